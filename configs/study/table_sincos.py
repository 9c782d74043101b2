"""A fixed table of sines and cosines over STAR's coordinates."""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run
from star_jax.nn.positions import SinCos

shared = load_run(Path(__file__).with_name('rotary_normalised.py'))
run = dataclasses.replace(
    shared, model=dataclasses.replace(shared.model, positions=SinCos(theta=100, extent=32))
)
