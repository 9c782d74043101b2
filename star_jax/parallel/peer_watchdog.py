"""Are the other processes of a run still there, and do all mean the same?

A process that waits for another's part of a sum does not notice that the other has died. So each
says every `BEAT` seconds that it lives, at the store that JAX keeps in process 0, and process 0
says who has been silent for `SILENCE` seconds. Who ends for a reason says it there, too. All who
read of such an end stop: within `BEAT` + `GRACE` seconds of what was said, within `SILENCE` more of
a loss. On CPUs the connections that break tell at once. Where process 0 itself is lost, there is no
store: JAX then aborts the others, at once or after `DEAD` seconds.
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
from jax._src import distributed  # JAX shows its store nowhere else

from star_jax.errors import RunError, UserError

BEAT = 2.0
SILENCE = 60.0
GRACE = 3.0  # seconds for a process that learns of an end to come to its own
DEAD = 100  # seconds after which JAX itself takes a process for dead
DAY = 24 * 3600 * 1000  # milliseconds: whom one waits for is watched, and may take long
BEATS, ENDS = 'star_jax/beat', 'star_jax/end'
LOST_FIRST = 'process 0, at which the others meet, is lost or cannot be reached'
BROKEN = 'Gloo'  # in what JAX raises where the connection to another CPU is broken
ADVICE = 'the same command, started in all of them, goes on from the newest checkpoint'

_numbers = itertools.count()
_failed = threading.Event()


class Watch:
    """While it is entered, the end of any process is that of all; a process alone watches nobody.

    Left for an error, it tells the others. Left well, it waits until all others leave it well.
    """

    def __init__(self) -> None:
        self._store = _store()
        self._over = threading.Event()
        self._heard: dict[str, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> 'Watch':
        if self._store is not None:
            atexit.register(leave, 1)  # before what JAX does at exit: it waits for the others
            self._heard = dict.fromkeys(_others(), ('', time.monotonic()))
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self._store is None:
            return
        if error is None:
            wait('the end')
            self._over.set()
            return
        _failed.set()
        self._over.set()
        reason = self._reason_of_break(error) if BROKEN in str(error) else None
        self._tell(str(reason or error) or kind.__name__)
        if reason:
            raise RunError(f'{reason}; {ADVICE}') from error

    def _watch(self) -> None:
        for count in itertools.count():
            if self._over.wait(BEAT):
                return
            try:
                self._store.key_value_set(f'{BEATS}/{_me()}', str(count), allow_overwrite=True)
                if jax.process_index() == 0:
                    self._look_for_silence(time.monotonic())
                reason = self._reason()
            except jax.errors.JaxRuntimeError:
                reason = LOST_FIRST
            if reason and not self._over.wait(GRACE):
                os.write(2, f'star-jax: {reason}; {ADVICE}\n'.encode())
                os._exit(1)

    def _look_for_silence(self, now: float) -> None:
        """Says of who has been silent for too long that he is lost."""
        for key, beat in self._store.key_value_dir_get(BEATS):
            number = key.rpartition('/')[2]
            if number in self._heard and self._heard[number][0] != beat:
                self._heard[number] = (beat, now)
        for number, (_, since) in self._heard.items():
            if now - since > SILENCE:
                self._say(number, f'is lost: not heard of for {SILENCE:.0f} seconds')

    def _reason(self) -> str | None:
        """Which other process has ended, and why."""
        for key, why in self._store.key_value_dir_get(ENDS):
            number = key.rpartition('/')[2]
            if number != _me():
                return f'process {number} of {jax.process_count()} {why}'
        return None

    def _reason_of_break(self, error: BaseException) -> str:
        """Why a connection has broken."""
        try:
            time.sleep(BEAT)  # who has ended for a reason says it
            reason = self._reason()
        except jax.errors.JaxRuntimeError:
            reason = LOST_FIRST
        return reason or f'another process of the run is lost ({" ".join(str(error).split())})'

    def _tell(self, why: str) -> None:
        """Tells the others that this process ends. Process 0 stays until they have heard it."""
        try:
            self._say(_me(), f'on {socket.gethostname()} has ended ({" ".join(why.split())})')
            deadline = time.monotonic() + 2 * BEAT + GRACE
            while jax.process_index() == 0 and time.monotonic() < deadline:
                if len(self._store.key_value_dir_get(ENDS)) == jax.process_count():
                    break
                time.sleep(BEAT / 10)
        except jax.errors.JaxRuntimeError:
            pass  # there is nobody left to tell

    def _say(self, number: str, why: str) -> None:
        self._store.key_value_set(f'{ENDS}/{number}', why, allow_overwrite=True)


def leave(status: int) -> None:
    """Ends a process at once that has failed among others, which JAX would have it wait for."""
    if _failed.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(what: str) -> None:
    """Returns when all processes have come here; they must come to the same places in turn."""
    if (store := _store()) is not None:
        store.wait_at_barrier(f'star_jax/{next(_numbers)}/{what}', DAY)


def first_alone(act: Callable[[], Any]) -> None:
    """`act` in process 0, then in all others: what is shared is then there, what is not they do."""
    if jax.process_index() == 0:
        act()
    wait('what process 0 does first')
    if jax.process_index() != 0:
        act()


def of_first(text: str) -> str:
    """The text of process 0, in all of them; they must come to the same places in turn."""
    store = _store()
    if store is None:
        return text
    key = f'star_jax/text/{next(_numbers)}'
    if jax.process_index() == 0:
        store.key_value_set(key, text)
    return store.blocking_key_value_get(key, DAY)


def check_same(what: str, text: str) -> None:
    """Raises UserError in a process whose text is not that of process 0."""
    if of_first(text) != text:
        raise UserError(
            f'the {what} of process {_me()} are not those of process 0: start all with the same '
            'command on the same files'
        )


def _store() -> Any:
    """Where processes leave each other words, in process 0; None of a process alone."""
    return distributed.global_state.client


def _me() -> str:
    return str(jax.process_index())


def _others() -> list[str]:
    return [str(n) for n in range(jax.process_count()) if n != jax.process_index()]
