"""How does a run go on, whatever is trained?

The one loop: it restores, steps, reports, draws pictures and saves. What is trained is a `Job`.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from star_jax.checkpoint import config
from star_jax.checkpoint.training import Checkpoints
from star_jax.data import pipeline
from star_jax.data.pipeline import Source
from star_jax.errors import NotFiniteError, UserError
from star_jax.parallel import peer_watchdog
from star_jax.training import logger
from star_jax.training.faults import Stop, state_flaw
from star_jax.training.logger import MetricsWindow, NullLogger, RunLogger
from star_jax.training.run import Run, TokenizerRun, check_kind
from star_jax.training.state import TrainState
from star_jax.training.summary import check_state

CONFIG = 'config.json'
DATA = 'data.json'  # how many training examples there are, and their fingerprint
BASE = 'base.json'  # the digest of the model folder that stays frozen, where there is one
CHECKPOINTS = 'checkpoints'
METRICS = logger.METRICS
SAMPLES = logger.SAMPLES
MODEL = 'model'

ELSEWHERE = ('mesh', 'cache')  # fields that change where a run happens, and not what it makes

log = logging.getLogger(__name__)


class Job(Protocol):
    """What the loop needs to know of a thing that trains."""

    run: Run | TokenizerRun
    source: Source  # of the training examples
    base: str  # digest of the folder whose weights belong to the state, but not to checkpoints

    def summary(self) -> dict[str, str]:
        """What a user wants to know before paying for the run."""

    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""

    def init(self) -> TrainState:
        """The state before step 0, sharded."""

    def batches(self, step: int) -> Iterator[Any]:
        """Batches on the devices from `step` on."""

    def step(
        self, step: int, state: TrainState, batch: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Step number `step` and its scalars, not yet fetched. Donates the state."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Scores on the validation set."""

    def picture(self, state: TrainState) -> np.ndarray | None:
        """What a user looks at, uint8 (h, w, 3); None where nobody does."""

    def export(self, state: TrainState, folder: Path) -> None:
        """Writes a model folder, from the first process; all must call it."""


def fit(job: Job, out: Path, console: Console, stop: Stop) -> bool:
    """Runs `job` in the folder `out` from where an earlier run in it stopped; whether to its end.

    Leaves `config.json`, `data.json`, `base.json` (of a head), `checkpoints/`, `samples/`,
    `metrics.jsonl`, event files and `model/`. Asked to `stop`, it finishes the step (with its
    pictures, if it has any) and saves. Raises UserError if `out` belongs to a run with another
    config or frozen model, and NotFiniteError if a loss or the state is not finite any more: what
    was saved before stays, and nothing later is saved.
    """
    check(out, job.run)
    wanted = job.abstract()
    check_state(wanted)
    if jax.process_index() == 0:
        _print_summary(job, console)
    with Checkpoints(out / CHECKPOINTS, keep=job.run.pace.keep) as checkpoints:
        restored = checkpoints.restore(wanted)
        first, state = restored if restored else (0, job.init())
        claim(out, job.run)  # now that it can begin: what is mended is no other config
        _compare_data(out, job.source, first)
        _compare_base(out, job.base, first)
        if first:
            console.print(f'continuing from step {first}')
        window = MetricsWindow(job.run.batch, first, checkpoints.notes(first))
        with logger.begin(out, first) as told, _progress(console) as progress:
            step, state = Trainer(job, checkpoints, window, told, progress).run(first, state, stop)
    if step < job.run.pace.steps:
        where = f'at step {step}, saved' if step else 'before the first step'
        console.print(f'stopped {where}; the same command goes on')
        return False
    job.export(state, out / MODEL)
    console.print(f'model folder: {out / MODEL}')
    return True


class Trainer:
    """The steps of a run, and what is due after each."""

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        window: MetricsWindow,
        told: RunLogger | NullLogger,
        progress: Progress,
    ) -> None:
        self._job, self._pace = job, job.run.pace
        self._checkpoints, self._window = checkpoints, window
        self._report, self._progress = told, progress

    def run(self, first: int, state: TrainState, stop: Stop) -> tuple[int, TrainState]:
        """Goes on from step `first` to the end, or until asked to stop; the step come to, saved."""
        task = self._progress.add_task(
            'training', total=self._pace.steps, completed=first, note='compiling'
        )
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
                note = self._tell(done)
                self._progress.update(task, completed=done, note=note)
            if self._is_due(done, self._pace.sample):
                self._report.scalars(done, self._job.evaluate(state))
                if (picture := self._job.picture(state)) is not None:
                    self._report.picture(done, picture)
                self._window.restart()
            if self._is_due(done, self._pace.save):
                self._save(done, state)
                self._window.restart()
        return self._pace.steps, state

    def _is_due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self._pace.steps

    def _tell(self, done: int) -> str:
        """Reports the scalars since the last time, and notices a save that has failed."""
        self._refuse(self._window.flaw())
        scalars = self._window.close()
        self._report.scalars(done, scalars)
        self._checkpoints.check()
        return f'loss {scalars["loss"]:.3f}, {scalars["images_per_second"]:.1f} images/s'

    def _save(self, done: int, state: TrainState) -> None:
        self._refuse(self._window.flaw())
        if flaw := state_flaw(state):
            self._refuse(f'step {done}: {flaw}')
        self._checkpoints.save(done, state, self._window.pending())

    def _refuse(self, flaw: str | None) -> None:
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
    """The state of the newest checkpoint in `out`, which another process may be writing."""
    checkpoints = Checkpoints(out / CHECKPOINTS, read_only=True)
    restored = checkpoints.restore(job.abstract())
    checkpoints.close()
    if restored is None:
        return None
    _check_base(out, job.base)
    return restored[1]


def claim(out: Path, run: Run | TokenizerRun) -> None:
    """Makes `out` the folder of `run`; a UserError names the fields if it belongs to another.

    Another mesh or cache is no other run: it may go on on other devices, with the same codes.
    """
    check(out, run)
    path = out / CONFIG
    if not path.exists() and jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        config.write(path, run)


def check(out: Path, run: Run | TokenizerRun) -> None:
    """Raises UserError if `out` is the folder of another run; leaves it as it is."""
    path = out / CONFIG
    if not path.exists():
        return
    fields = config.read_json(path)
    check_kind(fields, type(run), str(path))
    earlier = config.from_json(type(run), fields, str(path))
    same = {name: getattr(run, name) for name in ELSEWHERE if hasattr(run, name)}
    changed = config.differences(dataclasses.replace(earlier, **same), run)
    if changed:
        raise UserError(
            f'{out} holds a run with another config ({"; ".join(changed)}): '
            'give the same settings to continue it, or another --out'
        )


def _compare_data(out: Path, source: Source, first: int) -> None:
    """Warns where a run goes on, from step `first`, with other data than it had; remembers these.

    Raises UserError where the processes of a run have different data. The order of the data depends
    on how many there are, so one picture more changes every batch.
    """
    if jax.process_count() > 1:
        peer_watchdog.check_same('training data', pipeline.outline(source))
    if jax.process_index() != 0:
        return
    path, found = out / DATA, {'examples': len(source), 'fingerprint': source.fingerprint()}
    known = config.read_json(path) if path.exists() else None
    if first and known and known != found:
        log.warning(
            '%s: the training data have changed since this run was last here (%s examples then, %s '
            'now), so it goes on with other pictures, or in another order, than if they had '
            'stayed; give another --out to begin anew',
            out,
            *(data['examples'] for data in (known, found)),
        )
    if known != found:
        config.write_json(path, found)


def _compare_base(out: Path, base: str, first: int) -> None:
    """Remembers the digest of the frozen model of a run that begins; later it must be the same."""
    if first:
        _check_base(out, base)
    if base and jax.process_index() == 0:
        config.write_json(out / BASE, {'sha256': base})


def _check_base(out: Path, base: str) -> None:
    """Raises UserError if the frozen model of the run in `out` is not what it was."""
    path = out / BASE
    if path.exists() and config.read_json(path) != {'sha256': base}:
        raise UserError(
            f'the model that {out} goes on from with --init has changed since the run began, and '
            'its checkpoints fit no other: put the earlier one back, or give another --out'
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn('{task.completed}/{task.total} steps, {task.fields[note]},'),
        TimeRemainingColumn(),
        console=console,
    )


def _print_summary(job: Job, console: Console) -> None:
    table = Table(show_header=False, title=type(job.run).__name__)
    for name, value in job.summary().items():
        table.add_row(name, value)
    console.print(table)
