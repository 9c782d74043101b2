"""Which code and which machines made the results of a report?"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from star_jax.errors import UserError

SHOWN = 9  # digits of a commit


def sentence(what: str, commits: Iterable[str], machines: Iterable[Mapping[str, Any]]) -> str:
    """A sentence that names the code and the machines of measurements.

    Args:
        what: what was measured.
        commits: the commit of every result.
        machines: the machines, as `machine.describe` describes them.
    """
    different = dict.fromkeys(map(_describe, machines))
    return f'{what} of commit {", ".join(sorted(set(commits)))} on {"; ".join(different)}.'


def check_commits(results: Iterable[Any], folder: Path) -> None:
    """Raises UserError if results of a folder are of several commits."""
    commits = sorted({one.commit for one in results})
    if len(commits) > 1:
        listed = ', '.join(commit[:SHOWN] for commit in commits)
        raise UserError(
            f'{folder} has units of {len(commits)} different commits ({listed}), which do not '
            'compare: keep those of one in the folder'
        )


def _describe(machine: Mapping[str, Any]) -> str:
    cores = machine['cores']
    processor = machine.get('processor') or machine['device']
    return f'{cores} core{"s" if cores != 1 else ""}, {processor}, JAX {machine["jax"]}'
