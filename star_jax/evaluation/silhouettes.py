"""Which shape is this patch of a picture?

Each of the six is drawn with the patch's area and centre of mass, neither of which blur moves, so
nothing is searched; the one that leaves the fewest pixels unexplained is the answer. Lengths are
in pixels of a picture of 64.
"""

import dataclasses
import functools

import numpy as np

from star_jax.data.scenes import SHAPES
from star_jax.data.shapes import COVERAGES

# A decoder blurs, and not the same everywhere: shapes are compared as drawn, and blurred by a
# Gaussian of about 1 and of 1.4 pixels (2 and 4 passes of `_soften`).
PASSES = (0, 2, 2)
MARGIN = 4  # pixels around a patch that a shape of its area may reach

# Lossy decoders fill notches and melt tips until a disc explains the body best, while an eye still
# follows the outline. A body is a star or a cross if its outline rises and falls with theirs: so
# well correlated, and by so much of their height. Of 357 discs and squares behind a small tokenizer
# (22 to 27 dB) none came above 0.57 and 0.15.
NOTCHED = ('star', 'cross')
BODIES = ('circle', 'square')
CORRELATION = 0.6
HEIGHT = 0.18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silhouette:
    """A shape in a picture: `extent` is the longer side of its box, (`x`, `y`) the box's centre.

    `cover_hw` is its share of each pixel, `displacement` how far on average its outline is from
    that of the patch.
    """

    shape: str
    extent: float
    x: float
    y: float
    cover_hw: np.ndarray
    displacement: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measure:
    """Of a shape of extent 1: area, length of outline, centre of mass below the box's centre."""

    area: float
    outline: float
    low: float


def fit(patch_hw: np.ndarray) -> Silhouette:
    """The shape that explains a patch best, from the share of each pixel (h, w) that it covers."""
    area = patch_hw.sum()
    line_h, line_w = (np.arange(side) + 0.5 for side in patch_hw.shape)
    x, y = patch_hw.sum(0) @ line_w / area, patch_hw.sum(1) @ line_h / area
    rows, columns = _span(patch_hw.any(1)), _span(patch_hw.any(0))
    right, down = line_w[None, columns] - x, line_h[rows, None] - y
    measures = [_measure(shape) for shape in SHAPES]
    extents = [np.sqrt(area / measure.area) for measure in measures]
    shown_Nhw = np.stack(
        [
            COVERAGES[shape](right, down + measure.low * extent, extent / 2)
            for shape, measure, extent in zip(SHAPES, measures, extents, strict=True)
        ]
    )
    soft_hw, soft_Nhw = _soften(patch_hw[rows, columns]), _soften(shown_Nhw)
    misfits = _misfits(soft_hw, soft_Nhw)
    best = int(np.argmin(misfits))
    if SHAPES[best] in BODIES:
        best = _notched(soft_hw, soft_Nhw, np.hypot(right, down)) or best
    cover_hw = np.zeros_like(patch_hw)
    cover_hw[rows, columns] = shown_Nhw[best]
    return Silhouette(
        shape=SHAPES[best],
        extent=float(extents[best]),
        x=float(x),
        y=float(y - measures[best].low * extents[best]),
        cover_hw=cover_hw,
        displacement=float(misfits[best] / (measures[best].outline * extents[best])),
    )


def _span(some: np.ndarray) -> slice:
    places = np.flatnonzero(some)
    return slice(max(places[0] - MARGIN, 0), places[-1] + MARGIN + 1)


def _misfits(patch_hw: np.ndarray, shown_Nhw: np.ndarray) -> np.ndarray:
    """How many pixels each shape leaves unexplained, at the blur that suits it best."""
    least = np.full(len(shown_Nhw), np.inf)
    for passes in PASSES:
        for _ in range(passes):
            shown_Nhw = _soften(shown_Nhw)
        least = np.minimum(least, np.abs(shown_Nhw - patch_hw).sum((1, 2)))
    return least


def _notched(patch_hw: np.ndarray, shown_Nhw: np.ndarray, distance_hw: np.ndarray) -> int | None:
    """The number of the notched shape whose outline a body follows, if one."""
    options = [SHAPES.index(shape) for shape in NOTCHED]
    rings_hw = np.rint(distance_hw).astype(int)
    patch = _unround(patch_hw, rings_hw)
    power = (patch**2).sum()
    best = None, CORRELATION
    for option in options:
        shown = _unround(shown_Nhw[option], rings_hw)
        common, full = (patch * shown).sum(), (shown**2).sum()
        correlation = common / np.sqrt(power * full + 1e-9)
        if correlation >= best[1] and common / full >= HEIGHT:
            best = option, correlation
    return best[0]


def _unround(map_hw: np.ndarray, rings_hw: np.ndarray) -> np.ndarray:
    """What is left of a map without its mean over each circle around the centre."""
    rings = rings_hw.ravel()
    means = np.bincount(rings, map_hw.ravel()) / np.maximum(np.bincount(rings), 1)
    return map_hw - means[rings_hw]


def _soften(maps_hw: np.ndarray) -> np.ndarray:
    """A binomial blur of 3 x 3 over the last two axes; outside is nothing."""
    padded = np.pad(maps_hw, [(0, 0)] * (maps_hw.ndim - 2) + [(1, 1)] * 2)
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


@functools.cache
def _measure(shape: str) -> _Measure:
    extent = 256
    line = np.arange(-8, extent + 8) + 0.5 - extent / 2
    cover_hw = COVERAGES[shape](line[None, :], line[:, None], extent / 2)
    return _Measure(
        area=float(cover_hw.sum() / extent**2),
        outline=float(np.hypot(*np.gradient(cover_hw)).sum() / extent),
        low=float(cover_hw.sum(1) @ line / cover_hw.sum() / extent),
    )
