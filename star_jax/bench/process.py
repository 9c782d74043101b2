"""What does a job cost in a fresh process, with and without a cache of compiled programs?

Two worker processes run the same job: the first starts with an empty cache and measures, the second
starts with the programs of the first. Both report when they completed each stage.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from star_jax import files
from star_jax.bench.sampling import SamplingJob
from star_jax.bench.training import TrainingJob
from star_jax.checkpoint import config
from star_jax.errors import UserError

WORKER = 'star_jax.bench'
REPORT = 'report: '  # starts the line of a worker's report; libraries may print JSON, too

Job = SamplingJob | TrainingJob
Task = Literal['start', 'measure']


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobFile:
    """The content of the file that a worker process reads.

    Attributes:
        job: the benchmark to run.
        profile: a folder for a profiler's trace ('': none).
    """

    job: Job
    profile: str = ''


def measure(
    job: Job,
    on_progress: Callable[[str], None],
    cache: Path | None = None,
    profile: Path | None = None,
) -> dict[str, Any]:
    """The report of a job: its config, a cold start, a warm start, and all that `worker` measures.

    Args:
        job: the benchmark to run.
        on_progress: receives a line of text before each slow step.
        cache: a new folder that keeps compiled programs; by default they are deleted.
        profile: a folder for a profiler's trace.

    Raises:
        UserError: the folder `cache` exists, or a process fails.
    """
    with files.temporary_folder() as temporary:
        folder = cache or temporary / 'cache'
        if folder.exists():
            raise UserError(f'{folder} exists and may hold compiled programs: name a new folder')
        cold = run_worker(job, 'measure', folder, on_progress, profile)
        warm = run_worker(job, 'start', folder, on_progress)
    starts = {'cold_start': cold.pop('start'), 'warm_start': warm['start']}
    return describe(job) | starts | cold


def describe(job: Job) -> dict[str, Any]:
    """What a report says of its job: its kind, its config, and of sampling whether it is guided."""
    described = {'kind': type(job).__name__, 'job': config.to_json(job)}
    return described | ({'guided': job.guided} if isinstance(job, SamplingJob) else {})


def run_worker(
    job: Job,
    task: Task,
    cache: Path,
    on_progress: Callable[[str], None],
    profile: Path | None = None,
) -> dict[str, Any]:
    """The report of one worker process, with its stages in seconds since it was started.

    Args:
        job: the benchmark to run.
        task: 'start' ends after the first result, 'measure' goes on to measure.
        cache: the folder of compiled programs.
        on_progress: receives a line of text for each stage.
        profile: a folder for a profiler's trace.

    Raises:
        UserError: the process fails.
    """
    environment = os.environ | {'STAR_JAX_CACHE': str(cache)}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    with files.temporary_folder() as temporary:
        path = temporary / 'job.json'
        config.write(path, JobFile(job=job, profile=str(profile or '')))
        started = time.time()
        command = [sys.executable, '-m', WORKER, str(path), task]
        reports, status = _run(command, environment, lambda line: on_progress(f'{task}: {line}'))
    if status or not reports:
        raise UserError(
            f'the benchmark process ({task}) ended with status {status}: its messages are above'
        )
    report = reports[-1]
    stages = {name: moment - started for name, moment in report['start']['stages'].items()}
    report['start'] |= {
        'stages': stages,
        'compile_seconds': stages['compiled'] - stages['lowered'],
        'jax_to_dispatch_seconds': stages['dispatch'] - stages['imports'],
        'weights_to_dispatch_seconds': stages['dispatch'] - stages['weights'],
    }
    return report


def _run(
    command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]
) -> tuple[list[dict[str, Any]], int]:
    """The reports that a command prints and its exit status; `on_line` gets the other lines."""
    reports = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith(REPORT):
                reports.append(json.loads(line.removeprefix(REPORT)))
            else:
                on_line(line.strip())
    return reports, process.returncode
