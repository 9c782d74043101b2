"""`star-jax bench sample CONFIG`"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from star_jax.bench import sampling, tables
from star_jax.checkpoint import config, files, models
from star_jax.commands import arguments, training
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.families import Family
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.training.run import Run

COMMAND = 'bench sample CONFIG|FOLDER'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measures sampling, from a cold start on, beside the matrix rate of this machine.

    CONFIG, the first word, is a Python file that defines `run` (see configs/) or a run's
    config.json: the model's sizes and how to sample, every field of which can be changed by an
    option; weights, text and tokenizer (the published one, at the model's sides) are random. Or it
    is a model FOLDER, whose weights are used; text is random.

    Example: star-jax bench sample configs/star_d16_256.py --batch 4 --json d16.json

    Attributes:
        model: the sizes of the transformer.
        settings: how images are drawn.
        autoencoder: the sizes of the tokenizer.
        text_tokens: tokens of a caption.
        batch: images per run of the program.
        repeats: timed runs.
        dtype: float32, or bfloat16 for accelerators.
        cache: a folder in which to leave compiled programs (by default they are thrown away).
        json: a file for the whole report.
    """

    model: Annotated[Family, tyro.conf.arg(name='')]
    settings: Annotated[Settings, tyro.conf.arg(name='')] = Settings()
    autoencoder: Autoencoder = Autoencoder()
    text_tokens: int = 77
    batch: int = 1
    repeats: int = 10
    dtype: str = 'float32'
    cache: Path | None = None
    json: Path | None = None


def main(words: Sequence[str]) -> int:
    words = list(words)
    if words[:1] in (['-h'], ['--help']):
        words = ['sample', '--help']  # all there is to measure so far
    if words[:1] != ['sample']:
        raise UserError(f'expected sample after bench, not {words[0] if words else "nothing"!r}')
    place = words[1] if words[1:] and not words[1].startswith('-') else ''
    given, folder = read_arguments(place, words[2:] if place else words[1:])
    job = _job(given, folder)
    if given.json is not None:
        files.check_file(given.json)
    if given.cache is not None:
        files.check_folder(given.cache)
    console = Console()
    with console.status('starting') as status:
        report = sampling.run(job, status.update, given.cache)
    console.print(tables.summary(report), highlight=False)
    for table in tables.sampling(report):
        console.print(table)
    if given.json is not None:
        with files.writing(given.json):
            given.json.parent.mkdir(parents=True, exist_ok=True)
            config.write_json(given.json, report)
    return 0


def read_arguments(place: str, words: Sequence[str]) -> tuple[Bench, str]:
    """The arguments, and the model folder that they are about ('': random weights)."""
    if not place or Path(place).suffix in ('.py', '.json'):
        run = training.load(Path(place), Run) if place else Run()
        settings = run.sampling
        default = Bench(model=run.model, settings=settings)
        return arguments.parse(Bench, words, COMMAND, default), ''
    model = models.read(place)
    default = Bench(
        model=model.config,
        settings=model.sampling,
        autoencoder=model.tokenizer.config.autoencoder,
    )
    given = arguments.parse(Bench, words, COMMAND, default)
    changed = config.differences(default.model, given.model)
    changed += config.differences(default.autoencoder, given.autoencoder)
    if changed:
        raise UserError(f'the weights of {place} have their sizes: leave out {"; ".join(changed)}')
    return given, place


def _job(given: Bench, folder: str) -> sampling.Job:
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    del fields['cache'], fields['json']
    try:
        return sampling.Job(**fields, folder=folder)
    except ValueError as error:
        raise UserError(str(error)) from error
