"""`star-jax bench suite CONFIG...`"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from star_jax import files
from star_jax.bench import bench_tables, suite
from star_jax.commands import arguments, training
from star_jax.errors import UserError
from star_jax.training.run import Run

NAME = 'report.md'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Measures sampling and training of several models in one go, beside the machine's matrix rate.

    CONFIG..., the first words, are Python files that define a `run` (see configs/). Each of their
    models is drawn from at every resolution with every batch and with the largest that fits, and
    trained at some resolutions, with random weights. Each measurement is a process of its own and
    a file in the folder --out: stopped or out of time, the same command goes on.

    Example: star-jax bench suite configs/star_d16_256.py configs/star_d30_256.py --minutes 25

    Attributes:
        measured: what is measured of each model.
        minutes: after which nothing more is begun.
        out: the folder of the reports, with a table of all of them in report.md.
    """

    measured: Annotated[suite.SuiteSettings, tyro.conf.arg(name='')] = suite.SuiteSettings()
    minutes: float = 60.0
    out: Path = Path('runs/bench')


def measure(words: Sequence[str]) -> None:
    """Of the words after `bench suite`."""
    count = next((n for n, word in enumerate(words) if word.startswith('-')), len(words))
    asked_for_help = bool({'-h', '--help'} & set(words))
    if not count and not asked_for_help:
        raise UserError(
            'bench suite measures the models of configs: name some, such as configs/star_d16_256.py'
        )
    given = arguments.parse(Suite, words[count:], 'bench suite CONFIG...', Suite())
    if not given.minutes > 0:
        raise UserError(f'minutes must be positive, not {given.minutes}')
    places = [Path(word) for word in words[:count]]
    runs = {place.stem: training.load(place, Run) for place in places}
    if len(runs) < len(places):
        raise UserError(
            'reports are told apart by the names of their configs, and two are equal: rename one '
            f'of {", ".join(map(str, places))}'
        )
    files.check_folder(given.out)
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with console.status('starting') as status:
        reports = suite.measure(runs, given.measured, given.out, given.minutes, status.update)
    done = {name: report for name, report in reports.items() if 'failed' not in report}
    if done:
        console.print(
            bench_tables.summary(next(iter(done.values()))).splitlines()[-1], highlight=False
        )
        console.print(bench_tables.sweep(done))
        (given.out / NAME).write_text(bench_tables.markdown(done), 'utf-8')
    for name, report in reports.items():
        if 'failed' in report:
            console.print(f'{name}: {report["failed"]}', highlight=False)
