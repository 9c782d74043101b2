"""How does a run go on, whatever is trained?

The one loop: it restores, steps, reports, draws pictures and saves. What is trained is a `Job`.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import SummaryWriter

from star_jax.checkpoint import config
from star_jax.checkpoint.training import Checkpoints
from star_jax.core import pictures
from star_jax.errors import UserError
from star_jax.training.run import Run, TokenizerRun
from star_jax.training.state import TrainState

CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
SAMPLES = 'samples'
METRICS = 'metrics.jsonl'
MODEL = 'model'

log = logging.getLogger(__name__)


class Job(Protocol):
    """What the loop needs to know of a thing that trains."""

    run: Run | TokenizerRun

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

    def picture(self, state: TrainState) -> np.ndarray:
        """What a user looks at, uint8 (h, w, 3)."""

    def export(self, state: TrainState, folder: Path) -> None:
        """Writes a model folder."""


def fit(job: Job, out: Path, console: Console) -> TrainState:
    """Runs `job` to its end in the folder `out`, from where an earlier run in it stopped.

    Leaves `config.json`, `checkpoints/`, `samples/`, `metrics.jsonl`, event files and `model/`.
    Raises UserError if `out` belongs to a run with another config.
    """
    pace = job.run.pace
    claim(out, job.run)
    _print_summary(job, console)
    checkpoints = Checkpoints(out / CHECKPOINTS, keep=pace.keep)
    restored = checkpoints.restore(job.abstract())
    first, state = restored if restored else (0, job.init())
    if first:
        console.print(f'continuing from step {first}')
    report = Report(out, first)
    with _progress(console) as progress:
        task = progress.add_task('training', total=pace.steps, completed=first, note='compiling')
        window = Window(job.run.batch)
        for step, batch in zip(range(first, pace.steps), job.batches(first), strict=False):
            state, metrics = job.step(step, state, batch)
            window.add(metrics)
            done = step + 1
            if done % pace.log == 0 or done == pace.steps:
                scalars = window.close()
                report.scalars(done, scalars)
                note = f'loss {scalars["loss"]:.3f}, {scalars["images_per_second"]:.1f} images/s'
                progress.update(task, completed=done, note=note)
            if done % pace.sample == 0 or done == pace.steps:
                report.scalars(done, job.evaluate(state))
                report.picture(done, job.picture(state))
                window.restart()
            if done % pace.save == 0 or done == pace.steps:
                checkpoints.save(done, state)
                window.restart()
    checkpoints.close()
    report.close()
    job.export(state, out / MODEL)
    console.print(f'model folder: {out / MODEL}')
    return state


def newest(job: Job, out: Path) -> TrainState | None:
    """The state of the newest checkpoint in `out`, which another process may be writing."""
    checkpoints = Checkpoints(out / CHECKPOINTS, read_only=True)
    restored = checkpoints.restore(job.abstract())
    checkpoints.close()
    return restored and restored[1]


def claim(out: Path, run: Run | TokenizerRun) -> None:
    """Makes `out` the folder of `run`; a UserError names the fields if it belongs to another.

    Another mesh is no other run: it may go on on other devices.
    """
    path = out / CONFIG
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        config.write(path, run)
        return
    earlier = config.read(path, type(run))
    changed = config.differences(dataclasses.replace(earlier, mesh=run.mesh), run)
    if changed:
        raise UserError(
            f'{out} holds a run with another config ({"; ".join(changed)}): '
            'give the same settings to continue it, or another --out'
        )


class Window:
    """Means of the scalars since the last report, and the speed."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._metrics: list[dict[str, jax.Array]] = []
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew; what was not training does not count."""
        self._begin = time.perf_counter()
        self._counted = len(self._metrics)

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._metrics.append(metrics)

    def close(self) -> dict[str, float]:
        """The means, fetched; waits for the last step."""
        fetched = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._begin
        steps = len(fetched) - self._counted
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        self._metrics = []
        self.restart()
        return means | {'images_per_second': steps * self._batch / seconds}


class Report:
    """Scalars to `metrics.jsonl` and TensorBoard, pictures to `samples/` and TensorBoard.

    What an interrupted run reported after `step` is dropped: the run reports it again.
    """

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / METRICS
        self._samples = out / SAMPLES
        self._samples.mkdir(exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self._path.write_text(''.join(f'{line}\n' for line in kept))
        self._events = SummaryWriter(str(out), purge_step=step + 1)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        with self._path.open('a') as file:
            file.write(json.dumps({'step': step, **scalars}) + '\n')
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def picture(self, step: int, picture_hwc: np.ndarray) -> None:
        pictures.save_png(picture_hwc, self._samples / f'{step:08d}.png')
        self._events.add_image('samples', picture_hwc, step, dataformats='HWC')

    def close(self) -> None:
        self._events.close()


def _step_of(line: str) -> float:
    """The step of a line of metrics; a torn line counts as never reported."""
    try:
        return json.loads(line)['step']
    except (json.JSONDecodeError, KeyError, TypeError):
        return float('inf')


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
