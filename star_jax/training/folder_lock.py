"""How are two runs kept out of one folder?"""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from star_jax import files
from star_jax.errors import UserError
from star_jax.parallel import peer_watchdog

LOCK = '.lock'  # in the run's folder; the kernel releases it when the process dies
FILE_DELAY = 30  # seconds until a file written on one machine must be visible on another
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Locks the folder of a run while the context is active; warns if the file system has no locks.

    The processes of one run share a folder, and the first of them locks it.

    Raises:
        UserError: another process holds the lock (the error names it), the folder cannot be
            written, or another process of the run does not have the same folder.
    """
    if jax.process_index() != 0:
        _check_shared(out, peer_watchdog.broadcast_text(''))
        yield
        return
    files.check_regular(out / LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open('a+')
    except OSError as error:
        raise UserError(
            f'{out}: cannot be written ({error.strerror}): give another --out'
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(_in_use(out)) from error
            log.warning('%s: no locks here (%s): start no second run in it', out, error.strerror)
        file.truncate(0)
        since = datetime.datetime.now().isoformat(' ', 'seconds')
        holder = f'process {os.getpid()} on {socket.gethostname()} since {since}'
        file.write(holder)
        file.flush()
        os.fsync(file.fileno())
        peer_watchdog.broadcast_text(holder)
        yield


def _check_shared(out: Path, holder: str) -> None:
    """Raises UserError unless this process reads the holder of the lock in the same folder."""
    deadline = time.monotonic() + FILE_DELAY
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if (out / LOCK).read_text() == holder:
                return
        time.sleep(FILE_DELAY / 100)
    raise UserError(
        f'process {jax.process_index()} on {socket.gethostname()} does not find in {out} what '
        'process 0 has written there: give an --out that all processes share'
    )


def _in_use(out: Path) -> str:
    holder = (out / LOCK).read_text(errors='replace') or 'another process'
    return (
        f'{out} is in use by {holder}, and two runs cannot share a folder: '
        'wait for it, stop it, or give another --out'
    )
