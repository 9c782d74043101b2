"""`star-jax sample PROMPTS...`"""

import dataclasses
import itertools
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.progress import Progress

from star_jax import files
from star_jax.checkpoint import models
from star_jax.commands import arguments
from star_jax.core.buckets import Buckets
from star_jax.core.classes import Classes
from star_jax.core.settings import Dtype, Settings
from star_jax.errors import UserError
from star_jax.parallel import startup
from star_jax.parallel.mesh import MeshShape
from star_jax.sampling import pipeline, program
from star_jax.sampling.sample_folder import SampleFolder

NO_TEXT = ('Cc', 'Cs')  # Unicode's control characters, and halves of characters
LONGEST = 2_000  # characters of a prompt; encoders read some hundred at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws one image per prompt into numbered PNG files, samples.jsonl and grid.png.

    Interrupted, the same command goes on.

    Example: star-jax sample "a red circle" "a small blue star on a white background" --out drawn

    Attributes:
        words: the prompts.
        prompts: a text file with one prompt per line, instead.
        classes: the numbers or names of classes instead, for a model that draws classes.
        model: a model folder, a hub id, or 'shipped'.
        text: another place of the model's text encoder, if it is not where the model says.
        out: where the files go.
        seed: image i draws from seed + i; its line in samples.jsonl says which.
        batch: images per run of the program.
        dtype: float32, or bfloat16 for accelerators.
        cross_attention: STAR's cross-attention: as trained, or 'released', where the unprompted
            row of an image sees what the prompted one does, or 'corrected'.
        buckets: the first and the last of scales that share a part of the program, in pairs: less
            to compile, slower to draw, the same images (by default what suits the platform).
        mesh: over how many devices parameters and batches are split (data: 0 for all the others).
        settings: how they are drawn, by default as the model folder recommends.
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    prompts: Path | None = None
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name='class')] = ()
    model: str = models.SHIPPED
    text: str = ''
    out: Path = Path('drawn')
    seed: int = 0
    batch: int = pipeline.BATCH
    dtype: Dtype = 'float32'
    cross_attention: pipeline.CrossAttentionMode = 'as_trained'
    buckets: Buckets | None = None
    mesh: MeshShape = MeshShape(data=1)
    settings: Annotated[Settings, tyro.conf.arg(name='')] = Settings()

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.seed < program.SEEDS:
            raise ValueError(
                f'batch must be at least 1 and seed lie in [0, 2^32), not {self.batch} and '
                f'{self.seed}'
            )


def main(words: Sequence[str]) -> int:
    given = arguments.parse(Sample, words, 'sample')
    recommended = Sample(settings=models.read_sampling(given.model))
    given = arguments.parse(Sample, words, 'sample', recommended)
    prompts = _prompts(given)
    files.check_folder(given.out)
    startup.start()
    model = {'source': given.model, 'sha256': models.digest(given.model)}
    mesh = given.mesh.build_on_first()
    pipe = pipeline.load(
        given.model,
        text=given.text,
        dtype=given.dtype,
        mesh=mesh,
        cross_attention=given.cross_attention,
        buckets=given.buckets,
    )
    if given.classes and not isinstance(pipe.encoder, Classes):
        raise UserError(f'{given.model} draws from text and knows no classes: give prompts')
    if isinstance(pipe.encoder, Classes):
        pipe.encoder.encode(prompts)  # tells of one that is none before anything is written
    same = {
        'settings': dataclasses.asdict(given.settings),
        'model': model,
        'text': pipe.encoder.reference(),
        'dtype': given.dtype,
        'cross_attention': given.cross_attention,
    }
    numbered = enumerate(prompts, given.seed)
    album = SampleFolder(
        given.out, [{'prompt': one, 'seed': seed} | same for seed, one in numbered]
    )
    missing = album.missing()
    wanted = [prompts[i] for i in missing], [given.seed + i for i in missing]
    images = pipe.stream(*wanted, given.settings, given.batch)
    for index, image in zip(missing, _counted(images, len(missing)), strict=True):
        album.add(index, image)
    sys.stdout.write(f'{album.grid()}\n')
    return 0


def _counted(batches: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """The images of all batches, under a bar."""
    with Progress() as progress:
        task = progress.add_task('drawing', total=total)
        for image in itertools.chain.from_iterable(batches):
            yield image
            progress.advance(task)


def _prompts(given: Sample) -> list[str]:
    prompts = _given_prompts(given)
    for prompt in prompts:
        _check(prompt)
    if given.seed + len(prompts) > program.SEEDS:
        raise UserError(
            f'image {len(prompts) - 1} would draw from seed {given.seed + len(prompts) - 1}, and '
            'seeds lie below 2^32: give a smaller --seed'
        )
    return prompts


def _check(prompt: str) -> None:
    if not prompt.strip():
        raise UserError('a prompt is empty: say what to draw, or leave it out')
    if len(prompt) > LONGEST:
        raise UserError(
            f'a prompt has {len(prompt):,} characters ({prompt[:30]!r}...), expected at most '
            f'{LONGEST:,}, of which a text encoder reads the beginning alone: make it shorter'
        )
    strange = (one for one in prompt if unicodedata.category(one) in NO_TEXT and not one.isspace())
    if one := next(strange, None):
        raise UserError(
            f'the prompt {ascii(prompt[:30])} holds {ascii(one)}, which is no text: expected UTF-8 '
            'without control characters'
        )


def _given_prompts(given: Sample) -> list[str]:
    if given.classes:
        if given.words or given.prompts:
            raise UserError('a picture is drawn from a prompt or from a class: leave one out')
        return list(given.classes)
    if given.prompts is None:
        if not given.words:
            raise UserError(
                'there is no prompt: give some in quotes, or a file with --prompts FILE'
            )
        return list(given.words)
    if given.words:
        raise UserError('prompts come either as words or from --prompts FILE: leave one out')
    try:
        lines = given.prompts.read_text(encoding='utf-8-sig').splitlines()
    except OSError as error:
        raise UserError(
            f'{given.prompts} cannot be read ({error.strerror}): give a text file with one prompt '
            'per line'
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f'{given.prompts} is no text in UTF-8 (byte {error.start}): save it as such, one '
            'prompt per line'
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f'{given.prompts} holds no prompt: write one per line')
    return prompts
