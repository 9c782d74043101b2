"""Which images are evaluated together?"""

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
from star_jax.data.splits import TEST, TRAIN, VALIDATION
from star_jax.errors import UserError

SHAPES_DATASET = 'shapes'
UNTRAINED_SPLITS = ('held_out', 'validation')  # splits of shapes that training does not use


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalGroup:
    """Images of one split with an equal number of objects.

    Attributes:
        split: name of the split.
        objects: number of objects in each image (0: unknown).
        source: the images and their captions.
    """

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


def load_groups(
    data: str, splits: Sequence[str], count: int, size: int | tuple[int, int]
) -> list[EvalGroup]:
    """A group for each split and, for shapes, for each number of objects.

    Args:
        data: 'shapes', the folder of a prepared dataset, or a folder of images with captions.
        splits: names of splits (none: `test` if there is one, else all that are not for training).
        count: images per group; a dataset may have fewer.
        size: pixels of a side, or height and width.

    Raises:
        UserError: the dataset or a split is missing.
    """
    if data == SHAPES_DATASET:
        return [
            EvalGroup(
                split=split, objects=objects, source=_scenes(split, objects, count).open(size)
            )
            for split in splits or UNTRAINED_SPLITS
            for objects in range(1, MAX_THINGS + 1)
        ]
    return [
        EvalGroup(
            split=split, objects=0, source=_FirstExamples(source=dataset.open(size), count=count)
        )
        for split, dataset in _datasets(data, splits).items()
    ]


def _scenes(split: str, objects: int, count: int) -> Shapes:
    """Scenes with one caption each; neighbours have different phrasings, so that all occur."""
    return Shapes(count=count, split=split, objects=(objects,), phrasings=1)


def _datasets(data: str, splits: Sequence[str]) -> dict[str, Prepared | Folder]:
    """The dataset of each split."""
    if Path(data).is_dir() and not prepared.is_prepared(data):
        if not splits:
            splits = [TEST if Folder(path=data).has_test_images() else VALIDATION]
        return {split: Folder(path=data, split=split) for split in splits}
    if not splits:
        present = prepared.splits(data)
        splits = [TEST] if TEST in present else [split for split in present if split != TRAIN]
    if not splits:
        raise UserError(
            f'{data} has only the split train: give --splits train to evaluate on training images'
        )
    return {split: Prepared(path=data, split=split, label='') for split in splits}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FirstExamples:
    """The first `count` examples of a source."""

    source: Source
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def __getitem__(self, index: int) -> Example:
        return self.source[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)
