"""What does a study say?

`study.json` holds everything, `study.md` and the tables of the terminal what a reader compares,
`study.png` the curves. All are functions of the runs' own reports: the same runs, the same bytes.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from star_jax.checkpoint import config, files
from star_jax.studies import plot
from star_jax.studies.comparison import Comparison, compare
from star_jax.studies.results import LOSS, Result
from star_jax.training.run import Run

JSON = 'study.json'
MARKDOWN = 'study.md'
PLOT = 'study.png'
ACCURACY = 'accuracy'
ENOUGH_SEEDS = 5  # fewer, and the interval is mostly an assumption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One config: what it differs in, what it costs, and its held-out scores by name.

    `step_seconds` and `images_per_second` are medians over seeds, `best` the lowest loss of every
    run on its way. `curves` are (step, loss) pairs, one curve per seed.
    """

    config: str
    differences: list[str]
    parameters: int
    step_seconds: float
    images_per_second: float
    best: Comparison
    scores: dict[str, Comparison]
    curves: dict[int, tuple[tuple[int, float], ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A study so far: its configs over the seeds that all of them have ended."""

    seeds: list[int]
    conditions: dict[str, Any]
    machines: list[dict[str, Any]]
    outcomes: list[Outcome]
    runs: list[Result]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """A table before it is known who reads it; the first column holds names."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def for_terminal(self) -> Table:
        table = Table(title=self.title, title_justify='left')
        for number, column in enumerate(self.columns):
            table.add_column(column, justify='right' if number else 'left', no_wrap=not number)
        for row in self.rows:
            table.add_row(*row)
        return table

    def for_markdown(self) -> str:
        marks = ['---', *['---:'] * (len(self.columns) - 1)]
        lines = [f'| {" | ".join(row)} |' for row in (self.columns, marks, *self.rows)]
        return '\n'.join([f'**{self.title}**', '', *lines])


def summarise(
    runs: Sequence[Result], differences: Mapping[str, list[str]], baseline: Run
) -> Summary:
    """The summary of runs; `differences` has every config, the first one compared with."""
    seeds = list(dict.fromkeys(run.seed for run in runs))
    by_config = {
        name: sorted((run for run in runs if run.config == name), key=lambda run: run.seed)
        for name in differences
    }
    first = by_config[next(iter(by_config))]
    machines = [machine for run in runs for machine in run.machines]
    conditions = config.to_json(baseline)
    del conditions['model'], conditions['seed']
    return Summary(
        seeds=seeds,
        conditions=conditions,
        machines=[one for n, one in enumerate(machines) if one not in machines[:n]],
        outcomes=[_outcome(own, first, differences[name]) for name, own in by_config.items()],
        runs=list(runs),
    )


def write(summary: Summary, out: Path) -> None:
    """The three files of a report, each replaced whole."""
    config.write_json(out / JSON, dataclasses.asdict(summary))
    with files.replacing(out / MARKDOWN) as temporary:
        temporary.write_text(markdown(summary), 'utf-8')
    curves = {one.config: list(one.curves.values()) for one in summary.outcomes}
    with files.replacing(out / PLOT) as temporary:
        plot.draw(curves, _count(len(summary.seeds), 'seed'), temporary)


def show(summary: Summary, console: Console) -> None:
    """The tables, and how to read them."""
    for line in _differing(summary):
        console.print(line, highlight=False)
    for cells in tables(summary):
        console.print(cells.for_terminal())
    console.print(caution(summary), highlight=False)


def markdown(summary: Summary) -> str:
    """The report for a page of documentation; the plot lies beside it."""
    pace, batch = summary.conditions['pace'], summary.conditions['batch']
    seeds = ', '.join(map(str, summary.seeds))
    parts = [
        '# Study',
        f'{_count(len(summary.outcomes), "config")}, '
        f'{_count(len(summary.seeds), "seed")} ({seeds}) each: {pace["steps"]:,} steps of {batch} '
        f'images, {pace["steps"] * batch:,} images a run. Everything but these fields is equal:',
        '\n'.join(f'- {line}' for line in _differing(summary)),
        f'![held-out loss against steps]({PLOT})',
        *[cells.for_markdown() for cells in tables(summary)],
        caution(summary),
        '\n'.join(f'Trained on {_machine(machine)}.' for machine in summary.machines),
    ]
    return '\n\n'.join(parts) + '\n'


def tables(summary: Summary) -> list[Cells]:
    """Scores over all tokens, loss and accuracy of every scale, and what training took."""
    overall = Cells(
        title=f'Held out, after the last step, {_count(len(summary.seeds), "seed")}',
        columns=['config', 'loss', 'to the first', 'accuracy'],
        rows=[
            [
                one.config,
                _mean(one.scores[LOSS]),
                _difference(one.scores[LOSS]),
                f'{one.scores[ACCURACY].mean:.1%}',
            ]
            for one in summary.outcomes
        ],
    )
    training = Cells(
        title='Training',
        columns=['config', 'best held-out loss', 'parameters', 'images/s', 'ms/step'],
        rows=[
            [
                one.config,
                _mean(one.best),
                f'{one.parameters:,}',
                f'{one.images_per_second:.1f}',
                f'{1000 * one.step_seconds:.0f}',
            ]
            for one in summary.outcomes
        ],
    )
    return [overall, *_by_scale(summary), training]


def caution(summary: Summary) -> str:
    """How far the numbers can be trusted, in words."""
    others = summary.outcomes[1:]
    count = len(summary.seeds)
    speed = 'Step times were taken while training, beside whatever else the machine did.'
    if count == 1:
        return f'One seed: no difference here can be told from chance. {speed}'
    words = ['± is the standard deviation over seeds.']
    if others:
        apart = [one.config for one in others if one.scores[LOSS].is_apart]
        verdict = f'apart from 0: {", ".join(apart)}' if apart else 'none is apart from 0'
        words.append(
            f'A difference is the mean of those to {summary.outcomes[0].config} seed by seed, with '
            f"Student's 95 % interval; {verdict}. Each interval alone misses the truth in one "
            'study of 20.'
        )
    if count < ENOUGH_SEEDS:
        words.append(
            f'{count} seeds are few: the intervals are wide, and right only as far as differences '
            'are normally distributed.'
        )
    return ' '.join([*words, speed])


def _outcome(own: Sequence[Result], first: Sequence[Result], differences: list[str]) -> Outcome:
    is_first = own is first

    def over_seeds(score: Any) -> Comparison:
        return compare([score(run) for run in own], None if is_first else [*map(score, first)])

    return Outcome(
        config=own[0].config,
        differences=differences,
        parameters=own[0].parameters,
        step_seconds=statistics.median(run.step_seconds for run in own),
        images_per_second=statistics.median(run.images_per_second for run in own),
        best=over_seeds(lambda run: run.best[1]),
        scores={name: over_seeds(lambda run, name=name: run.final[name]) for name in own[0].final},
        curves={run.seed: run.curve for run in own},
    )


def _by_scale(summary: Summary) -> list[Cells]:
    scales = [name for name in summary.outcomes[0].scores if name.startswith(f'{LOSS}/')]
    numbers = [name.removeprefix(f'{LOSS}/') for name in scales]
    if not numbers:
        return []
    columns = ['config', *[f'scale {number}' for number in numbers]]
    return [
        Cells(
            title=title,
            columns=columns,
            rows=[
                [one.config, *[say(one.scores[f'{score}/{number}']) for number in numbers]]
                for one in summary.outcomes
            ],
        )
        for title, score, say in (
            ('Held-out loss by scale', LOSS, _mean),
            ('Held-out accuracy by scale', ACCURACY, lambda score: f'{score.mean:.1%}'),
        )
    ]


def _differing(summary: Summary) -> list[str]:
    """What each config is, told by what it does not share with the first."""
    first, *others = summary.outcomes
    return [
        f'{first.config}: the first, the others are compared with it',
        *[f'{one.config}: {"; ".join(one.differences) or "the same again"}' for one in others],
    ]


def _mean(score: Comparison) -> str:
    spread = '' if score.deviation is None else f' ± {score.deviation:.3f}'
    return f'{score.mean:.3f}{spread}'


def _difference(score: Comparison) -> str:
    if score.difference is None:
        return ''
    interval = '' if score.low is None else f' [{score.low:+.3f}, {score.high:+.3f}]'
    return f'{score.difference:+.3f}{interval}'


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ', '.join(f'{name} {machine[name]}' for name in ('jax', 'jaxlib', 'flax', 'python'))
    return f'{machine["devices"]} x {machine["device"]} ({machine["cores"]} cores), {versions}'


def _count(number: int, noun: str) -> str:
    return f'{number} {noun}{"" if number == 1 else "s"}'
