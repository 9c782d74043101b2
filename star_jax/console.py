"""How are progress and tables shown on a terminal?

No text is markup: names of folders, prompts and tensors may hold brackets, colons and escape
sequences, and are shown as they are, with control characters escaped. Therefore only this module
imports what rich prints with.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from star_jax.terminal import printable

Item = TypeVar('Item')


def plain(text: str) -> str:
    """The text in lines, without other control characters."""
    return printable(text, keep='\n')


class Console(rich.console.Console):
    """A console on which every text is shown as it is, except for control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders a text without markup; rich calls this for every text, also in tables."""
        return super().render_str(plain(text), **options)

    def status(self, status: str, **options: Any) -> Status:
        """A line that is shown during a long operation; `update` changes it."""
        return _PlainStatus(status, console=self, **options)


class _PlainStatus(Status):
    """A status line whose text is no markup."""

    def __init__(self, status: str, **options: Any) -> None:
        super().__init__(Text(printable(status)), **options)

    def update(self, status: str | None = None, **options: Any) -> None:
        super().update(None if status is None else Text(printable(status)), **options)


class _Words(ProgressColumn):
    """A column of a progress bar that shows a text of its task."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: Task) -> Text:
        """The text, without markup."""
        return Text(printable(self._text(task)))


def progress_bar(
    console: Console | None = None, visible: bool = True, transient: bool = False
) -> Progress:
    """A bar with a count, a note and the remaining time.

    Args:
        console: where it is shown (None: standard error).
        visible: whether it is shown at all.
        transient: whether it disappears at the end.

    Returns:
        A bar whose tasks have a field `note`, which may be ''.
    """
    return Progress(
        _Words(lambda task: task.description),
        BarColumn(),
        MofNCompleteColumn(),
        _Words(lambda task: task.fields['note']),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        disable=not visible,
        transient=transient,
    )


def track(
    items: Iterable[Item],
    description: str,
    total: int,
    visible: bool = True,
    transient: bool = False,
) -> Iterator[Item]:
    """Yields items, with a progress bar on standard error that counts the finished ones.

    Args:
        items: the items.
        description: text before the bar.
        total: number of items.
        visible: whether the bar is shown at all.
        transient: whether it disappears at the end.
    """
    with progress_bar(visible=visible, transient=transient) as progress:
        task = progress.add_task(description, total=total, note='')
        for item in items:
            yield item
            progress.advance(task)


def is_terminal() -> bool:
    """Whether standard error is a terminal."""
    return Console(stderr=True).is_terminal


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
