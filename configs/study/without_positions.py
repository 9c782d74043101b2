"""Level embeddings only: the location of a token within its scale is not encoded."""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run
from star_jax.nn.positions import NoPositions

shared = load_run(Path(__file__).with_name('rotary_normalised.py'))
run = dataclasses.replace(shared, model=dataclasses.replace(shared.model, positions=NoPositions()))
