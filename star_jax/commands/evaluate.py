"""`star-jax evaluate MODEL`"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import track

from star_jax import files, image_io
from star_jax.checkpoint import config, models
from star_jax.commands import arguments
from star_jax.core.settings import Dtype, Settings, StableVersion
from star_jax.errors import UserError
from star_jax.evaluation import eval_report, eval_tables
from star_jax.evaluation.eval_context import Job, Subject
from star_jax.evaluation.groups import SHAPES
from star_jax.parallel import startup
from star_jax.sampling.pipeline import CrossAttentionMode

SWEPT = ('guidance', 'top_k', 'top_p', 'temperature')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Scores a model or a tokenizer on images that training never saw.

    Of the tokenizer: PSNR, LPIPS (needs the extra lpips), how many codes each scale uses and how
    evenly. Of the model: loss and accuracy of each scale. Of shapes: the share of pictures in which
    everything that the caption says holds, read by rules; beside what is drawn stand the true
    pictures and their reconstructions, which are the ceiling of any model. Of other sets:
    KID-EffLite0 (needs the extra kid). A score of images has its 95 % interval. Of several values
    of guidance, top-k, top-p or temperature every combination is drawn.

    Drawn as the model folder recommends, where no option says otherwise.

    Example: star-jax evaluate shipped --only alignment --guidance 1 2 4 --out scores.json

    Attributes:
        model: a model or tokenizer folder, a hub id, or 'shipped'.
        data: shapes, the folder of a prepared set, or a folder of captioned images.
        splits: which parts of the set (by default all but those of training).
        only: the parts of the report (by default all that fit model and set).
        count: images per split and, of shapes, per number of objects.
        seed: image i is drawn from seed + i; the intervals depend on it, too.
        batch: images per run of a program.
        guidance: STAR's cfg.
        top_k: codes of which one is drawn (0: all).
        top_p: share of their mass (0: all).
        temperature: of the draws.
        smooth: mix code vectors instead of drawing codes.
        stable: draw finer scales in several passes, by a refinement head ('off': at once).
        out: a file for the whole report, in JSON.
        grid: a picture file for what is drawn from the first 16 captions.
        text: another place of the model's text encoder, if it is not where the model says.
        dtype: float32, or bfloat16 for accelerators.
        cross_attention: STAR's cross-attention: as trained, or 'released', where the unprompted
            row of an image (in a loss: every image of a batch) sees what the first one does, or
            'corrected'.
    """

    model: tyro.conf.Positional[str]
    data: str = SHAPES
    splits: tuple[str, ...] = ()
    only: tuple[Literal['tokenizer', 'lpips', 'loss', 'alignment', 'kid'], ...] = ()
    count: int = 250
    seed: int = 0
    batch: int = 16
    guidance: tuple[float, ...] = ()
    top_k: tuple[int, ...] = ()
    top_p: tuple[float, ...] = ()
    temperature: tuple[float, ...] = ()
    smooth: bool = False
    stable: StableVersion | None = None
    out: Path | None = None
    grid: Path | None = None
    text: str = ''
    dtype: Dtype = 'float32'
    cross_attention: CrossAttentionMode = 'as_trained'


def main(words: Sequence[str]) -> int:
    given = arguments.parse(Evaluate, words, 'evaluate')
    job = _job(given)
    for path in (given.out, given.grid):
        _check_place(path)
    startup.start()
    subject = Subject(job, _track)
    if given.grid is not None and subject.model is None:
        raise UserError(f'{given.model} holds a tokenizer alone: --grid needs a model')
    found = eval_report.run(subject)
    if given.grid is not None:
        image_io.save_png(eval_report.grid(subject, job.settings[0]), given.grid)
    if given.out is not None:
        config.write_json(given.out, config.to_json(found))
    console = Console()
    console.print(eval_tables.summary(found), highlight=False, soft_wrap=True)
    for table in eval_tables.tables(found):
        console.print(table)
    return 0


def _job(given: Evaluate) -> Job:
    try:
        return Job(
            place=given.model,
            data=given.data,
            splits=given.splits,
            parts=given.only,
            count=given.count,
            seed=given.seed,
            batch=min(given.batch, given.count),
            settings=_settings(given),
            text=given.text,
            dtype=given.dtype,
            cross_attention=given.cross_attention,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _settings(given: Evaluate) -> tuple[Settings, ...]:
    """Every combination of the given values, with what the model recommends where none is given."""
    if models.holds_tokenizer_alone(given.model):
        return (Settings(),)
    usual = models.read_sampling(given.model)
    values = [getattr(given, name) or (getattr(usual, name),) for name in SWEPT]
    smooth = given.smooth or usual.smooth
    stable = usual.stable
    if given.stable is not None:
        stable = dataclasses.replace(stable, version=given.stable)
    return tuple(
        dataclasses.replace(
            usual, smooth=smooth, stable=stable, **dict(zip(SWEPT, some, strict=True))
        )
        for some in itertools.product(*values)
    )


def _check_place(path: Path | None) -> None:
    """A UserError before the work begins, where its result could not be written."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f'{path} cannot be written: give a file in a folder that is there')
    files.check_file(path)


def _track(bits: Iterable, count: int, what: str) -> Iterable:
    """The bits, with a bar on stderr that goes away."""
    console = Console(stderr=True)
    return track(
        bits,
        total=count,
        description=what,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
