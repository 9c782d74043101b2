"""How is a file or a folder replaced so that no reader ever opens half of it? Can it be written?

A killed process may leave temporary files and folders behind. A running process locks
its own; the next writer of the same folder, or of a file of the same kind in it, removes the
others.
"""

import contextlib
import errno
import fcntl
import fnmatch
import glob
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from star_jax.errors import UserError

SHIPPED = 'shipped'  # the model that commands take unless another is named
SHIPPED_MODELS = (SHIPPED, 'shipped/infinity')  # names of the model folders in this package
SPECIAL = {  # files that may have no end
    stat.S_IFIFO: 'a pipe',
    stat.S_IFCHR: 'a device',
    stat.S_IFBLK: 'a device',
    stat.S_IFSOCK: 'a socket',
}
DEVICES = '/dev'  # where links lead to the open files of a process
MOST_TEXT = 2**26  # bytes of a config, an index or a list that a user writes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, the limit of a file
LONGEST_NAME = 255  # bytes of the name of a file
ABANDONED_AFTER = 86_400  # seconds, on a file system without locks
TEMPORARY = re.compile(r'\.(.+)\.[0-9a-f]{8}')  # the name of a file that is not yet complete


def cache_folder() -> Path:
    """The folder of all caches: $STAR_JAX_CACHE, or ~/.cache/star_jax."""
    return Path(os.environ.get('STAR_JAX_CACHE') or '~/.cache/star_jax').expanduser()


def shipped_folder(name: str) -> Path:
    """The model folder in this package with one of the names `SHIPPED_MODELS`."""
    return Path(__file__).parent / name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success the file written there replaces `path`.

    The folder must exist. On an error an earlier file at `path` stays as it was. The first call for
    a folder and a suffix removes what killed processes left of such files there.

    Raises:
        OSError: `path` is a pipe, a device or a socket, or cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):
        if kind := _special(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, f'it is {kind}', str(path))
    _remove_abandoned_once(path)
    temporary, lock = _create_temporary(path)
    _unfinished.add(temporary)
    try:
        yield temporary
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        os.close(lock)
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def remove_temporary_files(folder: Path, pattern: str) -> None:
    """Removes the temporary files that killed processes left of `replacing`.

    Args:
        folder: the folder of the files.
        pattern: which file names they were to get, such as '*.png'.
    """
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and fnmatch.fnmatchcase(match[1], pattern) and path.is_file():
            with contextlib.suppress(OSError):
                if _is_abandoned(path):
                    path.unlink()


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a new folder among the temporary files of the system, and removes it at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _unfinished.add(folder)
        try:
            yield folder
        finally:
            _unfinished.discard(folder)


def remove_unfinished() -> None:
    """Removes the temporary files and folders of this process, which is about to exit."""
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            path.unlink() if path.is_file() else shutil.rmtree(path)


_unfinished: set[Path] = set()  # temporary files and folders of this process
_searched: set[tuple[Path, str]] = set()  # folders and patterns of `_remove_abandoned_once`


def _remove_abandoned_once(path: Path) -> None:
    """Removes temporary files of killed processes; one search per process, as folders are large."""
    pattern = f'*{glob.escape(path.suffix)}' if path.suffix else glob.escape(path.name)
    search = (path.parent.absolute(), pattern)
    if search not in _searched:
        _searched.add(search)
        with contextlib.suppress(OSError):
            remove_temporary_files(path.parent, pattern)


def _create_temporary(path: Path) -> tuple[Path, int]:
    """A new empty file beside `path`, and a descriptor that locks it."""
    while True:
        temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # not removed before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """Whether no running process has locked a temporary file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return time.time() - os.fstat(descriptor).st_mtime > ABANDONED_AFTER
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks a file or folder; False if another process has it or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def replacing_folder(folder: Path, is_replaced: Callable[[str], bool]) -> Iterator[Path]:
    """Yields an empty folder beside `folder`; on success the filled folder replaces `folder`.

    Folders have no atomic exchange: a kill between the two renames leaves nothing at `folder` and
    both folders beside it. The next call for the same folder completes such an exchange and
    removes temporary folders that no running process has locked.

    Args:
        folder: the folder to write; it need not exist.
        is_replaced: whether an entry of that name in an earlier `folder` is removed. All others
            move to the new folder.
    """
    _clean_up(folder, is_replaced)
    new = _temporary(folder, 'new')
    _unfinished.add(new)
    try:
        new.mkdir(parents=True)
        with _locked(new):
            yield new
            if folder.exists():
                old = _temporary(folder, 'old')
                with _locked(folder):
                    folder.rename(old)
                    new.rename(folder)
                    _remove_old(old, folder, is_replaced)
            else:
                new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        _unfinished.discard(new)


def _clean_up(folder: Path, is_replaced: Callable[[str], bool]) -> None:
    """Completes or removes the temporary folders that killed processes left beside `folder`."""
    if not folder.parent.is_dir():
        return
    for path in sorted(folder.parent.iterdir()):
        match = re.fullmatch(rf'\.{re.escape(folder.name)}\.(new|old)\.[0-9a-f]{{8}}', path.name)
        if match is None:
            continue
        with contextlib.suppress(OSError), _locked(path) as has_lock:
            if not has_lock:
                continue
            if match[1] == 'new':
                shutil.rmtree(path)
            elif folder.exists():
                _remove_old(path, folder, is_replaced)
            else:
                path.rename(folder)


def _remove_old(old: Path, folder: Path, is_replaced: Callable[[str], bool]) -> None:
    """Removes an earlier folder after moving the entries that stay to the new `folder`."""
    for entry in old.iterdir():
        if not is_replaced(entry.name) and not (folder / entry.name).exists():
            entry.rename(folder / entry.name)
    shutil.rmtree(old)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder, which survives renaming; yields whether the lock was obtained.

    It is not obtained if another process has it, or if the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _temporary(folder: Path, kind: str) -> Path:
    return folder.with_name(f'.{folder.name}.{kind}.{uuid.uuid4().hex[:8]}')


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into the UserError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def check_file(path: Path) -> None:
    """Checks, before work whose result goes to a file, that the file can be written.

    Changes nothing on disk. Parent folders may be missing.

    Raises:
        UserError: names `path` and the reason.
    """
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        raise UserError(f'{path} is a folder, expected the name of a file: choose another path')
    kind = _special(mode)
    if kind or (path.is_symlink() and path.absolute().is_relative_to(DEVICES)):
        kind = kind or 'a link to an open file'
        raise UserError(f'{path} is {kind}, expected the name of a file: choose another path')
    _check_writable(path, path.absolute().parents)


def check_folder(path: Path) -> None:
    """Checks that files can be written in a folder, which may be missing; otherwise `check_file`.

    Raises:
        UserError: names `path` and the reason.
    """
    mode = _mode(path)
    if mode is not None and not stat.S_ISDIR(mode):
        raise UserError(f'{path} is a file, expected the name of a folder: choose another path')
    absolute = path.absolute()
    _check_writable(path, (absolute, *absolute.parents))


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`, which raises ValueError for a text that is nested too deeply, too."""
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError('its JSON is nested too deeply') from error


def lines(text: str) -> list[str]:
    """The lines of a text, which end as any system ends them.

    `str.splitlines` also ends a line at form feeds and at five separators of Unicode, which texts
    from web pages contain.
    """
    return re.split(r'\r\n|\r|\n', text)


def check_regular(path: str | Path, most: int | None = None) -> None:
    """Checks, before a file is read, that reading it ends.

    A pipe may wait for ever, and a device may have no end. A missing file is not reported here.

    Args:
        path: the file.
        most: its largest size in bytes (None: any).

    Raises:
        UserError: the path is a pipe, a device or a socket, or the file is too large.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return
    if kind := _special(status.st_mode):
        raise UserError(f'{path} is {kind}, expected a regular file: name another path')
    if most is not None and stat.S_ISREG(status.st_mode) and status.st_size > most:
        raise UserError(
            f'{path} has {status.st_size:,} bytes, expected at most {most:,}: it is another kind '
            'of file, name another path'
        )


def _special(mode: int | None) -> str | None:
    """In words what a path of this mode is, unless it is a file or a folder."""
    return SPECIAL.get(stat.S_IFMT(mode or 0))


def is_file_name(name: object) -> bool:
    """Whether a value from a file names a file in the same folder."""
    plain = isinstance(name, str) and name not in ('', '.', '..') and name.isprintable()
    return plain and '/' not in name and len(os.fsencode(name)) <= LONGEST_NAME


def unwritable(path: Path, error: OSError) -> UserError:
    """The UserError for a path that the operating system refuses to write."""
    return UserError(f'{path} cannot be written ({error.strerror or error}): choose another path')


def full_disk(error: BaseException | None) -> str | None:
    """The system's message if an error was caused by a full disk, else None.

    Libraries may keep the message of the original error and nothing else, so its causes count, too.
    """
    while error is not None:
        for number in FULL:
            message = os.strerror(number)
            if getattr(error, 'errno', None) == number:
                return f'{message}: {error.filename}' if error.filename else message
            if message in str(error):
                return message
        error = error.__cause__ or error.__context__
    return None


def _mode(path: Path) -> int | None:
    """The mode of the file or folder at `path`; None if nothing is there."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(
                f'{path} is a link to a missing file or folder: choose another path'
            ) from None
        return None
    except OSError as error:
        raise unwritable(path, error) from error


def _check_writable(path: Path, folders: Iterable[Path]) -> None:
    """Raises UserError about `path` unless the first existing one of `folders` takes files."""
    existing = next(folder for folder in folders if _mode(folder) is not None)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise unwritable(path, error) from error
