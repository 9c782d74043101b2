"""Is a run of many processes the run of one, whatever happens to them?"""

import dataclasses
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from spawn import Crew, free_port

from star_jax.checkpoint import config, models, weights
from star_jax.errors import RunError, UserError
from star_jax.parallel import hosts, peer_watchdog, rendezvous
from star_jax.training import faults, train
from star_jax.training.run import Pace, Run
from star_jax.training.transformer import TransformerJob

STEPS = 30
SPEED = 'images_per_second'


class Cut(TransformerJob):
    """Is asked to stop in its second step."""

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
    place = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')
    pace = Pace(steps=STEPS, log=1, sample=STEPS, save=3)
    return dataclasses.replace(tiny.STAR, tokenizer=place, ema=0.5, caption_drop=0.2, pace=pace)


@pytest.fixture(scope='module')
def alone(run, tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp('alone')
    assert train.main(run, out)
    return out


def command(run: Run, folder: Path, *options: str) -> list[str]:
    """The arguments of one of several processes that train what `run` says."""
    config.write(folder / 'run.json', run)
    return ['train', str(folder / 'run.json'), '--out', str(folder / 'out'), *options]


def metrics(out: Path) -> list[dict]:
    lines = (out / 'metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != SPEED} for line in lines]


def names(out: Path) -> list[str]:
    """What a run leaves, but for numbers in names."""
    found = (path.relative_to(out).as_posix() for path in out.rglob('*') if path.is_file())
    return sorted({re.sub(r'\d{6,}\.\S+', '', name) for name in found if '/state/' not in name})


def assert_same_run(out: Path, alone: Path) -> None:
    """Losses to rounding, weights as near as the optimizer's roots leave them, the same files."""
    here, there = metrics(out), metrics(alone)
    assert [line.keys() for line in here] == [line.keys() for line in there]
    for key in ('loss', 'validation/loss'):
        ours, theirs = ([line[key] for line in lines if key in line] for lines in (here, there))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    ours, theirs = (weights.flatten(models.read(str(one / 'model')).params) for one in (out, alone))
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-3, err_msg=name)
    assert names(out) == names(alone)


def has_locked(crew: Crew, out: Path) -> bool:
    """Whether these processes have met and taken the folder."""
    lock = out / '.lock'
    return lock.exists() and f'process {crew.processes[0].pid} ' in lock.read_text()


def test_a_run_moves_from_one_process_to_four_and_to_two(run, alone, tmp_path):
    """A tensor axis crosses processes; a signal to one stops them all."""
    out = tmp_path / 'out'
    assert not train.main(run, out, Cut)
    with Crew(command(run, tmp_path, '--mesh.tensor', '2'), 4, tmp_path) as crew:
        crew.wait_for(lambda: has_locked(crew, out))
        crew.signal(1, signal.SIGTERM)
        assert crew.end() == [0] * 4
        assert 'continuing from step 2' in crew.said(0) and 'step 2' not in crew.said(1)
        stopped = int(re.search(r'stopped at step (\d+), saved', crew.said(0))[1])
    assert 2 < stopped < STEPS and (out / 'checkpoints' / str(stopped)).is_dir()
    with Crew(command(run, tmp_path), 2, tmp_path) as crew:
        assert crew.end() == [0, 0]
        assert f'continuing from step {stopped}' in crew.said(0)
    assert_same_run(out, alone)


def test_the_loss_of_a_process_ends_the_other_and_one_goes_on(run, alone, tmp_path):
    out = tmp_path / 'out'
    with Crew(command(run, tmp_path), 2, tmp_path) as crew:
        crew.wait_for((out / 'checkpoints' / '3').is_dir)
        crew.signal(1, signal.SIGKILL)
        assert crew.end(seconds=300) == [1, -signal.SIGKILL]
        said = crew.said(0).splitlines()
    assert re.search('lost.*the same command', said[-1]) and 'Traceback' not in '\n'.join(said)
    assert 3 <= metrics(out)[-1]['step'] < STEPS
    assert train.main(run, out)
    assert_same_run(out, alone)


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
def test_mistakes_in_the_environment_are_told(variables, sentence):
    with pytest.raises(UserError, match=sentence):
        hosts.read_place({f'STAR_JAX_{name}': value for name, value in variables.items()})


def test_the_environment_says_who_this_is():
    given = {'STAR_JAX_COORDINATOR': '[fe80::1]:99', 'STAR_JAX_PROCESSES': '3'}
    place = hosts.read_place(given | {'STAR_JAX_PROCESS': '2'})
    assert place == hosts.Place(host='fe80::1', port=99, processes=3, process=2)
    assert place.coordinator == '[fe80::1]:99'
    assert hosts.read_place({}) is None
    alone = {'STAR_JAX_COORDINATOR': 'a:1', 'STAR_JAX_PROCESSES': '1', 'STAR_JAX_PROCESS': '0'}
    assert hosts.read_place(alone) is None


@pytest.mark.parametrize('tasks, devices', [('1(x4)', [0, 1, 2]), ('1', [0, 1, 2]), ('3', None)])
def test_a_task_alone_on_its_node_takes_all_gpus(monkeypatch, tasks, devices):
    asked = {}
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **settings: asked.update(settings))
    for name, value in {
        'SLURM_NTASKS': '6',
        'SLURM_STEP_NODELIST': 'node[1-2]',
        'SLURM_STEP_TASKS_PER_NODE': tasks,
        'SLURM_GPUS_ON_NODE': '3',
    }.items():
        monkeypatch.setenv(name, value)
    hosts.join()
    assert asked['cluster_detection_method'] == 'slurm'
    assert asked['local_device_ids'] == devices


def call(*calls: tuple[int, int], patience: float = 20) -> list[str]:
    """What processes say that think to be (number, count) at one address: '' if nothing."""
    port, said = free_port(), [''] * len(calls)

    def hold(place: int) -> None:
        number, count = calls[place]
        try:
            rendezvous.hold('127.0.0.1', port, count, number, patience)
        except UserError as error:
            said[place] = str(error)

    threads = [threading.Thread(target=hold, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_all_processes_meet():
    assert call((0, 3), (2, 3), (1, 3)) == ['', '', '']


@pytest.mark.parametrize(
    'calls, patience, sentence',
    [
        ([(0, 3), (1, 3)], 1, 'of 3 processes number 2 did not come'),
        ([(0, 3), (1, 3), (1, 3)], 20, 'two processes are number 1'),
        ([(0, 2), (1, 3)], 20, 'told that there are 3 processes, and process 0 that there are 2'),
        ([(1, 2)], 0.5, 'process 1 cannot reach process 0 at 127.0.0.1'),
    ],
)
def test_who_is_missing_or_wrong_is_told_to_all(calls, patience, sentence):
    assert all(sentence in said for said in call(*calls, patience=patience))


def test_a_port_that_is_taken_is_told():
    with socket.create_server(('', 0)) as taken, pytest.raises(UserError, match='choose another'):
        rendezvous.hold('127.0.0.1', taken.getsockname()[1], 2, 0, 1)


class Store(dict):
    """What processes tell each other, in one."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.items() if key.startswith(folder)]


@pytest.fixture
def store(monkeypatch):
    """That of two processes, of which this is the first."""
    store = Store()
    monkeypatch.setattr(peer_watchdog, '_store', lambda: store)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    for name, seconds in {'BEAT': 0.02, 'GRACE': 0.02, 'SILENCE': 0.5}.items():
        monkeypatch.setattr(peer_watchdog, name, seconds)
    monkeypatch.setattr(peer_watchdog.atexit, 'register', lambda *_: None)
    yield store
    peer_watchdog._failed.clear()


@pytest.fixture
def ends(monkeypatch):
    """How this process would have ended: its last words, and its status."""
    ends = []
    monkeypatch.setattr(peer_watchdog.os, 'write', lambda file, words: ends.append(words.decode()))

    def end(status: int) -> None:
        ends.append(status)
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait()  # for ever, as far as this thread can tell
        raise SystemExit

    monkeypatch.setattr(peer_watchdog.os, '_exit', end)
    return ends


@pytest.mark.parametrize('beats', [True, False])
def test_who_is_silent_is_lost(store, ends, beats):
    with pytest.raises(KeyboardInterrupt), peer_watchdog.Watch():
        for number in range(60):
            if beats:
                store['star_jax/beat/1'] = str(number)
            time.sleep(0.02)
        raise KeyboardInterrupt  # or it would wait for the other
    assert [type(end) for end in ends] == ([] if beats else [str, int])
    if not beats:
        assert 'process 1 of 2 is lost: not heard of' in ends[0] and ends[1] == 1


def test_who_fails_says_why(store, ends):
    with pytest.raises(UserError), peer_watchdog.Watch():
        raise UserError('two\nlines')
    assert 'has ended (two lines)' in store['star_jax/end/0']
    with pytest.raises(SystemExit):
        peer_watchdog.leave(2)
    assert ends == [2]


def test_a_broken_connection_is_put_down_to_who_has_ended(store):
    store['star_jax/end/1'] = 'has ended (its disk is full)'
    told = pytest.raises(RunError, match='process 1 of 2 has ended .its disk is full.; the same')
    with told, peer_watchdog.Watch():
        raise ValueError('Gloo AllGather failed: Connection closed by peer')


def test_a_process_alone_watches_nobody():
    with peer_watchdog.Watch():
        peer_watchdog.wait('nobody')
        peer_watchdog.check_same('settings', 'any')
        peer_watchdog.first_alone(lambda: None)
        assert peer_watchdog.of_first('mine') == 'mine'
    peer_watchdog.leave(2)


def test_a_folder_that_is_not_shared_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(faults, 'SIGHT', 0.1)
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    told = pytest.raises(UserError, match='give an --out that all of them share')
    with told, faults.lock(tmp_path):
        raise AssertionError
