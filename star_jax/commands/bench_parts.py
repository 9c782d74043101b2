"""`star-jax bench attention|layers|torch|data CONFIG`: the benchmarks that run in this process."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.table import Table

from star_jax import files
from star_jax.bench import attention, bench_tables, data, layers, torch_loop
from star_jax.bench.sampling import SamplingJob
from star_jax.checkpoint import config, models
from star_jax.commands import arguments, run_config
from star_jax.commands.data import MAX_SIZE
from star_jax.console import Console
from star_jax.core.settings import Dtype, Settings
from star_jax.errors import UserError
from star_jax.nn.attention_dispatch import Name
from star_jax.parallel import startup
from star_jax.protocols import Family
from star_jax.training.run import Data, Run, resolve

Job = TypeVar('Job')

COMMON = {
    'model': ('depth', 'width', 'heads', 'sides', 'grid'),
    'sampling': ('guidance', 'top-k', 'top-p'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchAttention:
    """Measures self-attention in training: every kernel, compared with the reference formula.

    It measures one layer over all tokens of an image. CONFIG is a Python file that defines `run`
    (see configs/) or the config.json of a run; options replace the sizes of its model.

    Example: star-jax bench attention configs/star_d16_256.py --batch 4

    Attributes:
        model: sizes of the transformer.
        batch: images per call.
        repeats: timed runs of each kernel.
        dtype: dtype of queries, keys and values; bfloat16 on accelerators.
        kernels: kernels to measure, on GPUs also flash, on TPUs also splash (dense, the formula,
            keeps the scores of all tokens in memory).
        json: JSON file of the report.
    """

    model: Annotated[Family, tyro.conf.arg(name='')]
    batch: int = 1
    repeats: int = 5
    dtype: Dtype = 'float32'
    kernels: tuple[Name, ...] = attention.KERNELS
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchLayers:
    """Measures sampling with weights that layers read in place, in turn with one scan over them.

    CONFIG is a Python file that defines `run` (see configs/) or the config.json of a run; options
    replace its sizes. Weights and text are random, and nothing is decoded.

    Example: star-jax bench layers configs/star_d16_256.py

    Example: star-jax bench layers configs/llamagen_b.py --grid 16 16 --batch 8

    Attributes:
        model: sizes of the transformer.
        settings: how images are sampled.
        batch: images at once.
        repeats: timed runs of each form, in turn.
        dtype: dtype of the activations.
        text_tokens: tokens of a caption.
        json: JSON file of the report.
    """

    model: Annotated[Family, tyro.conf.arg(name='')]
    settings: Annotated[Settings, tyro.conf.arg(name='')] = Settings()
    batch: int = 1
    repeats: int = 3
    dtype: Dtype = 'float32'
    text_tokens: int = 77
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchTorch:
    """Measures a step of sampling a raster, in turn with a plain PyTorch loop of the same sizes.

    CONFIG is a Python file that defines `run` (see configs/) or the config.json of a run whose
    model is a LlamaGen; options replace its sizes. The weights of both are random, and both use all
    cores of the CPU. PyTorch must be installed.

    Example: star-jax bench torch configs/llamagen_b.py --grid 16 16

    Attributes:
        model: sizes of the transformer.
        batch: images at once.
        rounds: how often both are timed, in turn.
        steps: steps of the loop in a round.
        json: JSON file of the report.
    """

    model: Annotated[Family, tyro.conf.arg(name='')]
    batch: int = 1
    rounds: int = 3
    steps: int = 32
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchData:
    """Measures how fast batches are read from a dataset, compared with a single thread.

    CONFIG is a Python file that defines `run` (see configs/) or the config.json of a run; its
    training data are read.

    Example: star-jax bench data configs/shapes.py --threads 8

    Attributes:
        data: dataset to read.
        size: side of the images in px (0: that of the run's tokenizer).
        batch: images per batch.
        batches: number of batches.
        threads: threads that read ahead.
        json: JSON file of the report.
    """

    data: Data
    size: int = 0
    batch: int = 64
    batches: int = 20
    threads: int = 4
    json: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_SIZE:
            raise UserError(
                f'size must lie in [0, {MAX_SIZE}] pixels (0: of the tokenizer), not {self.size}'
            )


def measure_attention(source: str, words: Sequence[str]) -> None:
    """Runs `bench attention` with the config `source` ('': the default run)."""
    default = BenchAttention(model=_run(source).model)
    options = arguments.parse(
        BenchAttention, words, 'bench attention CONFIG', default, common=COMMON
    )
    job = _job(attention.AttentionJob, options)
    _measure(job, attention.run, bench_tables.attention, options.json)


def measure_layers(source: str, words: Sequence[str]) -> None:
    """Runs `bench layers` with the config `source` ('': the default run)."""
    run = _run(source)
    default = BenchLayers(model=run.model, settings=run.sampling)
    options = arguments.parse(BenchLayers, words, 'bench layers CONFIG', default, common=COMMON)
    fields = {field.name for field in dataclasses.fields(BenchLayers)} - {'json'}
    job = SamplingJob(**{name: getattr(options, name) for name in fields})
    _measure(job, layers.run, bench_tables.layers, options.json)


def measure_torch(source: str, words: Sequence[str]) -> None:
    """Runs `bench torch` with the config `source`, which must be given."""
    if not source and not arguments.asks_for_help(words):
        raise UserError(
            'bench torch measures a raster: name the config of a LlamaGen model, such as '
            'configs/llamagen_b.py'
        )
    default = BenchTorch(model=_run(source).model)
    options = arguments.parse(BenchTorch, words, 'bench torch CONFIG', default, common=COMMON)
    job = _job(torch_loop.TorchLoopJob, options)
    _measure(job, torch_loop.run, bench_tables.torch_loop, options.json)


def measure_data(source: str, words: Sequence[str]) -> None:
    """Runs `bench data` with the config `source` ('': the default run)."""
    run = _run(source)
    default = BenchData(data=run.data, batch=run.batch)
    options = arguments.parse(BenchData, words, 'bench data CONFIG', default)
    reading = data.ReadingJob(batch=options.batch, batches=options.batches, threads=options.threads)
    _check(options.json)
    startup.start()
    images = options.data.open(options.size or _resolution(run))
    console = Console()
    with console.status('reading'):
        report = data.run(images, reading)
    console.print(bench_tables.data(report))
    _write(options.json, {'data': config.to_json(options.data), **report})


def _job(job_class: type[Job], options: Any) -> Job:
    """The job with the options of the same names; UserError for invalid ones."""
    names = [field.name for field in dataclasses.fields(job_class)]
    return job_class(**{name: getattr(options, name) for name in names})


def _measure(
    job: Job,
    measure: Callable[[Job], dict[str, Any]],
    table: Callable[[dict[str, Any]], Table],
    path: Path | None,
) -> None:
    """Measures a job, prints the report as a table, and writes it to `path`."""
    _check(path)
    startup.start()
    console = Console()
    with console.status('compiling and measuring'):
        report = measure(job)
    console.print(table(report))
    _write(path, {'job': config.to_json(job), **report})


def _run(source: str) -> Run:
    return run_config.load(Path(source), Run) if source else Run()


def _resolution(run: Run) -> tuple[int, int]:
    tokenizer = models.read_tokenizer(resolve(run).tokenizer)
    return tokenizer.config.at(run.model.schedule).resolution


def _check(path: Path | None) -> None:
    if path is not None:
        files.check_file(path)


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            config.write_json(path, report)
