"""The released Infinity-8B at 1024 px (Infinity specification 6 and 8), with tokens of 2 x 2 cells.

Everything else is that of infinity_125m.py, which names the source of every hyperparameter.
"""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run
from star_jax.core.settings import Settings
from star_jax.families.infinity import Infinity
from star_jax.training.run import Run

SMALLEST = load_run(Path(__file__).with_name('infinity_125m.py'), Run)

run = dataclasses.replace(
    SMALLEST,
    model=Infinity.published('8B', '1M'),
    tokenizer='models/infinity_tokenizer_8b',
    sampling=Settings(guidance=3.0, top_k=0, top_p=0.97, temperature=1.0),
)
