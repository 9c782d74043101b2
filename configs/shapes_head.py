"""A refinement head for the shipped transformer: it samples the two finest scales in eight passes.

Run `star-jax data cache configs/shapes_head.py` first, which encodes all images and captions once,
and give the folder that it prints as --cache.
"""

from star_jax.core.settings import Settings, StableSettings
from star_jax.data.shapes import Shapes
from star_jax.families.star import Refinement, Star
from star_jax.nn.positions import NormalisedRotary
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=Star(
        depth=4,
        width=160,
        heads=5,
        sides=(1, 2, 4, 8),
        codes=512,
        channels=16,
        text_width=384,
        positions=NormalisedRotary(theta=100, extent=32),
        refinement=Refinement(first=2),
    ),
    init='shipped',
    data=Shapes(count=40_000, objects=(1, 2), phrasings=1),
    validation=Shapes(count=512, split='validation', objects=(1, 2)),
    optimizer=AdamW(learning_rate=LearningRate(peak=1e-3, warmup_steps=200, shape='lin')),
    pace=Pace(steps=6_000, log=100, sample=1_000, save=500),
    batch=16,
    ema=0.999,
    unroll=4,
    sampling=Settings(guidance=1.0, top_k=3, top_p=0.9, stable=StableSettings(version='new')),
)
