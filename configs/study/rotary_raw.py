"""Rotary positions that count cells: the same location has other coordinates at every scale."""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run
from star_jax.nn.positions import RawRotary

shared = load_run(Path(__file__).with_name('rotary_normalised.py'))
run = dataclasses.replace(
    shared, model=dataclasses.replace(shared.model, positions=RawRotary(theta=100))
)
