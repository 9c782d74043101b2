"""The second stage of the small Infinity: self-correction of the first two scales.

It starts from the model folder of the first stage (`configs/shapes_bits.py`). Bits of a token are
predicted as independent, so those of the single first token may not fit each other; here some
bits of the first scales are flipped, and later scales learn to repair them.

    star-jax data cache configs/shapes_bits_corrected.py --features --cache runs/bits.features
    star-jax train configs/shapes_bits_corrected.py --cache runs/bits.features --out runs/bits2
"""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run
from star_jax.core.self_correction import SelfCorrection
from star_jax.training.run import Run
from star_jax.training.schedules import LearningRate

FIRST = load_run(Path(__file__).with_name('shapes_bits.py'), Run)

run = dataclasses.replace(
    FIRST,
    init='runs/bits/model',
    correction=SelfCorrection(strength=0.3, scales=2),
    optimizer=dataclasses.replace(
        FIRST.optimizer, learning_rate=LearningRate(peak=1.5e-3, warmup_steps=200, shape='lin')
    ),
    pace=dataclasses.replace(FIRST.pace, steps=12_000, sample=3_000),
    balance=0.7,
)
