"""`star-jax data prepare emoji OUT`, `star-jax data prepare folder IMAGES OUT`, `data show SET`"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tyro

from star_jax import files
from star_jax.commands import arguments
from star_jax.data import folder, prepared, show
from star_jax.data.folder import Folder
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError

USAGE = """usage: star-jax data prepare|show|cache [...]   (each explains itself with --help)

  star-jax data prepare emoji sets/emoji          fetches and writes a captioned data set
  star-jax data prepare folder my_images sets/me  writes one of your own captioned images
  star-jax data show my_images                    draws a captioned grid of any of them
  star-jax data cache configs/shapes.py           encodes the sets of a run once for all training
"""
PREPARE_USAGE = """usage: star-jax data prepare emoji|folder [...]   (--help explains each)

  star-jax data prepare emoji sets/emoji --size 128          open emoji in seven styles
  star-jax data prepare folder my_images sets/me --size 128  your own captioned images
"""


LARGEST = 4096  # pixels a side of a picture in a set
MOST_SHOWN = 1024  # pictures of a grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareEmoji:
    """Fetches and writes some 10,600 captioned emoji in seven styles; needs npm and '.[emoji]'.

    Interrupted, the same command goes on.

    Example: star-jax data prepare emoji sets/emoji --size 128

    Attributes:
        out: the folder of the set.
        size: side of the pictures in pixels.
        limit: only so many pictures, for a trial (0: all).
    """

    out: tyro.conf.Positional[Path]
    size: int = 128
    limit: int = 0

    def __post_init__(self) -> None:
        _check_size(self.size)
        if self.limit < 0:
            raise ValueError(f'limit must not be negative (0: all), not {self.limit}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareFolder:
    """Writes your own captioned images as squares of one size into a prepared set.

    A caption stands in cat.txt beside cat.png, or in a metadata.jsonl or captions.jsonl with lines
    such as {"file_name": "cat.png", "text": "a cat"}. What cannot be used is named and left out.

    Example: star-jax data prepare folder my_images sets/me --size 128

    Attributes:
        images: the folder of the images.
        out: the folder of the set.
        size: side of the pictures in pixels: the centre square, by Lanczos.
        held_out: about this share of the images is the split 'validation' (0: none).
        caption: the field of the list with the captions (by default text, caption or captions).
    """

    images: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    size: int = 128
    held_out: float = 0.1
    caption: str = ''

    def __post_init__(self) -> None:
        _check_size(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Draws a captioned grid of a data set.

    Example: star-jax data show shapes --split held_out

    Attributes:
        name: shapes, a folder of images or of a prepared set, or the name of a tfds set.
        split: which part of it (by default train, or all of a folder of images).
        size: side of the pictures in pixels.
        count: how many pictures.
        columns: how many in a row.
        seed: another seed shows others.
        image: the field of a prepared set that holds the image.
        caption: the field that holds the captions (by default captions; not for shapes).
        out: the picture file.
    """

    name: tyro.conf.Positional[str]
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
        if not 1 <= self.count <= MOST_SHOWN or not 1 <= self.columns <= MOST_SHOWN:
            raise ValueError(
                f'count and columns must lie in [1, {MOST_SHOWN}], not {self.count} and '
                f'{self.columns}'
            )
        if self.seed < 0:
            raise ValueError(f'seed must not be negative, not {self.seed}')


def _check_size(size: int) -> None:
    """Raises ValueError for a side, in pixels, that no picture of a set has."""
    if not 1 <= size <= LARGEST:
        raise ValueError(f'size must lie in [1, {LARGEST}] pixels, not {size}')


def main(words: Sequence[str]) -> int:
    actions = {'prepare': _prepare, 'show': _show, 'cache': _cache}
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
    """Does what the first word says with the others."""
    if words and words[0] in ('-h', '--help'):
        sys.stdout.write(usage)
        return 0
    if not words or words[0] not in actions:
        given = f'not {words[0]!r}' if words else 'not nothing'
        raise UserError(f'expected one of {", ".join(actions)} after {command}, {given}')
    return actions[words[0]](words[1:])


def _prepare_emoji(words: Sequence[str]) -> int:
    given = arguments.parse(PrepareEmoji, words, 'data prepare emoji')
    from star_jax.data import emoji  # needs the renderer only here

    done = emoji.prepare(given.out, given.size, limit=given.limit or None)
    of = f'pictures of {done.labels:,} labels'
    return _tell(given.out, done.images, of, done.megabytes, done.seconds)


def _prepare_folder(words: Sequence[str]) -> int:
    given = arguments.parse(PrepareFolder, words, 'data prepare folder')
    source = Folder(path=str(given.images), held_out=given.held_out, caption=given.caption)
    done = folder.prepare(source, given.out, given.size)
    of = f'pictures, {done.skipped:,} records skipped'
    return _tell(given.out, done.images, of, done.megabytes, done.seconds)


def _tell(out: Path, images: Mapping[str, int], of: str, megabytes: float, seconds: float) -> int:
    counts = ', '.join(f'{name} {count:,}' for name, count in images.items())
    sys.stdout.write(f'{out}: {counts} {of}, {megabytes:.1f} MB, {seconds:.0f} s\n')
    return 0


def _show(words: Sequence[str]) -> int:
    given = arguments.parse(Show, words, 'data show')
    files.check_file(given.out)
    source = _named(given).open(given.size)
    path = show.show(source, given.out, given.count, given.columns, given.seed)
    sys.stdout.write(f'{path}\n')
    return 0


def _cache(words: Sequence[str]) -> int:
    from star_jax.commands import cache  # all of training, which the other actions do without

    return cache.main(words)


def _named(given: Show) -> Shapes | Prepared | Folder:
    """The set that a word means: a folder tells by itself whether it is a prepared one."""
    if given.name == 'shapes':
        return Shapes(split=given.split or 'train')
    if os.path.isdir(os.path.expanduser(given.name)) and not prepared.is_prepared(given.name):
        return Folder(path=given.name, split=given.split or 'all', caption=given.caption)
    fields = {'image': given.image, 'caption': given.caption or 'captions', 'label': ''}
    return Prepared(path=given.name, split=given.split or 'train', **fields)
