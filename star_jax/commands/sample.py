"""`star-jax sample PROMPTS...`"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from star_jax import files, terminal
from star_jax.checkpoint import models
from star_jax.commands import arguments, image_files, prompts
from star_jax.console import progress_bar
from star_jax.core.buckets import Buckets
from star_jax.core.settings import Dtype, Settings
from star_jax.errors import UserError
from star_jax.files import SHIPPED
from star_jax.parallel import startup
from star_jax.parallel.mesh import MeshShape
from star_jax.protocols import CrossAttentionMode
from star_jax.sampling import loading, pipeline, program
from star_jax.sampling.image_size import ImageSize
from star_jax.sampling.sample_folder import MOST_IMAGES, WHOLE, SampleFolder

COMMON = {
    'size of the images': ('aspect', 'height', 'width', 'resolution', 'resize'),
    'sampling': ('guidance', 'top-k', 'top-p', 'temperature'),
}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Generates images of prompts or classes: numbered PNG files, samples.jsonl and grid.png.

    The model folder recommends sampling settings; options replace them. An interrupted command
    continues when it is given again. Several processes divide a set by --share, each with the same
    other options.

    Example: star-jax sample "a red circle" "a small blue star on a white background" --out samples

    Example: star-jax sample --model imagenet --class 207 360 --count 50 --share 0 2 --out set

    Attributes:
        prompt: the prompts, each in quotes.
        prompts: text file with one prompt per line.
        classes: numbers or names of classes, for a class-conditional model.
        count: images of each prompt or class; they alternate, so that batches hold several.
        share: two numbers I N: of N processes that fill one folder, this one makes images I, I + N,
            and so on, with I from 0.
        model: model folder, hub id, 'shipped' or 'shipped/infinity'.
        text: path of the model's text encoder ('': the path or hub id in the model folder).
        image: image files to start from, one for all prompts or one per prompt; the centre of a
            file is cropped and resized by Lanczos to the size of the images.
        keep: how many first scales of them are kept, while the finer ones are sampled; of a raster
            (LlamaGen), the first rows of tokens.
        out: folder of the images.
        seed: seed of the first image; image i uses seed + i, and samples.jsonl records it.
        batch: images per batch.
        exact: fill up every batch, so that an image does not depend on how many are sampled with
            it; needed in bfloat16, where samples.jsonl then records the batch, too.
        dtype: dtype of the activations; bfloat16 on accelerators.
        text_dtype: dtype of the weights and activations of the text encoder.
        cross_attention: cross-attention of a STAR model: 'as_trained', 'corrected', or 'released',
            in which the unprompted row of an image uses that of the prompted row.
        buckets: pairs of the first and the last scale that share a program body: compiles faster,
            samples slower, the same images (none: chosen by platform).
        mesh: devices along each mesh axis, which split parameters and batches.
        check: compare the weights with the SHA-256 that the model folder keeps.
        size: size of the images.
        settings: how images are sampled.
    """

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    prompts: Path | None = None
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name='class')] = ()
    count: int = 1
    share: tuple[int, int] = WHOLE
    model: str = SHIPPED
    text: str = ''
    image: tuple[Path, ...] = ()
    keep: int | None = None
    out: Path = Path('samples')
    seed: int = 0
    batch: int = pipeline.BATCH
    exact: bool = False
    dtype: Dtype = 'float32'
    text_dtype: Dtype = 'float32'
    cross_attention: CrossAttentionMode = 'as_trained'
    buckets: Buckets | None = None
    mesh: MeshShape = MeshShape(data=1)
    check: bool = True
    size: Annotated[ImageSize, tyro.conf.arg(name='')] = ImageSize()
    settings: Annotated[Settings, tyro.conf.arg(name='')] = Settings()

    @property
    def varies_with_shares(self) -> bool:
        """Whether images depend on the number of processes, as their batches do.

        The text encoder has one number of rows, so that its features never depend on batches.
        """
        return self.share[1] > 1 and self.dtype == 'bfloat16' and not self.exact

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.seed < program.SEEDS:
            raise UserError(
                f'batch must be at least 1 and seed must lie in [0, 2^32), not {self.batch} and '
                f'{self.seed}'
            )
        if self.count < 1:
            raise UserError(f'count must be at least 1, not {self.count}')
        number, processes = self.share
        if not 0 <= number < processes:
            raise UserError(
                f'share is the number of this process, from 0, and the number of processes, not '
                f'{number} {processes}'
            )
        if bool(self.image) != (self.keep is not None):
            raise UserError(
                'image and keep are given together: image names the files, and keep how many of '
                'their first scales are kept'
            )


def main(words: Sequence[str]) -> int:
    options = arguments.parse(Sample, words, 'sample', common=COMMON)
    recommended = Sample(settings=models.read_sampling(options.model))
    options = arguments.parse(Sample, words, 'sample', recommended)
    texts = _texts(options)
    model = models.read_config(options.model)
    program.check_temperatures(model, options.settings)
    files.check_folder(options.out)
    if options.varies_with_shares:
        log.warning(
            'in bfloat16 images depend on the number of shares: give --exact to make the same ones '
            'with any number of processes'
        )
    startup.start()
    pipe = loading.load(
        options.model,
        text=options.text,
        dtype=options.dtype,
        text_dtype=options.text_dtype,
        mesh=options.mesh.build_on_first(),
        cross_attention=options.cross_attention,
        buckets=options.buckets,
        check=options.check,
        size=options.size,
    )
    pipe.resolve(**vars(options.settings))  # checks them for the scales that the size chose
    height, width = pipe.tokenizer.resolution
    if pipe.template:
        terminal.write_line(f'template {pipe.template}: {_shown_size(pipe)}')
    if options.classes and pipe.encoder.field != 'label':
        raise UserError(f'{options.model} samples from text and has no classes: give prompts')
    if pipe.encoder.field == 'label':
        classes = sorted(set(texts))
        pipe.encoder.encode(classes)  # refuses unknown ones before anything is written
    given, recorded = image_files.read_given(
        options.image, options.keep, count=len(texts) // options.count, size=(height, width)
    )
    shared = _shared_record(options, pipe)
    records = [
        {'prompt': prompt, 'seed': options.seed + index} | shared | record
        for index, (prompt, record) in enumerate(zip(texts, recorded * options.count, strict=True))
    ]
    with SampleFolder(options.out, records, options.share) as folder:
        missing = folder.missing()
        if len(given) > 1:
            given = [given[index % len(given)] for index in missing]
        images = pipe.stream(
            [texts[index] for index in missing],
            [options.seed + index for index in missing],
            options.settings,
            batch=options.batch,
            exact=options.exact,
            image=given if options.image else None,
            keep=options.keep or 0,
        )
        for index, image in zip(missing, _with_progress(images, len(missing)), strict=True):
            folder.add(index, image)
        if left := folder.left():
            terminal.write_line(f'{left:,} images of other shares do not exist yet')
        else:
            terminal.write_line(folder.grid())
    return 0


def _shown_size(pipe: pipeline.Pipeline) -> str:
    """The size of the images, for the user."""
    (height, width), (shown_height, shown_width) = pipe.tokenizer.resolution, pipe.size
    if pipe.size == pipe.tokenizer.resolution:
        return f'images of {width} x {height} px (w x h)'
    return (
        f'images are sampled at {width} x {height} px (w x h), resized to {shown_width} x '
        f'{shown_height}'
    )


def _shared_record(options: Sample, pipe: pipeline.Pipeline) -> dict[str, Any]:
    """The part of a record that is the same for all images of a command."""
    height, width = pipe.tokenizer.resolution
    record = {
        'settings': dataclasses.asdict(options.settings),
        'height': height,
        'width': width,
        'model': {'source': options.model, 'sha256': models.digest(options.model)},
        'text': pipe.encoder.reference(),
        'dtype': options.dtype,
        'cross_attention': options.cross_attention,
    }
    if options.size.resize:
        record |= {'resize': options.size.resize}
    if options.exact:
        record |= {'batch': options.batch}
    if options.text_dtype != Sample.text_dtype:
        record |= {'text_dtype': options.text_dtype}
    return record


def _with_progress(batches: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """The images of all batches, with a progress bar."""
    with progress_bar() as progress:
        task = progress.add_task('sampling', total=total, note='')
        for image in itertools.chain.from_iterable(batches):
            yield image
            progress.advance(task)


def _texts(options: Sample) -> list[str]:
    """The prompts or classes of all images, checked."""
    found = prompts.read(options.prompt, options.prompts, options.classes)
    if len(found) * options.count > MOST_IMAGES:
        raise UserError(
            f'{options.count:,} images of {len(found):,} prompts are more than the '
            f'{MOST_IMAGES:,} of a folder: give a smaller --count'
        )
    for prompt in [*found, *filter(None, [options.settings.negative])]:
        prompts.check(prompt)
    found = found * options.count
    if options.seed + len(found) > program.SEEDS:
        raise UserError(
            f'image {len(found) - 1} would have the seed {options.seed + len(found) - 1}, '
            'expected a seed below 2^32: give a smaller --seed'
        )
    return found
