"""A few minutes on two cores with the shipped tokenizer: images of one shape, by caption."""

from star_jax.core.settings import Settings
from star_jax.data.shapes import Shapes
from star_jax.families.star import Star
from star_jax.nn.positions import NormalisedRotary
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=Star(
        depth=4,
        width=128,
        heads=4,
        sides=(1, 2, 4, 8),
        codes=512,
        channels=16,
        text_width=384,
        positions=NormalisedRotary(theta=100, extent=32),
    ),
    data=Shapes(count=4_000, objects=(1,)),
    validation=Shapes(count=256, split='validation', objects=(1,)),
    optimizer=AdamW(learning_rate=LearningRate(peak=2e-3, warmup_steps=50, shape='lin')),
    pace=Pace(steps=400, log=20, sample=200, save=100),
    batch=32,
    sampling=Settings(guidance=1.0, top_k=5, top_p=0.9),
)
