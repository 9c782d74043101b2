"""Which scene does an image of the embedded dataset show?

Classical vision without learned parts, so that a score is comparable between all models. The rim
gives the background; every pixel is assigned to the nearest colour, and the flat interior of a
colour includes the edge around it. A shape is fitted to each covered patch, or to each of the
pieces into which the patch is cut (`shape_fitting`). A piece that no shape fits is unrecognised.
"""

import dataclasses

import numpy as np

from star_jax.core.resize import area_matrix, linear_matrix
from star_jax.data.scenes import COLOURS, Scene, Thing
from star_jax.errors import UserError
from star_jax.evaluation import shape_fitting
from star_jax.evaluation.shape_fitting import FittedShape

# Larger images are averaged down until their shorter side is this; smaller ones are interpolated.
# In a scene every place is separated from the next one by at least one pixel of it, every size by
# two and every relation by four.
SIDE = 64
MIN_SIDE = 40  # pixels of the shorter side: in smaller images edges hide the flat interiors

# A larger distance from a colour is a different colour. Two of the ten are 117 or more apart;
# after a small tokenizer (23 to 27 dB) all flat interiors were within 64, 99 % within 52.
COLOUR_DISTANCE = 90.0
# Large things are as close as half a pixel to the rim, and a blurred one changes its colour; at
# least this share of the rim is clear.
RIM_SHARE = 0.75

# An edge passes near third colours, in a band of one or two pixels. So a colour is present only
# where 8 of the 9 pixels around have it. The thinnest part of a thing is 5 pixels wide, so the flat
# interior of the smallest thing has about 30 pixels. Blurred edges are wider: within 4 pixels of an
# interior, the colours between that of the thing and the background belong to its edge.
CORE_NEIGHBOURS = 8
CORE_PIXELS = 10
EDGE = 4
GROWTH = 8  # pixels; slightly more than from the flat interior of a large star to its tips

FRINGE = 3  # pixels around the covered ones that hold the rest of a blurred edge
SPECK_PIXELS = 16  # smaller patches are ignored; the smallest star has 140
# Pixels that are covered by half belong to a patch. Things of one colour that are 1.5 pixels apart
# may touch, so a patch is cut at higher levels, too.
CUT_LEVELS = (0.5, 0.75, 0.9)

# Largest mean displacement of an outline, in pixels. Rings after that tokenizer have up to 1.0, all
# other shapes 0.8. An ellipse of 6 : 5 has 0.7, of 4 : 3 1.1; a half disc, a T and an L have 2.
MAX_DISPLACEMENT = 1.0
# Extents, in pixels, that count as small or large: the dataset has 20 to 30.
EXTENT_RANGE = (14.0, 42.0)

# An unknown texture has no flat interior, but leaves a patch of wrong pixels that is wider than an
# edge. Images after that tokenizer that were parsed correctly had at most 22 such pixels.
WRONG_PIXELS = 24

_NAMES = tuple(COLOURS)
_PALETTE_N3 = np.array(list(COLOURS.values()), np.float64)
_POWER_N = (_PALETTE_N3**2).sum(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParsedScene:
    """The recognised parts of an image.

    Attributes:
        things: the recognised things; lengths are shares of sides of the image, as in `scenes`.
        background: a key of `scenes.COLOURS`, or None if the rim has no single named colour.
        unrecognised: the colour of each patch that no shape fits, '' for an unnamed colour.
    """

    things: tuple[Thing, ...]
    background: str | None
    unrecognised: tuple[str, ...] = ()

    @property
    def scene(self) -> Scene | None:
        """The scene, if all of the image was recognised."""
        if self.unrecognised or self.background is None:
            return None
        return Scene(things=self.things, background=self.background)


def parse_scene(image_hwc: np.ndarray) -> Scene | None:
    """The scene that an image shows, or None if a part of it is unrecognised; as `parse`."""
    return parse(image_hwc).scene


def parse(image_hwc: np.ndarray) -> ParsedScene:
    """The background and the things of an image.

    Args:
        image_hwc: (h, w, 3) uint8 RGB, both sides at least 40.

    Raises:
        UserError: an image of another form.
    """
    image_hwc = _rescale(image_hwc)
    rim_c = _rim_colour(image_hwc)
    if rim_c is None:
        return ParsedScene(things=(), background=None, unrecognised=('',))
    background = int(_nearest_colour(rim_c))
    cores = _cores(_nearest_colour(image_hwc), rim_c, background)
    labels_hw = _grow(cores, image_hwc.shape[:2])
    rendered_hwc = np.broadcast_to(rim_c, image_hwc.shape).copy()
    things, unrecognised = [], []
    for label, core_hw in cores.items():
        colour_c = np.median(image_hwc[core_hw], axis=0)
        if _distance(colour_c, _PALETTE_N3[label]) > COLOUR_DISTANCE:
            unrecognised.append('')
            continue
        patch_hw = _coverage(image_hwc - rim_c, colour_c - rim_c, labels_hw == label)
        for fitted in _fit_shapes(patch_hw):
            if fitted is None:
                unrecognised.append(_NAMES[label])
            else:
                things.append(_thing(fitted, _NAMES[label], image_hwc.shape[:2]))
                rendered_hwc += fitted.cover_hw[:, :, None] * (colour_c - rim_c)
    wrong_hw = _distance(image_hwc, rendered_hwc) > COLOUR_DISTANCE
    if not unrecognised and _interior(wrong_hw).sum() >= WRONG_PIXELS:
        unrecognised.append('')
    return ParsedScene(
        things=tuple(things), background=_NAMES[background], unrecognised=tuple(unrecognised)
    )


def _thing(fitted: FittedShape, colour: str, size: tuple[int, int]) -> Thing:
    """A shape that was fitted in an image of (height, width) pixels."""
    height, width = size
    return Thing(
        shape=fitted.shape,
        colour=colour,
        extent=fitted.extent / SIDE,
        x=fitted.x / width,
        y=fitted.y / height,
    )


def _rescale(image_hwc: np.ndarray) -> np.ndarray:
    """The image as float64 with a shorter side of 64 pixels."""
    if image_hwc.ndim != 3 or image_hwc.shape[-1] != 3 or image_hwc.dtype != np.uint8:
        raise UserError(
            f'the scene parser needs an image of uint8 RGB, not {image_hwc.dtype} {image_hwc.shape}'
        )
    height, width, _ = image_hwc.shape
    shorter = min(height, width)
    if shorter < MIN_SIDE:
        raise UserError(
            f'the scene parser needs an image with {MIN_SIDE} pixels a side or more, not '
            f'{height} x {width}'
        )
    image_hwc = image_hwc.astype(np.float64)
    for axis, side in enumerate((height, width)):
        target = round(side * SIDE / shorter)
        if target != side:
            matrix = (area_matrix if target < side else linear_matrix)(side, target)
            image_hwc = np.moveaxis(np.tensordot(matrix, image_hwc, ((1,), (axis,))), 0, axis)
    return image_hwc


def _nearest_colour(colours_c: np.ndarray) -> np.ndarray:
    """Indices (...) of the nearest of the ten colours, from (..., 3)."""
    return np.argmin(_POWER_N - 2 * colours_c @ _PALETTE_N3.T, axis=-1)


def _distance(first_c: np.ndarray, second_c: np.ndarray) -> np.ndarray:
    return np.sqrt(((first_c - second_c) ** 2).sum(-1))


def _rim_colour(image_hwc: np.ndarray) -> np.ndarray | None:
    """The colour (3,) of the rim, or None if it has no single named colour."""
    rim_N3 = np.concatenate([image_hwc[0], image_hwc[-1], image_hwc[1:-1, 0], image_hwc[1:-1, -1]])
    median_c = np.median(rim_N3, axis=0)
    named = _distance(_PALETTE_N3[_nearest_colour(median_c)], median_c) <= COLOUR_DISTANCE
    uniform = (_distance(rim_N3, median_c) <= COLOUR_DISTANCE).mean() >= RIM_SHARE
    return median_c if named and uniform else None


def _cores(labels_hw: np.ndarray, rim_c: np.ndarray, background: int) -> dict[int, np.ndarray]:
    """The flat interiors (h, w) of each colour, except the background and colours of edges."""
    counts = np.bincount(labels_hw.ravel(), minlength=len(_NAMES))
    counts[background] = 0
    labels = np.flatnonzero(counts >= CORE_PIXELS).tolist()
    cores = _large_enough({label: _interior(labels_hw == label) for label in labels})
    edges = {label: _colours_between(rim_c, label) & cores.keys() for label in cores}
    for label, edge_labels in edges.items():
        near_hw = _dilate(cores[label], EDGE) if edge_labels else None
        for edge_label in edge_labels:
            cores[edge_label] = cores[edge_label] & ~near_hw
    return _large_enough(cores)


def _large_enough(cores: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {label: core_hw for label, core_hw in cores.items() if core_hw.sum() >= CORE_PIXELS}


def _colours_between(rim_c: np.ndarray, label: int) -> set[int]:
    """The other colours on an edge between the background and a colour."""
    shares = np.linspace(0, 1, 21)[:, None]
    nearest = _nearest_colour(rim_c + shares * (_PALETTE_N3[label] - rim_c))
    return set(nearest.tolist()) - {label}


def _interior(mask_hw: np.ndarray) -> np.ndarray:
    """The pixels where a mask is wider than an edge."""
    padded = np.pad(mask_hw, 1).astype(np.int8)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    count_hw = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return mask_hw & (count_hw >= CORE_NEIGHBOURS)


def _dilate(mask_hw: np.ndarray, pixels: int) -> np.ndarray:
    padded = np.pad(mask_hw, pixels)
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * pixels + 1, axis)
        padded = windows.any(-1)
    return padded


def _grow(cores: dict[int, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The label (h, w) of the nearest core of each pixel, -1 beyond `GROWTH` pixels."""
    labels_hw = np.full(size, -1, np.int8)
    for label, core_hw in cores.items():
        labels_hw[core_hw] = label
    for _ in range(GROWTH):
        for lines in (labels_hw, labels_hw.T):
            before = lines.copy()
            for target, source in ((slice(1, None), slice(-1)), (slice(-1), slice(1, None))):
                np.copyto(lines[target], before[source], where=lines[target] < 0)
    return labels_hw


def _coverage(difference_hwc: np.ndarray, change_c: np.ndarray, mask_hw: np.ndarray) -> np.ndarray:
    """The share (h, w) of each pixel that a colour covers.

    Args:
        difference_hwc: the image minus the background.
        change_c: the colour minus the background.
        mask_hw: the pixels that may belong to the colour.
    """
    share_hw = np.where(mask_hw, difference_hwc @ (change_c / (change_c @ change_c)), 0.0)
    near_hw = _dilate(share_hw > CUT_LEVELS[0], FRINGE)
    return np.where(near_hw, np.clip(share_hw, 0.0, 1.0), 0.0)


def _fit_shapes(patch_hw: np.ndarray) -> list[FittedShape | None]:
    """The one shape that fits a patch, or the shapes of its pieces; None for an unfitted piece."""
    if patch_hw.sum() < SPECK_PIXELS:
        return []
    best = shape_fitting.fit(patch_hw)
    smallest, largest = EXTENT_RANGE
    if best.displacement <= MAX_DISPLACEMENT and smallest <= best.extent <= largest:
        return [best]
    pieces = _cut(patch_hw)
    if len(pieces) == 1:
        return [None]
    return [fitted for piece_hw in pieces for fitted in _fit_shapes(piece_hw)]


def _cut(patch_hw: np.ndarray) -> list[np.ndarray]:
    """Cuts a patch along empty rows or columns: the boxes of two things never overlap."""
    for level in CUT_LEVELS:
        for axis in (0, 1):
            occupied = np.flatnonzero((patch_hw > level).any(1 - axis))
            last = np.flatnonzero(np.diff(occupied) > 1)
            if len(last):
                cuts = (occupied[last] + occupied[last + 1]) / 2
                piece = np.searchsorted(cuts, np.arange(patch_hw.shape[axis]))
                piece = np.expand_dims(piece, 1 - axis)
                return [np.where(piece == n, patch_hw, 0.0) for n in range(len(cuts) + 1)]
    return [patch_hw]
