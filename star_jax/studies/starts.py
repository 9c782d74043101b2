"""Which commits and machines have worked on a unit, and for how long?

The folder in which a unit trains records every start. The result of the unit names all machines,
and a unit that another commit has begun is refused.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from star_jax.checkpoint import config
from star_jax.errors import UserError
from star_jax.parallel import machine
from star_jax.training.folder_lock import lock

FILE = 'starts.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a unit.

    Attributes:
        commit: commit of the code.
        hardware: the machine, as `machine.describe` describes it.
        began: time of the start, seconds since 1970.
        ended: time of its last change in the folder, seconds since 1970; None for the newest start.
    """

    commit: str
    hardware: dict[str, Any]
    began: float
    ended: float | None = None


def record(folder: Path, commit: str) -> tuple[dict[str, Any], ...]:
    """Records a start in a folder, and returns the machines of all starts, each once.

    Starts that left no work in the folder do not count.

    Args:
        folder: the folder, which may be missing.
        commit: commit of the code.

    Raises:
        UserError: the folder is in use, or has work of another or an unknown commit.
    """
    with lock(folder):
        earlier = _earlier(folder)
        for one in earlier:
            if one.commit != commit:
                raise UserError(_refusal(folder, f'commit {one.commit}', commit))
        if not earlier and _changes(folder):
            raise UserError(_refusal(folder, 'an unknown commit', commit))
        newest = Start(commit=commit, hardware=machine.describe(), began=time.time())
        starts = [*earlier, newest]
        config.write_json(folder / FILE, [config.to_json(one) for one in starts])
    machines = [one.hardware for one in starts]
    return tuple(one for number, one in enumerate(machines) if one not in machines[:number])


def seconds(folder: Path) -> float:
    """The time of all starts in a folder, the newest of which has not ended."""
    return sum((one.ended or time.time()) - one.began for one in _read(folder))


def _earlier(folder: Path) -> list[Start]:
    """The starts that have left work in a folder; all have ended, the last one at its last change.

    A killed start has lost what it did later.
    """
    changes = _changes(folder)
    if not changes or not (folder / FILE).exists():
        return []
    *others, last = _read(folder)
    return [*others, dataclasses.replace(last, ended=max(last.began, *changes))]


def _changes(folder: Path) -> list[float]:
    """When the files of a folder have changed, except for records, locks and temporary files."""
    return [
        path.lstat().st_mtime
        for path in folder.rglob('*')
        if path.name != FILE and not path.name.startswith('.')
    ]


def _read(folder: Path) -> list[Start]:
    path = folder / FILE
    return config.from_json(list[Start], config.read_json(path), where=str(path))


def _refusal(folder: Path, made_by: str, commit: str) -> str:
    return (
        f'{folder} has work of {made_by}, and this is commit {commit}, which do not compare: '
        'continue it in a clone with the first code, or remove the folder to begin again'
    )
