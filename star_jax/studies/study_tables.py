"""What of a study stands in rows, on a page and on a terminal?"""

import dataclasses
from collections.abc import Callable, Iterator

from rich.table import Table

from star_jax.studies.comparison import Comparison
from star_jax.studies.results import LOSS
from star_jax.studies.summary import Outcome, Summary

ACCURACY = 'accuracy'
FAILED = 'failed'
TERMINAL = 80  # columns of text
BORDER = 3  # of them from one cell to the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """A table before it is known who reads it; the first column holds names."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def for_terminal(self) -> Iterator[Table]:
        """As many tables as need be for none to be wider than a terminal."""
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
    """Scores over all tokens, loss and accuracy of every scale, what training took, what failed."""
    overall = Cells(
        title=f'Held out, after the last step, {count(len(summary.seeds), "seed")}',
        columns=['config', 'loss', 'to the first', 'accuracy'],
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
    """Such as '2 seeds'."""
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
    title = 'Failed, and not trained again while its folder is there'
    return [Cells(title=title, columns=['run', 'reason'], rows=rows)] if rows else []


def _name(one: Outcome) -> str:
    """A config, and where some of its runs failed, of how many its scores are."""
    ended, failed = len(one.curves), len(one.failures)
    return f'{one.config} ({ended} of {ended + failed})' if ended and failed else one.config


def _loss(one: Outcome) -> str:
    return _mean(one.scores[LOSS]) if one.scores else FAILED


def _accuracy(one: Outcome) -> str:
    return f'{one.scores[ACCURACY].mean:.1%}' if one.scores else ''


def _mean(score: Comparison | None) -> str:
    if score is None:
        return ''
    spread = '' if score.deviation is None else f' ± {score.deviation:.3f}'
    return f'{score.mean:.3f}{spread}'


def _difference(one: Outcome) -> str:
    score = one.scores.get(LOSS)
    if score is None or score.difference is None:
        return ''
    interval = '' if score.low is None else f' [{score.low:+.3f}, {score.high:+.3f}]'
    return f'{score.difference:+.3f}{interval}'
