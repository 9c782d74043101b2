"""`star-jax bench attention|data CONFIG`: what is measured in this process, and in parts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from star_jax import files
from star_jax.bench import attention, bench_tables, data
from star_jax.checkpoint import config, models
from star_jax.commands import arguments, training
from star_jax.core.settings import Dtype
from star_jax.errors import UserError
from star_jax.families import Family
from star_jax.nn.attention_dispatch import Name
from star_jax.parallel import startup
from star_jax.training.run import Data, Run, resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Measures self-attention in training, every way of computing it beside the formula.

    CONFIG, the first word, is a Python file that defines `run` (see configs/) or a run's
    config.json: one layer of its model, over all rows of an image.

    Example: star-jax bench attention configs/star_d16_256.py --batch 4

    Attributes:
        model: the sizes of the transformer.
        batch: images at once.
        repeats: timed runs of each.
        dtype: float32, or bfloat16 for accelerators.
        kernels: which of them, also flash on GPUs and splash on TPUs (dense, the formula, keeps
            all scores of all rows in memory).
        json: a file for the whole report.
    """

    model: Annotated[Family, tyro.conf.arg(name='')]
    batch: int = 1
    repeats: int = 5
    dtype: Dtype = 'float32'
    kernels: tuple[Name, ...] = attention.KERNELS
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Measures how fast batches come from a data set, beside one thread that reads alone.

    CONFIG, the first word, is a Python file that defines `run` (see configs/) or a run's
    config.json: its training data, at the size that its tokenizer wants.

    Example: star-jax bench data configs/shapes.py --threads 8

    Attributes:
        data: the pictures.
        size: of their sides, in px (0: that of the run's tokenizer).
        batch: images of a batch.
        batches: how many are read.
        threads: that read ahead.
        json: a file for the whole report.
    """

    data: Data
    size: int = 0
    batch: int = 64
    batches: int = 20
    threads: int = 4
    json: Path | None = None


def measure_attention(place: str, words: Sequence[str]) -> None:
    run = _run(place)
    given = arguments.parse(Attention, words, 'bench attention CONFIG', Attention(model=run.model))
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    path = fields.pop('json')
    try:
        job = attention.AttentionJob(**fields)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check(path)
    startup.start()
    console = Console()
    with console.status('compiling and measuring'):
        report = attention.run(job)
    console.print(bench_tables.attention(report))
    _keep(path, {'job': config.to_json(job), **report})


def measure_data(place: str, words: Sequence[str]) -> None:
    run = _run(place)
    default = Reading(data=run.data, batch=run.batch)
    given = arguments.parse(Reading, words, 'bench data CONFIG', default)
    try:
        reading = data.ReadingJob(batch=given.batch, batches=given.batches, threads=given.threads)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check(given.json)
    startup.start()
    source = given.data.open(given.size or _resolution(run))
    console = Console()
    with console.status('reading'):
        report = data.run(source, reading)
    console.print(bench_tables.data(report))
    _keep(given.json, {'data': config.to_json(given.data), **report})


def _run(place: str) -> Run:
    return training.load(Path(place), Run) if place else Run()


def _resolution(run: Run) -> tuple[int, int]:
    tokenizer = models.read_tokenizer(resolve(run).tokenizer)
    return tokenizer.config.at(run.model.schedule).resolution


def _check(path: Path | None) -> None:
    if path is not None:
        files.check_file(path)


def _keep(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            config.write_json(path, report)
