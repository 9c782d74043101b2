"""The first stage of a small Infinity: scenes of one shape as bits, at three aspect ratios.

    star-jax train-tokenizer configs/shapes_bits_tokenizer.py --out runs/bits_tokenizer
    star-jax data cache configs/shapes_bits.py --cache runs/bits.codes
    star-jax train configs/shapes_bits.py --cache runs/bits.codes --out runs/bits

`shapes_bits_corrected.py` is the second stage. Images have 8 px a token: 64 x 64, 40 x 80 and
80 x 40 px (height x width).
"""

import dataclasses

from star_jax.core.schedule import square_grids
from star_jax.core.settings import Settings
from star_jax.core.templates import Templates
from star_jax.data.shapes import Shapes
from star_jax.families.infinity import Infinity
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

TEMPLATES = Templates(
    grids=(
        ('1:1', '1x1 2x2 4x4 8x8'),
        ('2:1', '1x1 2x2 3x6 5x10'),
        ('1:2', '1x1 2x2 6x3 10x5'),
    ),
)
DATA = Shapes(count=80_000, objects=(1,), aspects=TEMPLATES.names)

run = Run(
    model=Infinity(
        depth=3,
        width=144,
        heads=4,
        drop_path=0.0,
        bits=16,
        grids=square_grids((1, 2, 4, 8)),
        reference=(8, 8),
        templates=TEMPLATES,
        text_width=384,
        text_rows=32,
    ),
    tokenizer='runs/bits_tokenizer/model',
    data=DATA,
    validation=dataclasses.replace(DATA, count=256, split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=2e-3, warmup_steps=40, shape='lin'),
        beta2=0.97,
        clip=5.0,
    ),
    pace=Pace(steps=24_000, log=100, sample=6_000, save=500),
    batch=16,
    balance=0.5,
    ema=0.999,
    unroll=3,
    sampling=Settings(guidance=3.0, top_k=0, top_p=0.9),
)
