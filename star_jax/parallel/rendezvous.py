"""Are all processes of a run there, each once, before JAX joins them?

JAX itself waits for minutes and then aborts with a stack trace. Here process 0 listens at the
address that it will give to JAX; the others tell their number, wait until everybody is there, and
learn in a sentence if that does not come about.
"""

import contextlib
import socket
import time

from star_jax.errors import UserError

GO = 'go'
PAUSE = 0.2  # seconds between two attempts to reach process 0
LINE = 4096  # bytes that anybody may say
HEARING = 5  # seconds for somebody who has connected to say who he is


def hold(host: str, port: int, processes: int, process: int, patience: float) -> None:
    """Returns in all processes once all are there; a UserError in each that hears why not.

    `patience` in seconds.
    """
    if process == 0:
        _gather(port, processes, time.monotonic() + patience)
    else:
        _report(host, port, processes, process, time.monotonic() + patience)


def _gather(port: int, processes: int, deadline: float) -> None:
    """Hears all others, and tells them to go on or what is wrong."""
    try:
        listener = _listen(port)
    except OSError as error:
        raise UserError(
            f'process 0 cannot listen at port {port} ({error.strerror}): choose another one'
        ) from error
    links: list[socket.socket] = []
    with listener, contextlib.ExitStack() as stack:
        answer = GO
        try:
            numbers: list[int] = []
            while len(numbers) < processes - 1:
                link = stack.enter_context(_accept(listener, numbers, processes, deadline))
                if heard := _hear(link):
                    links.append(link)
                    _check(*heard, numbers, processes)
                    numbers.append(heard[0])
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
    listener: socket.socket, numbers: list[int], processes: int, deadline: float
) -> socket.socket:
    """The next who connects; a UserError naming who has not been heard where nobody does."""
    listener.settimeout(max(deadline - time.monotonic(), 0.01))
    try:
        return listener.accept()[0]
    except TimeoutError:
        missing = [str(number) for number in range(1, processes) if number not in numbers]
        raise UserError(
            f'of {processes} processes number {", ".join(missing)} did not come in time: start '
            'all of them, with the same address of process 0'
        ) from None


def _hear(link: socket.socket) -> tuple[int, int] | None:
    """Which of how many processes somebody says to be; None of who is no process of a run."""
    try:
        link.settimeout(HEARING)
        number, count = map(int, _read_line(link).split())
    except (OSError, ValueError):
        return None
    return number, count


def _check(number: int, count: int, numbers: list[int], processes: int) -> None:
    """Raises UserError where a process does not fit those that have been heard."""
    if count != processes:
        raise UserError(
            f'process {number} was told that there are {count} processes, and process 0 that '
            f'there are {processes}: tell all the same'
        )
    if number in numbers:
        raise UserError(
            f'two processes are number {number}: every one of the {processes} needs its own, from 0'
        )


def _report(host: str, port: int, processes: int, process: int, deadline: float) -> None:
    """Tells process 0 that this one is there, and waits for its answer."""
    where = f'process 0 at {host}:{port}'
    with _connect(host, port, process, deadline) as link:
        try:
            link.sendall(f'{process} {processes}\n'.encode())
            link.settimeout(max(deadline - time.monotonic(), HEARING))
            answer = _read_line(link).decode(errors='replace')
        except OSError:
            answer = ''
    if not answer:
        raise UserError(f'{where} went away before all processes were there: start all of them')
    if answer != GO:
        raise UserError(f'{where} says: {answer}')


def _connect(host: str, port: int, process: int, deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), max(deadline - time.monotonic(), 0.01))
        except OSError as error:
            if time.monotonic() + PAUSE > deadline:
                raise UserError(
                    f'process {process} cannot reach process 0 at {host}:{port} '
                    f'({error.strerror or error}): start process 0 there, and let its port through'
                ) from error
        time.sleep(PAUSE)


def _read_line(link: socket.socket) -> bytes:
    """Up to the end of the line, or of what is said."""
    said = b''
    while not said.endswith(b'\n') and len(said) < LINE and (more := link.recv(LINE)):
        said += more
    return said.strip()
