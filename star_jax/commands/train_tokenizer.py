"""`star-jax train-tokenizer [CONFIG]`"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from star_jax.commands import run_config
from star_jax.training.run import TokenizerRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Trains an image tokenizer.

    CONFIG is a Python file that defines `run` (see configs/) or the config.json of a run; options
    replace its fields. An interrupted run continues when the same command is given again.

    Example: star-jax train-tokenizer configs/shapes_tokenizer.py --pace.steps 2000

    Attributes:
        run: config of the run.
        out: folder of the run: config, checkpoints, samples, metrics, and the trained tokenizer.
    """

    run: Annotated[TokenizerRun, tyro.conf.arg(name='')]
    out: Path


def main(words: Sequence[str]) -> int:
    return run_config.train(words, 'train-tokenizer', TrainTokenizer, TokenizerRun)
