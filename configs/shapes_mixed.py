"""The shipped transformer learns five aspect ratios: scenes of one shape, on two cores.

Images have 8 px a token: 64 x 64, 48 x 64 and 40 x 80 px (height x width), and the latter turned.
"""

import dataclasses

from star_jax.core.settings import Settings
from star_jax.core.templates import Templates
from star_jax.data.shapes import Shapes
from star_jax.families.star import Star
from star_jax.nn.positions import NormalisedRotary
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

TEMPLATES = Templates(
    grids=(
        ('1:1', '1x1 2x2 4x4 8x8'),
        ('4:3', '1x1 2x2 3x4 6x8'),
        ('3:4', '1x1 2x2 4x3 8x6'),
        ('2:1', '1x1 2x2 3x6 5x10'),
        ('1:2', '1x1 2x2 6x3 10x5'),
    ),
)
DATA = Shapes(count=4_000, objects=(1,), phrasings=1, aspects=TEMPLATES.names)

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
        templates=TEMPLATES,
    ),
    data=DATA,
    validation=dataclasses.replace(DATA, count=250, split='validation'),
    optimizer=AdamW(learning_rate=LearningRate(peak=5e-4, warmup_steps=50, shape='lin')),
    pace=Pace(steps=1_000, log=50, sample=500, save=250),
    batch=16,
    balance=0.8,
    init='shipped',
    ema=0.99,
    unroll=4,
    sampling=Settings(guidance=1.0, top_k=3, top_p=0.9),
)
