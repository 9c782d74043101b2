"""`star-jax data prepare emoji OUT`, `prepare folder IMAGES OUT`, `show SET`, `check CACHE`"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tyro

from star_jax import files, terminal
from star_jax.commands import arguments
from star_jax.data import folder, prepared, show
from star_jax.data.folder import Folder
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError

USAGE = """usage: star-jax data prepare|show|cache|check [...]   (each has --help)

  star-jax data prepare emoji sets/emoji          downloads and writes a set of captioned emoji
  star-jax data prepare folder my_images sets/me  writes a set of your own images with captions
  star-jax data show my_images                    writes a captioned grid of any set
  star-jax data cache configs/shapes.py           encodes the images and captions of a run once
  star-jax data check sets/me.codes               compares an encoded set with its checksums
"""
PREPARE_USAGE = """usage: star-jax data prepare emoji|folder [...]   (each has --help)

  star-jax data prepare emoji sets/emoji --size 128          open emoji in seven styles
  star-jax data prepare folder my_images sets/me --size 128  your own images with captions
"""

MAX_SIZE = 4096  # px, of the side of an image in a set
MAX_SHOWN = 1024  # images of a grid
SHOWN = 5  # names of damaged files in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareEmoji:
    """Downloads about 10,600 captioned emoji in seven styles; needs npm and the extra emoji.

    An interrupted command continues when it is given again.

    Example: star-jax data prepare emoji sets/emoji --size 128

    Attributes:
        out: folder of the set.
        size: side of the images in px.
        limit: number of images, for a trial (0: all).
    """

    out: tyro.conf.Positional[Path]
    size: int = 128
    limit: int = 0

    def __post_init__(self) -> None:
        _check_size(self.size)
        if self.limit < 0:
            raise UserError(f'limit must not be negative (0: all), not {self.limit}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareFolder:
    """Writes a prepared dataset of your own images with captions, as squares or whole.

    The caption of cat.png is in cat.txt beside it, or in a list: metadata.jsonl with lines such as
    {"file_name": "cat.png", "text": "a cat"}, metadata.json, metadata.csv. Parquet sets and tar
    archives are read, too. Folders train, val and test are splits. Unusable images are named and
    left out.

    Example: star-jax data prepare folder my_images sets/me --size 128

    Attributes:
        images: folder of the images.
        out: folder of the set.
        size: side of the images in px: the centre square, resized with a Lanczos filter.
        held_out: approximate share of the images in the split 'validation' if no folder is named
            after a split (0: no such split).
        caption: field or column of the captions in a list or a Parquet file ('': the first of text,
            caption and captions).
        whole: keep the ratio of height and width, for a model of several aspect ratios; size is the
            shorter side.
    """

    images: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    size: int = 128
    held_out: float = 0.1
    caption: str = ''
    whole: bool = False

    def __post_init__(self) -> None:
        _check_size(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Writes a captioned grid of images of a dataset.

    Example: star-jax data show shapes --split held_out

    Attributes:
        source: shapes, a folder of images or of a prepared dataset, or the name of a tfds set.
        split: split of the set ('': train; all images of a folder).
        size: side of the images in px.
        count: number of images.
        columns: number of images in a row.
        seed: seed of the choice of images.
        image: field of a prepared dataset that holds the image.
        caption: field that holds the captions ('': captions; shapes has none).
        out: image file to write.
    """

    source: tyro.conf.Positional[str]
    split: str = ''
    size: int = 128
    count: int = 36
    columns: int = 6
    seed: int = 0
    image: str = 'image'
    caption: str = ''
    out: Path = Path('set.png')

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 1 <= self.count <= MAX_SHOWN or not 1 <= self.columns <= MAX_SHOWN:
            raise UserError(
                f'count and columns must lie in [1, {MAX_SHOWN}], not {self.count} and '
                f'{self.columns}'
            )
        if self.seed < 0:
            raise UserError(f'seed must not be negative, not {self.seed}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Compares all encoded images and features of a cache with their checksums.

    Opening a cache compares the sizes of its files and a sample of their contents.

    Example: star-jax data check sets/me.codes

    Attributes:
        cache: folder of the cache.
        remove: remove damaged files, so that data cache makes them again.
    """

    cache: tyro.conf.Positional[Path]
    remove: bool = False


def _check_size(size: int) -> None:
    """Raises UserError for an invalid side of the images, in px."""
    if not 1 <= size <= MAX_SIZE:
        raise UserError(f'size must lie in [1, {MAX_SIZE}] pixels, not {size}')


def main(words: Sequence[str]) -> int:
    actions = {'prepare': _prepare, 'show': _show, 'cache': _cache, 'check': _check}
    return _choose(actions, words, 'data', USAGE)


def _prepare(words: Sequence[str]) -> int:
    actions = {'emoji': _prepare_emoji, 'folder': _prepare_folder}
    return _choose(actions, words, 'data prepare', PREPARE_USAGE)


def _choose(
    actions: Mapping[str, Callable[[Sequence[str]], int]],
    words: Sequence[str],
    command: str,
    usage: str,
) -> int:
    """Runs the action that the first word names, with the other words."""
    if arguments.asks_for_help(words[:1]):
        sys.stdout.write(usage)
        return 0
    if not words or words[0] not in actions:
        found = f', not {words[0]!r}' if words else ''
        raise UserError(f'expected one of {", ".join(actions)} after {command}{found}')
    return actions[words[0]](words[1:])


def _prepare_emoji(words: Sequence[str]) -> int:
    options = arguments.parse(PrepareEmoji, words, 'data prepare emoji')
    from star_jax.data import emoji  # needs the renderer

    result = emoji.prepare(options.out, options.size, limit=options.limit or None)
    description = f'images of {result.labels:,} labels'
    return _print(options.out, result.images, description, result.megabytes, result.seconds)


def _prepare_folder(words: Sequence[str]) -> int:
    options = arguments.parse(PrepareFolder, words, 'data prepare folder')
    source = Folder(path=str(options.images), held_out=options.held_out, caption=options.caption)
    result = folder.prepare(source, options.out, options.size, options.whole)
    description = f'images, {result.skipped:,} records skipped'
    return _print(options.out, result.images, description, result.megabytes, result.seconds)


def _print(
    out: Path, counts: Mapping[str, int], description: str, megabytes: float, seconds: float
) -> int:
    splits = folder.counts_text(counts)
    terminal.write_line(f'{out}: {splits} {description}, {megabytes:.1f} MB, {seconds:.0f} s')
    return 0


def _show(words: Sequence[str]) -> int:
    options = arguments.parse(Show, words, 'data show')
    files.check_file(options.out)
    source = _data_set(options).open(options.size)
    path = show.show(source, options.out, options.count, options.columns, options.seed)
    terminal.write_line(path)
    return 0


def _cache(words: Sequence[str]) -> int:
    from star_jax.commands import cache  # imports all of training

    return cache.main(words)


def _check(words: Sequence[str]) -> int:
    options = arguments.parse(Check, words, 'data check')
    from star_jax.training import cache  # imports all of training

    folder, found = options.cache, cache.check(options.cache, options.remove)
    total = found.intact + len(found.damaged)
    if not found.damaged:
        terminal.write_line(f'{folder}: {total:,} files, {found.size / 1e9:.1f} GB, all intact')
        return 0
    names = ', '.join(str(path.relative_to(folder)) for path in found.damaged[:SHOWN])
    state = 'were damaged and are removed' if options.remove else 'are damaged'
    remedy = '' if options.remove else 'remove them with --remove, and '
    raise UserError(
        f'{len(found.damaged):,} of {total:,} files in {folder} {state} ({names}): {remedy}make '
        f'them again with `star-jax data cache CONFIG --cache {folder}`'
    )


def _data_set(options: Show) -> Shapes | Prepared | Folder:
    """The dataset that `source` names; a folder with a dataset description is a prepared one."""
    name, split = options.source, options.split
    if name == 'shapes':
        return Shapes(split=split or 'train')
    if os.path.isdir(os.path.expanduser(name)) and not prepared.is_prepared(name):
        return Folder(path=name, split=split or 'all', caption=options.caption)
    fields = {'image': options.image, 'caption': options.caption or 'captions', 'label': ''}
    return Prepared(path=name, split=split or 'train', **fields)
