"""How does a run proceed, whatever is trained?

The one loop: it restores, steps, logs metrics, evaluates, and saves. What is trained is a `Job`.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.progress import Progress

from star_jax.checkpoint import config
from star_jax.checkpoint.training import Checkpoints
from star_jax.console import Console, pairs, progress_bar
from star_jax.data import pipeline
from star_jax.data.pipeline import Source
from star_jax.errors import NotFiniteError, UserError
from star_jax.parallel import peer_watchdog
from star_jax.training import logger, notice
from star_jax.training.finite import state_flaw
from star_jax.training.logger import Logger, MetricsWindow
from star_jax.training.run import Run, TokenizerRun, check_kind
from star_jax.training.state import TrainState
from star_jax.training.stop_signals import Stop
from star_jax.training.summary import check_state, state_bytes

CONFIG = 'config.json'
DATA = 'data.json'  # number of training examples, and their fingerprint
BASE = 'base.json'  # digest of the model folder that stays frozen, if there is one
CHECKPOINTS = 'checkpoints'
METRICS = logger.METRICS
SAMPLES = logger.SAMPLES
MODEL = 'model'

FREE_FIELDS = (
    'mesh',
    'cache',
)  # may change within a run: results do not depend on them

log = logging.getLogger(__name__)


class Job(Protocol):
    """Something that trains: the parts of a run, as far as the trainer needs them.

    Attributes:
        run: the config.
        source: the training examples.
        base: digest of a model folder whose frozen weights belong to the state, but are not in its
            checkpoints; '' if there is none.
    """

    run: Run | TokenizerRun
    source: Source
    base: str

    def summary(self) -> dict[str, str]:
        """The size of the run, as lines that are printed before its first step."""

    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""

    def init(self) -> TrainState:
        """The state before step 0, sharded."""

    def batches(self, step: int) -> Iterator[Any]:
        """Batches on the devices, from `step` on."""

    def step(
        self, step: int, state: TrainState, batch: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Step number `step` and its metrics, not yet fetched. Donates the state."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Metrics of the validation set."""

    def compile_grid(self) -> int:
        """Compiles what `sample_grid` runs; the bytes of its temporaries on each device.

        Raises UserError if it does not fit into the memory of a device.
        """

    def sample_grid(self, state: TrainState) -> np.ndarray:
        """An image of `pace.images` images that shows the quality of the state, uint8 (h, w, 3)."""

    def export(self, state: TrainState, folder: Path) -> None:
        """Writes a model folder, from the first process; all processes must call it."""


def fit(job: Job, out: Path, console: Console, stop: Stop) -> bool:
    """Trains a job in a folder, from the last checkpoint in it.

    Leaves `config.json`, `data.json`, `base.json` (of a refinement head), `checkpoints/`,
    `samples/`, `metrics.jsonl`, event files and `model/`.

    Args:
        job: the job that trains.
        out: the folder of the run.
        console: shows summary and progress.
        stop: after a request to stop, the current step is completed and saved.

    Returns:
        Whether the run is complete.

    Raises:
        UserError: `out` belongs to a run with another config or frozen model.
        NotFiniteError: a loss or the state is no longer finite; earlier checkpoints stay, and
            nothing is saved any more.
    """
    check(out, job.run)
    abstract = job.abstract()
    check_state(abstract)
    if jax.process_index() == 0:
        _print_summary(job, console, state_bytes(abstract))
    with Checkpoints(out / CHECKPOINTS, keep=job.run.pace.keep) as checkpoints:
        restored = checkpoints.restore(abstract)
        first, state = restored if restored else (0, job.init())
        claim(out, job.run)  # only now: a failed start leaves no config behind
        _compare_data(out, job.source, first)
        _compare_base(out, job.base, first)
        if first:
            console.print(f'continuing from step {first}')
        if job.run.pace.images and first < job.run.pace.steps:
            _compile_grid(job, console)
        window = MetricsWindow(job.run.mean_batch, first, checkpoints.notes(first))
        with logger.open_logger(out, first) as run_logger, progress_bar(console) as progress:
            trainer = Trainer(
                job,
                checkpoints=checkpoints,
                window=window,
                logger=run_logger,
                progress=progress,
            )
            step, state = trainer.run(first, state, stop)
    if step < job.run.pace.steps:
        where = f'at step {step}, saved' if step else 'before the first step'
        console.print(f'stopped {where}; the same command goes on')
        return False
    job.export(state, out / MODEL)
    console.print(f'model folder: {out / MODEL}')
    return True


class Trainer:
    """The steps of a run, with the saves, logs and sample grids after them.

    Args:
        job: the job that trains.
        checkpoints: store of the saved states.
        window: collects metrics from one report to the next.
        logger: records metrics and sample grids.
        progress: shows how far the run is.
    """

    def __init__(
        self,
        job: Job,
        *,
        checkpoints: Checkpoints,
        window: MetricsWindow,
        logger: Logger,
        progress: Progress,
    ) -> None:
        self._job, self._pace = job, job.run.pace
        self._checkpoints, self._window = checkpoints, window
        self._logger, self._progress = logger, progress
        self._notice = notice.find(os.environ) if jax.process_index() == 0 else None
        self._size = 0  # bytes of a checkpoint

    def run(self, first: int, state: TrainState, stop: Stop) -> tuple[int, TrainState]:
        """Trains from step `first` to the end, or until a stop is requested.

        Returns the number of completed steps and the state after them, which is saved.
        """
        task = self._progress.add_task(
            'training', total=self._pace.steps, completed=first, note='steps, compiling'
        )
        if first and self._is_due(first, self._pace.sample) and not self._is_evaluated(first):
            self._evaluate(first, state)  # interrupted after the save of that step
        batches = self._job.batches(first)
        for step in range(first, self._pace.steps):
            if stop.agreed():
                if step > first:
                    self._save(step, state)
                return step, state
            state, metrics = self._job.step(step, state, next(batches))
            self._window.add(metrics)
            done = step + 1
            if self._is_due(done, self._pace.log):
                note = self._report(done)
                self._progress.update(task, completed=done, note=f'steps, {note}')
            if self._is_due(done, self._pace.save):  # first: nothing that a grid does costs steps
                self._save(done, state)
                self._window.restart_clock()
            if self._is_due(done, self._pace.sample):
                self._evaluate(done, state)
                self._window.restart_clock()
        return self._pace.steps, state

    def _is_due(self, done: int, interval: int) -> bool:
        return done % interval == 0 or done == self._pace.steps

    def _report(self, done: int) -> str:
        """Logs the mean metrics since the last report, and notices a save that has failed."""
        self._check_finite(self._window.flaw())
        metrics = self._window.close()
        self._logger.log(done, metrics)
        self._checkpoints.check()
        self._compare_notice()
        return f'loss {metrics["loss"]:.3f}, {metrics["images_per_second"]:.1f} images/s'

    def _compare_notice(self) -> None:
        """Says once whether a save fits between the notice of a preemption and the end."""
        seconds = self._checkpoints.seconds
        if self._notice is None or seconds is None:
            return
        sentence = self._notice.compare(self._size, seconds, self._pace.save)
        if self._notice.fits(seconds):
            self._progress.console.print(sentence, highlight=False, soft_wrap=True)
        else:
            log.warning(sentence)
        self._notice = None

    def _evaluate(self, done: int, state: TrainState) -> None:
        metrics = self._job.evaluate(state)
        if self._pace.images:
            self._logger.log_image(done, self._job.sample_grid(state))
        self._logger.log(done, metrics)  # last: these metrics mark a finished evaluation

    def _is_evaluated(self, done: int) -> bool:
        """Whether the metrics of the validation set after `done` steps are recorded."""
        answer = 'yes' if self._logger.is_evaluated(done) else 'no'
        return peer_watchdog.broadcast_text(answer) == 'yes'

    def _save(self, done: int, state: TrainState) -> None:
        self._check_finite(self._window.flaw())
        flaw = state_flaw(state)
        self._check_finite(flaw and f'step {done}: {flaw}')
        self._size = state_bytes(state)
        self._checkpoints.save(done, state, self._window.pending())

    def _check_finite(self, flaw: str | None) -> None:
        """Raises a NotFiniteError if there is a flaw."""
        if not flaw:
            return
        self._checkpoints.wait()
        good = self._checkpoints.latest()
        kept = f'the last good checkpoint is of step {good}' if good else 'nothing was saved yet'
        peak = self._job.run.optimizer.learning_rate.peak
        raise NotFiniteError(
            f'{flaw}, so the run stopped; {kept}, and the same command would come to the same '
            f'end: give another --out and a lower --optimizer.learning-rate.peak than {peak:g}'
            + (', and --init with what `star-jax export` makes of this run' if good else ''),
            flaw,
        )


def newest(job: Job, out: Path) -> TrainState | None:
    """The state of the newest checkpoint in `out`; another process may be writing there."""
    checkpoints = Checkpoints(out / CHECKPOINTS, read_only=True)
    restored = checkpoints.restore(job.abstract())
    checkpoints.close()
    if restored is None:
        return None
    _check_base(out, job.base)
    return restored[1]


def claim(out: Path, run: Run | TokenizerRun) -> None:
    """Makes `out` the folder of `run`; a UserError names the fields if it belongs to another run.

    A run may continue with another mesh or cache: its results do not depend on them.
    """
    check(out, run)
    path = out / CONFIG
    if not path.exists() and jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        config.write(path, run)


def check(out: Path, run: Run | TokenizerRun) -> None:
    """Raises UserError if `out` is the folder of another run; writes nothing."""
    path = out / CONFIG
    if not path.exists():
        return
    fields = config.read_json(path)
    check_kind(fields, type(run), str(path))
    earlier = config.from_json(type(run), fields, str(path))
    same = {name: getattr(run, name) for name in FREE_FIELDS if hasattr(run, name)}
    changed = config.differences(dataclasses.replace(earlier, **same), run)
    if changed:
        raise UserError(
            f'{out} holds a run with another config ({"; ".join(changed)}): '
            'give the same settings to continue it, or another --out'
        )


def _compare_data(out: Path, source: Source, first: int) -> None:
    """Warns if a run continues, from step `first`, with other data than before; records the data.

    Raises UserError if the processes of a run have different data. The order of the data depends on
    the number of examples, so one more image changes every batch.
    """
    if jax.process_count() > 1:
        peer_watchdog.check_same('training data', pipeline.caption_fingerprint(source))
    if jax.process_index() != 0:
        return
    path, data = out / DATA, {'examples': len(source), 'fingerprint': source.fingerprint()}
    earlier = config.read_json(path) if path.exists() else None
    if first and earlier and earlier != data:
        log.warning(
            '%s: the training data have changed since the run was interrupted (%s examples then, '
            '%s now), so it continues with other images or in another order; give another --out '
            'to start anew',
            out,
            earlier['examples'],
            data['examples'],
        )
    if earlier != data:
        config.write_json(path, data)


def _compare_base(out: Path, base: str, first: int) -> None:
    """Records the digest of the frozen model when a run starts; later it must be the same."""
    if first:
        _check_base(out, base)
    if base and jax.process_index() == 0:
        config.write_json(out / BASE, {'sha256': base})


def _check_base(out: Path, base: str) -> None:
    """Raises UserError if the frozen model of the run in `out` has changed."""
    path = out / BASE
    if path.exists() and config.read_json(path) != {'sha256': base}:
        raise UserError(
            f'the model that {out} started from with --init has changed since then, and its '
            'checkpoints fit no other model: restore the earlier one, or give another --out'
        )


def _compile_grid(job: Job, console: Console) -> None:
    """Compiles the program of the sample grids before step 0, and prints the memory that it needs.

    Raises UserError if it does not fit.
    """
    size = job.compile_grid()
    if size:
        console.print(
            f'sample grids of {job.run.pace.images} images: {size / 2**20:,.0f} MiB of temporaries '
            'per device'
        )


def _print_summary(job: Job, console: Console, size: int) -> None:
    """Prints what the run will cost; `size` is that of a checkpoint in bytes."""
    lines = job.summary()
    if known := notice.find(os.environ):
        lines = lines | {'checkpoint': known.plan(size)}
    console.print(pairs(type(job.run).__name__, lines))
