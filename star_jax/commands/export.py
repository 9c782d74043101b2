"""`star-jax export RUN`"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from star_jax import terminal
from star_jax.commands import arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a model folder from the newest checkpoint of a run, finished or not.

    Example: star-jax export runs/shapes --out models/shapes

    Attributes:
        run: folder of the run.
        out: model folder to write (none: `model` in the folder of the run).
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None


def main(words: Sequence[str]) -> int:
    options = arguments.parse(Export, words, 'export')
    from star_jax.training import train

    out = options.out or options.run / 'model'
    terminal.write_line(train.export(options.run, out))
    return 0
