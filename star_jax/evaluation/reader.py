"""What does a picture of the embedded set show?

Read by classical vision, without any learned part, so that a score means the same thing for every
model: pixels go to the nearest colour, the flat middle of each patch claims the edge around it,
and the patch is the shape that explains it best, by its area, its centre and its outline. What
no shape explains is counted as strange, never taken for a thing.
"""

import dataclasses
import functools

import numpy as np

from star_jax.core.resize import area_matrix
from star_jax.data.scenes import COLOURS, SHAPES, Scene, Thing
from star_jax.data.shapes import COVERAGES
from star_jax.errors import UserError

SIDE = 64  # larger pictures are averaged down to it: at 64 pixels a place has a margin of one pixel

# A ground within half the least distance of two colours has one name; a quarter of the rim may
# differ from it, where large things come close.
GROUND_DISTANCE = 58.0
GROUND_SHARE = 0.75

# An edge between two colours passes near a third one, in a band of one or two pixels: a colour is
# there only where 8 of the 9 pixels around have it. The thinnest part of a thing is 5 pixels wide,
# and the flat middle of the least one has some 30 pixels.
CORE_NEIGHBOURS = 8
CORE_PIXELS = 10
REACH = 8  # pixels from the flat middle of a star to its tips, and to spare

# Half of its difference from the ground makes a pixel part of a patch.
INSIDE = 0.5
FRINGE = 2  # pixels around a patch that hold the rest of its edge

# A patch of less is dust.
DUST_PIXELS = 12
# The share of its area by which a patch may differ from a shape of that area. 
MISFIT = 0.3
# Sizes that the words small and large can mean: the set has 0.31 to 0.46.
EXTENTS = (0.22, 0.65)

# A pixel further than this from its explanation is wrong; a strange patch has a flat middle too.
WRONG_DISTANCE = 90.0
WRONG_PIXELS = 6

_NAMES = tuple(COLOURS)
_PALETTE_N3 = np.array(list(COLOURS.values()), np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What was recognised in a picture, and how many patches (`strange`) were not."""

    things: tuple[Thing, ...]
    background: str | None
    strange: int = 0


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A shape that explains a patch: lengths in pixels, its coverage of every pixel (h, w)."""

    thing: Thing
    cover_hw: np.ndarray
    misfit: float


def read(image_hwc: np.ndarray) -> Scene | None:
    """The scene in a uint8 RGB picture (S, S, 3), S at least 64; None where it is none."""
    reading = inspect(image_hwc)
    if reading.strange or reading.background is None:
        return None
    return Scene(things=reading.things, background=reading.background)


def inspect(image_hwc: np.ndarray) -> Reading:
    """All that can be read in a uint8 RGB picture (S, S, 3), S at least 64."""
    picture_hwc = _shrink(image_hwc)
    ground = _ground(picture_hwc)
    if ground is None:
        return Reading(things=(), background=None, strange=1)
    background = int(_nearest(ground))
    labels_hw = _nearest(picture_hwc)
    cores = _cores(labels_hw, background)
    owners_hw = _grow(cores)
    canvas_hwc = np.broadcast_to(ground, picture_hwc.shape).copy()
    things, strange = [], 0
    for label, core_hw in cores.items():
        change = np.median(picture_hwc[core_hw], axis=0) - ground
        cover_hw = _cover(picture_hwc - ground, change, owners_hw == label)
        for fit in _explain(cover_hw, _NAMES[label]):
            if fit is None:
                strange += 1
            else:
                things.append(fit.thing)
                canvas_hwc += fit.cover_hw[:, :, None] * change
    if not strange:
        wrong_hw = np.linalg.norm(picture_hwc - canvas_hwc, axis=-1) > WRONG_DISTANCE
        strange = int(_middle(wrong_hw).sum() >= WRONG_PIXELS)
    return Reading(things=tuple(things), background=_NAMES[background], strange=strange)


def _shrink(image_hwc: np.ndarray) -> np.ndarray:
    """float32 (64, 64, 3)."""
    side = len(image_hwc)
    if image_hwc.ndim != 3 or image_hwc.shape[1:] != (side, 3) or side < SIDE:
        raise UserError(
            f'a picture to read is square RGB of at least {SIDE} pixels, not {image_hwc.shape}'
        )
    image_hwc = image_hwc.astype(np.float32)
    if side == SIDE:
        return image_hwc
    matrix = area_matrix(side, SIDE)
    rows = np.tensordot(matrix, image_hwc, 1)
    return np.tensordot(matrix, rows.swapaxes(0, 1), 1).swapaxes(0, 1)


def _nearest(colours_c: np.ndarray) -> np.ndarray:
    """The number of the nearest of the ten colours, (...) from (..., 3)."""
    return np.argmin((_PALETTE_N3**2).sum(1) - 2 * colours_c @ _PALETTE_N3.T, axis=-1)


def _ground(picture_hwc: np.ndarray) -> np.ndarray | None:
    """The colour (3,) of the picture's rim, if it has one."""
    rim_n3 = np.concatenate(
        [picture_hwc[0], picture_hwc[-1], picture_hwc[1:-1, 0], picture_hwc[1:-1, -1]]
    )
    ground = np.median(rim_n3, axis=0)
    off_n = np.linalg.norm(rim_n3 - ground, axis=-1)
    named = np.linalg.norm(_PALETTE_N3[_nearest(ground)] - ground) <= GROUND_DISTANCE
    return ground if named and (off_n <= GROUND_DISTANCE).mean() >= GROUND_SHARE else None


def _middle(mask_hw: np.ndarray) -> np.ndarray:
    """Where a mask is more than an edge wide."""
    padded = np.pad(mask_hw, 1, mode='edge').astype(np.int8)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    count = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return mask_hw & (count >= CORE_NEIGHBOURS)


def _cores(labels_hw: np.ndarray, background: int) -> dict[int, np.ndarray]:
    """The flat middles (h, w) of each colour that is not the background's."""
    counts = np.bincount(labels_hw.ravel(), minlength=len(_NAMES))
    cores = {
        int(label): _middle(labels_hw == label)
        for label in np.flatnonzero(counts >= CORE_PIXELS)
        if label != background
    }
    return {label: core_hw for label, core_hw in cores.items() if core_hw.sum() >= CORE_PIXELS}


def _grow(cores: dict[int, np.ndarray]) -> np.ndarray:
    """Which colour's middle is next to each pixel, -1 where none is within reach."""
    shape = next(iter(cores.values())).shape if cores else (SIDE, SIDE)
    owners_hw = np.full(shape, -1, np.int8)
    for label, core_hw in cores.items():
        owners_hw[core_hw] = label
    for _ in range(REACH):
        for axis in (0, 1):
            here, there = owners_hw.swapaxes(0, axis), owners_hw.swapaxes(0, axis).copy()
            for to, of in ((slice(1, None), slice(-1)), (slice(-1), slice(1, None))):
                here[to] = np.where(here[to] < 0, there[of], here[to])
    return owners_hw


def _cover(off_hwc: np.ndarray, change: np.ndarray, owned_hw: np.ndarray) -> np.ndarray:
    """The share of each pixel, from the ground (0) to a patch's colour (1)."""
    share_hw = np.where(owned_hw, off_hwc @ change / (change @ change), 0.0)
    near_hw = _widen(share_hw > INSIDE, FRINGE)
    return np.where(near_hw, np.clip(share_hw, 0.0, 1.0), 0.0)


def _widen(mask_hw: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        padded = np.pad(mask_hw, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask_hw = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask_hw


def _explain(cover_hw: np.ndarray, colour: str) -> list[_Fit | None]:
    """The things that make a patch: one if a shape fits it, else those of its pieces."""
    if cover_hw.sum() < DUST_PIXELS:
        return []
    fit = min((_fit(cover_hw, shape, colour) for shape in SHAPES), key=lambda fit: fit.misfit)
    if fit.misfit <= MISFIT and EXTENTS[0] <= fit.thing.extent <= EXTENTS[1]:
        return [fit]
    pieces = _cut(cover_hw)
    if len(pieces) == 1:
        return [None]
    return [fit for piece_hw in pieces for fit in _explain(piece_hw, colour)]


def _cut(cover_hw: np.ndarray) -> list[np.ndarray]:
    """A patch cut along its empty rows, or columns: the boxes of two things never overlap."""
    for axis in (0, 1):
        full = np.flatnonzero((cover_hw > INSIDE).any(1 - axis))
        ends = np.flatnonzero(np.diff(full) > 1)
        if len(ends):
            line = np.arange(cover_hw.shape[axis])
            piece = np.searchsorted((full[ends] + full[ends + 1]) / 2, line)
            piece = piece[:, None] if axis == 0 else piece[None, :]
            return [np.where(piece == number, cover_hw, 0.0) for number in range(len(ends) + 1)]
    return [cover_hw]


def _fit(cover_hw: np.ndarray, shape: str, colour: str) -> _Fit:
    """The shape of a patch's area and centre, which blur does not move."""
    side, area = len(cover_hw), cover_hw.sum()
    share, low = _moments(shape)
    line = np.arange(side) + 0.5
    extent = np.sqrt(area / share)
    x, y = cover_hw.sum(0) @ line / area, cover_hw.sum(1) @ line / area - low * extent
    shown_hw = COVERAGES[shape](line[None, :] - x, line[:, None] - y, extent / 2)
    misfit = np.abs(_smooth(cover_hw - shown_hw)).sum() / area
    place = (float(length / side) for length in (extent, x, y))
    thing = Thing(shape=shape, colour=colour, **dict(zip(("extent", "x", "y"), place, strict=True)))
    return _Fit(thing, shown_hw, float(misfit))


def _smooth(map_hw: np.ndarray) -> np.ndarray:
    padded = np.pad(map_hw, 1)
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


@functools.cache
def _moments(shape: str) -> tuple[float, float]:
    """The area of a shape of extent 1, and how far its centre of mass lies below its box's."""
    extent = 512
    line = np.arange(extent) + 0.5 - extent / 2
    cover_hw = COVERAGES[shape](line[None, :], line[:, None], extent / 2)
    area = cover_hw.sum()
    return area / extent**2, cover_hw.sum(1) @ line / area / extent
