"""What does image number n of the embedded dataset show?

A scene is one to three things on a plain background. `scene(n)` is a pure function of the number
and does not depend on pixels or words: `shapes.render` renders a scene, `captions` describes it.
x grows to the right and is a share of the width, y grows downwards and is a share of the height;
extents are shares of the shorter side. So the things of a scene are apart on every canvas, and its
places and relations, which compare shares, are the same.
"""

import dataclasses
import hashlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import TypeVar

from star_jax.errors import UserError

# Any two colours are at least 117 apart, so that a lossy tokenizer cannot confuse them.
COLOURS = {
    'red': (215, 0, 30),
    'green': (0, 150, 60),
    'blue': (0, 60, 240),
    'yellow': (255, 240, 0),
    'orange': (255, 123, 0),
    'purple': (130, 0, 180),
    'pink': (255, 140, 200),
    'black': (0, 0, 0),
    'white': (255, 255, 255),
    'gray': (128, 128, 128),
}
SHAPES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
SIZES = ('small', 'large')
RELATIONS = {
    'left of': 'right of',
    'right of': 'left of',
    'above': 'below',
    'below': 'above',
}
# Frequencies, out of 16.
BACKGROUNDS = {'white': 6, 'gray': 3, 'black': 3, 'blue': 1, 'green': 1, 'yellow': 1, 'pink': 1}
Option = TypeVar('Option')
SPLITS = ('train', 'validation', 'held_out')

# 9 of the 60 pairs, no colour twice: five shapes of each of these colours remain for training.
HELD_OUT = (
    ('red', 'star'),
    ('green', 'ring'),
    ('blue', 'triangle'),
    ('yellow', 'square'),
    ('orange', 'cross'),
    ('purple', 'circle'),
    ('pink', 'square'),
    ('black', 'ring'),
    ('white', 'triangle'),
)
PAIRS = tuple(itertools.product(COLOURS, SHAPES))
TRAINED = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

MAX_THINGS = 3
LEAST_DISTANCE = 1 / 8  # between two centres, along the axis of a relation
SMALL_BELOW = 0.39

# Coordinates are multiples of 1/512: binary fractions, so comparisons are exact on every machine.
_GRID = 512
_EXTENTS = {'small': (160, 176), 'large': (222, 236)}
_BORDER = 6  # between a bounding box and the edge of the image
_GAP = 12  # between two bounding boxes
_CLEAR = 8  # between a centre and the border of its third, so that its place is unambiguous


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a scene.

    Attributes:
        shape: one of SHAPES.
        colour: a key of COLOURS.
        extent: longer side of the bounding box, as a share of the shorter side of the image.
        x: horizontal centre of the bounding box, as a share of the width.
        y: vertical centre of the bounding box, as a share of the height.
    """

    shape: str
    colour: str
    extent: float
    x: float
    y: float

    @property
    def size(self) -> str:
        """'small' (about a third of the shorter side) or 'large' (about 0.45)."""
        return 'small' if self.extent < SMALL_BELOW else 'large'

    @property
    def place(self) -> str:
        """The third of the image along each axis: 'top left', 'right', 'center' and so on."""
        row = _third(self.y, ('top', '', 'bottom'))
        column = _third(self.x, ('left', '', 'right'))
        return f'{row} {column}'.strip() or 'center'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """One to three things on a background.

    Attributes:
        things: the objects.
        background: a key of BACKGROUNDS.
    """

    things: tuple[Thing, ...]
    background: str

    @property
    def relation(self) -> str | None:
        """The relation of the first thing to the second, or None."""
        return relation(*self.things[:2]) if len(self.things) > 1 else None


def relation(first: Thing, second: Thing, margin: float = 0.0) -> str | None:
    """The relation of one thing to another: a key of RELATIONS, or None if neither axis dominates.

    Along the axis of the relation the centres are at least `LEAST_DISTANCE` apart, and their
    distance exceeds that along the other axis by more than `margin`.
    """
    right, down = first.x - second.x, first.y - second.y
    across, along = sorted((abs(right), abs(down)))
    if along < LEAST_DISTANCE or along - across <= margin:
        return None
    if abs(right) > abs(down):
        return 'right of' if right > 0 else 'left of'
    return 'below' if down > 0 else 'above'


def scene(index: int, split: str = 'train', objects: tuple[int, ...] = (1, 2, 3)) -> Scene:
    """Scene `index` of a split.

    Scenes of 'train' and 'validation' have trained pairs of colour and shape only; the first thing
    of a 'held_out' scene is a held-out pair.

    Args:
        index: number of the scene.
        split: one of SPLITS.
        objects: possible numbers of things.

    Raises:
        UserError: the split is unknown.
    """
    if split not in SPLITS:
        raise UserError(f'there is no split {split!r} of shapes: choose one of {", ".join(SPLITS)}')
    randoms = _random_words(f'{split} {index}')
    background = _choose(randoms, [name for name, n in BACKGROUNDS.items() for _ in range(n)])
    number = _choose(randoms, objects)
    pairs = _sample_pairs(randoms, split, number, background)
    extents = [_sample_extent(randoms, number) for _ in range(number)]
    things = (
        Thing(shape=shape, colour=colour, extent=extent / _GRID, x=x / _GRID, y=y / _GRID)
        for (colour, shape), extent, (x, y) in zip(
            pairs, extents, _sample_centres(randoms, extents), strict=True
        )
    )
    return Scene(things=tuple(things), background=background)


def choice(name: str, count: int) -> int:
    """A random number below `count` that depends on a name alone."""
    return next(_random_words(name)) % count


def _third(coordinate: float, names: tuple[str, str, str]) -> str:
    return names[(coordinate > 1 / 3) + (coordinate > 2 / 3)]


def _random_words(seed: str) -> Iterator[int]:
    """Endless random 64-bit integers, from a hash: NumPy's streams may change with its version."""
    for block in itertools.count():
        yield from struct.unpack('<8Q', hashlib.blake2b(f'{seed} {block}'.encode()).digest())


def _choose(randoms: Iterator[int], options: Sequence[Option]) -> Option:
    return options[next(randoms) % len(options)]


def _sample_pairs(
    randoms: Iterator[int], split: str, number: int, background: str
) -> list[tuple[str, str]]:
    """Different pairs of colour and shape; no colour is that of the background."""
    held_out = split == 'held_out'
    pairs: list[tuple[str, str]] = []
    for position in range(number):
        table = (HELD_OUT if position == 0 else PAIRS) if held_out else TRAINED
        free = [pair for pair in table if pair[0] != background and pair not in pairs]
        pairs.append(_choose(randoms, free))
    return pairs


def _sample_extent(randoms: Iterator[int], number: int) -> int:
    size = 'small' if number == MAX_THINGS else _choose(randoms, SIZES)
    low, high = _EXTENTS[size]
    return _choose(randoms, range(low, high + 1, 2))


def _sample_centres(randoms: Iterator[int], extents: list[int]) -> list[tuple[int, int]]:
    """Centres (x, y) of separate boxes: all are sampled again until no two boxes are too close."""
    while True:
        centres = [
            (_sample_coordinate(randoms, extent), _sample_coordinate(randoms, extent))
            for extent in extents
        ]
        if all(
            _apart(a, b) for a, b in itertools.combinations(zip(centres, extents, strict=True), 2)
        ):
            return centres


def _sample_coordinate(randoms: Iterator[int], extent: int) -> int:
    """Samples a third, then a coordinate in it: else half of all things would be in the center."""
    edge = extent // 2 + _BORDER
    low, high = _choose(
        randoms,
        (
            (edge, _GRID // 3 - _CLEAR),
            (_GRID // 3 + 1 + _CLEAR, 2 * _GRID // 3 - _CLEAR),
            (2 * _GRID // 3 + 1 + _CLEAR, _GRID - edge),
        ),
    )
    return low + next(randoms) % (high - low + 1)


def _apart(first: tuple[tuple[int, int], int], second: tuple[tuple[int, int], int]) -> bool:
    (a, a_extent), (b, b_extent) = first, second
    distance = max(abs(a[0] - b[0]), abs(a[1] - b[1]))
    return distance >= (a_extent + b_extent) // 2 + _GAP
