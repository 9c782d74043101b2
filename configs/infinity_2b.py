"""The released Infinity-2B at 1024 px (Infinity specification 6 and 8).

Everything else is that of infinity_125m.py, which names the source of every hyperparameter.
"""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run
from star_jax.families.infinity import Infinity
from star_jax.training.run import Run

SMALLEST = load_run(Path(__file__).with_name('infinity_125m.py'), Run)

run = dataclasses.replace(
    SMALLEST,
    model=Infinity.published('2B', '1M'),
)
