"""Are the other processes of a run alive, and do all of them run the same settings?

A process that waits in a collective does not notice that a peer has died. Every process therefore
writes a heartbeat to the key-value store of `jax.distributed`, which process 0 serves. Process 0
records a peer as lost after `LOST_AFTER` seconds without a heartbeat, and a process that exits with
an error records its reason. Every process that reads such a record prints it in one line and exits
with status 1, within `HEARTBEAT` + `GRACE` seconds. On CPUs a broken connection raises at once.

What JAX offers instead, and why it is not enough (0.10.2 and 0.11):

- Its own heartbeats abort all processes (status 134) and name no reason. They remain the second
  line, after `JAX_TIMEOUT` seconds. If process 0 is lost, so is the store, and JAX aborts the
  others at once or after that time; no public setting changes that. `launch/node.sh` then prints
  what to do. (`jax_enable_recoverability` keeps the peers alive; JAX calls it experimental.)
- The barriers and broadcasts of `multihost_utils` are collectives of devices. They time out, or
  keep devices busy, if a process works alone for minutes. The barriers of this module use the
  store and do neither.
- Its preemption service is disabled in `hosts`: it counts steps from 0, so that a run that
  continues from a checkpoint would lose a SIGTERM that comes before its first step.
"""

import atexit
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from star_jax import terminal
from star_jax.errors import RunError, UserError

try:
    from jax._src.distributed import global_state as _jax_state  # JAX has no public store
except ImportError:  # a version of JAX that has moved it: one process alone still works
    _jax_state = None

HEARTBEAT = 2.0  # seconds between two heartbeats
LOST_AFTER = 60.0  # seconds without a heartbeat after which a process counts as lost
GRACE = 3.0  # seconds in which a process may still exit with its own error
JAX_TIMEOUT = 100  # seconds after which JAX's own heartbeats abort all processes
NO_TIMEOUT = 24 * 3600 * 1000  # milliseconds; the watchdog ends a wait for a lost process
HEARTBEATS, EXITS = 'star_jax/heartbeat', 'star_jax/exit'  # prefixes of keys, before the process
FIRST_LOST = 'process 0, which coordinates the run, is lost or does not answer'
BROKEN_CONNECTION = 'Gloo'  # in the error that JAX raises on CPUs
ADVICE = 'the same command, started for all of them, continues from the last checkpoint'

_barriers = itertools.count()
_failed = threading.Event()


class PeerWatchdog:
    """While this context is entered, the failure of one process ends all processes of the run.

    If the context is left with an error, the error is recorded for the other processes. If it is
    left without one, it first waits for all others. A process alone is not watched.
    """

    def __init__(self) -> None:
        self._store = _key_value_store()
        self._left = threading.Event()
        self._last_heartbeat: dict[str, tuple[str, float]] = {}  # process -> value, time
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> 'PeerWatchdog':
        if self._store is not None:
            atexit.register(exit_if_failed, 1)  # JAX's own exit handler waits for the others
            others = (str(n) for n in range(jax.process_count()) if n != jax.process_index())
            self._last_heartbeat = dict.fromkeys(others, ('', time.monotonic()))
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self._store is None:
            return
        if error is None:
            barrier('end of the run')
            self._left.set()
            return
        _failed.set()
        self._left.set()
        cause = self._cause_of_break(error) if BROKEN_CONNECTION in str(error) else None
        self._record_own_exit(str(cause or error) or kind.__name__)
        if cause:
            raise RunError(f'{cause}; {ADVICE}') from error

    def _watch(self) -> None:
        """Sends heartbeats; ends the process if another one has exited or is lost."""
        for count in itertools.count():
            if self._left.wait(HEARTBEAT):
                return
            try:
                key = f'{HEARTBEATS}/{_process()}'
                self._store.key_value_set(key, str(count), allow_overwrite=True)
                if jax.process_index() == 0:
                    self._record_lost_processes(time.monotonic())
                reason = self._peer_exit()
            except jax.errors.JaxRuntimeError:
                reason = FIRST_LOST
            if reason and not self._left.wait(GRACE):
                os.write(2, f'star-jax: {terminal.printable(reason)}; {ADVICE}\n'.encode())
                os._exit(1)

    def _record_lost_processes(self, now: float) -> None:
        for key, value in self._store.key_value_dir_get(HEARTBEATS):
            process = key.rpartition('/')[2]
            if process in self._last_heartbeat and self._last_heartbeat[process][0] != value:
                self._last_heartbeat[process] = (value, now)
        for process, (_, since) in self._last_heartbeat.items():
            if now - since > LOST_AFTER:
                self._record_exit(process, f'is lost: no heartbeat for {LOST_AFTER:.0f} seconds')

    def _peer_exit(self) -> str | None:
        """The recorded exit of another process, if there is one."""
        for key, reason in self._store.key_value_dir_get(EXITS):
            process = key.rpartition('/')[2]
            if process != _process():
                return f'process {process} of {jax.process_count()} {reason}'
        return None

    def _cause_of_break(self, error: BaseException) -> str:
        """The reason why a connection to another process is broken."""
        try:
            time.sleep(HEARTBEAT)  # a process that exits deliberately records its reason
            reason = self._peer_exit()
        except jax.errors.JaxRuntimeError:
            reason = FIRST_LOST
        return reason or f'another process of the run is lost ({" ".join(str(error).split())})'

    def _record_own_exit(self, reason: str) -> None:
        """Records why this process exits. Process 0 waits until the others have read it."""
        try:
            host = socket.gethostname()
            self._record_exit(_process(), f'on {host} has ended ({" ".join(reason.split())})')
            deadline = time.monotonic() + 2 * HEARTBEAT + GRACE
            while jax.process_index() == 0 and time.monotonic() < deadline:
                if len(self._store.key_value_dir_get(EXITS)) == jax.process_count():
                    break
                time.sleep(HEARTBEAT / 10)
        except jax.errors.JaxRuntimeError:
            pass  # process 0 is lost, and the store with it

    def _record_exit(self, process: str, reason: str) -> None:
        self._store.key_value_set(f'{EXITS}/{process}', reason, allow_overwrite=True)


def exit_if_failed(status: int) -> None:
    """Exits at once if the watchdog of this process was left with an error.

    A normal exit would wait for the other processes, in JAX's own exit handler.
    """
    if _failed.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def barrier(name: str) -> None:
    """Returns once all processes have called it; they must call all barriers in the same order."""
    if (store := _key_value_store()) is not None:
        store.wait_at_barrier(f'star_jax/{next(_barriers)}/{name}', NO_TIMEOUT)


def first_then_others(action: Callable[[], Any]) -> None:
    """Runs `action` in process 0, then in all others.

    On a shared file system the others find its results; on separate ones they compute their own.
    """
    if jax.process_index() == 0:
        action()
    barrier('process 0 first')
    if jax.process_index() != 0:
        action()


def broadcast_text(text: str) -> str:
    """The text of process 0, in all processes; they must call this in the same order."""
    store = _key_value_store()
    if store is None:
        return text
    key = f'star_jax/text/{next(_barriers)}'
    if jax.process_index() == 0:
        store.key_value_set(key, text)
    return store.blocking_key_value_get(key, NO_TIMEOUT)


def check_same(name: str, text: str) -> None:
    """Raises UserError in every process whose text differs from that of process 0.

    `name` is the plural of what the text describes, such as 'settings'.
    """
    if broadcast_text(text) != text:
        raise UserError(
            f'the {name} of process {_process()} differ from those of process 0: start all '
            'processes with the same command on the same files'
        )


def _key_value_store() -> Any:
    """The client of the key-value store that process 0 serves; None for a process alone."""
    if not jax.distributed.is_initialized():
        return None
    store = getattr(_jax_state, 'client', None)
    if store is None:
        raise RunError(
            f'JAX {jax.__version__} has no key-value store where star_jax expects it, so several '
            'processes cannot train together: install a version of JAX that setup.py names'
        )
    return store


def _process() -> str:
    return str(jax.process_index())
