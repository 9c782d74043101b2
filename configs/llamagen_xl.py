"""LlamaGen-XL, by class at 384 px: 300 epochs of ImageNet (LlamaGen specification 2.1 and 4.1).

The paths are those of llamagen_b.py, and so is the recipe.
"""

import dataclasses
from pathlib import Path

from star_jax.checkpoint import config
from star_jax.families.llamagen import LlamaGen
from star_jax.training.run import Run

base = config.load_run(Path(__file__).with_name('llamagen_b.py'), Run)

run = dataclasses.replace(
    base,
    model=LlamaGen.published('XL', grid=base.model.grid),
    remat='full',
    sampling=dataclasses.replace(base.sampling, guidance=1.75),
)
