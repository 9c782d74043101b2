"""After a signal, a kill, damage or a full disk: is the outcome that of an undisturbed run?"""

import dataclasses
import errno
import fcntl
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import xla_flags

from star_jax import cli, image_io
from star_jax.checkpoint import config, models, weights
from star_jax.checkpoint.training import UNFINISHED, Checkpoints
from star_jax.console import Console
from star_jax.data.folder import Folder
from star_jax.errors import RunError, UserError
from star_jax.nn.discriminators import PatchGAN
from star_jax.training import folder_lock, logger, stop_signals, train, trainer
from star_jax.training.folder_lock import lock
from star_jax.training.full_disk import disk_watched
from star_jax.training.objective import Adversary, Objective
from star_jax.training.run import Pace
from star_jax.training.state import TrainState
from star_jax.training.stop_signals import Stop
from star_jax.training.tokenizer_job import TokenizerJob

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds until a run is taken for hung, on a busy machine
GAN = 'train-tokenizer gan'  # a command, and a kind of its run
LITTLE = 2**15  # bytes: enough for what a short run reports, too little for its checkpoint
PACE = Pace(steps=14, log=5, sample=6, save=5)


def no_event(name: str, step: int) -> None:
    """A run without faults."""


class Examples(list):
    """A set of examples, as far as a run compares it."""

    def fingerprint(self) -> str:
        return str(self)


@jax.jit
def tiny_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    x = state.params['x'] * 1.1 + batch
    state = state.replace(step=state.step + 1, params={'x': x})
    return state, {'loss': x.mean(), 'other': x[0] / 3}


class TinyJob:
    """A job with almost no work.

    Args:
        on_event: called with the name of each method of a job and the step.
        poisoned: the metric or array that becomes nan at step `bad`.
        bad: the step, counted from 1 (0: none).
    """

    source = Examples('abc')
    base = ''

    def __init__(
        self,
        on_event: Callable[[str, int], None] = no_event,
        poisoned: str = '',
        bad: int = 0,
    ) -> None:
        self.run = dataclasses.replace(tiny.TOKENIZER, pace=PACE)
        self._on_event, self._poisoned, self._bad = on_event, poisoned, bad

    def summary(self) -> dict[str, str]:
        return {}

    def abstract(self) -> TrainState:
        return jax.eval_shape(_begin)

    def init(self) -> TrainState:
        self._on_event('init', 0)
        return _begin()

    def batches(self, step: int) -> Iterator[jax.Array]:
        while True:
            self._on_event('batch', step)
            yield jnp.float32(step)
            step += 1

    def step(
        self, step: int, state: TrainState, batch: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        self._on_event('step', step)
        state, metrics = tiny_step(state, batch)
        if step + 1 == self._bad and self._poisoned in metrics:
            metrics[self._poisoned] = jnp.float32(jnp.nan)
        elif step + 1 == self._bad:
            state = state.replace(params={'x': state.params['x'] * jnp.nan})
        return state, metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        self._on_event('evaluate', int(state.step))
        return {'validation/loss': float(state.params['x'][1])}

    def compile_grid(self) -> int:
        self._on_event('compile_grid', 0)
        return 3 * 2**20

    def sample_grid(self, state: TrainState) -> np.ndarray:
        self._on_event('sample_grid', int(state.step))
        return np.zeros((4, 4, 3), np.uint8)

    def export(self, state: TrainState, folder: Path) -> None:
        self._on_event('export', int(state.step))
        folder.mkdir(exist_ok=True)
        np.save(folder / 'x.npy', np.asarray(state.params['x']))


def _begin() -> TrainState:
    return TrainState(jnp.int32(0), params={'x': jnp.arange(3.0)}, ema=None, opt=())


class SlowJob(TinyJob):
    """A job with a larger state and slower steps, so that a full disk interrupts it."""

    def __init__(self) -> None:
        super().__init__(lambda *_: time.sleep(0.01))
        self.run = dataclasses.replace(self.run, pace=Pace(steps=50, log=1, sample=1000, save=10))

    def abstract(self) -> TrainState:
        return jax.eval_shape(self.init)

    def init(self) -> TrainState:
        return TrainState(jnp.int32(0), params={'x': jnp.arange(2.0**16)}, ema=None, opt=())


def train_job(job: TinyJob, out: Path) -> tuple[bool, str]:
    """Trains a job as `train.main` does: whether it is complete, and the console's text."""
    console = Console(file=io.StringIO(), width=200)
    with Stop() as stop, disk_watched(out / trainer.CHECKPOINTS), lock(out):
        return trainer.fit(job, out, console, stop), console.file.getvalue()


@pytest.mark.parametrize(('seconds', 'fits'), [('15', True), ('0.0001', False)])
def test_a_save_is_compared_with_the_notice(tmp_path, monkeypatch, caplog, seconds, fits):
    monkeypatch.setenv('STAR_JAX_NOTICE', seconds)
    _, text = train_job(TinyJob(lambda event, step: time.sleep(0.02)), tmp_path)
    assert f'this machine has {float(seconds):g} s after the notice' in text
    assert ('nothing is lost' in text) == fits
    assert caplog.text.count('loses the work since the last checkpoint') == (not fits)


def outcome(out: Path) -> tuple[list[dict], bytes, list[str]]:
    """Metrics without their speed, parameters, and names of sample grids."""
    grids = sorted(path.name for path in (out / logger.SAMPLES).iterdir())
    return metrics(out), (out / 'model' / 'x.npy').read_bytes(), grids


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The outcome of a run without faults."""
    out = tmp_path_factory.mktemp('undisturbed')
    assert train_job(TinyJob(), out)[0]
    return outcome(out)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Raises KeyboardInterrupt, even where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int, name: str, step: int) -> Callable[[str, int], None]:
    """Sends this process a signal at one event."""

    def on_event(*event: str | int) -> None:
        if event == (name, step):
            os.kill(os.getpid(), number)

    return on_event


@pytest.fixture
def hangups():
    """Signals of a closed terminal arrive, as they do not where `nohup` started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures('hangups')
@pytest.mark.parametrize(
    'number, event, step, end',
    [
        (signal.SIGTERM, 'init', 0, 'before the first step'),
        (signal.SIGINT, 'batch', 0, 'at step 1, saved'),
        (signal.SIGTERM, 'step', 6, 'at step 7, saved'),
        (signal.SIGINT, 'evaluate', 6, 'at step 6, saved'),
        (signal.SIGTERM, 'sample_grid', 12, 'at step 12, saved'),
        (signal.SIGINT, 'step', 9, 'at step 10, saved'),
        (signal.SIGHUP, 'step', 4, 'at step 5, saved'),
    ],
)
def test_signal_stops_a_run_after_its_step(undisturbed, tmp_path, number, event, step, end):
    handlers = [signal.getsignal(number) for number in stop_signals.SIGNALS]
    complete, text = train_job(TinyJob(send(number, event, step)), tmp_path)
    assert not complete and text.endswith(f'stopped {end}; the same command goes on\n')
    assert [signal.getsignal(number) for number in stop_signals.SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert train_job(TinyJob(), tmp_path)[0]
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize('event', ['evaluate', 'sample_grid'])
@pytest.mark.parametrize('step', [6, 12, 14])
def test_a_failed_evaluation_is_made_after_the_restart(undisturbed, tmp_path, event, step):
    def fail(*happened: str | int) -> None:
        if happened == (event, step):
            raise RuntimeError('the device is lost')

    with pytest.raises(RuntimeError):
        train_job(TinyJob(fail), tmp_path)
    events = []
    assert train_job(TinyJob(lambda *happened: events.append(happened)), tmp_path)[0]
    assert outcome(tmp_path) == undisturbed
    if step == PACE.steps:
        assert ('step', step - 1) not in events, 'the state is saved before it is evaluated'


def test_no_grid_is_compiled_or_sampled_where_none_is_wanted(undisturbed, tmp_path):
    events = []
    job = TinyJob(lambda name, _: events.append(name))
    job.run = dataclasses.replace(job.run, pace=dataclasses.replace(PACE, images=0))
    assert train_job(job, tmp_path)[0]
    assert not {'compile_grid', 'sample_grid'} & set(events)
    assert outcome(tmp_path) == (*undisturbed[:2], [])


def test_memory_of_grids_is_printed_before_the_first_step(tmp_path):
    events = []
    _, text = train_job(TinyJob(lambda name, _: events.append(name)), tmp_path)
    assert 'sample grids of 16 images: 3 MiB of temporaries per device' in text
    assert events.index('compile_grid') < events.index('step')


def test_signal_at_the_end_changes_nothing(undisturbed, tmp_path):
    assert train_job(TinyJob(send(signal.SIGTERM, 'export', 14)), tmp_path)[0]
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize('flag', [False, True])
def test_processes_combine_their_requests_to_stop(flag):
    assert stop_signals._any_of(flag).item() is flag


def test_metrics_of_stopped_runs_are_joined(undisturbed, tmp_path):
    for step in (1, 2, 6, 7):
        assert not train_job(TinyJob(send(signal.SIGTERM, 'step', step)), tmp_path)[0]
    assert train_job(TinyJob(), tmp_path)[0]
    assert outcome(tmp_path) == undisturbed


def test_second_signal_ends_the_process(monkeypatch):
    ends = []
    monkeypatch.setattr(stop_signals.os, '_exit', ends.append)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # `timeout` and shells may send two
        time.sleep(2 * stop_signals.ONE_SIGNAL)
        assert stop.requested and ends == []
        os.kill(os.getpid(), signal.SIGTERM)
    assert ends == [130]


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert not stop.requested and signal.signal(signal.SIGINT, before) is signal.SIG_IGN


def test_only_the_main_thread_catches_signals():
    handlers = []

    def enter() -> None:
        with Stop():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_run_skips_a_damaged_checkpoint(undisturbed, tmp_path, caplog):
    assert not train_job(TinyJob(send(signal.SIGTERM, 'step', 11)), tmp_path)[0]
    newest = tmp_path / 'checkpoints' / '12' / 'state'
    largest = max(newest.rglob('d/*'), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    complete, text = train_job(TinyJob(), tmp_path)
    assert complete and 'continuing from step 10' in text
    assert 'step 12 is torn and skipped' in caplog.text and largest.name in caplog.text
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize(
    'poisoned, bad, named',
    [
        ('other', 8, 'step 8: other is nan'),
        ('loss', 10, 'step 10: loss is nan'),
        ('params/x', 7, 'step 8: loss is nan, other is nan'),
        ('params/x', 10, 'step 10: params/x not finite after it'),
    ],
)
def test_non_finite_values_stop_the_run_and_are_not_saved(tmp_path, poisoned, bad, named):
    with pytest.raises(RunError) as caught:
        train_job(TinyJob(poisoned=poisoned, bad=bad), tmp_path)
    message = str(caught.value)
    assert message.startswith(f'{named}, so the run stopped')
    assert 'last good checkpoint is of step 5' in message and '\n' not in message
    assert '--optimizer.learning-rate.peak than 0.01' in message
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['5']
    assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()


def test_stop_does_not_save_non_finite_metrics(tmp_path):
    job = TinyJob(send(signal.SIGTERM, 'step', 8), 'other', 7)
    with pytest.raises(RunError, match='step 7: other is nan'):
        train_job(job, tmp_path)
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['5']


@pytest.mark.parametrize('event, step, kept', [('evaluate', 6, 5), ('step', 0, None)])
def test_full_disk_error_names_the_newest_complete_checkpoint(
    undisturbed, tmp_path, event, step, kept
):
    def on_event(*args: str | int) -> None:
        if args == (event, step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'samples/1.png')

    with pytest.raises(RunError) as caught:
        train_job(TinyJob(on_event), tmp_path)
    message = str(caught.value)
    assert 'No space left on device: samples/1.png' in message
    assert (f'checkpoint of step {kept} is whole' if kept else 'no checkpoint yet') in message
    assert train_job(TinyJob(), tmp_path)[0]
    assert outcome(tmp_path) == undisturbed


def test_full_disk_is_recognized_by_message_and_cause(tmp_path):
    with pytest.raises(RunError, match='File too large'), disk_watched(tmp_path):
        try:
            raise ValueError('OUT_OF_RANGE: Failed to write to file 11: File too large')
        except ValueError as error:
            raise UserError('the cache cannot be written') from error
    with pytest.raises(UserError), disk_watched(tmp_path):
        raise UserError('something else')


def test_run_error_is_one_sentence_and_status_1(monkeypatch, tmp_path, capsys):
    def fail(*_: object) -> bool:
        raise RunError('step 8: loss is nan')

    monkeypatch.setattr(train, 'main', fail)
    assert cli.main(['train-tokenizer', '--out', str(tmp_path)]) == 1
    assert capsys.readouterr().err == 'star-jax train-tokenizer: step 8: loss is nan\n'


def test_changed_training_data_are_warned_of_once(tmp_path, caplog):
    messages = []
    for step, examples in enumerate(('abc', 'abc', 'abcd', 'abcd', 'bcde')):
        job = TinyJob(send(signal.SIGTERM, 'batch', step))
        job.source = Examples(examples)
        caplog.clear()
        assert 'at step' in train_job(job, tmp_path)[1]
        messages.append([record.message for record in caplog.records])
    assert [len(texts) for texts in messages] == [0, 0, 1, 0, 1]
    assert (
        'training data have changed' in messages[2][0]
        and '3 examples then, 4 now' in messages[2][0]
    )


def test_fingerprint_of_own_images_changes_with_their_files(tmp_path, monkeypatch):
    """It changes with another image, another caption, and other bytes of an image."""
    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path / 'cache'))
    own = tmp_path / 'own'
    own.mkdir()

    def add(name: str, grey: int) -> str:
        image_io.save_png(np.full((20, 20, 3), grey, np.uint8), own / f'{name}.png')
        (own / f'{name}.txt').write_text(name)
        return Folder(path=str(own), split='all').open(16).fingerprint()

    add('a', 10)
    known = [add('b', 20), add('c', 30)]
    (own / 'a.txt').write_text('another')
    known += [add('c', 31), add('c', 32)]
    assert len(set(known)) == len(known)
    assert known[-1] == Folder(path=str(own), split='all').open(16).fingerprint()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    """All processes compute the same metrics and sample grids."""
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    with logger.open_logger(tmp_path, 0) as run_logger:
        run_logger.log(1, {'loss': 1.0})
        run_logger.log_image(1, np.zeros((4, 4, 3), np.uint8))
    trainer.claim(tmp_path, TinyJob().run)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with logger.open_logger(tmp_path, 0) as run_logger:
        run_logger.log(1, {'loss': 1.0})
        run_logger.log_image(1, np.zeros((4, 4, 3), np.uint8))
    found = {path.name.split('.')[0] for path in tmp_path.iterdir()}
    assert found == {'metrics', 'samples', 'events'}


def test_logger_removes_temporary_files_of_a_killed_run(tmp_path):
    (tmp_path / 'samples').mkdir()
    own = [tmp_path / name for name in ('.note.0123abcd', '.metrics.jsonl.x', 'samples/a.0123abcd')]
    left = [tmp_path / '.metrics.jsonl.0123abcd', tmp_path / 'samples' / '.00000006.png.0123abcd']
    for path in own + left:
        path.touch()
    logger.open_logger(tmp_path, 0).__exit__(None)
    assert all(path.exists() for path in own) and not any(path.exists() for path in left)


HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], 'a+')
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f'process {os.getpid()}')
file.flush()
print('locked', flush=True)
sys.stdin.read()
"""


def test_lock_refuses_a_second_run_until_the_first_ends(undisturbed, tmp_path):
    words = [sys.executable, '-S', '-c', HOLDER, str(tmp_path / folder_lock.LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == 'locked\n'
        with pytest.raises(UserError, match=f'in use by process {first.pid}.*another --out'):
            train_job(TinyJob(), tmp_path)
        assert not (tmp_path / 'config.json').exists()
        first.kill()
    assert train_job(TinyJob(), tmp_path)[0]
    assert outcome(tmp_path) == undisturbed


def test_lock_is_released_when_a_run_ends(tmp_path):
    with lock(tmp_path):
        said = f'in use by process {os.getpid()} on .* since'
        with pytest.raises(UserError, match=said), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass


def test_lock_warns_of_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'flock', flock)
    with lock(tmp_path):
        pass
    assert 'no locks here' in caplog.text


def test_lock_refuses_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written'), lock(tmp_path / 'file' / 'x'):
        pass


# Real processes.


@pytest.fixture(scope='module')
def environment(tmp_path_factory) -> dict[str, str]:
    """The environment of a user's process: one host device per core."""
    return os.environ | {
        'PYTHONPATH': str(ROOT),
        'STAR_JAX_CACHE': str(tmp_path_factory.mktemp('cache')),
        'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
        'XLA_FLAGS': xla_flags.QUICK,
    }


def settings(command: str, folder: Path, steps: int) -> Path:
    """The file of a tiny run; `train-tokenizer gan` has a discriminator."""
    run = tiny.TOKENIZER
    if command == GAN:
        adversary = Adversary(discriminator=PatchGAN(width=4, layers=1), start=20, adaptive=True)
        run = dataclasses.replace(run, objective=Objective(adversary=adversary))
    if command == 'train':
        run = dataclasses.replace(tiny.STAR, tokenizer=tiny.write_tokenizer(folder / 'tokenizer'))
    pace = Pace(steps=steps, log=1, sample=1000, save=10)
    config.write(folder / f'{command}.json', dataclasses.replace(run, pace=pace))
    return folder / f'{command}.json'


def start(environment: dict[str, str], *words: object) -> subprocess.Popen:
    """A process of its own, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, '-m', 'star_jax', *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


SEVERAL = """
import shlex, sys
from star_jax import cli
from star_jax.training import train

if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
    import faults_test
    train.build_job = lambda run: faults_test.SlowJob()
for line in sys.stdin:
    print('status', cli.main(shlex.split(line)), flush=True)
"""


class Several:
    """A process that runs one command line after another, so that Python starts once.

    It trains a `SlowJob` in place of any run if its argument is the folder of this file.
    """

    def __init__(self, environment: dict[str, str], *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, '-c', SEVERAL, *map(str, words)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> 'Several':
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def begin(self, *words: object) -> None:
        self.process.stdin.write(' '.join(map(str, words)) + '\n')
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """The exit status and the output of the command line."""
        said = ''
        for line in self.process.stdout:
            if line.startswith('status '):
                return int(line.removeprefix('status ')), said
            said += line
        return pytest.fail(f'the process ended:\n{said}')

    def run(self, *words: object) -> tuple[int, str]:
        self.begin(*words)
        return self.end()


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit(environment, tmp_path):
    """kill -9 during a save, then the same command: equal bit for bit."""
    whole, torn = tmp_path / 'whole', tmp_path / 'torn'
    words = ('train', settings('train', tmp_path, steps=50))
    with Several(environment) as several:
        status, said = several.run(*words, '--out', whole)
        assert status == 0, said
        several.begin(*words, '--out', torn)
        kill_during_a_save(several.process, torn)
    with Several(environment) as several:
        status, said = several.run(*words, '--out', torn)
        assert status == 0 and 'continuing from step' in said, said
    assert_same('train', torn, whole, steps=50)


def test_stopped_tokenizer_run_continues_bit_for_bit(tmp_path):
    """Unused codes move in the first step after the checkpoint."""
    job = TokenizerJob(tiny.TOKENIZER)

    def train(first: int, state: TrainState) -> tuple[TrainState, list[float]]:
        losses, batches = [], job.batches(first)
        for step, batch in zip(range(first, first + 3), batches, strict=False):
            state, scalars = job.step(step, state, batch)
            losses.append(float(scalars['loss']))
        return state, losses

    with Checkpoints(tmp_path) as checkpoints:
        state, _ = train(0, job.init())
        checkpoints.save(3, state)
        stayed = train(3, state)
        went_on = train(*checkpoints.restore(job.abstract()))
    jax.tree.map(np.testing.assert_array_equal, went_on, stayed)


def test_run_continues_after_a_full_disk_and_a_stop(environment, tmp_path):
    whole, torn = tmp_path / 'whole', tmp_path / 'torn'
    words = ('train-tokenizer', settings('train-tokenizer', tmp_path, steps=50))
    with Several(environment, Path(__file__).parent) as several:
        assert several.run(*words, '--out', whole)[0] == 0

        several.begin(*words, '--out', torn)
        wait_until(several.process, lambda: newest(torn) >= 10)
        limits = resource.prlimit(several.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(several.process.pid, resource.RLIMIT_FSIZE, (LITTLE, limits[1]))
        status, said = several.end()
        saved = newest(torn)
        assert status == 1 and 'Traceback' not in said, said
        assert f'File too large), so the run stopped; the checkpoint of step {saved} is' in said

        resource.prlimit(several.process.pid, resource.RLIMIT_FSIZE, limits)
        several.begin(*words, '--out', torn)
        wait_for_steps(several.process, torn, 3, saving=False)
        several.process.send_signal(signal.SIGTERM)
        status, said = several.end()
        assert status == 0 and f'continuing from step {saved}' in said, said
        assert f'stopped at step {newest(torn)}, saved' in said, said
        assert saved < newest(torn) < 50 and not (torn / 'model').exists()

        status, said = several.run(*words, '--out', torn)
        assert status == 0, said
    assert outcome(torn) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize('command', ['train', 'train-tokenizer', GAN])
def test_run_killed_at_random_points_continues_bit_for_bit(command, environment, tmp_path):
    """While starting, between saves and during them: ten points with each kind of run."""
    steps, chance = 300, random.Random(0)
    # A kill may leave half a program in the cache, which is then no cache for the other tests.
    environment = environment | {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'programs')}
    whole, torn = tmp_path / 'whole', tmp_path / 'torn'
    words = (command.partition(' ')[0], settings(command, tmp_path, steps))
    began = time.monotonic()
    with start(environment, *words, '--out', whole) as process:
        wait_until(process, lambda: last_step(whole) > 0)
        start_up = time.monotonic() - began
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said

    for point in range(10):
        with start(environment, *words, '--out', torn) as process:
            if point % 3 == 0:
                wait_while_starting(process, torn, chance.uniform(0, start_up))
            else:
                wait_for_steps(process, torn, chance.randrange(2, 25), saving=point % 3 == 1)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    with start(environment, *words, '--out', torn) as process:
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert_same(command, torn, whole, steps)


def kill_during_a_save(process: subprocess.Popen, out: Path) -> None:
    """Kills a run that has saved once while it saves again."""
    while True:
        wait_until(process, lambda: newest(out) >= 10 and is_saving(out))
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if is_saving(out):  # the save may have ended since the look
            break
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    assert not (out / 'model').exists()


def wait_while_starting(process: subprocess.Popen, out: Path, seconds: float) -> None:
    """Waits for some seconds, or until a run has begun to report."""
    lines, end = last_step(out), time.monotonic() + seconds
    wait_until(process, lambda: time.monotonic() > end or last_step(out) != lines)


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int, saving: bool) -> None:
    """Waits until a running run has done so many steps and, if asked, until it saves."""
    lines = last_step(out)
    wait_until(process, lambda: last_step(out) != lines)
    saved_until = newest(out) + steps
    wait_until(process, lambda: last_step(out) >= saved_until)
    wait_until(process, lambda: is_saving(out) or not saving)


def wait_until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            pytest.fail(f'the run ended before it could be interrupted:\n{process.stdout.read()}')
        assert time.monotonic() < end, 'the run hangs'
        time.sleep(0.005)


def assert_same(command: str, torn: Path, whole: Path, steps: int) -> None:
    """Two runs reported the same, at every step once, and end with the same parameters."""
    assert metrics(torn) == metrics(whole)
    assert [line['step'] for line in metrics(whole) if 'loss' in line] == [*range(1, steps + 1)]
    read = models.read if command == 'train' else models.read_tokenizer
    ended, never_stopped = (
        weights.flatten(jax.device_get(read(out / 'model').params)) for out in (torn, whole)
    )
    assert ended.keys() == never_stopped.keys()
    for name, array in never_stopped.items():
        np.testing.assert_array_equal(ended[name], array, err_msg=name)


def metrics(out: Path) -> list[dict]:
    """The reported metrics of a run, without its speed."""
    lines = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != 'images_per_second'} for line in lines]


def last_step(out: Path) -> int:
    path = out / 'metrics.jsonl'
    return path.read_text().count('\n') if path.exists() else 0


def newest(out: Path) -> int:
    """The newest checkpoint that is whole."""
    found = (out / 'checkpoints').glob('*/manifest.json')
    return max((int(path.parent.name) for path in found if path.parent.name.isdigit()), default=0)


def is_saving(out: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(UNFINISHED in name for name in os.listdir(out / 'checkpoints'))
