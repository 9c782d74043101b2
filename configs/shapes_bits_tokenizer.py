"""The tokenizer of shapes_bits.py: scenes of shapes at 64 px as 16 bits a token, on two cores.

It serves every aspect ratio, because no parameter depends on the size of an image.
"""

import dataclasses

from star_jax.core.schedule import square_grids
from star_jax.data.shapes import Shapes
from star_jax.losses.tokenizer import EntropyOfBits
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training.objective import Objective
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, TokenizerRun
from star_jax.training.schedules import LearningRate

DATA = Shapes(count=200_000, objects=(1,))

run = TokenizerRun(
    model=BSQ(
        autoencoder=Autoencoder(
            width=24, multipliers=(1, 2), blocks=1, groups=8, stem=4, attention=False
        ),
        grids=square_grids((1, 2, 4, 8)),
        bits=16,
    ),
    data=DATA,
    validation=dataclasses.replace(DATA, count=256, split='validation'),
    objective=Objective(commitment=0.25, entropy=EntropyOfBits(weight=0.01)),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-3, warmup_steps=200, end=0.02, shape='lin'),
        weight_decay=0.0,
    ),
    pace=Pace(steps=30_000, log=100, sample=5_000, save=1_000),
    batch=8,
    plain_steps=0,
    ema=0.999,
)
