"""`star-jax export DIR`"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from star_jax.commands import arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a model folder from the newest checkpoint of a run, finished or not.

    Example: star-jax export runs/shapes --out models/shapes

    Attributes:
        run: the folder of the run.
        out: the model folder (by default `model` in the run's folder).
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None


def main(words: Sequence[str]) -> int:
    given = arguments.parse(Export, words, 'export')
    from star_jax.training import train

    sys.stdout.write(f'{train.export(given.run, given.out or given.run / "model")}\n')
    return 0
