"""How are the tables and sentences of a report formatted, for Markdown and for a terminal?"""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from star_jax import files
from star_jax.checkpoint import config
from star_jax.console import Console

TERMINAL = 80  # columns of text
BORDER = 3  # columns from one cell to the next
PAGE = 120  # columns of a text in Markdown
NAMES = 34  # columns of text of the first cell, at most: longer ones are wrapped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """A table before it is formatted; the first column holds names.

    Attributes:
        title: the title.
        columns: the header of every column.
        rows: the cells of every row, as text.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]

    def for_terminal(self) -> Iterator[Table]:
        """Split into tables that are no wider than a terminal."""
        rows = [self.columns, *self.rows]
        widths = [max(map(len, cells)) + BORDER for cells in zip(*rows, strict=True)]
        widths[0] = min(widths[0], NAMES + BORDER)
        left = list(range(1, len(widths)))
        while left:
            shown, room = [0], TERMINAL - 1 - widths[0]
            while left and (len(shown) == 1 or widths[left[0]] <= room):
                room -= widths[left[0]]
                shown.append(left.pop(0))
            table = Table(title=self.title, title_justify='left')
            table.add_column(self.columns[0], min_width=widths[0] - BORDER, max_width=NAMES)
            for number in shown[1:]:
                table.add_column(self.columns[number], justify='right')
            for row in self.rows:
                table.add_row(*[row[number] for number in shown])
            yield table

    def for_markdown(self) -> str:
        marks = ['---', *['---:'] * (len(self.columns) - 1)]
        lines = [f'| {" | ".join(row)} |' for row in (self.columns, marks, *self.rows)]
        return '\n'.join([f'**{self.title}**', '', *lines])


def show(parts: Sequence[Cells | str], console: Console) -> None:
    """Prints tables and sentences to a terminal."""
    for part in parts:
        if isinstance(part, str):
            console.print(part, highlight=False)
            continue
        for table in part.for_terminal():
            console.print(table)


def write(parts: Sequence[Cells | str], path: Path) -> None:
    """Writes tables and sentences as a Markdown file, which is replaced atomically."""
    text = [
        textwrap.fill(part, PAGE) if isinstance(part, str) else part.for_markdown()
        for part in parts
    ]
    with files.replacing(path) as temporary:
        temporary.write_text('\n\n'.join(text) + '\n', 'utf-8')


def to_json(parts: Sequence[Cells | str]) -> list[Any]:
    """The tables among the parts of a report, as JSON."""
    return [config.to_json(part) for part in parts if isinstance(part, Cells)]
