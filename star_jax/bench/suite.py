"""What does a machine do with the published sizes, in one go?

Job after job, each in a process of its own, so that one which does not fit ends nothing. What was
measured stays in a folder, a file each: stopped, or out of time, the same call goes on.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from star_jax.bench import process
from star_jax.bench.process import Job
from star_jax.bench.sampling import Sampling
from star_jax.bench.training import Training
from star_jax.checkpoint import config
from star_jax.convert.infer import SIDES
from star_jax.core.settings import Dtype
from star_jax.errors import UserError
from star_jax.families import Family
from star_jax.training.run import Run

PROGRAMS = 'programs'  # the folder of compiled ones
FITS = 0.85  # of the memory that may be filled
MULTIPLE = 4  # that the largest batch is of

Reports = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured of every run.

    Attributes:
        resolutions: image sides to sample at, in px of the published scales (0: the model's own).
        batches: batch sizes of sampling.
        largest: also sample with the largest batch that fits, estimated from the smaller ones.
        trained: image sides to train at, in px of the published scales (0: the model's own).
        training: batch sizes of training.
        repeats: timed runs of each program.
        dtype: dtype of the activations; bfloat16 on accelerators.
    """

    resolutions: tuple[int, ...] = (256, 512, 1024)
    batches: tuple[int, ...] = (1, 8)
    largest: bool = True
    trained: tuple[int, ...] = (256, 512)
    training: tuple[int, ...] = (16,)
    repeats: int = 10
    dtype: Dtype = 'bfloat16'

    def __post_init__(self) -> None:
        for name in ('batches', 'training'):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f'{name} must be at least 1, not {getattr(self, name)}')
        if self.repeats < 1:
            raise ValueError(f'repeats must be at least 1, not {self.repeats}')
        for size in self.resolutions + self.trained:
            if size and size not in SIDES:
                raise ValueError(f'there are no published scales of {size} px: choose of {SIDES}')


def sized(model: Family, resolution: int) -> Family:
    """The model with the published scales of a resolution (0: its own), all tokens kept."""
    if not resolution:
        return model
    return dataclasses.replace(model, sides=SIDES[resolution], keep_tokens=0)


def measure(
    runs: Mapping[str, Run],
    suite: Suite,
    out: Path,
    minutes: float,
    notice: Callable[[str], None],
) -> Reports:
    """The reports of all jobs that there was time for, by name; what failed says `failed`.

    No job begins after so many `minutes`. `notice` is told what goes on. Raises UserError where the
    folder `out` holds what was measured of another job of the same name.
    """
    end = time.monotonic() + 60 * minutes
    reports: Reports = {}

    def observe(name: str, job: Job) -> None:
        path = out / f'{name.replace(" ", "_")}.json'
        if path.exists():
            reports[name] = _kept(path, job)
        elif time.monotonic() < end:
            reports[name] = _observe(job, out, lambda words: notice(f'{name}, {words}'))
            config.write_json(path, reports[name])

    for name, job in _jobs(runs, suite):
        observe(name, job)
    for name, job in list(_largest(runs, suite, reports)):
        observe(name, job)
    return reports


def _jobs(runs: Mapping[str, Run], suite: Suite) -> Iterator[tuple[str, Job]]:
    """The jobs, those that most are curious about first."""
    for batch in sorted(suite.batches):
        for resolution in suite.resolutions:
            for name, run in runs.items():
                yield (
                    _name('sample', name, resolution, batch),
                    _sampling(run, suite, resolution, batch),
                )
    for batch in suite.training:
        for resolution in suite.trained:
            for name, run in runs.items():
                changed = dataclasses.replace(
                    run, model=sized(run.model, resolution), batch=batch, dtype=suite.dtype
                )
                job = Training(run=changed, repeats=suite.repeats)
                yield _name('train', name, resolution, batch), job


def _largest(
    runs: Mapping[str, Run], suite: Suite, reports: Reports
) -> Iterator[tuple[str, Sampling]]:
    """A job with the largest batch that fits, wherever two smaller ones tell what one takes."""
    two = sorted(set(suite.batches))[-2:]
    if not suite.largest or len(two) < 2:
        return
    for resolution in suite.resolutions:
        for name, run in runs.items():
            pair = [reports.get(_name('sample', name, resolution, batch), {}) for batch in two]
            if all('memory' in report for report in pair):
                batch = largest_batch(*pair)
                if batch > max(suite.batches):
                    job = _sampling(run, suite, resolution, batch)
                    yield _name('sample', name, resolution, batch), job


def largest_batch(small: Mapping[str, Any], large: Mapping[str, Any]) -> int:
    """Images that fit into the memory, if what two batches needed grows by the image."""
    (first, second), (least, most) = (
        [report[part][key] for report in (small, large)]
        for part, key in (('job', 'batch'), ('memory', 'temporaries'))
    )
    each = max((most - least) / (second - first), 1e-3)
    room = FITS * large['memory']['limit'] - large['memory']['weights'] - most
    return max(second + int(room / each), 1) // MULTIPLE * MULTIPLE


def _kept(path: Path, job: Job) -> dict[str, Any]:
    """The report of a job in its file; UserError where that tells of another one."""
    report = config.read_json(path)
    given = config.from_json(type(job), report.get('job'), where=str(path))
    if changed := config.differences(given, job):
        raise UserError(
            f'{path} was measured with other settings ({"; ".join(changed)}): give another --out, '
            'or remove it'
        )
    return report


def _sampling(run: Run, suite: Suite, resolution: int, batch: int) -> Sampling:
    return Sampling(
        model=sized(run.model, resolution),
        settings=run.sampling,
        batch=batch,
        repeats=suite.repeats,
        dtype=suite.dtype,
    )


def _name(what: str, run: str, resolution: int, batch: int) -> str:
    return f'{what} {run} {f"{resolution} px " if resolution else ""}batch {batch}'


def _observe(job: Job, out: Path, notice: Callable[[str], None]) -> dict[str, Any]:
    """The report of a job; of one that draws a single image with its start from a warm cache."""
    described = {'kind': type(job).__name__, 'job': config.to_json(job)}
    try:
        report = process.observe(job, 'measure', out / PROGRAMS, notice)
        start = {'cold_start': report.pop('start')}
        if isinstance(job, Sampling) and job.batch == 1:
            second = process.observe(job, 'start', out / PROGRAMS, notice)
            start['warm_start'] = second['start']
    except UserError as error:
        return described | {'failed': str(error)}
    return described | start | report
