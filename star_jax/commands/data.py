"""`star-jax data prepare emoji OUT` and `star-jax data show SET`"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from star_jax.commands import arguments
from star_jax.data import show
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError

USAGE = """usage: star-jax data prepare|show [...]   (each explains itself with --help)

  star-jax data prepare emoji sets/emoji   fetches and writes a captioned data set
  star-jax data show shapes                draws a captioned grid of a data set
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Fetches and writes a captioned data set. Interrupted, the same command goes on.

    Example: star-jax data prepare emoji sets/emoji --size 128

    Attributes:
        name: emoji (about 10,600 pictures in seven styles; needs npm and the extra `emoji`).
        out: the folder of the set.
        size: side of the pictures in pixels.
        limit: only so many pictures, for a trial (0: all).
    """

    name: tyro.conf.Positional[Literal['emoji']]
    out: tyro.conf.Positional[Path]
    size: int = 128
    limit: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Draws a captioned grid of a data set.

    Example: star-jax data show shapes --split held_out

    Attributes:
        name: shapes, the folder of a prepared set, or the name of a tfds set.
        split: which part of it.
        size: side of the pictures in pixels.
        count: how many pictures.
        columns: how many in a row.
        seed: another seed shows others.
        image: the field that holds the image (not for shapes).
        caption: the field that holds the captions (not for shapes).
        out: the picture file.
    """

    name: tyro.conf.Positional[str]
    split: str = 'train'
    size: int = 128
    count: int = 36
    columns: int = 6
    seed: int = 0
    image: str = 'image'
    caption: str = 'captions'
    out: Path = Path('set.png')


def main(words: Sequence[str]) -> int:
    actions = {'prepare': _prepare, 'show': _show}
    if words and words[0] in ('-h', '--help'):
        sys.stdout.write(USAGE)
        return 0
    if not words or words[0] not in actions:
        given = f'not {words[0]!r}' if words else 'not nothing'
        raise UserError(f'expected one of {", ".join(actions)} after data, {given}')
    return actions[words[0]](words[1:])


def _prepare(words: Sequence[str]) -> int:
    given = arguments.parse(Prepare, words, 'data prepare')
    from star_jax.data import emoji  # needs the renderer only here

    done = emoji.prepare(given.out, given.size, limit=given.limit or None)
    counts = ', '.join(f'{name} {count:,}' for name, count in done.images.items())
    sys.stdout.write(
        f'{given.out}: {counts} pictures of {done.labels:,} labels, '
        f'{done.megabytes:.0f} MB, {done.seconds:.0f} s\n'
    )
    return 0


def _show(words: Sequence[str]) -> int:
    given = arguments.parse(Show, words, 'data show')
    if given.name == 'shapes':
        source = Shapes(split=given.split).open(given.size)
    else:
        fields = {'image': given.image, 'caption': given.caption, 'label': ''}
        source = Prepared(path=given.name, split=given.split, **fields).open(given.size)
    path = show.show(source, given.out, given.count, given.columns, given.seed)
    sys.stdout.write(f'{path}\n')
    return 0
