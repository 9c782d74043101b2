"""`star-jax study CONFIGS...`"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from star_jax import files
from star_jax.commands import arguments, run_config
from star_jax.errors import UserError
from star_jax.training.run import Run

COMMAND = 'study CONFIGS...'
COMMON = {title: run_config.COMMON[Run][title] for title in ('model', 'data', 'training')}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Trains several configs under equal conditions with the same seeds, and compares them.

    CONFIGS are Python files that define `run` (see configs/study/) or config.json files of runs;
    they may differ only in their model, and all are compared with the first. Options replace a
    field in all of them; with --cache FOLDER the images are encoded once for all runs. An
    interrupted study continues when the same command is given again, more --seeds add runs, and a
    finished one only writes its report.

    Example: star-jax study configs/study/*.py --seeds 0 1 2 --out runs/positions --pace.steps 800

    Attributes:
        run: config of the runs.
        seeds: seeds of the initial parameters and of the order of the data; every config is trained
            with each.
        out: folder of study.json, study.md, study.png and, per config, a folder with one run per
            seed.
    """

    run: Annotated[Run, tyro.conf.arg(name='')] = Run()
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path('runs/study')


def main(words: Sequence[str]) -> int:
    words = list(words)
    paths = [Path(word) for word in itertools.takewhile(lambda word: word[:1] != '-', words)]
    option_words = words[len(paths) :]
    if not paths:
        _parse(option_words, Run())  # prints --help
        raise UserError('expected configs after study, such as configs/study/*.py')
    configs = {name: _replace(run, option_words) for name, run in _load(paths).items()}
    from star_jax.studies import study  # only after the arguments are checked

    first = next(iter(configs.values()))
    runs = {name: options.run for name, options in configs.items()}
    files.check_folder(first.out)
    study.main(study.Study(configs=runs, seeds=first.seeds), first.out, Console())
    return 0


def _load(paths: Sequence[Path]) -> dict[str, Run]:
    """The runs of config files by name. Raises UserError if two have the same name."""
    runs = {}
    for path in paths:
        run = run_config.load(path, Run)
        name = path.parent.name if path.name == 'config.json' else path.stem
        if name in runs:
            raise UserError(f'two configs are called {name!r}: a study needs different names')
        runs[name] = run
    return runs


def _parse(option_words: Sequence[str], run: Run) -> Study:
    return arguments.parse(Study, option_words, COMMAND, Study(run=run), common=COMMON)


def _replace(run: Run, option_words: Sequence[str]) -> Study:
    """The arguments with the run of one config, whose fields the options replace."""
    options = _parse(option_words, run)
    if options.run.seed != run.seed:
        raise UserError('a study gives every config the same --seeds: leave out --seed')
    return options
