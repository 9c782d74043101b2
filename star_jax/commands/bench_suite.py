"""`star-jax bench suite CONFIG...`"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from star_jax import files
from star_jax.bench import bench_tables, suite
from star_jax.commands import arguments, run_config
from star_jax.console import Console
from star_jax.errors import UserError
from star_jax.training.run import Run

REPORT = 'report.md'


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSuite:
    """Measures sampling and training of several models, compared with the machine's matrix rate.

    CONFIG... are Python files that define `run` (see configs/). Each model, with random weights, is
    sampled at every resolution with every batch size and with the largest batch that fits, and
    trained at some resolutions. Each measurement is a process and a file in the folder --out: an
    interrupted suite, or one that ran out of time, continues when the command is given again, and
    tries again what failed.

    Example: star-jax bench suite configs/star_d16_256.py configs/star_d30_256.py --minutes 25

    Attributes:
        measured: measurements of each model.
        minutes: time after which no further measurement starts.
        out: folder of the reports, with a table of all of them in report.md.
    """

    measured: Annotated[suite.SuiteSettings, tyro.conf.arg(name='')] = suite.SuiteSettings()
    minutes: float = 60.0
    out: Path = Path('runs/bench')


def measure(words: Sequence[str]) -> None:
    """Runs `bench suite` with the words after it."""
    paths = [Path(word) for word in itertools.takewhile(lambda word: word[:1] != '-', words)]
    if not paths and not arguments.asks_for_help(words):
        raise UserError(
            'bench suite measures the models of configs: name some, such as configs/star_d16_256.py'
        )
    options = arguments.parse(BenchSuite, words[len(paths) :], 'bench suite CONFIG...')
    if not options.minutes > 0:
        raise UserError(f'minutes must be positive, not {options.minutes}')
    runs = {path.stem: run_config.load(path, Run) for path in paths}
    if len(runs) < len(paths):
        raise UserError(
            'reports are named after their configs, and two have the same name: rename one of '
            f'{", ".join(map(str, paths))}'
        )
    files.check_folder(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with console.status('starting') as status:
        reports = suite.measure(runs, options.measured, options.out, options.minutes, status.update)
    done = {name: report for name, report in reports.items() if suite.FAILED not in report}
    if done:
        summary = bench_tables.summary(next(iter(done.values())))
        console.print(summary.splitlines()[-1], highlight=False)
        console.print(bench_tables.sweep(done))
        (options.out / REPORT).write_text(bench_tables.markdown(done), 'utf-8')
    for name, report in reports.items():
        if suite.FAILED in report:
            console.print(f'{name}: {report[suite.FAILED]}', highlight=False)
