"""How is a file or a folder replaced so that a reader never meets half of it, and can it be at all?

What a kill leaves beside them, the next one who writes there clears away.
"""

import contextlib
import fcntl
import fnmatch
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from star_jax.errors import UserError

DRAFT = re.compile(r'\.(.+)\.[0-9a-f]{8}')  # a file on its way to its place


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


def drop_drafts(folder: Path, name: str) -> None:
    """Removes what `replacing` left of the files called `name` (`*.png`) when it was killed.

    Only for who alone writes them.
    """
    for path in folder.iterdir():
        draft = DRAFT.fullmatch(path.name)
        if draft and fnmatch.fnmatchcase(draft[1], name) and path.is_file():
            path.unlink()


@contextlib.contextmanager
def replacing_folder(folder: Path, is_replaced: Callable[[str], bool]) -> Iterator[Path]:
    """An empty folder beside `folder` to fill; it takes its place when all went well.

    What `folder` held stays in it, unless `is_replaced` says of its name that it goes. A folder has
    no atomic exchange: a kill between two renames leaves nothing at `folder`, and both beside it.
    The next call there ends what such a one began, and clears away what no living process holds.
    """
    _clear(folder, is_replaced)
    new = _beside(folder, 'new')
    try:
        new.mkdir(parents=True)
        with _held(new):
            yield new
            if folder.exists():
                old = _beside(folder, 'old')
                with _held(folder):
                    folder.rename(old)
                    new.rename(folder)
                    _empty_into(old, folder, is_replaced)
            else:
                new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _clear(folder: Path, is_replaced: Callable[[str], bool]) -> None:
    """Ends what killed processes began beside `folder`."""
    if not folder.parent.is_dir():
        return
    for place in sorted(folder.parent.iterdir()):
        kind = re.fullmatch(rf'\.{re.escape(folder.name)}\.(new|old)\.[0-9a-f]{{8}}', place.name)
        if kind is None:
            continue
        with contextlib.suppress(OSError), _held(place) as is_mine:
            if not is_mine:
                continue
            if kind[1] == 'new':
                shutil.rmtree(place)
            elif folder.exists():
                _empty_into(place, folder, is_replaced)
            else:
                place.rename(folder)


def _empty_into(old: Path, folder: Path, is_replaced: Callable[[str], bool]) -> None:
    """Removes an earlier folder when what stays of it has moved to the one in its place."""
    for entry in old.iterdir():
        if not is_replaced(entry.name) and not (folder / entry.name).exists():
            entry.rename(folder / entry.name)
    shutil.rmtree(old)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks a folder, under whatever name, while this process lives; whether nobody else has it.

    False, too, where the file system has no locks.
    """
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_mine = True
    except OSError:
        is_mine = False
    try:
        yield is_mine
    finally:
        os.close(place)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f'.{folder.name}.{kind}.{uuid.uuid4().hex[:8]}')


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
    _check_takes_files(path, path.absolute().parents)


def check_folder(path: Path) -> None:
    """Raises UserError where no file can be written in a folder `path`; as `check_file`."""
    mode = _mode(path)
    if mode is not None and not stat.S_ISDIR(mode):
        raise UserError(f'{path} is a file, expected the name of a folder: choose another place')
    place = path.absolute()
    _check_takes_files(path, (place, *place.parents))


def unwritable(path: Path, error: OSError) -> UserError:
    """What a user is told where the system refuses to write."""
    return UserError(f'{path} cannot be written ({error.strerror or error}): choose another place')


def _mode(path: Path) -> int | None:
    """What lies at `path`, None for nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(
                f'{path} is a link to a place that is not there: choose another place'
            ) from None
        return None
    except OSError as error:
        raise unwritable(path, error) from error


def _check_takes_files(path: Path, folders: Iterable[Path]) -> None:
    """Raises UserError about `path` unless the first of `folders` that is there takes files."""
    above = next(folder for folder in folders if _mode(folder) is not None)
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise unwritable(path, error) from error
