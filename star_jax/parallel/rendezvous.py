"""Are all processes of a run started, each number once, before JAX connects them?

JAX itself waits for minutes and then aborts with a stack trace. Here process 0 first listens at the
address that JAX will use. Every other process reports its number there and waits until all have
reported. If that fails, every connected process gets the reason in one sentence.

Process 0 also connects to that address itself. If another process answers, two processes are
number 0, on one machine or on two.
"""

import contextlib
import dataclasses
import secrets
import socket
import threading
import time

from star_jax.errors import UserError

GO = 'go'
RETRY = 0.2  # seconds between two attempts to connect to process 0
MAX_LINE = 4096  # bytes of a message
MESSAGE_TIMEOUT = 5  # seconds for a message to arrive after a connection


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a process to process 0.

    Attributes:
        process: its number.
        processes: the number of processes of the run, as it was started.
        token: distinguishes processes of one number.
    """

    process: int
    processes: int
    token: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))

    def encode(self) -> bytes:
        return f'{self.process} {self.processes} {self.token}\n'.encode()


def meet(host: str, port: int, processes: int, process: int, timeout: float) -> None:
    """Returns in all processes once all have been started.

    Args:
        host: name or address of the machine of process 0.
        port: TCP port on which process 0 listens.
        processes: number of processes of the run.
        process: number of this process, from 0.
        timeout: seconds until processes that have not reported count as missing.

    Raises:
        UserError: a process is missing, two have the same number, the counts differ, or the port
            is in use. Every process that is connected to process 0 raises it.
    """
    report, deadline = Report(process, processes), time.monotonic() + timeout
    if process == 0:
        _collect(host, port, report, deadline)
    else:
        _register(host, port, report, deadline)


def _collect(host: str, port: int, report: Report, deadline: float) -> None:
    """Process 0: receives the reports of all others and answers each with `GO` or an error."""
    try:
        listener = _listen(port)
    except OSError as error:
        answer = _exchange(host, port, report, time.monotonic() + 1)
        raise UserError(
            answer
            or f'process 0 cannot listen at port {port} ({error.strerror}): choose another one'
        ) from error
    answers: list[str | None] = []  # to process 0 itself, if another process has its address
    over = threading.Event()
    threading.Thread(
        target=lambda: answers.append(_exchange(host, port, report, deadline, over)), daemon=True
    ).start()
    links: list[socket.socket] = []
    with listener, contextlib.ExitStack() as stack:
        stack.callback(over.set)
        answer = GO
        try:
            reported = [report.process]
            while len(reported) < report.processes:
                link = stack.enter_context(_accept(listener, reported, report, answers, deadline))
                peer = _receive(link)
                if peer is None or peer == report:
                    continue
                links.append(link)
                _check(peer, reported, report.processes)
                reported.append(peer.process)
        except UserError as error:
            answer = str(error)
            raise
        finally:
            for link in links:
                with contextlib.suppress(OSError):
                    link.sendall(answer.encode() + b'\n')


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(('', port))


def _accept(
    listener: socket.socket,
    reported: list[int],
    report: Report,
    answers: list[str | None],
    deadline: float,
) -> socket.socket:
    """The next connection.

    Raises UserError at the deadline, naming the missing processes, or if another process has
    answered this one.
    """
    listener.settimeout(RETRY)
    while time.monotonic() < deadline:
        if any(answers):
            raise UserError(answers[0])
        with contextlib.suppress(TimeoutError):
            return listener.accept()[0]
    missing = [str(number) for number in range(report.processes) if number not in reported]
    raise UserError(
        f'of {report.processes} processes number {", ".join(missing)} did not come in time: start '
        'all of them, with the same address of process 0'
    )


def _receive(link: socket.socket) -> Report | None:
    """The report of a connection; None if it comes from another program."""
    try:
        link.settimeout(MESSAGE_TIMEOUT)
        process, processes, token = _read_line(link).decode().split()
        return Report(int(process), int(processes), token)
    except (OSError, ValueError):
        return None


def _check(peer: Report, reported: list[int], processes: int) -> None:
    """Raises UserError if a report contradicts process 0 or an earlier report."""
    if peer.processes != processes:
        raise UserError(
            f'process {peer.process} was started as one of {peer.processes} processes, and '
            f'process 0 as one of {processes}: start all with the same number'
        )
    if peer.process in reported:
        raise UserError(
            f'two processes are number {peer.process}: every one of the {processes} needs its '
            'own number, from 0'
        )


def _register(host: str, port: int, report: Report, deadline: float) -> None:
    """Every other process: reports itself and waits for the answer."""
    answer = _exchange(host, port, report, deadline)
    if answer is None:
        raise UserError(
            f'process {report.process} cannot connect to process 0 at {host}:{port}: '
            'start process 0 there, and let its port through'
        )
    if not answer:
        raise UserError(
            f'process 0 at {host}:{port} ended before all processes had started: start all of them'
        )
    if answer != GO:
        raise UserError(f'process 0 at {host}:{port} reports: {answer}')


def _exchange(
    host: str, port: int, report: Report, deadline: float, over: threading.Event | None = None
) -> str | None:
    """Sends a report to process 0 and returns its answer.

    Returns '' if the connection ends without an answer, None if there was no connection by the
    deadline, or until the event `over`.
    """
    over = over or threading.Event()
    while True:
        timeout = max(deadline - time.monotonic(), RETRY)
        try:
            link = socket.create_connection((host, port), timeout)
            break
        except OSError:
            if time.monotonic() + RETRY > deadline or over.wait(RETRY):
                return None
    with link:
        try:
            link.sendall(report.encode())
            link.settimeout(max(deadline - time.monotonic(), 0) + MESSAGE_TIMEOUT)
            answer = _read_line(link).decode(errors='replace')
        except OSError:
            return ''
    if answer.isprintable():
        return answer
    return (
        f'another program answers at {host}:{port}: give the address of process 0 and a free port'
    )


def _read_line(link: socket.socket) -> bytes:
    """The bytes up to the end of the line or of the connection."""
    line = b''
    while not line.endswith(b'\n') and len(line) < MAX_LINE and (more := link.recv(MAX_LINE)):
        line += more
    return line.strip()
