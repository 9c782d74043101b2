"""What is in a set?"""

import os
from pathlib import Path

import numpy as np

from star_jax import image_io
from star_jax.data.pipeline import Source
from star_jax.errors import UserError


def show(
    source: Source,
    path: str | os.PathLike[str],
    count: int = 36,
    columns: int = 6,
    seed: int = 0,
) -> Path:
    """Draws `count` examples, chosen by `seed`, with their first captions into a PNG at `path`.

    Raises UserError for an empty source.
    """
    if len(source) == 0:
        raise UserError('the data set is empty: there is nothing to show, choose another split')
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(source), size=min(count, len(source)), replace=False)
    examples = [source[int(index)] for index in chosen]
    images = [example['image'] for example in examples]
    captions = [example['captions'][0] for example in examples]
    title = f'{len(examples)} of {len(source)} examples'
    return image_io.save_png(image_io.grid(images, captions, columns, title), path)
