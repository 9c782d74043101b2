"""How does a training run on TPUs unattended, to its end?

    bash launch/tpu_watch.sh NAME ZONE TYPE [OPTIONS OF gcloud] CONFIG --out SHARED/RUN ...

runs this module on the user's machine. Once a minute it checks a queued resource and the run
on it, through the actions of `launch/tpu.sh`, and acts: it creates the resource,
installs, starts the run, replaces a slice that was preempted or no longer answers, and deletes the
resource at the end. A slice costs money from ACTIVE to its deletion, so no wait is unbounded.

That machine may have no package and a Python as old as 3.9: only the standard library is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

INTERVAL = 60  # seconds between two checks
MOST_IDLE = 600  # seconds of a slice without a run, after which it is replaced
MOST_FAILURES = 5  # failures without a new checkpoint between them, after which the watch ends
LIMITS = {'create': 300, 'install': MOST_IDLE, 'start': 300, 'stop': MOST_IDLE, 'delete': 1200}
LIMIT = 120  # seconds of every other action, which only queries
INTERRUPTED = 130  # exit status after ctrl-c, as in shells
SCRIPT = Path(__file__).parents[2] / 'launch' / 'tpu.sh'

LOST = ('SUSPENDED', 'FAILED')  # states of a resource that is deleted and created again
UNKNOWN = 'unknown'  # the cloud did not answer
UNREACHABLE = 'unreachable'  # the first VM did not answer

Tpu = Callable[..., 'tuple[int, str]']


class GivenUpError(Exception):
    """The reason why the watch has ended before the run was complete.

    Attributes:
        log: the end of the run's log.
    """

    def __init__(self, reason: str, log: str = '') -> None:
        super().__init__(reason)
        self.log = log


class Clock:
    """A clock that counts seconds and waits."""

    def __init__(self) -> None:
        self._added = 0.0

    def now(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.monotonic() + self._added

    def sleep(self, seconds: int) -> None:
        """Waits by the command `sleep`, and counts at least the requested seconds."""
        start = time.monotonic()
        subprocess.run(['sleep', str(seconds)], check=True)
        self._added += max(0.0, seconds - (time.monotonic() - start))


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of the user.

    Attributes:
        create: type of the TPU, and options of its creation.
        train: config and options of the run.
        out: folder of the run, which all VMs share.
    """

    create: Sequence[str]
    train: Sequence[str]
    out: str


class Watch:
    """Looks at a resource and its run, and acts, until the run is complete or given up.

    Args:
        request: the arguments of the user.
        tpu: runs an action of `launch/tpu.sh` with its words; returns exit status and output.
        clock: has `now` and `sleep`.
        report: prints a sentence for the user.
    """

    def __init__(
        self, request: Request, tpu: Tpu, clock: Clock, report: Callable[[str], object]
    ) -> None:
        self._request, self._tpu, self._clock, self._report = request, tpu, clock, report
        self._reported: str | None = None  # the last state that was reported
        self._exists = False  # whether this watch has ever found the resource
        self._started = False  # whether the run on this slice was started, or seen running
        self._attempt_failed = False  # whether installing or starting has just failed
        self._stopped = False  # whether the last check found the run stopped
        self._looked = clock.now()
        self._is_idle, self._idle = (
            False,
            0.0,
        )  # at the last check; seconds of a slice without a run
        # Failures since the newest checkpoint; a preemption resets those of the slice.
        self._run_failures = self._slice_failures = 0
        self._step: int | None = None  # step of the newest checkpoint

    def run(self) -> None:
        """Watches until the run is complete and the resource deleted.

        Raises:
            GivenUpError: the run has failed too often or has a mistake, and the resource is
                deleted; or the first request for the resource was refused.
        """
        while not self._check():
            self._clock.sleep(INTERVAL)

    def _check(self) -> bool:
        """Checks once and acts; returns whether the run has ended."""
        now = self._clock.now()
        elapsed, self._looked = now - self._looked, now
        state, run, step = self._state()
        self._note_progress(step)
        current = f'{state} {run}'.strip()
        if current != self._reported:
            self._report(current or 'absent')
            self._reported = current
        if state == UNKNOWN:
            self._is_idle = False  # it is unknown whether the run went on
            return False
        if state == 'ACTIVE' and run != 'running':
            self._idle += elapsed if self._is_idle else 0
            self._is_idle = True
        else:
            self._is_idle, self._idle = False, 0.0
        if state == 'ACTIVE':
            self._exists = True
            return self._check_run(run)
        self._started = self._attempt_failed = self._stopped = False
        if not state:
            self._create()
        elif state in LOST:
            self._slice_failures = 0
            self._delete()  # and create again
        self._exists = True
        return False

    def _check_run(self, run: str) -> bool:
        if run == 'running':
            self._started, self._attempt_failed, self._stopped = True, False, False
        elif run == UNREACHABLE:
            self._wait_for_host()
        elif self._started and run == 'ended 0':
            self._delete_surely()
            self._report('the run is complete, and the resource is deleted')
            return True
        elif self._started and run == 'ended 2':
            self._give_up(f'the arguments of the run have a mistake ({run})')
        elif self._started and run == 'ended 143' and not self._stopped:
            self._stopped = True  # if this is a preemption, the next check shows it
        else:
            if self._started:
                self._run_failures += 1
            elif self._attempt_failed:
                self._slice_failures += 1
            self._check_failures(run)
            if self._attempt_failed and self._idle >= MOST_IDLE:
                self._replace()
            else:
                self._start()
        return False

    def _wait_for_host(self) -> None:
        """The first VM does not answer. As long as another one reports the run, it goes on."""
        if self._idle < MOST_IDLE:
            return
        _, states = self._tpu('states')
        if 'running' in states.split():
            self._report(
                'the first VM does not answer, but another one reports that the run goes on'
            )
            self._idle = 0.0
        else:
            self._slice_failures += 1
            self._check_failures(UNREACHABLE)
            self._replace()

    def _create(self) -> None:
        status, _ = self._tpu('create', *self._request.create)
        if status == 0:
            return
        if not self._exists and self._state()[0] == '':
            raise GivenUpError('the resource cannot be created (the reason is above)')
        self._report(
            'the resource cannot be created now, which costs nothing: the next try follows'
        )

    def _start(self) -> None:
        """Installs and starts the run; a run that is left from before is stopped first."""
        self._started = self._stopped = False
        for words in (('install',), ('stop',), ('start', *self._request.train)):
            status, _ = self._tpu(*words)
            if status:
                self._report(f'{words[0]} has failed: the next try follows')
                self._attempt_failed = True
                return
        self._started, self._attempt_failed = True, False
        self._is_idle, self._idle = False, 0.0

    def _note_progress(self, step: int | None) -> None:
        """Forgets earlier failures if the step of the newest checkpoint has grown."""
        if step is None:
            return
        if self._step is not None and step > self._step:
            self._run_failures = self._slice_failures = 0
        self._step = step if self._step is None else max(step, self._step)

    def _check_failures(self, run: str) -> None:
        if self._run_failures + self._slice_failures >= MOST_FAILURES:
            self._give_up(f'{MOST_FAILURES} failures without a new checkpoint ({run})')

    def _replace(self) -> None:
        self._report(
            f'no run on this slice for {self._idle / 60:.0f} minutes, which cost money: it is '
            'deleted and created again'
        )
        self._delete()

    def _give_up(self, reason: str) -> None:
        """Deletes the resource and raises the reason."""
        self._report(f'{reason}: the resource is deleted')
        _, log = self._tpu('last')
        self._delete_surely()
        raise GivenUpError(f'{reason}; the resource is deleted, and its log ends as above', log)

    def _delete(self) -> None:
        if self._tpu('delete')[0]:
            self._report('the resource cannot be deleted now: the next try follows')

    def _delete_surely(self) -> None:
        """Deletes the resource; returns when the cloud has none, or is deleting it."""
        while True:
            self._delete()
            if self._state()[0] in ('', 'DELETING'):
                return
            self._clock.sleep(INTERVAL)

    def _state(self) -> tuple[str, str, int | None]:
        """State of the resource, '' if there is none, and of the run if the resource is ACTIVE.

        The third is the step of the newest checkpoint: -1 if there is none yet, None if unknown.
        The action prints the first before it queries a VM, which may take too long to answer.
        """
        status, output = self._tpu('state', self._request.out)
        state, _, answer = output.strip().partition(' ')
        if state != 'ACTIVE':
            return UNKNOWN if status else state, '', None
        run, _, step = answer.partition(' step ')
        if run not in ('running', 'nothing', 'absent') and not run.startswith('ended '):
            return state, UNREACHABLE, None
        if step.isdecimal():
            return state, run, int(step)
        return state, run, None if run == 'absent' else -1


def run_action(name: str, zone: str, action: str, *words: str) -> tuple[int, str]:
    """Runs an action of `launch/tpu.sh`, and ends it after its limit.

    Returns:
        Exit status, and the output of an action that only queries.
    """
    asks = action not in LIMITS
    command = ['bash', str(SCRIPT), action, name, zone, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE if asks else None, text=True) as process:
        try:
            output, _ = process.communicate(timeout=LIMITS.get(action, LIMIT))
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            output, _ = process.communicate()
    return process.returncode, output or ''


def _kill(process: int) -> None:
    """Kills a process and those that it started, which may not end with it."""
    listed = subprocess.run(['ps', '-A', '-o', 'pid=,ppid='], stdout=subprocess.PIPE, text=True)
    parents = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found = [process]
    for parent in found:  # the list grows in the loop
        found += [child for child, its_parent in parents if its_parent == parent]
    for number in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def write(stream: TextIO, text: str) -> None:
    """Writes a text, or discards it and all later ones if they cannot be written.

    The reader of the log may have exited; the slice must not stay without a watch.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def main(words: Sequence[str]) -> int:
    """Watches NAME ZONE OUT TYPE [OPTIONS OF gcloud] -- CONFIG [...]; returns the exit status."""
    name, zone, out, *rest = words
    split = rest.index('--')
    request = Request(rest[:split], rest[split + 1 :], out)

    def tpu(action: str, *words: str) -> tuple[int, str]:
        return run_action(name, zone, action, *words)

    def report(sentence: str) -> None:
        line = f'{name}: {sentence}'.encode('unicode_escape').decode()
        write(sys.stdout, f'{time.strftime("%Y-%m-%d %H:%M:%S")} {line}\n')

    try:
        Watch(request, tpu, Clock(), report).run()
    except GivenUpError as error:
        write(sys.stderr, f'{error.log}\ntpu_watch.sh: {error}\n'.lstrip())
        return 2
    except KeyboardInterrupt:
        write(
            sys.stderr,
            'tpu_watch.sh: stopped; the resource stays and may cost money: the same command takes '
            f'over again, and bash launch/tpu.sh delete {name} {zone} ends it\n',
        )
        return INTERRUPTED
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
