"""STAR's positions without level embeddings: the scale of a token is not encoded."""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run

shared = load_run(Path(__file__).with_name('rotary_normalised.py'))
run = dataclasses.replace(shared, model=dataclasses.replace(shared.model, level_embedding=False))
