"""Which images come with the package, without any download?

Simple scenes with captions (`scenes`, `captions`), rendered by number at any resolution: one number
is the same scene at every size and aspect ratio. The coverage of a pixel is computed from distances
to the edges of a shape, inside its bounding box, so that one core renders thousands of images per
second while the others train.
"""

import dataclasses
import operator
from collections.abc import Callable

import numpy as np

from star_jax.core.argument_types import check_types
from star_jax.data import pipeline
from star_jax.data.captions import scene_captions
from star_jax.data.pipeline import Example
from star_jax.data.scenes import COLOURS, MAX_THINGS, SPLITS, Scene, Thing, choice, scene
from star_jax.errors import UserError
from star_jax.image_io import height_and_width, parse_aspect

MIN_SIDE = 16  # in smaller images a small shape has five pixels and is not recognisable

MAX_COUNT = 2**31 - 1  # images; grain shuffles in 32 bits
STRIDE = 13  # between the captions that a scene keeps; coprime to their number

RING_HOLE = 0.52  # share of the outer radius
CROSS_ARM = 0.36  # share of the extent
STAR_NOTCH = 0.45  # share of the radius of the tips


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The embedded dataset: rendered scenes of coloured shapes with captions.

    Attributes:
        count: number of scenes.
        split: 'train', 'validation' (other scenes with the same pairs of colour and shape) or
            'held_out' (every scene has a pair that is never in 'train').
        objects: numbers of objects in a scene; one of them is chosen per scene.
        phrasings: captions per scene (0: all, up to 31); few let text features be computed once.
        aspects: ratios of width to height; one of them is chosen per scene, as the shape that its
            image has before it is cropped.
    """

    count: int = 200_000
    split: str = 'train'
    objects: tuple[int, ...] = (1, 2, 3)
    phrasings: int = 2
    aspects: tuple[str, ...] = dataclasses.field(default=('1:1',), repr=False)

    def __post_init__(self) -> None:
        check_types(self)
        if not self.aspects:
            raise UserError('shapes have no aspects: give one or more, such as 1:1')
        for aspect in self.aspects:
            parse_aspect(aspect)
        if not 1 <= self.count <= MAX_COUNT:
            raise UserError(f'shapes has 1 to {MAX_COUNT:,} images, not {self.count}')
        if self.phrasings < 0:
            raise UserError(f'phrasings must be 0 (all) or more, not {self.phrasings}')
        if self.split not in SPLITS:
            raise UserError(
                f'there is no split {self.split!r} of shapes: choose one of {", ".join(SPLITS)}'
            )
        if not self.objects or not set(self.objects) <= set(range(1, MAX_THINGS + 1)):
            raise UserError(
                f'objects {self.objects} are the numbers of objects in a scene: '
                f'give one or more of 1 to {MAX_THINGS}'
            )

    def open(self, size: int | tuple[int, int]) -> 'ShapesSource':
        """The dataset at a size: the side of a square, or (height, width), in pixels."""
        return ShapesSource(shapes=self, size=size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesSource:
    """Random access to rendered scenes, a `pipeline.Source`.

    Attributes:
        shapes: the settings.
        size: side of a square, or (height, width), in pixels.
    """

    shapes: Shapes
    size: int | tuple[int, int]

    def __post_init__(self) -> None:
        if (side := min(height_and_width(self.size))) < MIN_SIDE:
            raise UserError(f'shapes have at least {MIN_SIDE} pixels a side, not {side}')

    def __len__(self) -> int:
        return self.shapes.count

    def __getitem__(self, index: int) -> Example:
        scene = self.scene(index)
        return Example(
            image=render(scene, self.size),
            captions=self._captions(index, scene),
            label=_label(scene),
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of image `index`, without rendering it."""
        return self._captions(index, self.scene(index))

    def label(self, index: int) -> str:
        """Colour and shape of the first object of image `index`, without rendering it."""
        return _label(self.scene(index))

    def ratio(self, index: int) -> float:
        """Height divided by width that the shapes of the set give scene `index`."""
        aspects = self.shapes.aspects
        return 1 / parse_aspect(
            aspects[choice(f'{self.shapes.split} {index} aspect', len(aspects))]
        )

    def at(self, size: int | tuple[int, int]) -> 'ShapesSource':
        return dataclasses.replace(self, size=size)

    def fingerprint(self) -> str:
        """Digest of the settings and of a few images and captions."""
        return pipeline.fingerprint(self, self.shapes)

    def _captions(self, index: int, scene: Scene) -> tuple[str, ...]:
        captions = scene_captions(scene)
        if not self.shapes.phrasings:
            return captions
        # Neighbouring scenes keep different captions, and a scene keeps no caption twice.
        numbers = range(min(self.shapes.phrasings, len(captions)))
        return tuple(captions[(index + number * STRIDE) % len(captions)] for number in numbers)

    def scene(self, index: int) -> Scene:
        """The scene of image `index`. Raises `IndexError` for a number outside of the dataset."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f'image {index} of a dataset of {len(self)}')
        return scene(index, self.shapes.split, self.shapes.objects)


def _label(scene: Scene) -> str:
    first = scene.things[0]
    return f'{first.colour} {first.shape}'


def render(scene: Scene, size: int | tuple[int, int]) -> np.ndarray:
    """The scene as uint8 RGB (height, width, 3), anti-aliased.

    Args:
        scene: the scene.
        size: side of a square, or (height, width), in pixels.
    """
    image_hwc = np.empty((*height_and_width(size), 3), np.uint8)
    image_hwc[:] = COLOURS[scene.background]
    for thing in scene.things:
        _render_thing(image_hwc, thing)
    return image_hwc


def _render_thing(image_hwc: np.ndarray, thing: Thing) -> None:
    height, width, _ = image_hwc.shape
    y, x, radius = thing.y * height, thing.x * width, thing.extent * min(height, width) / 2
    rows, columns = _span(y, radius, height), _span(x, radius, width)
    down = (np.arange(rows.start, rows.stop) + 0.5 - y)[:, None]
    right = (np.arange(columns.start, columns.stop) + 0.5 - x)[None, :]
    coverage_hw1 = COVERAGES[thing.shape](right, down, radius)[:, :, None]
    background_hwc = image_hwc[rows, columns]
    # In float64: the difference of two bytes has a sign.
    change_hwc = coverage_hw1 * (np.float64(COLOURS[thing.colour]) - background_hwc)
    image_hwc[rows, columns] = np.rint(background_hwc + change_hwc)


def _span(centre: float, radius: float, size: int) -> slice:
    return slice(max(int(centre - radius) - 1, 0), min(int(centre + radius) + 2, size))


# A coverage function takes pixel centres relative to the centre of the bounding box, `right` (1, w)
# and `down` (h, 1), and half the extent `radius`, all in pixels. It returns the covered share of
# every pixel, (h, w) in [0, 1].


def _inside(depth: np.ndarray) -> np.ndarray:
    """The covered share of a pixel with its centre `depth` pixels inside an edge."""
    return np.clip(depth + 0.5, 0.0, 1.0)


def _corner(depth: np.ndarray, other_depth: np.ndarray) -> np.ndarray:
    """The share inside two edges; the parts outside of each overlap only outside of the shape."""
    return np.maximum(_inside(depth) + _inside(other_depth) - 1.0, 0.0)


def _strip(offset: np.ndarray, half: float) -> np.ndarray:
    """The share of [offset - 1/2, offset + 1/2] inside [-half, half]."""
    return np.clip(np.minimum(offset + 0.5, half) - np.maximum(offset - 0.5, -half), 0.0, None)


def _circle(right: np.ndarray, down: np.ndarray, radius: float) -> np.ndarray:
    return _inside(radius - np.hypot(right, down))


def _ring(right: np.ndarray, down: np.ndarray, radius: float) -> np.ndarray:
    distance = np.hypot(right, down)
    return _inside(radius - distance) - _inside(RING_HOLE * radius - distance)


def _square(right: np.ndarray, down: np.ndarray, radius: float) -> np.ndarray:
    return _strip(right, radius) * _strip(down, radius)


def _cross(right: np.ndarray, down: np.ndarray, radius: float) -> np.ndarray:
    arm = CROSS_ARM * radius
    long, short = (_strip(right, half) * _strip(down, arm) for half in (radius, arm))
    return long + _strip(right, arm) * _strip(down, radius) - short


def _triangle(right: np.ndarray, down: np.ndarray, radius: float) -> np.ndarray:
    """Equilateral, with a side at the bottom."""
    half_height = radius * np.sqrt(3) / 2
    slope, lean = (down + half_height) / 2, right * np.sqrt(3) / 2
    return _corner(slope - lean, slope + lean) * _inside(half_height - down)


def _star(right: np.ndarray, down: np.ndarray, radius: float) -> np.ndarray:
    """Five tips, one at the top; folded onto one tip, the star is the inside of two lines."""
    fifth = 2 * np.pi / 5
    tip = radius / np.sin(fifth)
    down = down - tip * (1 - np.cos(fifth / 2)) / 2  # from the box's centre to the star's
    distance = np.hypot(right, down)
    angle = np.abs((np.arctan2(right, -down) + fifth / 2) % fifth - fifth / 2)
    notch = STAR_NOTCH * tip * np.exp(1j * fifth / 2)
    normal = 1j * (tip - notch) / abs(tip - notch)
    depth = normal.real * (tip - distance * np.cos(angle))
    lean = normal.imag * distance * np.sin(angle)
    return _corner(depth - lean, depth + lean)


COVERAGES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    'circle': _circle,
    'square': _square,
    'triangle': _triangle,
    'star': _star,
    'ring': _ring,
    'cross': _cross,
}
