"""How are progress and tables shown on a terminal?"""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def progress_bar(console: Console | None = None, visible: bool = True) -> Progress:
    """A bar with a count, a note and the remaining time.

    Args:
        console: where it is shown (None: standard error).
        visible: whether it is shown at all.

    Returns:
        A bar whose tasks have a field `note`, which may be ''.
    """
    return Progress(
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[note]}', markup=False),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        disable=not visible,
    )


def number_table(title: str, *columns: str) -> Table:
    """A table whose first column holds names, and whose others hold numbers on the right."""
    result = Table(title=title, title_justify='left')
    result.add_column('')
    for column in columns:
        result.add_column(column, justify='right')
    return result


def pairs(title: str, values: Mapping[str, str]) -> Table:
    """A table of names and values without a header."""
    result = Table(show_header=False, title=title)
    for name, value in values.items():
        result.add_row(name, value)
    return result
