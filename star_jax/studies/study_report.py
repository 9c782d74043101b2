"""What does a study say?

`study.json` holds everything, `study.md` and the tables of the terminal what a reader compares,
`study.png` the curves. All are functions of the runs' own reports: the same runs, the same bytes.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from star_jax import files
from star_jax.checkpoint import config
from star_jax.studies import plot
from star_jax.studies.results import LOSS
from star_jax.studies.study_tables import count, tables
from star_jax.studies.summary import Summary

JSON = 'study.json'
MARKDOWN = 'study.md'
PLOT = 'study.png'
ENOUGH_SEEDS = 5  # fewer, and the interval is mostly an assumption


def write(summary: Summary, out: Path) -> None:
    """The three files of a report, each replaced whole; the plot only where there is a line."""
    config.write_json(out / JSON, dataclasses.asdict(summary))
    with files.replacing(out / MARKDOWN) as temporary:
        temporary.write_text(markdown(summary), 'utf-8')
    if curves := _curves(summary):
        with files.replacing(out / PLOT) as temporary:
            plot.draw(curves, count(len(summary.seeds), 'seed'), temporary)


def show(summary: Summary, console: Console) -> None:
    """The tables, and how to read them."""
    for line in _differing(summary):
        console.print(line, highlight=False)
    for cells in tables(summary):
        for table in cells.for_terminal():
            console.print(table)
    console.print(caution(summary), highlight=False)


def markdown(summary: Summary) -> str:
    """The report for a page of documentation; the plot lies beside it."""
    pace, batch = summary.conditions['pace'], summary.conditions['batch']
    seeds = ', '.join(map(str, summary.seeds))
    parts = [
        '# Study',
        f'{count(len(summary.outcomes), "config")}, '
        f'{count(len(summary.seeds), "seed")} ({seeds}) each: {pace["steps"]:,} steps of {batch} '
        f'images, {pace["steps"] * batch:,} images a run. Everything but these fields is equal:',
        '\n'.join(f'- {line}' for line in _differing(summary)),
        *([f'![held-out loss against steps]({PLOT})'] if _curves(summary) else []),
        *[cells.for_markdown() for cells in tables(summary)],
        caution(summary),
        '\n'.join(f'Trained on {_machine(machine)}.' for machine in summary.machines),
    ]
    return '\n\n'.join(parts) + '\n'


def caution(summary: Summary) -> str:
    """How far the numbers can be trusted, in words."""
    others = summary.outcomes[1:]
    seeds = len(summary.seeds)
    speed = 'Step times were taken while training, beside whatever else the machine did.'
    if seeds == 1:
        return f'One seed: no difference here can be told from chance. {speed}'
    words = ['± is the standard deviation over seeds.']
    if others:
        apart = [one.config for one in others if one.scores and one.scores[LOSS].is_apart]
        verdict = f'apart from 0: {", ".join(apart)}' if apart else 'none is apart from 0'
        words.append(
            f'A difference is the mean of those to {summary.outcomes[0].config} seed by seed, with '
            f"Student's 95 % interval; {verdict}. Each interval alone misses the truth in one "
            'study of 20.'
        )
    if seeds < ENOUGH_SEEDS:
        words.append(
            f'{seeds} seeds are few: the intervals are wide, and right only as far as differences '
            'are normally distributed.'
        )
    return ' '.join([*words, speed])


def _curves(summary: Summary) -> dict[str, list[plot.Curve]]:
    """Those of every config of which a run has ended."""
    return {one.config: list(one.curves.values()) for one in summary.outcomes if one.curves}


def _differing(summary: Summary) -> list[str]:
    """What each config is, told by what it does not share with the first."""
    first, *others = summary.outcomes
    return [
        f'{first.config}: the first, the others are compared with it',
        *[f'{one.config}: {"; ".join(one.differences) or "the same again"}' for one in others],
    ]


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ', '.join(f'{name} {machine[name]}' for name in ('jax', 'jaxlib', 'flax', 'python'))
    return f'{machine["devices"]} x {machine["device"]} ({machine["cores"]} cores), {versions}'
