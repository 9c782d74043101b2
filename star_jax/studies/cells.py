"""How is a table of a report formatted, for Markdown and for a terminal?"""

import dataclasses
from collections.abc import Iterator

from rich.table import Table

TERMINAL = 80  # columns of text
BORDER = 3  # columns from one cell to the next
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
