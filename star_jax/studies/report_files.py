"""How are the tables and sentences of a report shown and written?"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from star_jax import files
from star_jax.checkpoint import config
from star_jax.console import Console
from star_jax.studies.cells import Cells
from star_jax.studies.cost_result import CostResult

PAGE = 120  # columns of a sentence in Markdown


def paths(out: Path) -> list[Path]:
    """The files of a report: numbers and tables."""
    return [out.with_name(f'{out.name}{end}') for end in ('.json', '_tables.md')]


def write(
    parts: Sequence[Cells | str],
    numbers: Mapping[str, Any],
    cost: CostResult | None,
    out: Path,
    console: Console,
) -> None:
    """Shows a report, and writes OUT.json and OUT_tables.md, which are replaced atomically.

    Args:
        parts: tables and sentences.
        numbers: what the tables are computed from, as JSON.
        cost: the cost of every kind or contender, whose tables are added.
        out: prefix of the paths of the files.
        console: shows the tables.

    Raises:
        OSError: a file cannot be written.
    """
    parts = [*parts, *(cost.parts() if cost else ())]
    show(parts, console)
    as_json, as_tables = paths(out)
    tables = [config.to_json(part) for part in parts if isinstance(part, Cells)]
    costs = config.to_json(cost) if cost else None
    config.write_json(as_json, {**numbers, 'cost': costs, 'tables': tables})
    text = [
        textwrap.fill(part, PAGE) if isinstance(part, str) else part.for_markdown()
        for part in parts
    ]
    with files.replacing(as_tables) as temporary:
        temporary.write_text('\n\n'.join(text) + '\n', 'utf-8')


def show(parts: Sequence[Cells | str], console: Console) -> None:
    """Prints tables and sentences to a terminal."""
    for part in parts:
        if isinstance(part, str):
            console.print(part, highlight=False)
            continue
        for table in part.for_terminal():
            console.print(table)
