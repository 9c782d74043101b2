"""How does a command end well though its reader has left, or a signal comes while it loads?

And how does it tell what is not as it should be, and go on? For a process that is one command and
nothing else. Only small modules are imported here: whatever comes before these settings is in force
may end in a traceback.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Mapping


class _Warnings(logging.Handler):
    """What this package warns of, as a sentence for whoever tells it."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._tell(record.getMessage())
        except Exception:
            self.handleError(record)


def hear_warnings(tell: Callable[[str], object]) -> None:
    """From now on every warning of this package goes to `tell`, and nowhere else."""
    log = logging.getLogger(__package__)
    log.addHandler(_Warnings(tell))
    log.propagate = False  # libraries give the root logger handlers of their own


class _Stream(io.FileIO):
    """Bytes to a file or pipe; where nobody reads them any more, to nobody."""

    deaf = False

    def write(self, content: bytes | memoryview) -> int:
        if self.deaf:
            return len(content)
        try:
            return super().write(content)
        except BrokenPipeError:
            self.deaf = True
            return len(content)


def outlive_readers() -> None:
    """From now on, output that nobody reads (`| head -1`) is dropped, and the work goes on.

    A run shall not lose its model because somebody has seen enough of its log.
    """
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # closed, or somebody's own
            continue
        stream.flush()
        raw = _Stream(stream.fileno(), 'wb', closefd=False)
        options = {'encoding': stream.encoding, 'errors': stream.errors}
        options |= {field: getattr(stream, field) for field in ('line_buffering', 'write_through')}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **options))


def flush() -> OSError | None:
    """Writes what stdout still holds; an error if it could not, and then drops it.

    Left to the interpreter's end, it would be a traceback there.
    """
    stream = sys.stdout
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        raw = getattr(getattr(stream, 'buffer', None), 'raw', None)
        if isinstance(raw, _Stream):
            raw.deaf = True
        return error
    return None


def end_at(statuses: Mapping[signal.Signals, int], said: str) -> Callable[[], None]:
    """From now on each of these signals says one line and ends the process with its status.

    Python's own handler of ctrl-c raises wherever the process is, and half-loaded modules make of
    it what they will. A signal that is ignored stays ignored; called by another thread than the
    main one, which alone may set handlers, this does nothing. Returns what undoes it.
    """

    def end(number: int, _: types.FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # it came in the midst of writing
            flush()
        with contextlib.suppress(OSError):
            os.write(2, f'{said}\n'.encode())
        os._exit(statuses[signal.Signals(number)])

    undo = contextlib.ExitStack()
    if threading.current_thread() is threading.main_thread():
        for number in statuses:
            if signal.getsignal(number) is not signal.SIG_IGN:
                undo.callback(signal.signal, number, signal.signal(number, end))
    return undo.close
