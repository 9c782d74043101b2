"""What do the commands share that are given the config of a run?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from star_jax.checkpoint import config
from star_jax.commands import arguments
from star_jax.training.run import Run, TokenizerRun, check_kind

Runs = TypeVar('Runs', Run, TokenizerRun)


def train(words: Sequence[str], command: str, given_as: type, kind: type) -> int:
    """`star-jax COMMAND [CONFIG] [--out DIR] [--field value ...]`.

    `given_as` is the class of the arguments, with a `run` of the class `kind` and `out`.
    """
    words = list(words)
    run, out = kind(), Path('runs') / command
    if words and not words[0].startswith('-'):
        path = Path(words.pop(0))
        run = load(path, kind)
        out = Path('runs') / (path.stem if path.suffix == '.py' else path.parent.name)
    default = given_as(run=run, out=out)
    given = arguments.parse(given_as, words, f'{command} [CONFIG]', default)
    config.check(given.run, where='the settings of the run')
    from star_jax.training import train as story_of_a_run  # waits for the arguments to be right

    story_of_a_run.main(given.run, given.out)
    return 0


def load(path: Path, kind: type[Runs]) -> Runs:
    """The run in a config file.

    Raises UserErrors as `config.load_run` does, and where a config of another kind is given.
    """
    if path.suffix == '.json':
        check_kind(config.read_json(path), kind, str(path))
    return config.load_run(path, kind)
