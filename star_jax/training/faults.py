"""How does a run handle signals, a second run, a full disk and non-finite numbers?

A signal asks the trainer to stop, a lock keeps two runs out of one folder, a full disk becomes one
sentence, and non-finite metrics and arrays are named. A kill needs none of this: the files on disk
are complete at any moment (see `checkpoint/training.py`).
"""

import contextlib
import datetime
import errno
import fcntl
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from star_jax import files
from star_jax.checkpoint.training import newest_complete_step, quiet_failed_saves
from star_jax.errors import RunError, UserError
from star_jax.parallel import peer_watchdog

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 130  # exit status after a second signal, as shells have it for ctrl-c
ONE_SIGNAL = 0.5  # seconds in which signals count as one: `timeout` sends its own twice
NOTICE = b'\nstopping after this step and saving; once more stops at once\n'
DELAY = 2  # steps until an answer is read: as many as are dispatched (`logger.STEPS_AHEAD`)
LOCK = '.lock'  # in the run's folder; the kernel releases it when the process dies
FILE_DELAY = 30  # seconds until a file written on one machine must be visible on another
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHOWN = 3  # names in one message

log = logging.getLogger(__name__)


class Stop:
    """A context in which SIGTERM and SIGINT are requests; a second one ends the process at once.

    A thread reads the signals, because Python's own handlers wait while the main thread compiles or
    waits for a device. Only the main thread may set handlers: in another thread this catches
    nothing. A signal that is ignored (`nohup`, `&` in a script) stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._answers: deque[jax.Array] = deque()

    def agreed(self) -> bool:
        """Whether to stop before the next step: the same answer in all processes of a run.

        A preemption notice may reach one process first, so the processes combine their requests
        before every step, and read the result `DELAY` steps later, when nothing needs to wait.
        """
        if jax.process_count() == 1:
            return self.asked
        self._answers.append(_any_of(self.asked))
        return len(self._answers) > DELAY and bool(self._answers.popleft())

    def __enter__(self) -> 'Stop':
        self._undo = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            self._catch()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _catch(self) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        reader = threading.Thread(target=self._read_signals, args=(read_end,), daemon=True)
        reader.start()
        self._undo.callback(os.close, read_end)
        self._undo.callback(reader.join)
        self._undo.callback(os.close, write_end)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_end))
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous = signal.signal(number, self._request)
                self._undo.callback(signal.signal, number, previous or signal.SIG_DFL)

    def _request(self, *_: object) -> None:
        self.asked = True

    def _read_signals(self, read_end: int) -> None:
        """Reads the number of every signal as it arrives, until the pipe is closed."""
        first = None
        while number := os.read(read_end, 1):
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                self.asked = True
                with contextlib.suppress(OSError):
                    os.write(2, NOTICE)
            elif time.monotonic() - first > ONE_SIGNAL:
                os._exit(INTERRUPTED)


def _any_of(flag: bool) -> jax.Array:
    """Whether the flag of any process is set, not yet computed."""
    mesh = Mesh(jax.devices(), 'devices')
    sharding = NamedSharding(mesh, PartitionSpec('devices'))
    flags = np.full(jax.local_device_count(), flag)
    return _any(jax.make_array_from_process_local_data(sharding, flags))


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return flags.any()


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


@contextlib.contextmanager
def disk_watched(checkpoints: Path) -> Iterator[None]:
    """Turns errors of a full disk into a RunError that names the newest complete checkpoint."""
    try:
        with quiet_failed_saves():
            yield
    except Exception as error:
        if (reason := _full_disk(error)) is None:
            raise
        step = newest_complete_step(checkpoints)
        safe = f'the checkpoint of step {step} is whole' if step else 'there is no checkpoint yet'
        raise RunError(
            f'nothing more can be written ({reason}), so the run stopped; {safe}: '
            'make room, and the same command goes on'
        ) from error


def _full_disk(error: BaseException | None) -> str | None:
    """The system's message if an error was caused by a full disk, else None.

    Libraries may keep the message of the original error and nothing else.
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


def first_flaw(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The index of the first step with a non-finite metric, and the metric, as 'loss is nan'."""
    for index, step_metrics in enumerate(metrics):
        flaws = [
            f'{name} is {value}' for name, value in step_metrics.items() if not math.isfinite(value)
        ]
        if flaws:
            return index, _shorten(flaws)
    return None


def state_flaw(state: Any) -> str | None:
    """The arrays of a state that are not finite, or None."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator='/')
        for path, leaf in jax.tree.leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    finite = jax.device_get(_are_finite(state))
    flaws = [path for path, is_finite in zip(paths, finite, strict=True) if not is_finite]
    return f'{_shorten(flaws)} not finite after it' if flaws else None


@jax.jit
def _are_finite(state: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(state)
    return [jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _shorten(names: list[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more
