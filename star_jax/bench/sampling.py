"""What does drawing an image cost, from a fresh process on?

Two processes of the same job: the first finds no compiled program and then takes the times, the
second finds the first one's. Both say when they reached what; nothing else runs in them.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from star_jax.checkpoint import config
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.families import Family
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ

WORKER = 'star_jax.bench'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is drawn: random weights of these sizes, or those of a model `folder`.

    Text is random too: `text_tokens` states of the model's text width. `batch` images per run of
    the program, `repeats` timed runs.
    """

    model: Family
    autoencoder: Autoencoder = Autoencoder()
    folder: str = ''
    settings: Settings = Settings()
    batch: int = 1
    repeats: int = 10
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    text_tokens: int = 77

    def __post_init__(self) -> None:
        if min(self.batch, self.repeats, self.text_tokens) < 1:
            raise ValueError(
                f'batch, repeats and text_tokens must be at least 1, not {self.batch}, '
                f'{self.repeats} and {self.text_tokens}'
            )

    @property
    def tokenizer(self) -> VQ:
        """The tokenizer whose weights are random."""
        return VQ(
            autoencoder=self.autoencoder,
            sides=self.model.sides,
            codes=self.model.codes,
            channels=self.model.channels,
        )


def run(job: Job, notice: Callable[[str], None], cache: Path | None = None) -> dict[str, Any]:
    """The report of a job (`worker` says what is in it), with its config.

    `notice` is told what goes on. Compiled programs go to the new folder `cache` and stay there (by
    default they are thrown away). Raises UserError if it exists, or if a process fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = cache or Path(temporary) / 'cache'
        if folder.exists():
            raise UserError(f'{folder} exists and may hold compiled programs: name a new folder')
        path = Path(temporary) / 'job.json'
        config.write(path, job)
        observe = functools.partial(_observe, path, folder, notice)
        first = observe('first process', 'measure')
        second = observe('second process', 'start')
    start = {'cold_start': first.pop('start'), 'warm_start': second['start']}
    return {'job': config.to_json(job), **start, **first}


def _observe(
    job: Path, cache: Path, notice: Callable[[str], None], name: str, task: str
) -> dict[str, Any]:
    """What a process reports, its start in seconds since it was asked for."""
    environment = os.environ | {'STAR_JAX_CACHE': str(cache)}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    asked = time.time()
    command = [sys.executable, '-m', WORKER, str(job), task]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            if line.startswith('{'):
                lines.append(json.loads(line))
            else:
                notice(f'{name}: {line.strip()}')
    if process.returncode or not lines:
        raise UserError(f'the {name} ended with status {process.returncode}; its words stand above')
    report = lines[-1]
    at = {stage: moment - asked for stage, moment in report['start']['reached'].items()}
    report['start'] |= {
        'reached': at,
        'compile_seconds': at['compiled'] - at['lowered'],
        'since_jax': at['dispatch'] - at['imports'],
        'since_weights': at['dispatch'] - at['weights'],
    }
    return report
