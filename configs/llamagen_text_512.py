"""LlamaGen-XL by text at 512 px, stage 2 of 2 (LlamaGen specification 4.3).

Paths and recipe are those of llamagen_text_256.py; the captions of the set are long, and 3 in 10
steps read what precedes the first full stop. It starts from the model of stage 1; no parameter
depends on the size of an image.
"""

import dataclasses
from pathlib import Path

from star_jax.checkpoint import config
from star_jax.data.caption_choice import WholeOrFirstSentence
from star_jax.training.run import Run

base = config.load_run(Path(__file__).with_name('llamagen_text_256.py'), Run)

run = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, grid=(32, 32)),
    init='runs/llamagen_text_256/model',
    captions=WholeOrFirstSentence(first=0.3),
)
