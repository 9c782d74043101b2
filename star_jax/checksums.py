"""Did a file change since its SHA-256 was written down?

A folder keeps the SHA-256 of its files in `SHA256SUMS`, which `sha256sum -c SHA256SUMS` reads, too.
A computed SHA-256 is remembered in the user's cache folder by path, size and time of the last
change, so that an unchanged file is hashed once, also in folders that cannot be written.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from star_jax import files
from star_jax.errors import UserError

SUMS = 'SHA256SUMS'
LINE = re.compile(r'([0-9a-f]{64}) [ *](.+)')
MEMORY = 'checksums'  # folder in the cache folder
CHUNK = 2**22  # bytes that are read at a time
THREADS = 4  # files that are hashed at the same time
CLOCK_TICK = 20_000_000  # nanoseconds; a file may change twice in one tick of the clock


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, computed or remembered; raises OSError."""
    return remembered([path], lambda: _hash(path, threading.Event()))


def remembered(paths: Sequence[Path], compute: Callable[[], str]) -> str:
    """Values computed from files, remembered until one of the files changes.

    Args:
        paths: the files.
        compute: computes it.
    """
    name = hashlib.sha256('\n'.join(map(os.path.realpath, paths)).encode(errors='surrogateescape'))
    memory = files.cache_folder() / MEMORY / f'{name.hexdigest()}.json'
    before = _stats(paths)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = files.parse_json(memory.read_text('utf-8'))
        if known['files'] == before:
            return str(known['sha256'])
    result = compute()
    newest = max((mtime for _, _, mtime in before), default=0)
    if _stats(paths) == before and newest < time.time_ns() - CLOCK_TICK:
        # The folder may be read-only, or the disk full; then it is computed again next time.
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(memory) as temporary:
                temporary.write_text(json.dumps({'files': before, 'sha256': result}), 'utf-8')
    return result


def write(folder: Path, digests: Mapping[str, str]) -> None:
    """Writes the SHA-256 of files by name."""
    lines = (f'{digest}  {name}\n' for name, digest in sorted(digests.items()))
    with files.replacing(folder / SUMS) as temporary:
        temporary.write_text(''.join(lines), 'utf-8')


def read(folder: Path) -> dict[str, str] | None:
    """The SHA-256 of files by name; None if the folder keeps none.

    Raises UserError if the file of sums is damaged or cannot be read.
    """
    path = folder / SUMS
    files.check_regular(path, files.MOST_TEXT)
    try:
        lines = path.read_text('utf-8-sig', errors='surrogateescape').splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error
    digests = {}
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f'{path}: line {number} has no SHA-256 and name of a file: write the list anew '
                f'with {REMEDY}'
            )
        digests[match[2].removeprefix('./')] = match[1]
    return digests


REMEDY = f'sha256sum *.safetensors* > {SUMS}'


@contextlib.contextmanager
def verifying(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Compares files with the list of their folder while the body uses them.

    A folder without a list is not compared. An error of the body precedes those of the files.

    Raises:
        UserError: a file changed, or is not in the list.
    """
    names = list(names)
    listed = read(folder) if names else None
    if listed is None:
        yield
        return
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = {name: pool.submit(_sha256_or_none, folder / name, stop) for name in names}
        try:
            yield
        except BaseException:
            stop.set()
            raise
        changed = [name for name, digest in found.items() if digest.result() != listed.get(name)]
    if changed:
        have = 'has' if len(changed) == 1 else 'have'
        raise UserError(
            f'{folder}: {", ".join(changed)} {have} changed since the folder was written (its '
            f'SHA-256 is not that of {SUMS}): restore it; if the change is meant, write the list '
            f'anew with `{REMEDY}` (sample, evaluate, reconstruct, convert also take --no-check)'
        )


def _sha256_or_none(path: Path, stop: threading.Event) -> str | None:
    try:
        return remembered([path], lambda: _hash(path, stop))
    except (OSError, UserError, _StoppedError):  # the body reports what cannot be read
        return None


class _StoppedError(Exception):
    """The result of this check is not needed any more."""


def _hash(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    files.check_regular(path)
    with path.open('rb', buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if stop.is_set():
                raise _StoppedError
    return digest.hexdigest()


def _stats(paths: Sequence[Path]) -> list[list[Any]]:
    """Path, size and time of the last change in nanoseconds of files."""
    stats = [(path, os.stat(path)) for path in paths]
    return [[os.path.realpath(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
