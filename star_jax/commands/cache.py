"""`star-jax data cache [CONFIG]`"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from star_jax.checkpoint import config
from star_jax.commands import arguments, training
from star_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Encodes the pictures and captions of a run once, for `train --cache FOLDER`.

    CONFIG, the first word, is what `train` is given; --cache names the folder, by default one
    beside the set. Interrupted, the same command goes on.

    Example: star-jax data cache configs/shapes.py --cache sets/shapes.codes

    Attributes:
        run: the settings of the run.
    """

    run: Annotated[Run, tyro.conf.arg(name='')]


def main(words: Sequence[str]) -> int:
    words, run = list(words), Run()
    if words and not words[0].startswith('-'):
        run = training.load(Path(words.pop(0)), Run)
    given = arguments.parse(Cache, words, 'data cache [CONFIG]', Cache(run=run))
    config.check(given.run, where='the settings of the run')
    from star_jax.training import train  # waits for the arguments to be right

    folder = train.cache(given.run)
    sys.stdout.write(f'{folder}: train with --cache {folder}\n')
    return 0
