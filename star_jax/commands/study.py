"""`star-jax study CONFIGS...`"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from star_jax import files
from star_jax.commands import arguments, training
from star_jax.errors import UserError
from star_jax.training.run import Run

COMMAND = 'study CONFIGS...'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Trains configs under equal conditions with the same seeds, and compares them.

    CONFIGS, the first words, are Python files that define `run` (see configs/study/), or a run's
    config.json; the others are compared with the first. They may differ in their model alone. Every
    field of `train` can be changed by an option, for all of them. Stop it at any time: the same
    command goes on, more --seeds add runs, and where nothing is missing it only reports. With
    --cache FOLDER the pictures are encoded once for all runs.

    Example: star-jax study configs/study/*.py --seeds 0 1 2 --out runs/positions --pace.steps 800

    Attributes:
        run: the settings.
        seeds: of initialisation and order of data; every config is trained with each.
        out: study.json, study.md and study.png, and a folder per config with one per seed.
    """

    run: Annotated[Run, tyro.conf.arg(name='')] = Run()
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path('runs/study')


def main(words: Sequence[str]) -> int:
    words = list(words)
    paths = [Path(word) for word in itertools.takewhile(lambda word: word[:1] != '-', words)]
    options = words[len(paths) :]
    if not paths:
        arguments.parse(Study, options, COMMAND)  # which knows --help
        raise UserError('expected configs after study, such as configs/study/*.py')
    runs = _load(paths)
    given = {name: _change(run, options) for name, run in runs.items()}
    from star_jax.studies import study  # waits for the arguments to be right

    any_given = next(iter(given.values()))
    configs = {name: one.run for name, one in given.items()}
    asked = study.Study(configs=configs, seeds=any_given.seeds)
    files.check_folder(any_given.out)
    study.main(asked, any_given.out, Console())
    return 0


def _load(paths: Sequence[Path]) -> dict[str, Run]:
    """The runs of config files by name; UserError if two share one."""
    runs = {}
    for path in paths:
        run = training.load(path, Run)
        name = path.parent.name if path.name == 'config.json' else path.stem
        if name in runs:
            raise UserError(f'two configs are called {name!r}: a study tells them by their names')
        runs[name] = run
    return runs


def _change(run: Run, options: Sequence[str]) -> Study:
    """What the options make of one config."""
    given = arguments.parse(Study, options, COMMAND, Study(run=run))
    if given.run.seed != run.seed:
        raise UserError('a study gives every config the same --seeds: leave out --seed')
    return given
