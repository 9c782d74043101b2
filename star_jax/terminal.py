"""How does a command handle closed pipes, signals while it loads, and warnings?

Its functions are for a process that runs one command. It imports small modules only: an error or a
signal during imports that precede these settings may end in a traceback.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import time
import types
import unicodedata
from collections.abc import Callable, Mapping

LONGEST_CLEANING = 60  # seconds
LONGEST_FLUSH = 1
CONTROLS = ('Cc', 'Cs', 'Zl', 'Zp')  # Unicode categories of characters that are not text
REORDERING = frozenset('\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')


def printable(text: str, keep: str = '') -> str:
    """The text, with control characters and those that reorder a line as escape sequences.

    A name that comes from a file could otherwise clear the terminal, hide text or forge a line.

    Args:
        text: any text.
        keep: control characters that stay, such as line feeds.
    """
    if text.isascii() and text.isprintable():
        return text
    return ''.join(
        character
        if character in keep or not _is_control(character)
        else character.encode('unicode_escape').decode()
        for character in text
    )


def write_line(text: object) -> None:
    """Writes one line to stdout, in which control characters are escaped."""
    sys.stdout.write(printable(str(text)) + '\n')


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in CONTROLS or character in REORDERING


class _WarningHandler(logging.Handler):
    """Passes every warning of this package to a function."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(record.getMessage())
        except Exception:
            self.handleError(record)


def redirect_warnings(write: Callable[[str], object]) -> None:
    """Passes every warning of this package to `write`, and to no other handler."""
    log = logging.getLogger(__package__)
    log.addHandler(_WarningHandler(write))
    log.propagate = False  # libraries add handlers to the root logger


class _Stream(io.FileIO):
    """A file or pipe; what is written after the first error is discarded.

    Attributes:
        error: the error, unless the reader has closed the pipe.
        discards: whether there was an error.
    """

    error: OSError | None = None
    discards = False

    def write(self, content: bytes | memoryview) -> int:
        if self.discards:
            return len(content)
        try:
            return super().write(content)
        except OSError as error:
            self.discards = True
            self.error = None if isinstance(error, BrokenPipeError) else error
            return len(content)


def ignore_broken_pipes() -> None:
    """Discards output that cannot be written, and continues; `flush` returns the error.

    A run must not lose its model because the reader of its log has exited (`| head -1`), the disk
    of the log is full, or the caller has closed the output (`>&-`).
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        _open_if_closed(number, name)
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # replaced by the caller
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        raw = _Stream(stream.fileno(), 'wb', closefd=False)
        options = {'encoding': stream.encoding, 'errors': stream.errors}
        options |= {field: getattr(stream, field) for field in ('line_buffering', 'write_through')}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **options))


def _open_if_closed(number: int, name: str) -> None:
    """Opens a standard stream that the caller has closed, as one that discards everything.

    Otherwise the next file that is opened gets its number, and messages are written into it.
    """
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
    if getattr(sys, name) is None:
        setattr(sys, name, open(number, 'w' if number else 'r', closefd=False))  # noqa: SIM115 (it stays open)


def flush() -> OSError | None:
    """Flushes stdout. Returns the first error of writing to it.

    Without this, the interpreter prints a traceback at exit.
    """
    stream = sys.stdout
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(stream, 'buffer', None), 'raw', None)
    return raw.error if isinstance(raw, _Stream) else None


def exit_on_signals(
    statuses: Mapping[signal.Signals, int],
    line: str,
    clean_up: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """Makes each of these signals clean up, print one line and exit with its status.

    Python's own handler of ctrl-c raises at any point, and half-imported modules turn that into
    other errors. An ignored signal stays ignored. Outside the main thread, which alone may set
    handlers, this does nothing.

    Args:
        statuses: the exit status of each signal.
        line: the line that is printed.
        clean_up: called before the exit.

    Returns:
        A function that restores the previous handlers.
    """

    def end(number: int, _: types.FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # the signal interrupted a write
            flush()
        _exit(statuses[signal.Signals(number)], line, clean_up)

    undo = contextlib.ExitStack()
    if threading.current_thread() is threading.main_thread():
        for number in statuses:
            if signal.getsignal(number) is not signal.SIG_IGN:
                undo.callback(signal.signal, number, signal.signal(number, end))
    return undo.close


def exit_at_once(
    statuses: Mapping[signal.Signals, int], line: str, clean_up: Callable[[], None]
) -> None:
    """Does what `exit_on_signals` does, even while the main thread computes outside of Python.

    Python runs its handlers between two instructions of the main thread, and a compilation is one
    instruction. So a thread reads the numbers of the signals from a pipe.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait(number: int, _: types.FrameType | None) -> None:
        """Keeps the main thread from writing while its temporary files are removed."""
        time.sleep(LONGEST_CLEANING)

    def watch() -> None:
        while number := os.read(reader, 1):
            if signal.getsignal(number[0]) is wait:  # a run that trains has its own handlers
                # The main thread may wait in the middle of a write, which locks the stream.
                flushing = threading.Thread(target=flush, daemon=True)
                flushing.start()
                flushing.join(LONGEST_FLUSH)
                _exit(statuses[signal.Signals(number[0])], line, clean_up)

    threading.Thread(target=watch, daemon=True).start()
    for number in statuses:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, wait)


def _exit(status: int, line: str, clean_up: Callable[[], None]) -> None:
    """Ends the process without waiting for its threads."""
    with contextlib.suppress(OSError):
        clean_up()
    with contextlib.suppress(OSError):
        os.write(2, f'{line}\n'.encode())
    os._exit(status)
