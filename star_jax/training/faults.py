"""What may break in the night, and how is it met?

A signal asks the loop to stop, a lock keeps two runs out of one folder, a full disk is told in one
sentence, and what is no number any more is named. A kill needs nothing of this: whatever is on
disk is whole at any moment (see `checkpoint/training.py`).
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

from star_jax.checkpoint.training import newest_complete_step, quiet_failed_saves
from star_jax.errors import RunError, UserError
from star_jax.parallel import peer_watchdog

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AT_ONCE = 130  # the exit status of a second signal, as shells have it for ctrl-c
TOGETHER = 0.5  # seconds in which signals count as one: `timeout` sends its own twice
NOTICE = b'\nstopping after this step and saving; once more stops at once\n'
LATE = 2  # steps under way at most (`report.AHEAD`): their results are there
LOCK = '.lock'  # in the run's folder; the kernel lets go of it when the process dies
SIGHT = 30  # seconds that a network's file system may take to show a file elsewhere
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHOWN = 3  # names in one message

log = logging.getLogger(__name__)


class Stop:
    """While it is entered, SIGTERM and SIGINT are requests; a second one ends the process at once.

    A thread listens, because Python's own handlers wait while the main thread compiles or waits
    for a device. Only the main thread may set handlers: entered elsewhere this catches nothing. A
    signal that is ignored (`nohup`, `&` in a script) stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._answers: deque[jax.Array] = deque()

    def agreed(self) -> bool:
        """Whether to stop before the next step: the same answer in all processes of a run.

        A preemption notice may reach one of them first, so several ask each other before every
        step, and hear the answer `LATE` steps later, when it costs no waiting.
        """
        if jax.process_count() == 1:
            return self.asked
        self._answers.append(_any_of(self.asked))
        return len(self._answers) > LATE and bool(self._answers.popleft())

    def __enter__(self) -> 'Stop':
        self._undo = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            self._catch()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _catch(self) -> None:
        heard, told = os.pipe()
        os.set_blocking(told, False)
        listener = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        listener.start()
        self._undo.callback(os.close, heard)
        self._undo.callback(listener.join)
        self._undo.callback(os.close, told)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(told))
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous = signal.signal(number, self._note)
                self._undo.callback(signal.signal, number, previous or signal.SIG_DFL)

    def _note(self, *_: object) -> None:
        self.asked = True

    def _listen(self, heard: int) -> None:
        """Reads the number of every signal as it comes, until the pipe is closed."""
        first = None
        while number := os.read(heard, 1):
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                self.asked = True
                with contextlib.suppress(OSError):
                    os.write(2, NOTICE)
            elif time.monotonic() - first > TOGETHER:
                os._exit(AT_ONCE)


def _any_of(mine: bool) -> jax.Array:
    """Whether any process says so, on its way."""
    mesh = Mesh(jax.devices(), 'devices')
    each = NamedSharding(mesh, PartitionSpec('devices'))
    said = np.full(jax.local_device_count(), mine)
    return _any(jax.make_array_from_process_local_data(each, said))


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return flags.any()


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Makes `out` this run's alone; a UserError names the process that has it, or why none may.

    The processes of one run share a folder, and the first of them locks it; a UserError where
    another one does not see it. A file system without locks is warned of.
    """
    if jax.process_index() != 0:
        _check_shared(out, peer_watchdog.broadcast_text(''))
        yield
        return
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
    """Raises UserError unless this process, too, sees who has locked the folder."""
    deadline = time.monotonic() + SIGHT
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if (out / LOCK).read_text() == holder:
                return
        time.sleep(SIGHT / 100)
    raise UserError(
        f'process {jax.process_index()} on {socket.gethostname()} does not see in {out} what '
        'process 0 has written there: give an --out that all of them share'
    )


def _in_use(out: Path) -> str:
    holder = (out / LOCK).read_text(errors='replace') or 'another process'
    return (
        f'{out} is in use by {holder}, and two runs cannot share a folder: '
        'wait for it, stop it, or give another --out'
    )


@contextlib.contextmanager
def disk_watched(checkpoints: Path) -> Iterator[None]:
    """Turns what a full disk makes fail into a RunError that names the newest whole checkpoint."""
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
    """What the system says where it was out of space, else None; libraries keep only its words."""
    while error is not None:
        for number in FULL:
            words = os.strerror(number)
            if getattr(error, 'errno', None) == number:
                return f'{words}: {error.filename}' if error.filename else words
            if words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


def first_flaw(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The first of several steps' scalars that are not all finite, and which, as 'loss is nan'."""
    for place, scalars in enumerate(metrics):
        flaws = [
            f'{name} is {value}' for name, value in scalars.items() if not math.isfinite(value)
        ]
        if flaws:
            return place, _some(flaws)
    return None


def state_flaw(state: Any) -> str | None:
    """Which arrays of a state hold what is not finite, or None."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator='/')
        for path, leaf in jax.tree.leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    finite = jax.device_get(_are_finite(state))
    flaws = [path for path, is_finite in zip(paths, finite, strict=True) if not is_finite]
    return f'{_some(flaws)} not finite after it' if flaws else None


@jax.jit
def _are_finite(state: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(state)
    return [jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _some(names: list[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more
