"""Which code and which machines made the results of a report, and do they compare?"""

import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from star_jax.errors import UserError

PACKAGE = Path(__file__).parents[1]
UNKNOWN = 'unknown'  # the commit of a package outside of a repository


def read_commit() -> str:
    """The commit of this package, with '-modified' if its code or the configs differ from it."""
    root = PACKAGE.parent

    def git(*words: str) -> str:
        command = ('git', '-C', str(root), *words)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        tracked = git('ls-files', '--error-unmatch', str(PACKAGE / '__init__.py'))
        commit = git('rev-parse', 'HEAD')
        changed = git('status', '--porcelain', '--', str(PACKAGE), 'configs')
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return f'{commit}-modified' if tracked and changed else commit


def of_units(results: Sequence[Any]) -> str:
    """A sentence that names the commits and the machines of units' results."""
    return sentence(
        f'{len(results)} units',
        (one.commit for one in results),
        (machine for one in results for machine in one.hardware),
    )


def sentence(what: str, commits: Iterable[str], machines: Iterable[Mapping[str, Any]]) -> str:
    """A sentence that names the code and the machines of measurements.

    Args:
        what: what was measured.
        commits: the commit of every result.
        machines: the machines, as `machine.describe` describes them.
    """
    different = dict.fromkeys(map(_describe, machines))
    return f'{what} of commit {", ".join(sorted(set(commits)))} on {"; ".join(different)}.'


def check_equal(
    what: str, results: Iterable[Any], value: Callable[[Any], Any], folder: Path
) -> None:
    """Raises UserError if a value differs among the results of a folder.

    Args:
        what: the name of the value, in the plural.
        results: the results of units.
        value: gives the value of a result.
        folder: the folder, for the error.
    """
    values = sorted({str(value(one)) for one in results})
    if len(values) > 1:
        raise UserError(
            f'{folder} has units of {len(values)} different {what} ({", ".join(values)}), which do '
            'not compare: keep those of one in the folder'
        )


def _describe(machine: Mapping[str, Any]) -> str:
    cores = machine['cores']
    processor = machine.get('processor') or machine['device']
    return f'{cores} core{"s" if cores != 1 else ""}, {processor}, JAX {machine["jax"]}'
