"""`star-jax study run FILE`, `study report FOLDER`, `study cost FILE`"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from star_jax import files, terminal
from star_jax.commands import arguments
from star_jax.console import Console
from star_jax.errors import UserError

USAGE = """usage: star-jax study run|report|cost [...]   (each has --help)

  star-jax study run configs/study/positions.py      makes the units that have no result yet
  star-jax study report docs/results/positions       tables and plots of all results
  star-jax study cost configs/study/positions.py     a step of every kind, timed in turn
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRun:
    """Makes the units of a study that have no result yet, one after another.

    FILE is a Python file that defines `study`. A unit trains and evaluates one model and ends with
    one JSON file. An interrupted unit continues when the same command is given again; a damaged
    result is made again.

    Example: star-jax study run configs/study/positions.py

    Attributes:
        file: the study.
        results: folder of the results, one JSON file each (none: docs/results/NAME, where NAME is
            that of the study).
        work: folder of checkpoints, encoded images and intermediate results (none: runs/NAME).
        only: names of the units to make (none: all).
        list: print the names of all units and which have a result, and make none.
    """

    file: tyro.conf.Positional[Path]
    results: Path | None = None
    work: Path | None = None
    only: tuple[str, ...] = ()
    list: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyReport:
    """Writes the tables of the results in a folder, and for a study of positions the plots.

    Results of several commits or settings do not compare and are refused.

    Example: star-jax study report docs/results/positions --out docs/positions

    Attributes:
        folder: folder of results, as `study run` writes them.
        out: the files are OUT.json, OUT_tables.md and, for positions, OUT.png (none: docs/NAME,
            where NAME is that of the study).
        cost: result of `study cost`, whose tables are added (none: no such tables).
    """

    folder: tyro.conf.Positional[Path]
    out: Path | None = None
    cost: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyCost:
    """Times a training step and sampling by every kind of a study, all in turn.

    Weights are random. A study of positions times no sampling.

    Example: star-jax study cost configs/study/positions.py

    Attributes:
        file: the study.
        out: JSON file to write (none: runs/NAME_cost.json, where NAME is that of the study).
        rounds: how often every kind is timed.
        text_tokens: tokens of a caption.
    """

    file: tyro.conf.Positional[Path]
    out: Path | None = None
    rounds: int = 15
    text_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ('rounds', 'text_tokens'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} must be at least 1, not {getattr(self, name)}')


def main(words: Sequence[str]) -> int:
    actions = {'run': _run, 'report': _report, 'cost': _cost}
    if arguments.asks_for_help(words[:1]):
        sys.stdout.write(USAGE)
        return 0
    if not words or words[0] not in actions:
        found = f', not {words[0]!r}' if words else ''
        raise UserError(f'expected one of {", ".join(actions)} after study{found}')
    return actions[words[0]](words[1:])


def _run(words: Sequence[str]) -> int:
    options = arguments.parse(StudyRun, words, 'study run')
    from star_jax.studies import units  # only after the arguments are checked

    study, console = units.load(options.file), Console()
    results = options.results or Path('docs/results', study.name)
    work = options.work or Path('runs', study.name)
    if options.list:
        for unit in study.units:
            made = (results / f'{unit.name}.json').exists()
            terminal.write_line(f'{unit.name}{"  made" if made else ""}')
        return 0
    units.run(study, results, work, console, options.only)
    return 0


def _report(words: Sequence[str]) -> int:
    options = arguments.parse(StudyReport, words, 'study report')
    from star_jax.studies import (
        cost_result,
        positions_report,
        positions_result,
        runs_report,
        units,
    )

    name = units.study_of(options.folder) or positions_result.NAME
    report = positions_report if name == positions_result.NAME else runs_report
    out = options.out or Path('docs', name)
    for path in report.paths(out):
        files.check_file(path)
    cost = None if options.cost is None else cost_result.read(options.cost, name)
    report.write(options.folder, out, Console(), cost)
    return 0


def _cost(words: Sequence[str]) -> int:
    options = arguments.parse(StudyCost, words, 'study cost')
    from star_jax.studies import cost, units

    study = units.load(options.file)
    out = options.out or Path('runs', f'{study.name}_cost.json')
    files.check_file(out)
    cost.measure(study, out, options.rounds, options.text_tokens, Console())
    return 0
