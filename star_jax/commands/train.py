"""`star-jax train [CONFIG]`"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from star_jax.commands import run_config
from star_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a transformer on images with captions or classes.

    CONFIG is a Python file that defines `run` (see configs/) or the config.json of a run; options
    replace its fields. An interrupted run continues when the same command is given again.

    Example: star-jax train configs/shapes.py --out runs/mine --batch 32 --pace.steps 2000

    Attributes:
        run: config of the run.
        out: folder of the run: config, checkpoints, samples, metrics, and the trained model.
    """

    run: Annotated[Run, tyro.conf.arg(name='')]
    out: Path


def main(words: Sequence[str]) -> int:
    return run_config.train(words, 'train', Train, Run)
