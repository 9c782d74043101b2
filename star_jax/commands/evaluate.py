"""`star-jax evaluate MODEL`"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import tyro

from star_jax import files, image_io
from star_jax.checkpoint import config, models
from star_jax.commands import arguments
from star_jax.console import Console, is_terminal, track
from star_jax.core.settings import Dtype, Settings, StableVersion
from star_jax.errors import UserError
from star_jax.evaluation import eval_report, eval_tables
from star_jax.evaluation.eval_context import EvalContext, EvalOptions
from star_jax.evaluation.groups import SHAPES_DATASET
from star_jax.parallel import startup
from star_jax.protocols import CrossAttentionMode
from star_jax.sampling import program

SWEPT = ('guidance', 'top_k', 'top_p', 'temperature')  # options that take several values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Computes metrics of a model or a tokenizer on images that were not trained on.

    Tokenizer: PSNR, LPIPS (needs the extra lpips), used codes and perplexity per scale. Model: loss
    and accuracy per scale. On shapes also alignment: the share of sampled images that show all that
    their caption states, decided by rules; the scores of the true images and of their
    reconstructions are printed beside it as upper bounds. On other data KID-EffLite0 (needs the
    extra kid). Metrics of images have 95 % intervals.

    The model folder recommends sampling settings; options replace them. With several values of
    guidance, top-k, top-p or temperature, every combination is evaluated.

    Example: star-jax evaluate shipped --metrics alignment --guidance 1 2 4 --out scores.json

    Attributes:
        model: model or tokenizer folder, hub id, 'shipped' or 'shipped/infinity'.
        data: shapes, the folder of a prepared dataset, or a folder of images with captions.
        splits: splits of the data (none: test if there is one, else all that are not for training).
        metrics: metrics to compute (none: all that the model and the data allow).
        count: images per split, and on shapes per number of objects.
        seed: seed of the first image; image i uses seed + i, and the intervals depend on it, too.
        batch: images per batch.
        guidance: classifier-free guidance, as published for the family of the model; that of STAR
            and VAR grows from 0 to this (off: 0; Infinity and LlamaGen: 1).
        top_k: sample among this many most probable codes (0: all).
        top_p: sample among the most probable codes that hold this share of the probability (0:
            all).
        temperature: divisor of the logits.
        smooth: mix code vectors instead of sampling codes.
        stable: version of stable sampling by a refinement head ('off': without it).
        out: JSON file of the report.
        grid: image file with the samples of the first 16 captions.
        text: path of the model's text encoder ('': the path or hub id in the model folder).
        dtype: dtype of the activations; bfloat16 on accelerators.
        text_dtype: dtype of the weights and activations of the text encoder.
        cross_attention: cross-attention of a STAR model: 'as_trained', 'corrected', or 'released',
            in which the unprompted row of an image (for the loss: every image of a batch) uses that
            of the first row.
        check: compare the weights with the SHA-256 that the model folder keeps.
    """

    model: tyro.conf.Positional[str]
    data: str = SHAPES_DATASET
    splits: tuple[str, ...] = ()
    metrics: tuple[Literal['tokenizer', 'lpips', 'loss', 'alignment', 'kid'], ...] = ()
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
    text_dtype: Dtype = 'float32'
    cross_attention: CrossAttentionMode = 'as_trained'
    check: bool = True


def main(words: Sequence[str]) -> int:
    options = arguments.parse(Evaluate, words, 'evaluate')
    eval_options = _eval_options(options)
    for path in (options.out, options.grid):
        _check_writable(path)
    startup.start()
    context = EvalContext(eval_options, _with_progress, options.check)
    if options.grid is not None and context.model is None:
        raise UserError(f'{options.model} holds only a tokenizer: --grid needs a model')
    report = eval_report.run(context)
    console = Console()
    console.print(eval_tables.summary(report), highlight=False, soft_wrap=True)
    for table in eval_tables.tables(report):
        console.print(table)
    # Only now, because a full disk must not lose the report.
    if options.out is not None:
        with files.writing(options.out):
            config.write_json(options.out, config.to_json(report))
    if options.grid is not None:
        grid = eval_report.sample_grid(context, eval_options.settings[0])
        image_io.save_png(grid, options.grid)
    return 0


def _eval_options(options: Evaluate) -> EvalOptions:
    return EvalOptions(
        model=options.model,
        data=options.data,
        splits=options.splits,
        metrics=options.metrics,
        count=options.count,
        seed=options.seed,
        batch=min(options.batch, options.count),
        settings=_settings(options),
        text=options.text,
        dtype=options.dtype,
        text_dtype=options.text_dtype,
        cross_attention=options.cross_attention,
    )


def _settings(options: Evaluate) -> tuple[Settings, ...]:
    """Every combination of the option values; the model's settings where there are none."""
    if models.has_only_tokenizer(options.model):
        return (Settings(),)
    recommended = models.read_sampling(options.model)
    values = [getattr(options, name) or (getattr(recommended, name),) for name in SWEPT]
    stable = recommended.stable
    if options.stable is not None:
        stable = dataclasses.replace(stable, version=options.stable)
    fixed = {'smooth': options.smooth or recommended.smooth, 'stable': stable}
    every = tuple(
        dataclasses.replace(recommended, **fixed, **dict(zip(SWEPT, combination, strict=True)))
        for combination in itertools.product(*values)
    )
    model = models.read_config(options.model)
    for settings in every:
        program.check_temperatures(model, settings)
    return every


def _check_writable(path: Path | None) -> None:
    """Raises UserError, before the work starts, if a result file could not be written."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f'{path} cannot be written: give a file in an existing folder')
    files.check_file(path)


def _with_progress(items: Iterable, count: int, description: str) -> Iterable:
    """The items, with a progress bar on stderr that disappears at the end."""
    return track(items, description, count, visible=is_terminal(), transient=True)
