"""STAR's positions alone: nothing tells a token its scale but what it is added to."""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run

shared = load_run(Path(__file__).with_name('rotary_normalised.py'))
run = dataclasses.replace(shared, model=dataclasses.replace(shared.model, level_embedding=False))
