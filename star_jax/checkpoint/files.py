"""How is a file replaced so that a reader never meets half of it, and can one be written at all?"""

import contextlib
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from star_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when all went well.

    The folder must exist. Whatever fails inside leaves an earlier `path` as it was.
    """
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
    try:
        yield temporary
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says against writing at `path` into a UserError."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def check_file(path: Path) -> None:
    """Raises UserError where no file can be written at `path`; nothing is made, nothing changes.

    For the beginning of work whose result goes there. Folders above it may be missing.
    """
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        raise UserError(f'{path} is a folder, expected the name of a file: choose another place')
    _check_above(path)


def check_folder(path: Path) -> None:
    """Raises UserError where no file can be written in a folder `path`; as `check_file`."""
    mode = _mode(path)
    if mode is not None and not stat.S_ISDIR(mode):
        raise UserError(f'{path} is a file, expected the name of a folder: choose another place')
    _check_above(path / 'file')


def unwritable(path: Path, error: OSError) -> UserError:
    """What a user is told where the system refuses to write."""
    return UserError(f'{path} cannot be written ({error.strerror or error}): choose another place')


def _mode(path: Path) -> int | None:
    """What lies at `path`, None for nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unwritable(path, error) from error


def _check_above(path: Path) -> None:
    """Raises UserError unless the nearest folder above `path` that is there takes files."""
    above = next(parent for parent in path.absolute().parents if _mode(parent) is not None)
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise unwritable(path, error) from error
