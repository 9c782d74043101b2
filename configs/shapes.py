"""The first stage of the shipped transformer: scenes of one and two shapes at 64 px, on two cores.

`configs/shapes_pairs.py` is the second stage.

Run `star-jax data cache configs/shapes.py` first, which encodes all images and captions once, and
give the folder that it prints as --cache.
"""

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
        width=160,
        heads=5,
        sides=(1, 2, 4, 8),
        codes=512,
        channels=16,
        text_width=384,
        positions=NormalisedRotary(theta=100, extent=32),
    ),
    data=Shapes(count=40_000, objects=(1, 2), phrasings=1),
    validation=Shapes(count=512, split='validation', objects=(1, 2)),
    optimizer=AdamW(learning_rate=LearningRate(peak=1.5e-3, warmup_steps=400, shape='lin')),
    pace=Pace(steps=24_000, log=100, sample=2_000, save=500),
    batch=16,
    ema=0.999,
    unroll=4,
    sampling=Settings(guidance=1.0, top_k=5, top_p=0.9),
)
