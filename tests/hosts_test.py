"""Does a run of many processes equal a run of one, even if processes stop or are lost?"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from spawn import ROOT, Processes, free_port

from star_jax.checkpoint import config, models, weights
from star_jax.errors import RunError, UserError
from star_jax.parallel import hosts, peer_watchdog, rendezvous
from star_jax.training import folder_lock, train
from star_jax.training.run import Pace, Run
from star_jax.training.transformer_job import TransformerJob

STEPS = 30
IMPORTS = 90  # seconds
SPEED = 'images_per_second'


class StoppedJob(TransformerJob):
    """A job that receives SIGTERM in its second step."""

    def step(self, step: int, *args) -> tuple:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(step, *args)


@pytest.fixture(scope='module', autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Run:
    tokenizer = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')
    pace = Pace(steps=STEPS, log=1, sample=STEPS, save=3)
    return dataclasses.replace(tiny.STAR, tokenizer=tokenizer, ema=0.5, caption_drop=0.2, pace=pace)


@pytest.fixture(scope='module')
def alone(run, tmp_path_factory) -> Path:
    """The output folder of a run of one process."""
    out = tmp_path_factory.mktemp('alone')
    assert train.main(run, out)
    return out


def command(run: Run, folder: Path, *options: str) -> list[str]:
    """The arguments that train `run` in `folder`, for each of several processes."""
    config.write(folder / 'run.json', run)
    return ['train', str(folder / 'run.json'), '--out', str(folder / 'out'), *options]


def metrics(out: Path) -> list[dict]:
    lines = (out / 'metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != SPEED} for line in lines]


def names(out: Path) -> list[str]:
    """The files that a run leaves, without numbers in their names."""
    paths = (path.relative_to(out).as_posix() for path in out.rglob('*') if path.is_file())
    return sorted({re.sub(r'\d{6,}\.\S+', '', name) for name in paths if '/state/' not in name})


def assert_same_run(out: Path, alone: Path) -> None:
    """Asserts equal losses up to rounding, close parameters, and the same files.

    Parameters differ more than losses: the optimizer divides by a square root.
    """
    here, there = metrics(out), metrics(alone)
    assert [line.keys() for line in here] == [line.keys() for line in there]
    for key in ('loss', 'validation/loss'):
        ours, theirs = ([line[key] for line in lines if key in line] for lines in (here, there))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    ours, theirs = (
        weights.flatten(models.read(str(folder / 'model')).params) for folder in (out, alone)
    )
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-3, err_msg=name)
    assert names(out) == names(alone)


def has_locked(processes: Processes, out: Path) -> bool:
    """Whether these processes have connected and locked the output folder."""
    lock = out / '.lock'
    return lock.exists() and f'process {processes.processes[0].pid} ' in lock.read_text()


@pytest.mark.slow
def test_run_continues_with_four_and_with_two_processes(run, alone, tmp_path):
    """A tensor axis spans processes; a signal to one process stops all."""
    out = tmp_path / 'out'
    assert not train.main(run, out, StoppedJob)
    with Processes(command(run, tmp_path, '--mesh.tensor', '2'), 4, tmp_path) as processes:
        processes.wait_for(lambda: has_locked(processes, out))
        processes.signal(1, signal.SIGTERM)
        assert processes.wait() == [0] * 4
        assert 'continuing from step 2' in processes.output(0) and 'step 2' not in processes.output(
            1
        )
        stopped = int(re.search(r'stopped at step (\d+), saved', processes.output(0))[1])
    assert 2 < stopped < STEPS and (out / 'checkpoints' / str(stopped)).is_dir()
    with Processes(command(run, tmp_path), 2, tmp_path) as processes:
        assert processes.wait() == [0, 0]
        assert f'continuing from step {stopped}' in processes.output(0)
    assert_same_run(out, alone)


@pytest.mark.slow
def test_lost_process_ends_the_other_and_one_continues(run, alone, tmp_path):
    out = tmp_path / 'out'
    with Processes(command(run, tmp_path), 2, tmp_path) as processes:
        processes.wait_for((out / 'checkpoints' / '3').is_dir)
        processes.signal(1, signal.SIGKILL)
        assert processes.wait(seconds=300) == [1, -signal.SIGKILL]
        output = processes.output(0)
    assert (
        re.search('lost.*the same command', output.splitlines()[-1]) and 'Traceback' not in output
    )
    assert 3 <= metrics(out)[-1]['step'] < STEPS
    assert train.main(run, out)
    assert_same_run(out, alone)


def test_two_processes_of_number_0_end_within_a_minute(run, tmp_path):
    """A minute without the imports, for which a busy machine gets more time."""
    with Processes(command(run, tmp_path), 2, tmp_path, STAR_JAX_PROCESS='0') as processes:
        assert processes.wait(seconds=60 + IMPORTS) == [2, 2]
        for number in range(2):
            (line,) = processes.output(number).splitlines()
            assert 'two processes are number 0: every one of the 2 needs its own' in line


JAX_STORE = """
import jax
from spawn import free_port
from star_jax.parallel import peer_watchdog

jax.distributed.initialize(
    f'127.0.0.1:{free_port()}', 1, 0, cluster_detection_method='deactivate'
)
with peer_watchdog.PeerWatchdog():
    assert peer_watchdog.broadcast_text('text') == 'text'
    peer_watchdog.check_same('settings', 'text')
    store = peer_watchdog._key_value_store()
    store.key_value_set('a/b', 'c', allow_overwrite=True)
    assert store.key_value_dir_get('a') == [('a/b', 'c')]
print('found')
"""


def test_jax_has_the_key_value_store_where_it_is_imported_from():
    """Fails if a version of JAX moves it: it is the only import of a private module."""
    done = subprocess.run(
        [sys.executable, '-c', JAX_STORE],
        env=dict(os.environ) | {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
    )
    assert done.stdout == 'found\n', done.stderr


def test_several_processes_need_the_key_value_store(monkeypatch):
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(peer_watchdog, '_jax_state', None)
    with pytest.raises(RunError, match='install a version of JAX that setup.py names'):
        peer_watchdog.PeerWatchdog()


@pytest.mark.parametrize(
    'variables, sentence',
    [
        ({'COORDINATOR': 'a:1'}, 'PROCESSES and STAR_JAX_PROCESS is not'),
        ({'COORDINATOR': 'a', 'PROCESSES': '2', 'PROCESS': '0'}, "'a', expected host:port"),
        ({'COORDINATOR': 'a:70000', 'PROCESSES': '2', 'PROCESS': '0'}, 'expected host:port'),
        ({'COORDINATOR': 'a:1', 'PROCESSES': 'two', 'PROCESS': '0'}, "PROCESSES is 'two'"),
        ({'COORDINATOR': 'a:1', 'PROCESSES': '2', 'PROCESS': '2'}, 'PROCESS=2 .*PROCESSES=2'),
        ({'COORDINATOR': 'a:1', 'PROCESSES': '0', 'PROCESS': '0'}, 'one or more'),
    ],
)
def test_read_address_refuses_invalid_variables(variables, sentence):
    with pytest.raises(UserError, match=sentence):
        hosts.read_address({f'STAR_JAX_{name}': value for name, value in variables.items()})


def test_read_address_parses_the_variables():
    variables = {'STAR_JAX_COORDINATOR': '[fe80::1]:99', 'STAR_JAX_PROCESSES': '3'}
    address = hosts.read_address(variables | {'STAR_JAX_PROCESS': '2'})
    assert address == hosts.ProcessAddress(host='fe80::1', port=99, processes=3, process=2)
    assert address.coordinator == '[fe80::1]:99'
    assert hosts.read_address({}) is None
    alone = {'STAR_JAX_COORDINATOR': 'a:1', 'STAR_JAX_PROCESSES': '1', 'STAR_JAX_PROCESS': '0'}
    assert hosts.read_address(alone) is None


@pytest.mark.parametrize('tasks, devices', [('1(x4)', [0, 1, 2]), ('1', [0, 1, 2]), ('3', None)])
def test_connect_gives_all_gpus_to_a_task_alone_on_its_node(monkeypatch, tasks, devices):
    settings = {}
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **options: settings.update(options))
    for name, value in {
        'SLURM_NTASKS': '6',
        'SLURM_STEP_NODELIST': 'node[1-2]',
        'SLURM_STEP_TASKS_PER_NODE': tasks,
        'SLURM_GPUS_ON_NODE': '3',
    }.items():
        monkeypatch.setenv(name, value)
    hosts.connect()
    assert settings['cluster_detection_method'] == 'slurm'
    assert settings['local_device_ids'] == devices


def meet(*calls: tuple[int, int], timeout: float = 20) -> list[str]:
    """The errors of processes started as (process, processes) at one address, '' for none."""
    port, errors = free_port(), [''] * len(calls)

    def call(index: int) -> None:
        process, processes = calls[index]
        try:
            rendezvous.meet('127.0.0.1', port, processes, process, timeout)
        except UserError as error:
            errors[index] = str(error)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_meet_returns_in_all_processes():
    assert meet((0, 3), (2, 3), (1, 3)) == ['', '', '']


@pytest.mark.parametrize(
    'calls, timeout, sentence',
    [
        ([(0, 3), (1, 3)], 1, 'of 3 processes number 2 did not come'),
        ([(0, 3), (1, 3), (1, 3)], 20, 'two processes are number 1'),
        ([(0, 2), (0, 2)], 20, 'two processes are number 0'),
        (
            [(0, 2), (1, 3)],
            20,
            'process 1 was started as one of 3 processes, and process 0 as one of 2',
        ),
        ([(1, 2)], 0.5, 'process 1 cannot connect to process 0 at 127.0.0.1'),
    ],
)
def test_meet_ends_all_processes_with_the_same_error(calls, timeout, sentence):
    assert all(sentence in error for error in meet(*calls, timeout=timeout))


def test_meet_ends_processes_of_number_0_on_two_machines(monkeypatch):
    """Each listens on its own machine: 127.0.0.1, the address of process 0, or 127.0.0.2."""
    machines = iter(('127.0.0.1', '127.0.0.2'))
    monkeypatch.setattr(
        rendezvous, '_listen', lambda port: socket.create_server((next(machines), port))
    )
    errors = meet((0, 2), (0, 2))
    assert all('two processes are number 0' in error for error in errors)


def test_meet_refuses_a_port_that_is_in_use():
    with socket.create_server(('', 0)) as taken, pytest.raises(UserError, match='choose another'):
        rendezvous.meet('127.0.0.1', taken.getsockname()[1], 2, 0, 1)


class Store(dict):
    """A key-value store within one process."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.items() if key.startswith(folder)]


@pytest.fixture
def store(monkeypatch):
    """The key-value store of two processes, of which this is process 0."""
    store = Store()
    monkeypatch.setattr(peer_watchdog, '_key_value_store', lambda: store)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    for name, seconds in {'HEARTBEAT': 0.02, 'GRACE': 0.02, 'LOST_AFTER': 0.5}.items():
        monkeypatch.setattr(peer_watchdog, name, seconds)
    monkeypatch.setattr(peer_watchdog.atexit, 'register', lambda *_: None)
    yield store
    peer_watchdog._failed.clear()


@pytest.fixture
def ends(monkeypatch):
    """How this process would have ended: its last line, then its exit status."""
    ends = []
    monkeypatch.setattr(peer_watchdog.os, 'write', lambda file, line: ends.append(line.decode()))

    def end(status: int) -> None:
        ends.append(status)
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait()  # for ever
        raise SystemExit

    monkeypatch.setattr(peer_watchdog.os, '_exit', end)
    return ends


@pytest.mark.parametrize('alive', [True, False])
def test_watchdog_ends_a_run_whose_peer_sends_no_heartbeat(store, ends, alive):
    with pytest.raises(KeyboardInterrupt), peer_watchdog.PeerWatchdog():
        for count in range(60):
            if alive:
                store['star_jax/heartbeat/1'] = str(count)
            time.sleep(0.02)
        raise KeyboardInterrupt  # or it would wait for the other
    assert [type(end) for end in ends] == ([] if alive else [str, int])
    if not alive:
        assert 'process 1 of 2 is lost: no heartbeat for' in ends[0] and ends[1] == 1


def test_watchdog_records_the_error_of_its_process(store, ends):
    with pytest.raises(UserError), peer_watchdog.PeerWatchdog():
        raise UserError('two\nlines')
    assert 'has ended (two lines)' in store['star_jax/exit/0']
    with pytest.raises(SystemExit):
        peer_watchdog.exit_if_failed(2)
    assert ends == [2]


def test_watchdog_explains_a_broken_connection_by_the_exit_of_a_peer(store):
    store['star_jax/exit/1'] = 'has ended (its disk is full)'
    error = pytest.raises(RunError, match='process 1 of 2 has ended .its disk is full.; the same')
    with error, peer_watchdog.PeerWatchdog():
        raise ValueError('Gloo AllGather failed: Connection closed by peer')


def test_watchdog_does_nothing_in_a_process_alone():
    with peer_watchdog.PeerWatchdog():
        peer_watchdog.barrier('alone')
        peer_watchdog.check_same('settings', 'text')
        peer_watchdog.first_then_others(lambda: None)
        assert peer_watchdog.broadcast_text('text') == 'text'
    peer_watchdog.exit_if_failed(2)


def test_lock_refuses_a_folder_that_is_not_shared(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_lock, 'FILE_DELAY', 0.1)
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    error = pytest.raises(UserError, match='give an --out that all processes share')
    with error, folder_lock.lock(tmp_path):
        raise AssertionError
