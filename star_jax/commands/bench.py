"""`star-jax bench sample|train|buckets|attention|layers|torch|data|suite CONFIG`"""

import dataclasses
import functools
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import tyro

from star_jax import files
from star_jax.bench import bench_tables, process, suite
from star_jax.bench.sampling import SamplingJob
from star_jax.bench.training import TrainingJob
from star_jax.checkpoint import config, models
from star_jax.commands import arguments, bench_parts, bench_suite, run_config
from star_jax.console import Console
from star_jax.core.buckets import Buckets, divide
from star_jax.core.settings import Dtype, Settings
from star_jax.errors import UserError
from star_jax.protocols import Family
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.training.run import Run

USAGE = """usage: star-jax bench sample|train|buckets|attention|layers|torch|data|suite [...]

Each has --help.

  star-jax bench sample configs/star_d16_256.py      sampling, from a cold start
  star-jax bench train configs/star_d16_256.py       a training step, from a cold start
  star-jax bench buckets configs/star_d16_256.py     sampling with scales that share a program body
  star-jax bench attention configs/star_d16_256.py   attention kernels against the formula
  star-jax bench layers configs/star_d16_256.py      weights read in place, against one scan
  star-jax bench torch configs/llamagen_b.py         steps of a raster against a PyTorch loop
  star-jax bench data configs/shapes.py              reading batches
  star-jax bench suite configs/star_d16_256.py       sampling and training at many sizes, resumable
"""

FLAG_PREFIXES = {'True': '', 'False': 'no-'}  # prefix of a switch's option, by its value
COMMON = {
    'model': ('depth', 'width', 'heads', 'sides'),
    'sampling': ('guidance', 'top-k', 'top-p', 'stable.version'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSample:
    """Measures sampling from a cold start, compared with the matrix rate of this machine.

    CONFIG is a Python file that defines `run` (see configs/) or the config.json of a run: the sizes
    of the model and the sampling settings, which options replace; weights, text and tokenizer (the
    published one, at the sides of the model) are random. Or it is a model FOLDER, whose weights are
    used with random text.

    Example: star-jax bench sample configs/star_d16_256.py --batch 4 --json d16.json

    Example: star-jax bench sample configs/star_d30_256.py --sweep batch=1,8 resolution=256,512

    Example: star-jax bench buckets configs/star_d16_256.py (compares none, three and one)

    Attributes:
        model: sizes of the transformer.
        settings: how images are sampled.
        autoencoder: sizes of the tokenizer.
        resolution: image side in px, with the published scales (0: the scales of the model).
        text_tokens: tokens of a caption.
        text_encoder: time the text encoder, too (that of Infinity takes 5 GB in float32); the
            program samples from text features that are given.
        batch: images per batch.
        repeats: timed runs of the program.
        dtype: dtype of the activations; bfloat16 on accelerators.
        buckets: pairs of the first and the last scale that share a program body (none: chosen by
            platform).
        sweep: options with their values, as OPTION=A,B,...; every combination is measured.
        compilation_cache: new folder in which the compiled programs stay (none: they are deleted).
        profile: folder of a profiler trace, for TensorBoard and Perfetto.
        json: JSON file of the reports.
    """

    model: Annotated[Family, tyro.conf.arg(name='')]
    settings: Annotated[Settings, tyro.conf.arg(name='')] = Settings()
    autoencoder: Autoencoder = Autoencoder()
    resolution: int = 0
    text_tokens: int = 77
    text_encoder: bool = True
    batch: int = 1
    repeats: int = 10
    dtype: Dtype = 'float32'
    buckets: Buckets | None = None
    sweep: tuple[str, ...] = ()
    compilation_cache: Path | None = None
    profile: Path | None = None
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchTrain:
    """Measures a training step from a cold start, compared with the matrix rate of this machine.

    CONFIG is a Python file that defines `run` (see configs/) or the config.json of a run; options
    replace its fields. Weights, codes and text features are random, so data and tokenizer are not
    needed.

    Example: star-jax bench train configs/star_d16_256.py --batch 4 --dtype float32

    Example: star-jax bench train configs/star_d30_256.py --sweep batch=8,16,32 remat=none,full

    Attributes:
        run: config of the run whose step is measured.
        text_tokens: tokens of a caption.
        repeats: timed steps.
        sweep: options with their values, as OPTION=A,B,...; every combination is measured.
        compilation_cache: new folder in which the compiled programs stay (none: they are deleted).
        profile: folder of a profiler trace, for TensorBoard and Perfetto.
        json: JSON file of the reports.
    """

    run: Annotated[Run, tyro.conf.arg(name='')]
    text_tokens: int = 77
    repeats: int = 10
    sweep: tuple[str, ...] = ()
    compilation_cache: Path | None = None
    profile: Path | None = None
    json: Path | None = None


class SharedOptions(Protocol):
    """The options that BenchSample and BenchTrain share, as their docstrings describe them.

    Attributes:
        sweep: options with their values.
        compilation_cache: folder of compiled programs.
        profile: folder of a profiler trace.
        json: JSON file of the reports.
    """

    sweep: tuple[str, ...]
    compilation_cache: Path | None
    profile: Path | None
    json: Path | None


# A CONFIG and the words after it -> the options and the job that they describe.
Read = Callable[[str, Sequence[str]], tuple[SharedOptions, SamplingJob | TrainingJob]]


def main(words: Sequence[str]) -> int:
    benchmarks = {
        'sample': functools.partial(_measure, read_sampling),
        'train': functools.partial(_measure, read_training),
        'buckets': _measure_buckets,
        'attention': bench_parts.measure_attention,
        'layers': bench_parts.measure_layers,
        'torch': bench_parts.measure_torch,
        'data': bench_parts.measure_data,
    }
    names = f'{", ".join(benchmarks)} or suite'
    words = list(words)
    if arguments.asks_for_help(words[:1]):
        sys.stdout.write(USAGE)
        return 0
    if not words:
        raise UserError(f'expected {names} after bench: --help describes each')
    if words[0] == 'suite':
        bench_suite.measure(words[1:])
        return 0
    if words[0] not in benchmarks:
        raise UserError(f'expected {names} after bench, not {words[0]!r}')
    source = words[1] if words[1:] and not words[1].startswith('-') else ''
    benchmarks[words[0]](source, words[2:] if source else words[1:])
    return 0


def read_sampling(
    source: str, words: Sequence[str], name: str = 'sample'
) -> tuple[BenchSample, SamplingJob]:
    """The options of `bench NAME` for a CONFIG or a model FOLDER, and their job.

    Raises UserError for invalid options.
    """
    command = f'bench {name} CONFIG|FOLDER'
    if not source or Path(source).suffix in ('.py', '.json'):
        run = run_config.load(Path(source), Run) if source else Run()
        tokenizer = run.model.default_tokenizer()
        autoencoder = getattr(tokenizer, 'autoencoder', Autoencoder())
        default = BenchSample(model=run.model, settings=run.sampling, autoencoder=autoencoder)
        options = arguments.parse(BenchSample, words, command, default, common=COMMON)
        return options, _sampling_job(options)
    model = models.read_without_weights(source)
    default = BenchSample(
        model=model.config,
        settings=model.sampling,
        autoencoder=model.tokenizer.config.autoencoder,
    )
    options = arguments.parse(BenchSample, words, command, default, common=COMMON)
    changed = config.differences(
        default.model, suite.with_resolution(options.model, options.resolution)
    )
    changed += config.differences(default.autoencoder, options.autoencoder)
    if changed:
        raise UserError(f'the weights of {source} have their sizes: leave out {"; ".join(changed)}')
    return options, _sampling_job(options, folder=source)


def read_training(source: str, words: Sequence[str]) -> tuple[BenchTrain, TrainingJob]:
    """The options for a CONFIG, and their job.

    Raises UserError for invalid options.
    """
    run = run_config.load(Path(source), Run) if source else Run()
    default = BenchTrain(run=run)
    options = arguments.parse(
        BenchTrain, words, 'bench train CONFIG', default, common=run_config.PROGRAM
    )
    job = TrainingJob(run=options.run, text_tokens=options.text_tokens, repeats=options.repeats)
    return options, job


def expand(sweep: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The name and the words of every combination of values of OPTION=A,B,... .

    >>> list(expand(['batch=1,8', 'dtype=bfloat16']))
    [('batch 1, dtype bfloat16', ['--batch', '1', '--dtype', 'bfloat16']),
     ('batch 8, dtype bfloat16', ['--batch', '8', '--dtype', 'bfloat16'])]

    Raises UserError for an invalid sweep.
    """
    columns = []
    for text in sweep:
        option, equals, values = text.partition('=')
        if not equals or not option or not all(values.split(',')):
            raise UserError(f'--sweep takes OPTION=A,B,..., such as batch=1,8, not {text!r}')
        columns.append([(option.lstrip('-'), value) for value in values.split(',')])
    for combination in itertools.product(*columns):
        words = [_option_words(option, value) for option, value in combination]
        yield ', '.join(f'{option} {value}' for option, value in combination), sum(words, [])


def _option_words(option: str, value: str) -> list[str]:
    """The words that give an option a value; a switch has no value, but a prefix."""
    if value in FLAG_PREFIXES:
        *parents, name = option.split('.')
        return ['--' + '.'.join([*parents, FLAG_PREFIXES[value] + name])]
    try:
        return [f'--{option}', *shlex.split(value)]
    except ValueError as error:
        raise UserError(f'--sweep {option}: {value!r} is not a valid value ({error})') from error


def sweep_of_buckets(sizes: Sequence[int]) -> str:
    """The sweep that compares no bucket, three buckets and one, for scales of these sizes."""
    choices = (divide(sizes, count) or ((0, 0),) for count in (0, 3, 1))
    values = (' '.join(map(str, itertools.chain(*buckets))) for buckets in choices)
    return f'buckets={",".join(values)}'


def _measure_buckets(source: str, words: Sequence[str]) -> None:
    read = functools.partial(read_sampling, name='buckets')
    _, job = read(source, words)
    sweep = (sweep_of_buckets(job.model.schedule.sizes),)
    _measure(read, source, words, sweep=sweep)


def _measure(read: Read, source: str, words: Sequence[str], sweep: tuple[str, ...] = ()) -> None:
    """Measures a job with every combination of `sweep` and of the option --sweep."""
    options, _ = read(source, words)
    for path in (options.compilation_cache, options.profile):
        if path is not None:
            files.check_folder(path)
    if options.json is not None:
        files.check_file(options.json)
    combinations = expand([*options.sweep, *sweep])
    jobs = {name: read(source, [*words, *more])[1] for name, more in combinations}
    for folder in {job.folder for job in jobs.values() if isinstance(job, SamplingJob)} - {''}:
        models.read(folder)  # refuses damaged weights before a process starts
    console, reports = Console(), {}
    for name, job in jobs.items():
        with console.status('starting') as status:
            cache, profile = (
                path and path / name for path in (options.compilation_cache, options.profile)
            )
            reports[name] = process.measure(job, status.update, cache, profile)
        console.print(bench_tables.summary(reports[name]), highlight=False)
        for table in bench_tables.tables(reports[name]):
            console.print(table)
        _write(options.json, list(reports.values()))
    if len(reports) > 1:
        console.print(bench_tables.sweep(reports))


def _write(path: Path | None, reports: list[dict[str, Any]]) -> None:
    """Writes the reports so far, because a long sweep may be interrupted."""
    if path is not None:
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            config.write_json(path, reports)


def _sampling_job(options: BenchSample, folder: str = '') -> SamplingJob:
    """The job of the options, with the weights of a model folder ('': random ones)."""
    shared = {field.name for field in dataclasses.fields(SamplingJob)} - {'model', 'folder'}
    fields = {name: getattr(options, name) for name in shared}
    model = suite.with_resolution(options.model, options.resolution)
    return SamplingJob(model=model, folder=folder, **fields)
