"""`star-jax sample PROMPTS...`"""

import dataclasses
import itertools
import json
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.progress import Progress

from star_jax.checkpoint import files, models
from star_jax.commands import arguments
from star_jax.core import pictures
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.parallel import startup
from star_jax.sampling import pipeline

MOST_IN_GRID = 64
RECORD = 'samples.jsonl'  # which prompt, seed and settings made each picture
GRID = 'grid.png'
SEEDS = 2**32
NO_TEXT = ('Cc', 'Cs')  # Unicode's control characters, and halves of characters
LONGEST = 2_000  # characters of a prompt; encoders read some hundred at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws one image per prompt into numbered PNG files, samples.jsonl and grid.png.

    Example: star-jax sample "a red circle" "a small blue star on a white background" --out drawn

    Attributes:
        words: the prompts.
        prompts: a text file with one prompt per line, instead.
        model: a model folder, a hub id, or 'shipped'.
        text: another place of the model's text encoder, if it is not where the model says.
        out: where the files go.
        seed: image i draws from seed + i; its line in samples.jsonl says which.
        batch: images per run of the program.
        dtype: float32, or bfloat16 for accelerators.
        settings: how they are drawn, by default as the model folder recommends.
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    prompts: Path | None = None
    model: str = models.SHIPPED
    text: str = ''
    out: Path = Path('drawn')
    seed: int = 0
    batch: int = 16
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings()

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.seed < SEEDS:
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
    for name in (RECORD, GRID):
        files.check_file(given.out / name)
    startup.start()
    pipe = pipeline.load(given.model, given.text, given.dtype)
    record = {
        'settings': dataclasses.asdict(given.settings),
        'model': given.model,
        'text': pipe.encoder.reference(),
        'dtype': given.dtype,
    }
    shown, lines = [], []
    images = pipe.stream(prompts, given.seed, given.settings, given.batch)
    try:
        for index, image in enumerate(_counted(images, len(prompts))):
            pictures.save_png(image, given.out / f'{index:05d}.png')
            line = {'prompt': prompts[index], 'seed': given.seed + index, **record}
            lines.append(json.dumps(line) + '\n')
            shown += [image] if index < MOST_IN_GRID else []
    finally:
        if lines:  # also of the pictures that were drawn before somebody stopped it
            _write(given.out / RECORD, lines)
    grid = pictures.grid(shown, prompts[: len(shown)])
    sys.stdout.write(f'{pictures.save_png(grid, given.out / GRID)}\n')
    return 0


def _counted(batches: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """The images of all batches, under a bar."""
    with Progress() as progress:
        task = progress.add_task('drawing', total=total)
        for image in itertools.chain.from_iterable(batches):
            yield image
            progress.advance(task)


def _write(path: Path, lines: list[str]) -> None:
    with files.writing(path), files.replacing(path) as temporary:
        temporary.write_text(''.join(lines), 'utf-8')


def _prompts(given: Sample) -> list[str]:
    prompts = _given_prompts(given)
    for prompt in prompts:
        _check(prompt)
    if given.seed + len(prompts) > SEEDS:
        raise UserError(
            f'image {len(prompts) - 1} would draw from seed {given.seed + len(prompts) - 1}, and '
            'seeds lie below 2^32: give a smaller --seed'
        )
    return prompts


def _check(prompt: str) -> None:
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
