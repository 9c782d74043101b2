"""What does a dataset contain?"""

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
    """Writes a grid of examples with their first captions to a PNG file.

    Args:
        source: the dataset.
        path: the PNG file.
        count: number of examples, chosen at random.
        columns: columns of the grid.
        seed: seed of the choice.

    Raises:
        UserError: the dataset is empty.
    """
    if len(source) == 0:
        raise UserError('the dataset is empty: there is nothing to show, choose another split')
    rng = np.random.default_rng(seed)
    indices = rng.choice(len(source), size=min(count, len(source)), replace=False)
    examples = [source[int(index)] for index in indices]
    images = [example['image'] for example in examples]
    captions = [example['captions'][0] for example in examples]
    title = f'{len(examples)} of {len(source)} examples'
    return image_io.save_png(image_io.grid(images, captions, columns, title), path)
