"""Does an unattended training on TPUs end as its user wants, whatever happens to its machines?

The cloud is simulated: a queued resource, its run and a clock. `launch_test.py` walks through the
same events with the scripts and stub commands.
"""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import star_jax
from star_jax.parallel import tpu_watch

MINUTE = 60
REQUEST = tpu_watch.Request(create=('v5p-8', '--spot'), train=('c.py', '--out', '/o'), out='/o')


class Cloud:
    """A queued resource and a run on it, at a time that passes when the watch sleeps or acts.

    Attributes:
        actions: what changed the resource or the run, in order.
        longest_idle: most seconds for which a slice cost money without a run, unless an action
            ended it.
        events: time -> what happens then.
        steps: steps per minute of the run.
        ends: how each start of the run ends: (minutes after its start, exit status); the last is
            used again.
    """

    def __init__(self) -> None:
        self.time, self.state, self.run = 0.0, '', 'absent'
        self.actions: list[str] = []
        self.said: list[str] = []
        self.events: list[tuple[float, object]] = []
        self.failing: dict[str, int] = {}  # action -> how often it fails
        self.reachable = self.others_run = self.answers = True
        self.ends = [(10_000, 0)]
        self.step = self.steps_per_minute = 0
        self.longest_idle = self.idle = 0.0
        self.starts = 0

    # The clock.

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert self.time < 1e7, 'the watch does not end'
        for _ in range(int(seconds)):
            self._pass_second()

    def _pass_second(self) -> None:
        self.time += 1
        while self.events and self.events[0][0] <= self.time:
            self.events.pop(0)[1]()
        if self.state == 'ACTIVE' and self.run == 'running':
            minutes, status = self.ends[min(self.starts, len(self.ends)) - 1]
            self.step += self.steps_per_minute / 60
            if self.time >= self.started + minutes * MINUTE:
                self.run = f'ended {status}'
        self.idle = self.idle + 1 if self.state == 'ACTIVE' and self.run != 'running' else 0
        self.longest_idle = max(self.longest_idle, self.idle)

    def at(self, minute: float, event) -> None:
        self.events = sorted([*self.events, (minute * MINUTE, event)], key=lambda pair: pair[0])

    def preempt(self) -> None:
        self.state, self.run = 'SUSPENDED', 'absent'

    def set(self, **fields) -> None:
        vars(self).update(fields)

    # The actions of launch/tpu.sh.

    def tpu(self, action: str, *words: str) -> tuple[int, str]:
        if action == 'state':
            assert words == ('/o',)
            if not self.answers:
                return 1, ''
            if self.state != 'ACTIVE':
                return 0, f'{self.state}\n'
            step = f' step {int(self.step)}' if self.step >= 1 and self.run != 'absent' else ''
            return 0, f'ACTIVE {self.run}{step}\n' if self.reachable else 'ACTIVE'
        if action == 'states':
            return 1, f'{self.run}\n' if self.others_run else ''
        if action == 'last':
            return 0, 'why\n'
        self.actions.append(action)
        if self.failing.get(action):
            self.failing[action] -= 1
            return 1, ''
        if action in ('install', 'stop', 'start') and not self.reachable:
            return 255, ''
        if action == 'create':
            assert words == REQUEST.create and not self.state
            self.state, self.run = 'ACTIVE', 'absent'
        elif action == 'delete':
            self.state, self.run = '', 'absent'
        elif action == 'install':
            self.sleep(2 * MINUTE)
            self.run = 'nothing' if self.run == 'absent' else self.run
        elif action == 'start':
            assert words == REQUEST.train
            self.run, self.started = 'running', self.time
            self.starts += 1
        return 0, ''


@pytest.fixture
def cloud() -> Cloud:
    return Cloud()


def watch(cloud: Cloud) -> None:
    tpu_watch.Watch(REQUEST, cloud.tpu, cloud, cloud.said.append).run()


def assert_given_up(cloud: Cloud, sentence: str) -> None:
    with pytest.raises(tpu_watch.GivenUpError, match=sentence) as caught:
        watch(cloud)
    assert cloud.state == '' and caught.value.log == 'why\n'


START = ['install', 'stop', 'start']


def test_run_completes_and_the_resource_is_deleted(cloud):
    cloud.ends = [(60, 0)]
    watch(cloud)
    assert cloud.actions == ['create', *START, 'delete'] and cloud.state == ''
    assert cloud.time < 65 * MINUTE and 'complete' in cloud.said[-1]


def test_creation_that_is_refused_after_a_preemption_is_tried_again(cloud):
    cloud.ends = [(60, 0)]
    cloud.at(30, cloud.preempt)
    cloud.at(30, lambda: cloud.failing.update(create=2))
    watch(cloud)
    assert cloud.actions == ['create', *START, 'delete', *['create'] * 3, *START, 'delete']


def test_first_creation_that_is_refused_ends_the_watch(cloud):
    cloud.failing['create'] = 1
    with pytest.raises(tpu_watch.GivenUpError, match='cannot be created'):
        watch(cloud)
    assert cloud.actions == ['create']


@pytest.mark.parametrize('steps', [0, 100])
@pytest.mark.parametrize('count', [5, 12])
def test_preemptions_are_no_failures(cloud, steps, count):
    cloud.steps_per_minute = steps
    cloud.ends = [(30, 0)]
    for number in range(count):
        cloud.at(20 * (number + 1), cloud.preempt)
    watch(cloud)
    assert cloud.starts == count + 1 and cloud.state == '' and cloud.longest_idle < 5 * MINUTE


def test_preemption_while_installing_is_no_failure(cloud):
    """The VMs disappear first, and the state of the resource follows."""
    cloud.ends = [(30, 0)]
    for number in range(8):
        cloud.at(6 * number, lambda: cloud.failing.update(install=9))
        cloud.at(6 * number + 3, lambda: cloud.failing.clear())
        cloud.at(6 * number + 3, cloud.preempt)
    watch(cloud)
    assert cloud.state == '' and cloud.longest_idle < 5 * MINUTE


def test_failures_with_progress_between_are_forgotten(cloud):
    cloud.ends = [(10, 1)] * 12 + [(10, 0)]
    cloud.steps_per_minute = 100
    watch(cloud)
    assert cloud.starts == 13 and cloud.longest_idle < 5 * MINUTE


@pytest.mark.parametrize(
    ('minutes', 'status', 'starts'), [(0.5, 1, 5), (10, 1, 5), (0.5, 2, 1), (10, 143, 5)]
)
def test_failures_without_progress_end_the_watch(cloud, minutes, status, starts):
    cloud.ends = [(minutes, status)]
    assert_given_up(cloud, rf'\(ended {status}\)')
    assert cloud.starts == starts and cloud.actions.count('delete') == 1


def test_progress_before_the_first_look_is_none(cloud):
    """A run that continues from an old checkpoint has made no progress."""
    cloud.step, cloud.ends = 1000, [(3, 1)]
    assert_given_up(cloud, 'without a new checkpoint')
    assert cloud.starts == 5


def test_preemptions_do_not_hide_failures(cloud):
    cloud.ends = [(3, 1)]
    for minute in (12, 30):
        cloud.at(minute, cloud.preempt)
    assert_given_up(cloud, 'without a new checkpoint')
    assert cloud.starts <= 7


def test_run_goes_on_if_its_host_answers_again_within_ten_minutes(cloud):
    cloud.ends = [(60, 0)]
    cloud.others_run = False
    cloud.at(20, lambda: cloud.set(reachable=False))
    cloud.at(30, lambda: cloud.set(reachable=True))
    watch(cloud)
    assert cloud.actions == ['create', *START, 'delete'] and cloud.time < 65 * MINUTE


def test_run_goes_on_while_another_host_reports_it(cloud):
    cloud.ends = [(200, 0)]
    cloud.at(20, lambda: cloud.set(reachable=False))
    cloud.at(120, lambda: cloud.set(reachable=True))
    watch(cloud)
    assert cloud.actions == ['create', *START, 'delete']
    assert any('another one reports' in sentence for sentence in cloud.said)


def test_slice_that_does_not_answer_is_replaced_after_ten_minutes(cloud):
    """One host fails with its machine; the other processes end with it."""
    cloud.ends = [(10_000, 0), (60, 0)]
    cloud.others_run = False
    cloud.at(20, lambda: cloud.set(reachable=False, run='ended 1'))
    cloud.at(40, lambda: cloud.set(reachable=True))
    watch(cloud)
    assert cloud.actions[:5] == ['create', *START, 'delete'] and cloud.starts == 2
    assert cloud.longest_idle <= 11 * MINUTE


def test_slices_that_never_answer_end_the_watch(cloud):
    cloud.set(reachable=False, others_run=False)
    assert_given_up(cloud, 'unreachable')
    assert cloud.actions == ['create', 'delete'] * 5 and cloud.time < 65 * MINUTE


def test_start_of_a_new_slice_waits_until_its_host_answers(cloud):
    cloud.set(reachable=False, others_run=False, ends=[(30, 0)])
    cloud.at(9.5, lambda: cloud.set(reachable=True))
    watch(cloud)
    assert cloud.actions == ['create', *START, 'delete']


@pytest.mark.parametrize('run', ['absent', 'nothing'])
def test_run_that_is_lost_after_its_start_is_started_again(cloud, run):
    cloud.ends = [(60, 0)]
    cloud.at(20, lambda: cloud.set(run=run))
    watch(cloud)
    assert cloud.actions == ['create', *START, *START, 'delete']
    assert cloud.longest_idle <= 5 * MINUTE


def test_run_that_is_never_there_after_its_start_ends_the_watch(cloud):
    for second in range(1, 100_000, 30):
        cloud.events.append((second, lambda: cloud.set(run='absent')))
    assert_given_up(cloud, 'absent')
    assert cloud.starts == 5 and cloud.time < 30 * MINUTE


def test_slice_on_which_nothing_can_be_installed_is_replaced(cloud):
    def hang(action: str, *words: str) -> tuple[int, str]:
        if action == 'install' and len(cloud.actions) < 3:
            cloud.actions.append('hung')
            cloud.sleep(tpu_watch.LIMITS['install'])
            return -9, ''
        return real(action, *words)

    real, cloud.tpu, cloud.ends = cloud.tpu, hang, [(60, 0)]
    watch(cloud)
    assert cloud.actions == ['create', 'hung', 'delete', 'create', *START, 'delete']
    assert cloud.longest_idle <= 12 * MINUTE


def test_installation_that_fails_always_ends_the_watch(cloud):
    cloud.failing['install'] = 99
    assert_given_up(cloud, 'without a new checkpoint')
    assert cloud.actions == ['create', *['install'] * 5, 'delete'] and cloud.time < 10 * MINUTE


def test_nothing_is_done_while_the_cloud_does_not_answer(cloud):
    cloud.ends = [(300, 0)]
    cloud.at(20, lambda: cloud.set(answers=False))
    cloud.at(200, lambda: cloud.set(answers=True))
    watch(cloud)
    assert cloud.actions == ['create', *START, 'delete']
    assert len(cloud.said) < 9  # one sentence per change


def test_deletion_that_fails_is_tried_again(cloud):
    cloud.ends, cloud.failing['delete'] = [(10, 0)], 3
    watch(cloud)
    assert cloud.actions == ['create', *START, *['delete'] * 4] and cloud.state == ''


def test_watch_takes_over_a_run(cloud):
    cloud.set(state='ACTIVE', run='running', started=0, starts=1, ends=[(60, 0)])
    watch(cloud)
    assert cloud.actions == ['delete']
    cloud.set(state='ACTIVE', run='ended 1', starts=0, actions=[])  # of an earlier watch
    watch(cloud)
    assert cloud.actions == [*START, 'delete']


# Without the simulation.


def test_action_that_takes_too_long_is_killed_with_its_children(tmp_path, monkeypatch):
    script = tmp_path / 'tpu.sh'
    script.write_text('printf ACTIVE; sleep 60 & echo $! >"$4"; wait; echo late\n')
    monkeypatch.setattr(tpu_watch, 'SCRIPT', script)
    monkeypatch.setattr(tpu_watch, 'LIMIT', 1)
    child = tmp_path / 'child'
    start = time.monotonic()
    status, output = tpu_watch.run_action('d16', 'z', 'state', str(child))
    assert (status, output) == (-9, 'ACTIVE') and time.monotonic() - start < 30
    listed = ['ps', '-o', 'stat=', '-p', child.read_text().strip()]
    while subprocess.run(listed, capture_output=True, text=True).stdout.strip() not in ('', 'Z'):
        assert time.monotonic() - start < 30


def test_clock_counts_the_seconds_that_it_was_asked_to_sleep(tmp_path, monkeypatch):
    (tmp_path / 'sleep').write_text('#!/bin/sh\n')
    (tmp_path / 'sleep').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    clock = tpu_watch.Clock()
    before = clock.now()
    clock.sleep(60)
    assert 60 <= clock.now() - before < 90


WATCH = """
import sys
from star_jax.parallel import tpu_watch

class Watch:
    def __init__(self, request, tpu, clock, report):
        self.report = report

    def run(self):
        for _ in range(9):
            self.report('the run continues')
        open(sys.argv[1], 'x').close()
        raise tpu_watch.GivenUpError('the run failed')

tpu_watch.Watch = Watch
sys.exit(tpu_watch.main(['d16', 'z', '/o', 'v5p-8', '--', 'c.py', '--out', '/o']))
"""


@pytest.mark.parametrize('outputs', [('stdout',), ('stdout', 'stderr')])
def test_the_watch_goes_on_after_its_reader_has_closed_the_pipe(tmp_path, outputs):
    read, write = os.pipe()
    os.close(read)
    streams = {'stderr': subprocess.PIPE} | dict.fromkeys(outputs, write)
    command = [sys.executable, '-c', WATCH, str(tmp_path / 'done')]
    environment = os.environ | {'PYTHONPATH': str(Path(star_jax.__file__).parents[1])}
    done = subprocess.run(command, env=environment, text=True, check=False, **streams)
    os.close(write)
    assert (tmp_path / 'done').exists() and done.returncode == 2
    assert done.stderr in (None, 'tpu_watch.sh: the run failed\n')


def test_ctrl_c_prints_what_stays(monkeypatch, capsys):
    def interrupt(watch):
        raise KeyboardInterrupt

    monkeypatch.setattr(tpu_watch.Watch, 'run', interrupt)
    words = ('d16', 'z', '/o', 'v5p-8', '--spot', '--', 'c.py', '--out', '/o')
    assert tpu_watch.main(words) == 130
    line = capsys.readouterr().err
    assert 'may cost money' in line and 'launch/tpu.sh delete d16 z' in line


def test_old_pythons_without_packages_can_run_the_watch():
    package = Path(star_jax.__file__).parent
    for name in ('__init__.py', 'errors.py', 'parallel/__init__.py', 'parallel/tpu_watch.py'):
        tree = ast.parse((package / name).read_text(), feature_version=(3, 9))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        imported = {
            name.partition('.')[0]
            for node in top
            for name in (
                [node.module or '']
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        }
        assert imported <= {*sys.stdlib_module_names, 'star_jax'}
