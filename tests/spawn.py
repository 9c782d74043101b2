"""Several real processes of one run on this machine, at an address of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import xla_flags

ROOT = Path(__file__).parents[1]
TIMEOUT = 900  # seconds until processes count as hung, on a busy machine


class Processes:
    """`count` processes of `star-jax ARGUMENTS`, one CPU device each; leaving it kills all.

    Their output goes to `folder/0`, `folder/1`, ... `variables` are set in the environment of
    each.
    """

    def __init__(
        self, arguments: Sequence[str], count: int, folder: Path, **variables: str
    ) -> None:
        self._outputs = [folder / str(number) for number in range(count)]
        command = [sys.executable, '-m', 'star_jax', *arguments]
        common = dict(os.environ) | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
        common['XLA_FLAGS'] = xla_flags.devices(1)
        common['JAX_DEFAULT_MATMUL_PRECISION'] = 'highest'
        common['STAR_JAX_COORDINATOR'] = f'127.0.0.1:{free_port()}'
        common['STAR_JAX_PROCESSES'] = str(count)
        self.processes = []
        for number, path in enumerate(self._outputs):
            env = common | {'STAR_JAX_PROCESS': str(number)} | variables
            with path.open('w') as file:
                self.processes.append(
                    subprocess.Popen(command, env=env, stdout=file, stderr=file, cwd=folder)
                )

    def __enter__(self) -> 'Processes':
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, number: int) -> str:
        return self._outputs[number].read_text()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition is true; fails if a process ends before."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert all(process.poll() is None for process in self.processes), self._outputs_text()
            assert time.monotonic() < deadline, self._outputs_text()
            time.sleep(0.1)

    def signal(self, number: int, sent: signal.Signals) -> None:
        self.processes[number].send_signal(sent)

    def wait(self, seconds: float = TIMEOUT) -> list[int]:
        """The exit statuses; fails if a process does not end within `seconds`."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, self._outputs_text()
            time.sleep(0.1)
        return [process.returncode for process in self.processes]

    def _outputs_text(self) -> str:
        return '\n'.join(f'--- {path.name}\n{path.read_text()}' for path in self._outputs)


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as listener:
        return listener.getsockname()[1]
