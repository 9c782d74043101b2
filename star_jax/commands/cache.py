"""`star-jax data cache [CONFIG]`"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from star_jax import terminal
from star_jax.checkpoint import config
from star_jax.commands import arguments, run_config
from star_jax.training.run import Run

COMMON = {'run': ('cache', 'tokenizer', 'text', 'init', 'model.sides', *run_config.DATA)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Encodes the images and captions of a run once, for `train --cache FOLDER`.

    CONFIG is the config that `train` is given. --cache names the folder; the default is one beside
    the dataset. An interrupted command continues when it is given again.

    Example: star-jax data cache configs/shapes.py --cache sets/shapes.codes

    Attributes:
        run: config of the run.
        features: store features of images in float16 instead of codes, for tokenizers of
            bits: only they serve a run with flipped bits (correction.strength above 0).
    """

    run: Annotated[Run, tyro.conf.arg(name='')]
    features: bool = False


def main(words: Sequence[str]) -> int:
    words, run = list(words), Run()
    if words and not words[0].startswith('-'):
        run = run_config.load(Path(words.pop(0)), Run)
    options = arguments.parse(Cache, words, 'data cache [CONFIG]', Cache(run=run), COMMON)
    config.check(options.run, where='the settings of the run')
    from star_jax.training import train  # only after the arguments are checked

    folder = train.cache(options.run, options.features)
    terminal.write_line(f'{folder}: train with --cache {folder}')
    return 0
