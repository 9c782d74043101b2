"""How does a signal stop a run?

A signal requests that the trainer stops after its step. A kill needs none of this: the files on
disk are complete at any moment (see `checkpoint/training.py`).
"""

import contextlib
import os
import signal
import threading
import time
from collections import deque

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed
INTERRUPTED = 130  # exit status after a second signal, as shells have it for ctrl-c
ONE_SIGNAL = 0.5  # seconds in which signals count as one: `timeout` sends its own twice
NOTICE = b'\nstopping after this step and saving; once more stops at once\n'
DELAY = 2  # steps until an answer is read: as many as are dispatched (`logger.STEPS_AHEAD`)


class Stop:
    """A context in which SIGNALS are requests to stop; a second one ends the process at once.

    A thread reads the signals, because Python's own handlers wait while the main thread compiles or
    waits for a device. Only the main thread may set handlers: in another thread this catches
    nothing. A signal that is ignored (`nohup`, `&` in a script) stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._answers: deque[jax.Array] = deque()

    def agreed(self) -> bool:
        """Whether to stop before the next step: the same answer in all processes of a run.

        A preemption notice may come to one process first, so the processes combine their requests
        before every step, and read the result `DELAY` steps later, when nothing needs to wait.
        """
        if jax.process_count() == 1:
            return self.requested
        self._answers.append(_any_of(self.requested))
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
        self.requested = True

    def _read_signals(self, read_end: int) -> None:
        """Reads the number of every signal as it arrives, until the pipe is closed."""
        first = None
        while number := os.read(read_end, 1):
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                self.requested = True
                with contextlib.suppress(OSError):
                    os.write(2, NOTICE)
            elif time.monotonic() - first > ONE_SIGNAL:
                os._exit(INTERRUPTED)


def _any_of(flag: bool) -> jax.Array:
    """Whether the flag of any process is set, not yet computed."""
    mesh = Mesh(jax.devices(), ('devices',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('devices'))
    flags = np.full(jax.local_device_count(), flag)
    return _any(jax.make_array_from_process_local_data(sharding, flags))


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return flags.any()
