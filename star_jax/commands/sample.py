"""`star-jax sample PROMPTS...`"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.progress import Progress

from star_jax.checkpoint import models
from star_jax.commands import arguments
from star_jax.core import pictures
from star_jax.errors import UserError
from star_jax.parallel import startup
from star_jax.sampling import pipeline
from star_jax.sampling.pipeline import Settings

MOST_IN_GRID = 64


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
        if self.batch < 1 or not 0 <= self.seed < 2**32:
            raise ValueError('batch must be at least 1 and seed lie in [0, 2^32)')


def main(words: Sequence[str]) -> int:
    given = arguments.parse(Sample, words, 'sample')
    prompts = _prompts(given)
    startup.start()
    pipe = pipeline.load(given.model, given.text, given.dtype)
    record = {
        'settings': dataclasses.asdict(given.settings),
        'model': given.model,
        'text': pipe.encoder.reference(),
        'dtype': given.dtype,
    }
    shown = []
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / 'samples.jsonl').open('w') as lines, Progress() as progress:
        task = progress.add_task('drawing', total=len(prompts))
        for images in pipe.stream(prompts, given.seed, given.settings, given.batch):
            for image in images:
                index = progress.tasks[task].completed
                pictures.save_png(image, given.out / f'{int(index):05d}.png')
                line = {'prompt': prompts[int(index)], 'seed': given.seed + int(index), **record}
                lines.write(json.dumps(line) + '\n')
                progress.advance(task)
            shown.extend(images[: MOST_IN_GRID - len(shown)])
    grid = pictures.grid(shown, prompts[: len(shown)])
    sys.stdout.write(f'{pictures.save_png(grid, given.out / "grid.png")}\n')
    return 0


def _prompts(given: Sample) -> list[str]:
    if given.prompts is None:
        if not given.words:
            raise UserError(
                'there is no prompt: give some in quotes, or a file with --prompts FILE'
            )
        return list(given.words)
    if given.words:
        raise UserError('prompts come either as words or from --prompts FILE: leave one out')
    try:
        lines = given.prompts.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{given.prompts} cannot be read as a text file ({error})') from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f'{given.prompts} holds no prompt: write one per line')
    return prompts
