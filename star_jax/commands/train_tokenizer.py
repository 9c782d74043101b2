"""`star-jax train-tokenizer [CONFIG]`"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from star_jax.commands import training
from star_jax.training.run import TokenizerRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Trains an image tokenizer.

    CONFIG, the first word, is a Python file that defines `run` (see configs/) or a run's
    config.json; every field can be changed by an option. Stop it at any time: the same command
    goes on.

    Example: star-jax train-tokenizer configs/shapes_tokenizer.py --pace.steps 2000

    Attributes:
        run: the settings.
        out: the run's folder: config, checkpoints, samples, scalars, and at the end the tokenizer.
    """

    run: Annotated[TokenizerRun, tyro.conf.arg(name='')]
    out: Path


def main(words: Sequence[str]) -> int:
    return training.train(words, 'train-tokenizer', TrainTokenizer, TokenizerRun)
