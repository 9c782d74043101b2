"""How fast is a machine at the published sizes?

Each job runs in its own process, so a job that does not fit in memory does not end the others. Each
report is a file in a folder, so the same call continues after an interruption.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from star_jax.bench import process, timing
from star_jax.bench.process import Job
from star_jax.bench.sampling import SamplingJob
from star_jax.bench.training import TrainingJob
from star_jax.checkpoint import config
from star_jax.convert.infer import SIDES, SQUARES
from star_jax.core.settings import Dtype
from star_jax.errors import UserError
from star_jax.protocols import Family
from star_jax.training.run import Run

PROGRAMS = 'programs'  # the folder of compiled programs
MEMORY_FRACTION = 0.85  # share of the memory that the largest batch may fill
BATCH_MULTIPLE = 4  # the largest batch is a multiple of it

FAILED = 'failed'  # the key of the error of a job that has no report
SHARE = 'read_rate_share'  # a key of each program in the reports of this version

Reports = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """The measurements of every model.

    Attributes:
        resolutions: px of published scales at which images are sampled (0: the run's own scales).
        batches: batch sizes of sampling.
        largest: also sample the largest batch that fits, by the memory that two batches needed.
        trained: px of published scales at which training is measured (0: the run's own scales).
        training: batch sizes of training.
        repeats: timed runs.
        dtype: the compute dtype.
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
                raise UserError(f'{name} must be at least 1, not {getattr(self, name)}')
        if self.repeats < 1:
            raise UserError(f'repeats must be at least 1, not {self.repeats}')
        timing.check_runs('repeats', self.repeats)
        for size in self.resolutions + self.trained:
            if size and size not in SIDES:
                known = ', '.join(map(str, SIDES))
                raise UserError(f'no published scales of {size} px: expected {known} or 0')


def with_resolution(model: Family, resolution: int) -> Family:
    """The model with the published scales of a resolution in px, and all tokens kept.

    Resolution 0 stands for the model as it is. Raises UserError for a resolution or a family
    without published scales.
    """
    if not resolution:
        return model
    scales = {'sides': SIDES, 'grids': SQUARES}
    field = next((name for name in scales if hasattr(model, name)), None)
    if field is None:
        raise UserError(
            f'{type(model).__name__} has no published scales: give the resolution 0, its own '
            '(--resolution 0; of a suite --resolutions 0 --trained 0)'
        )
    if resolution not in scales[field]:
        known = ', '.join(map(str, scales[field]))
        raise UserError(f'resolution must be one of {known} px, not {resolution}')
    changes = {'keep_tokens': 0} if model.keep_tokens else {}
    return dataclasses.replace(model, **{field: scales[field][resolution]}, **changes)


def measure(
    runs: Mapping[str, Run],
    settings: SuiteSettings,
    out: Path,
    minutes: float,
    on_progress: Callable[[str], None],
) -> Reports:
    """The reports of all jobs by name; that of a job that failed holds its error as `failed` alone.

    The others are written to files, which the next call reads; it tries failed jobs again.

    Args:
        runs: the runs whose models are measured, by name.
        settings: the measurements of every model.
        out: the folder of the reports.
        minutes: no job starts after this time.
        on_progress: receives a line of text before each slow step.

    Raises:
        UserError: a model cannot have a resolution, or the folder holds the report of a job with
            the same name and other settings; no job has started then.
    """
    end = time.monotonic() + 60 * minutes
    reports: Reports = {}

    def report_job(name: str, job: Job) -> None:
        path = _path(out, name)
        if path.exists():
            reports[name] = _read_report(path, job)
        elif time.monotonic() < end:
            reports[name] = _measure_job(job, out, lambda line: on_progress(f'{name}, {line}'))
            if FAILED not in reports[name]:
                config.write_json(path, reports[name])

    jobs = list(_jobs(runs, settings))
    for name, job in jobs:
        if _path(out, name).exists():
            _read_report(_path(out, name), job)
    for name, job in jobs:
        report_job(name, job)
    for name, make_job in list(_largest_jobs(runs, settings, reports)):
        try:
            report_job(name, make_job())
        except UserError as error:  # raised, it would lose the reports of the others
            reports[name] = {FAILED: str(error)}
    return reports


def _jobs(runs: Mapping[str, Run], settings: SuiteSettings) -> Iterator[tuple[str, Job]]:
    """The jobs by name, the most informative first."""
    for batch in sorted(settings.batches):
        for resolution in settings.resolutions:
            for name, run in runs.items():
                yield (
                    _name('sample', name, resolution, batch),
                    _sampling_job(run, settings, resolution, batch),
                )
    for batch in settings.training:
        for resolution in settings.trained:
            for name, run in runs.items():
                changed = dataclasses.replace(
                    run,
                    model=with_resolution(run.model, resolution),
                    batch=batch,
                    dtype=settings.dtype,
                )
                job = TrainingJob(run=changed, repeats=settings.repeats)
                yield _name('train', name, resolution, batch), job


def _largest_jobs(
    runs: Mapping[str, Run], settings: SuiteSettings, reports: Reports
) -> Iterator[tuple[str, Callable[[], SamplingJob]]]:
    """Makers of jobs with the largest batch that fits, where two smaller batches were measured."""
    two = sorted(set(settings.batches))[-2:]
    if not settings.largest or len(two) < 2:
        return
    for resolution in settings.resolutions:
        for name, run in runs.items():
            pair = [reports.get(_name('sample', name, resolution, batch), {}) for batch in two]
            if all('memory' in report for report in pair):
                batch = largest_batch(*pair)
                if batch > max(settings.batches):
                    make_job = functools.partial(_sampling_job, run, settings, resolution, batch)
                    yield _name('sample', name, resolution, batch), make_job


def largest_batch(small: Mapping[str, Any], large: Mapping[str, Any]) -> int:
    """The batch that fills the memory, on the line through the temporaries of two batches."""
    small_batch, large_batch = (report['job']['batch'] for report in (small, large))
    small_size, large_size = (report['memory']['temporaries'] for report in (small, large))
    per_image = max((large_size - small_size) / (large_batch - small_batch), 1e-3)
    memory = large['memory']
    available = MEMORY_FRACTION * memory['limit'] - memory['weights'] - large_size
    batch = max(large_batch + int(available / per_image), 1)
    return batch // BATCH_MULTIPLE * BATCH_MULTIPLE


def _read_report(path: Path, job: Job) -> dict[str, Any]:
    """The report in a file; UserError if it is no report, or that of another job or version."""
    report, remedy = config.read_json(path), 'give another --out, or remove it'
    if not isinstance(report, dict):
        raise UserError(f'{path} holds no report of a benchmark: {remedy}')
    measured = config.from_json(type(job), report.get('job'), where=str(path))
    if changed := config.differences(measured, job):
        raise UserError(f'{path} was measured with other settings ({"; ".join(changed)}): {remedy}')
    found: Any = report
    for key in ('parts', 'program', SHARE):
        found = found.get(key) if isinstance(found, dict) else None
    if found is None or process.describe(job).keys() - report.keys():
        raise UserError(
            f'{path} lacks what this version reports, so another version measured it: {remedy}'
        )
    return report


def _path(out: Path, name: str) -> Path:
    return out / f'{name.replace(" ", "_")}.json'


def _sampling_job(run: Run, settings: SuiteSettings, resolution: int, batch: int) -> SamplingJob:
    return SamplingJob(
        model=with_resolution(run.model, resolution),
        settings=run.sampling,
        batch=batch,
        repeats=settings.repeats,
        dtype=settings.dtype,
    )


def _name(kind: str, run: str, resolution: int, batch: int) -> str:
    return f'{kind} {run} {f"{resolution} px " if resolution else ""}batch {batch}'


def _measure_job(job: Job, out: Path, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """The report of a job; a job that samples one image is also started from a warm cache."""
    try:
        report = process.run_worker(job, 'measure', out / PROGRAMS, on_progress)
        starts = {'cold_start': report.pop('start')}
        if isinstance(job, SamplingJob) and job.batch == 1:
            warm = process.run_worker(job, 'start', out / PROGRAMS, on_progress)
            starts['warm_start'] = warm['start']
    except UserError as error:
        return {FAILED: str(error)}
    return process.describe(job) | starts | report
