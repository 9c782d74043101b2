"""On which images is something scored?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from star_jax.data import prepared
from star_jax.data.folder import Folder
from star_jax.data.pipeline import Example, Source
from star_jax.data.prepared import Prepared
from star_jax.data.scenes import MAX_THINGS
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError

SHAPES = 'shapes'
KEPT_BACK = ('held_out', 'validation')  # splits of shapes that training never sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Images of one split that are scored together; `objects` in each (0: nobody counted)."""

    split: str
    objects: int
    source: Source

    @property
    def name(self) -> str:
        return f'{self.split}, {self.objects} in each' if self.objects else self.split

    @property
    def captions(self) -> list[str]:
        """The first caption of every image."""
        return [self.source.captions(index)[0] for index in range(len(self.source))]

    def images(self) -> np.ndarray:
        """uint8 [N, H, W, 3]."""
        return np.stack([self.source[index]['image'] for index in range(len(self.source))])


def groups(
    data: str, splits: Sequence[str], count: int, size: int | tuple[int, int]
) -> list[Group]:
    """`count` images for each split and, of shapes, for each number of objects.

    `data` is 'shapes', a prepared dataset or a folder of captioned images, which may hold fewer;
    without `splits` all but those of training. Raises UserError where the set or a split is
    missing.
    """
    if data == SHAPES:
        return [
            Group(split=split, objects=objects, source=_scenes(split, objects, count).open(size))
            for split in splits or KEPT_BACK
            for objects in range(1, MAX_THINGS + 1)
        ]
    return [
        Group(split=split, objects=0, source=_First(source=source.open(size), count=count))
        for split, source in _named(data, splits).items()
    ]


def _scenes(split: str, objects: int, count: int) -> Shapes:
    """Each scene has one caption, neighbours different ones: every phrasing is asked for."""
    return Shapes(count=count, split=split, objects=(objects,), phrasings=1)


def _named(data: str, splits: Sequence[str]) -> dict[str, Prepared | Folder]:
    if Path(data).is_dir() and not prepared.is_prepared(data):
        return {split: Folder(path=data, split=split) for split in splits or ['validation']}
    splits = splits or [split for split in prepared.splits(data) if split != 'train']
    if not splits:
        raise UserError(f'{data} has no split but train: give --splits train to score that')
    return {split: Prepared(path=data, split=split, label='') for split in splits}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _First:
    """The first examples of a source."""

    source: Source
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getitem__(self, index: int) -> Example:
        return self.source[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)
