"""What does the report of a study contain?

`study.json` holds everything; `study.md` and the tables of the terminal hold the comparisons;
`study.png` holds the curves. All are functions of the metrics of the runs: the same runs give the
same bytes. Colours and line styles stay distinguishable for colour-blind readers and in grey; the
name of each line is printed at its end.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from star_jax import files
from star_jax.checkpoint import config
from star_jax.studies.results import LOSS
from star_jax.studies.summary import Comparison, Outcome, Summary

JSON = 'study.json'
MARKDOWN = 'study.md'
PLOT = 'study.png'
ENOUGH_SEEDS = 5  # with fewer, the interval depends mostly on the assumption of normality
ACCURACY = 'accuracy'
FAILED = 'failed'
TERMINAL = 80  # columns of text
BORDER = 3  # columns from one cell to the next
# Okabe and Ito (2008), without the yellow that white paper swallows.
COLOURS = ('#000000', '#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
STYLES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)))  # so many that pairs repeat after 35
FINAL = 1 / 3  # share of the steps that the second panel enlarges
GAP = 0.055  # of a panel's height, between two names
SIZE = (11, 4.5)  # inches
MARGIN = 0.05  # of the losses shown, above and below

Curve = Sequence[tuple[int, float]]
Style = str | tuple[int, tuple[int, ...]]


def write(summary: Summary, out: Path) -> None:
    """Writes the three files of a report, each atomically; the plot only if a run has finished."""
    config.write_json(out / JSON, dataclasses.asdict(summary))
    with files.replacing(out / MARKDOWN) as temporary:
        temporary.write_text(markdown(summary), 'utf-8')
    if curves := _curves(summary):
        with files.replacing(out / PLOT) as temporary:
            plot(curves, count(len(summary.seeds), 'seed'), temporary)


def show(summary: Summary, console: Console) -> None:
    """Prints the tables, and how to read them."""
    for line in _differing(summary):
        console.print(line, highlight=False)
    for cells in tables(summary):
        for table in cells.for_terminal():
            console.print(table)
    console.print(caution(summary), highlight=False)


def markdown(summary: Summary) -> str:
    """The report as Markdown; the plot is a file in the same folder."""
    pace, batch = summary.conditions['pace'], summary.conditions['batch']
    seeds = ', '.join(map(str, summary.seeds))
    parts = [
        '# Study',
        f'{count(len(summary.outcomes), "config")}, '
        f'{count(len(summary.seeds), "seed")} ({seeds}) each: {pace["steps"]:,} steps of {batch} '
        f'images, {pace["steps"] * batch:,} images a run. All other fields are equal:',
        '\n'.join(f'- {line}' for line in _differing(summary)),
        *([f'![held-out loss against steps]({PLOT})'] if _curves(summary) else []),
        *[cells.for_markdown() for cells in tables(summary)],
        caution(summary),
        '\n'.join(f'Trained on {_machine(machine)}.' for machine in summary.machines),
    ]
    return '\n\n'.join(parts) + '\n'


def caution(summary: Summary) -> str:
    """How reliable the numbers are, in words."""
    others = summary.outcomes[1:]
    seeds = len(summary.seeds)
    speed = 'Step times were measured during training, on a machine that may have been busy.'
    if seeds == 1:
        return f'One seed: no difference can be distinguished from chance. {speed}'
    sentences = ['± is the standard deviation over seeds.']
    if others:
        excluding = [
            other.config for other in others if other.scores and other.scores[LOSS].excludes_zero
        ]
        verdict = f'excludes 0 for {", ".join(excluding)}' if excluding else 'never excludes 0'
        sentences.append(
            f'A difference is the mean of the differences to {summary.outcomes[0].config}, paired '
            f"by seed; Student's 95 % interval {verdict}. Each interval alone misses the true "
            'difference in one study of 20.'
        )
    if seeds < ENOUGH_SEEDS:
        sentences.append(
            f'{seeds} seeds are few: the intervals are wide, and they assume that differences are '
            'normally distributed.'
        )
    return ' '.join([*sentences, speed])


def _curves(summary: Summary) -> dict[str, list[Curve]]:
    """The curves of every config that has a finished run."""
    return {one.config: list(one.curves.values()) for one in summary.outcomes if one.curves}


def _differing(summary: Summary) -> list[str]:
    """One line per config: the fields in which it differs from the first."""
    first, *others = summary.outcomes
    return [
        f'{first.config}: the first; all others are compared with it',
        *[f'{other.config}: {"; ".join(other.differences) or "no difference"}' for other in others],
    ]


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ', '.join(f'{name} {machine[name]}' for name in ('jax', 'jaxlib', 'flax', 'python'))
    return f'{machine["devices"]} x {machine["device"]} ({machine["cores"]} cores), {versions}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """A table before it is formatted; the first column holds names."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def for_terminal(self) -> Iterator[Table]:
        """Split into tables that are no wider than a terminal."""
        rows = [self.columns, *self.rows]
        widths = [max(map(len, cells)) + BORDER for cells in zip(*rows, strict=True)]
        left = list(range(1, len(widths)))
        while left:
            shown, room = [0], TERMINAL - 1 - widths[0]
            while left and (len(shown) == 1 or widths[left[0]] <= room):
                room -= widths[left[0]]
                shown.append(left.pop(0))
            table = Table(title=self.title, title_justify='left')
            for number in shown:
                justify = 'right' if number else 'left'
                table.add_column(self.columns[number], justify=justify, no_wrap=not number)
            for row in self.rows:
                table.add_row(*[row[number] for number in shown])
            yield table

    def for_markdown(self) -> str:
        marks = ['---', *['---:'] * (len(self.columns) - 1)]
        lines = [f'| {" | ".join(row)} |' for row in (self.columns, marks, *self.rows)]
        return '\n'.join([f'**{self.title}**', '', *lines])


def tables(summary: Summary) -> list[Cells]:
    """Scores over all tokens, scores per scale, cost of training, and failed runs."""
    overall = Cells(
        title=f'Held out, after the last step, {count(len(summary.seeds), "seed")}',
        columns=['config', 'loss', 'difference to the first', 'accuracy'],
        rows=[
            [_name(one), _loss(one), _difference(one), _accuracy(one)] for one in summary.outcomes
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
                '' if one.images_per_second is None else f'{one.images_per_second:.1f}',
                '' if one.step_seconds is None else f'{1000 * one.step_seconds:.0f}',
            ]
            for one in summary.outcomes
        ],
    )
    return [overall, *_by_scale(summary), training, *_failed(summary)]


def count(number: int, noun: str) -> str:
    """A number and its noun, as in '2 seeds'."""
    return f'{number} {noun}{"" if number == 1 else "s"}'


def _by_scale(summary: Summary) -> list[Cells]:
    ended = [one for one in summary.outcomes if one.scores]
    scales = [name for name in ended[0].scores if name.startswith(f'{LOSS}/')] if ended else []
    numbers = [name.removeprefix(f'{LOSS}/') for name in scales]
    if not numbers:
        return []

    def cells(title: str, score: str, say: Callable[[Comparison], str]) -> Cells:
        return Cells(
            title=title,
            columns=['config', *[f'scale {number}' for number in numbers]],
            rows=[
                [one.config, *[say(one.scores[f'{score}/{number}']) for number in numbers]]
                for one in ended
            ],
        )

    return [
        cells('Held-out loss by scale', LOSS, _mean),
        cells('Held-out accuracy by scale', ACCURACY, lambda score: f'{score.mean:.1%}'),
    ]


def _failed(summary: Summary) -> list[Cells]:
    rows = [
        [f'{one.config}, seed {seed}', reason]
        for one in summary.outcomes
        for seed, reason in one.failures.items()
    ]
    title = 'Failed; trained again only after its folder is deleted'
    return [Cells(title=title, columns=['run', 'reason'], rows=rows)] if rows else []


def _name(one: Outcome) -> str:
    """The name of a config and, if some of its runs failed, how many finished."""
    ended, failed = len(one.curves), len(one.failures)
    return f'{one.config} ({ended} of {ended + failed})' if ended and failed else one.config


def _loss(one: Outcome) -> str:
    return _mean(one.scores[LOSS]) if one.scores else FAILED


def _accuracy(one: Outcome) -> str:
    return f'{one.scores[ACCURACY].mean:.1%}' if one.scores else ''


def _mean(score: Comparison | None) -> str:
    if score is None:
        return ''
    deviation = '' if score.deviation is None else f' ± {score.deviation:.3f}'
    return f'{score.mean:.3f}{deviation}'


def _difference(one: Outcome) -> str:
    score = one.scores.get(LOSS)
    if score is None or score.difference is None:
        return ''
    interval = '' if score.low is None else f' [{score.low:+.3f}, {score.high:+.3f}]'
    return f'{score.difference:+.3f}{interval}'


def plot(curves: Mapping[str, Sequence[Curve]], seeds: str, path: Path) -> None:
    """Writes a PNG: the mean of every config over seeds, in a band from lowest to highest.

    Args:
        curves: by config, one curve of (step, loss) pairs per seed, at the same steps.
        seeds: the number of seeds in words.
        path: the file.
    """
    figure = Figure(figsize=SIZE, dpi=150, layout='constrained')
    full, end = figure.subplots(1, 2, width_ratios=(1, 1))
    bands = {name: _band(runs_of_config) for name, runs_of_config in curves.items()}
    for axes in (full, end):
        for number, band_4P in enumerate(bands.values()):
            _plot_band(axes, band_4P, number)
        axes.set_xlabel('steps')
        axes.grid(alpha=0.25)
    full.set_ylabel('held-out loss')
    full.set_title(f'mean of {seeds}, band from lowest to highest', fontsize='medium')
    end.set_title('the end, enlarged', fontsize='medium')
    _enlarge(end, list(bands.values()))
    _name_ends(end, bands)
    figure.savefig(path, format='png', metadata={'Software': None})


def spread(heights: Sequence[float], gap: float, top: float = 1.0) -> list[float]:
    """Moves positions in [0, top] as little as needed until neighbours are `gap` apart."""
    order = np.argsort(heights, kind='stable')
    # Minus the gaps below each, positions only have to be ascending: average those that are not.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([heights[index] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    risen = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])
    highest = max(top - (len(order) - 1) * gap, 0.0)
    moved = np.empty(len(order))
    moved[order] = np.clip(risen, 0.0, highest) + gap * np.arange(len(order))
    return moved.tolist()


def _band(curves: Sequence[Curve]) -> np.ndarray:
    """[4, P]: steps, mean, lowest and highest loss."""
    steps_P = np.array([step for step, _ in curves[0]])
    losses_NP = np.array([[loss for _, loss in curve] for curve in curves])
    return np.stack([steps_P, losses_NP.mean(0), losses_NP.min(0), losses_NP.max(0)])


def _plot_band(axes: Axes, band_4P: np.ndarray, number: int) -> None:
    steps_P, mean_P, low_P, high_P = band_4P
    colour, style = _style(number)
    axes.fill_between(steps_P, low_P, high_P, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps_P, mean_P, color=colour, linestyle=style, marker='.', markersize=4)


def _enlarge(axes: Axes, bands: Sequence[np.ndarray]) -> None:
    """Shows only the last steps, with at least two points of every line."""
    last = max(band_4P[0, -1] for band_4P in bands)
    first = min([last * (1 - FINAL), *(band_4P[0, -2:][0] for band_4P in bands)])
    shown = np.concatenate([band_4P[2:, band_4P[0] >= first] for band_4P in bands], axis=1)
    low, high = shown.min(), shown.max()
    margin = MARGIN * (high - low) or MARGIN
    axes.set_xlim(first, last if last > first else first + 1)
    axes.set_ylim(low - margin, high + margin)


def _name_ends(axes: Axes, bands: Mapping[str, np.ndarray]) -> None:
    """Prints the name of each line to the right of its end, connected by a piece of the line."""
    low, high = axes.get_ylim()
    heights = [(band_4P[1, -1] - low) / (high - low) for band_4P in bands.values()]
    for number, (name, height, free) in enumerate(
        zip(bands, heights, spread(heights, GAP), strict=True)
    ):
        colour, style = _style(number)
        axes.annotate(
            name,
            xy=(1.0, height),
            xytext=(1.1, free),
            xycoords='axes fraction',
            textcoords='axes fraction',
            va='center',
            fontsize='small',
            arrowprops={'arrowstyle': '-', 'color': colour, 'linestyle': style, 'linewidth': 1.5},
        )


def _style(number: int) -> tuple[str, Style]:
    """Colour and line style of the config with a number."""
    return COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
