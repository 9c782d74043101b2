"""`star-jax bench sample|train|buckets|attention|data|suite CONFIG`"""

import dataclasses
import functools
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import tyro
from rich.console import Console

from star_jax import files
from star_jax.bench import bench_tables, process
from star_jax.bench.sampling import SamplingJob
from star_jax.bench.training import TrainingJob
from star_jax.checkpoint import config, models
from star_jax.commands import arguments, bench_parts, bench_suite, training
from star_jax.convert.infer import SIDES
from star_jax.core.buckets import Buckets, divide
from star_jax.core.settings import Dtype, Settings
from star_jax.errors import UserError
from star_jax.families import Family
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.training.run import Run

USAGE = """usage: star-jax bench sample|train|buckets|attention|data|suite [...]   (each has --help)

  star-jax bench sample configs/star_d16_256.py      drawing images, from a cold start on
  star-jax bench train configs/star_d16_256.py       a training step
  star-jax bench buckets configs/star_d16_256.py     drawing with scales that share their programs
  star-jax bench attention configs/star_d16_256.py   every kernel of attention beside the formula
  star-jax bench data configs/shapes.py              reading batches
  star-jax bench suite configs/star_d16_256.py       many sizes in one go, resumable
"""

SWITCHES = {'True': '', 'False': 'no-'}  # how a switch is called for each of its values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Measures sampling, from a cold start on, beside the matrix rate of this machine.

    CONFIG, the first word, is a Python file that defines `run` (see configs/) or a run's
    config.json: the model's sizes and how to sample, every field of which can be changed by an
    option; weights, text and tokenizer (the published one, at the model's sides) are random. Or it
    is a model FOLDER, whose weights are used; text is random.

    Example: star-jax bench sample configs/star_d16_256.py --batch 4 --json d16.json
    Example: star-jax bench sample configs/star_d30_256.py --sweep batch=1,8 resolution=256,512
    Example: star-jax bench buckets configs/star_d16_256.py (none, that is 0 0, three and one)

    Attributes:
        model: the sizes of the transformer.
        settings: how images are drawn.
        autoencoder: the sizes of the tokenizer.
        resolution: px of published scales, instead of the model's (0: those).
        text_tokens: tokens of a caption.
        batch: images per run of the program.
        repeats: timed runs.
        dtype: float32, or bfloat16 for accelerators.
        buckets: the first and the last of scales that share a part of the program, in pairs (by
            default what suits the platform).
        sweep: options and their values, OPTION=A,B,...: every combination is measured.
        programs: a folder in which to leave compiled programs (by default they are thrown away).
        profile: a folder for a profiler's trace, which TensorBoard and Perfetto show.
        json: a file for a list of the whole reports.
    """

    model: Annotated[Family, tyro.conf.arg(name='')]
    settings: Annotated[Settings, tyro.conf.arg(name='')] = Settings()
    autoencoder: Autoencoder = Autoencoder()
    resolution: int = 0
    text_tokens: int = 77
    batch: int = 1
    repeats: int = 10
    dtype: Dtype = 'float32'
    buckets: Buckets | None = None
    sweep: tuple[str, ...] = ()
    programs: Path | None = None
    profile: Path | None = None
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Measures a training step, from a cold start on, beside the matrix rate of this machine.

    CONFIG, the first word, is a Python file that defines `run` (see configs/) or a run's
    config.json; every field can be changed by an option. Weights, codes and text are random, as
    they come from a cache: neither data nor tokenizer need to be there.

    Example: star-jax bench train configs/star_d16_256.py --batch 4 --dtype float32
    Example: star-jax bench train configs/star_d30_256.py --sweep batch=8,16,32 remat=True,False

    Attributes:
        run: the run whose step is measured.
        text_tokens: tokens of a caption.
        repeats: timed steps.
        sweep: options and their values, OPTION=A,B,...: every combination is measured.
        programs: a folder in which to leave compiled programs (by default they are thrown away).
        profile: a folder for a profiler's trace, which TensorBoard and Perfetto show.
        json: a file for a list of the whole reports.
    """

    run: Annotated[Run, tyro.conf.arg(name='')]
    text_tokens: int = 77
    repeats: int = 10
    sweep: tuple[str, ...] = ()
    programs: Path | None = None
    profile: Path | None = None
    json: Path | None = None


class Given(Protocol):
    """What the benchmarks of a process have in common."""

    sweep: tuple[str, ...]
    programs: Path | None
    profile: Path | None
    json: Path | None


# A CONFIG and the arguments after it -> the parsed ones and the job that they describe.
Read = Callable[[str, Sequence[str]], tuple[Given, SamplingJob | TrainingJob]]


def main(words: Sequence[str]) -> int:
    measures = {
        'sample': functools.partial(_measure, read_sampling),
        'train': functools.partial(_measure, read_training),
        'buckets': _measure_buckets,
        'attention': bench_parts.measure_attention,
        'data': bench_parts.measure_data,
    }
    kinds = f'{", ".join(measures)} or suite'
    words = list(words)
    if words[:1] in (['-h'], ['--help']):
        sys.stdout.write(USAGE)
        return 0
    if not words:
        raise UserError(f'expected {kinds} after bench: --help says what each measures')
    if words[0] == 'suite':
        bench_suite.measure(words[1:])
        return 0
    if words[0] not in measures:
        raise UserError(f'expected {kinds} after bench, not {words[0]!r}')
    place = words[1] if words[1:] and not words[1].startswith('-') else ''
    measures[words[0]](place, words[2:] if place else words[1:])
    return 0


def read_sampling(place: str, words: Sequence[str]) -> tuple[Sample, SamplingJob]:
    """The arguments for a CONFIG or a model FOLDER, and their job."""
    command = 'bench sample CONFIG|FOLDER'
    if not place or Path(place).suffix in ('.py', '.json'):
        run = training.load(Path(place), Run) if place else Run()
        default = Sample(model=run.model, settings=run.sampling)
        return _sampling(arguments.parse(Sample, words, command, default), folder='')
    model = models.read(place)
    default = Sample(
        model=model.config,
        settings=model.sampling,
        autoencoder=model.tokenizer.config.autoencoder,
    )
    given = arguments.parse(Sample, words, command, default)
    changed = config.differences(default.model, _sized(given))
    changed += config.differences(default.autoencoder, given.autoencoder)
    if changed:
        raise UserError(f'the weights of {place} have their sizes: leave out {"; ".join(changed)}')
    return _sampling(given, folder=place)


def read_training(place: str, words: Sequence[str]) -> tuple[Train, TrainingJob]:
    """The arguments for a CONFIG, and their job."""
    run = training.load(Path(place), Run) if place else Run()
    given = arguments.parse(Train, words, 'bench train CONFIG', Train(run=run))
    try:
        return given, TrainingJob(
            run=given.run, text_tokens=given.text_tokens, repeats=given.repeats
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def expand(sweep: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The name and the arguments of every combination of OPTION=A,B,... with another.

    >>> list(expand(['batch=1,8', 'dtype=bfloat16']))
    [('batch 1, dtype bfloat16', ['--batch', '1', '--dtype', 'bfloat16']),
     ('batch 8, dtype bfloat16', ['--batch', '8', '--dtype', 'bfloat16'])]

    Raises UserError for what is no such sweep.
    """
    columns = []
    for one in sweep:
        option, found, values = one.partition('=')
        if not found or not option or not all(values.split(',')):
            raise UserError(f'--sweep takes OPTION=A,B,..., such as batch=1,8, not {one!r}')
        columns.append([(option.lstrip('-'), value) for value in values.split(',')])
    for some in itertools.product(*columns):
        words = [_option(option, value) for option, value in some]
        yield ', '.join(f'{option} {value}' for option, value in some), sum(words, [])


def _option(option: str, value: str) -> list[str]:
    """The arguments that give an option a value; a switch is given by its name alone."""
    if value in SWITCHES:
        *parts, name = option.split('.')
        return ['--' + '.'.join([*parts, SWITCHES[value] + name])]
    try:
        return [f'--{option}', *shlex.split(value)]
    except ValueError as error:
        raise UserError(f'--sweep {option}: {value!r} is no value ({error})') from error


def sweep_of_buckets(sizes: Sequence[int]) -> str:
    """A sweep over a program body for each scale of so many tokens, three buckets, and one."""
    choices = (divide(sizes, count) or ((0, 0),) for count in (0, 3, 1))
    pairs = (' '.join(map(str, itertools.chain(*shared))) for shared in choices)
    return f'buckets={",".join(pairs)}'


def _measure_buckets(place: str, words: Sequence[str]) -> None:
    """Sampling, with each choice of them."""
    _, job = read_sampling(place, words)
    _measure(read_sampling, place, words, sweep=(sweep_of_buckets(job.model.schedule.sizes),))


def _measure(read: Read, place: str, words: Sequence[str], sweep: tuple[str, ...] = ()) -> None:
    """Measures a job, or those of the options' sweep and of this one."""
    given, _ = read(place, words)
    for path in (given.programs, given.profile):
        if path is not None:
            files.check_folder(path)
    if given.json is not None:
        files.check_file(given.json)
    jobs = {name: read(place, [*words, *more])[1] for name, more in expand([*given.sweep, *sweep])}
    console, reports = Console(), {}
    for name, job in jobs.items():
        with console.status('starting') as status:
            cache, profile = (path and path / name for path in (given.programs, given.profile))
            reports[name] = process.measure(job, status.update, cache, profile)
        console.print(bench_tables.summary(reports[name]), highlight=False)
        for table in bench_tables.tables(reports[name]):
            console.print(table)
        _keep(given.json, list(reports.values()))
    if len(reports) > 1:
        console.print(bench_tables.sweep(reports))


def _keep(path: Path | None, reports: list[dict[str, Any]]) -> None:
    """Writes what is there so far: a long sweep may be stopped."""
    if path is not None:
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            config.write_json(path, reports)


def _sampling(given: Sample, folder: str) -> tuple[Sample, SamplingJob]:
    same = {field.name for field in dataclasses.fields(SamplingJob)} - {'model', 'folder'}
    try:
        fields = {name: getattr(given, name) for name in same}
        return given, SamplingJob(model=_sized(given), folder=folder, **fields)
    except ValueError as error:
        raise UserError(str(error)) from error


def _sized(given: Sample) -> Family:
    """The model at the resolution asked for."""
    if not given.resolution:
        return given.model
    if given.resolution not in SIDES:
        known = ', '.join(map(str, SIDES))
        raise UserError(f'resolution must be one of {known} px, not {given.resolution}')
    return dataclasses.replace(given.model, sides=SIDES[given.resolution], keep_tokens=0)
