"""Which shape is a patch of an image?

Each of the six shapes is rendered with the area and the centre of mass of the patch. Blur changes
neither, so there is no search; the shape with the smallest residual is the answer. Lengths are in
pixels of an image whose shorter side has 64.
"""

import dataclasses
import functools

import numpy as np

from star_jax.data.scenes import SHAPES
from star_jax.data.shapes import COVERAGES

# A decoder blurs, and not the same everywhere: shapes are compared as rendered, and blurred by a
# Gaussian of about 1 and of 1.4 pixels (2 and 4 passes of `_blur`).
BLUR_PASSES = (0, 2, 2)
MARGIN = 4  # pixels around a patch that a shape of equal area may cover

# Lossy decoders fill notches and round tips until a disc fits the patch best, although the outline
# is still visible. A round or square patch is a star or a cross if its outline rises and falls like
# theirs: with this correlation, and with this share of their amplitude. Of 357 discs and squares
# decoded by a small tokenizer (22 to 27 dB) none exceeded 0.57 and 0.15.
NOTCHED = ('star', 'cross')
COMPACT = ('circle', 'square')
MIN_CORRELATION = 0.6
MIN_AMPLITUDE = 0.18


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedShape:
    """A shape that was fitted to a patch.

    Attributes:
        shape: one of `scenes.SHAPES`.
        extent: longer side of the bounding box.
        x: horizontal centre of the bounding box.
        y: vertical centre of the bounding box.
        cover_hw: share of each pixel that the shape covers, in [0, 1].
        displacement: mean distance between its outline and that of the patch.
    """

    shape: str
    extent: float
    x: float
    y: float
    cover_hw: np.ndarray
    displacement: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _UnitShape:
    """Measures of a shape of extent 1.

    Attributes:
        area: covered area.
        perimeter: length of the outline.
        centroid_y: centre of mass, downwards from the centre of the bounding box.
    """

    area: float
    perimeter: float
    centroid_y: float


def fit(patch_hw: np.ndarray) -> FittedShape:
    """The shape that fits a patch best.

    Args:
        patch_hw: share of each pixel that the patch covers, in [0, 1]; not all zero.
    """
    area = patch_hw.sum()
    line_h, line_w = (np.arange(side) + 0.5 for side in patch_hw.shape)
    x, y = patch_hw.sum(0) @ line_w / area, patch_hw.sum(1) @ line_h / area
    rows, columns = _span(patch_hw.any(1)), _span(patch_hw.any(0))
    right, down = line_w[None, columns] - x, line_h[rows, None] - y
    units = [_unit_shape(shape) for shape in SHAPES]
    extents = [np.sqrt(area / unit.area) for unit in units]
    covers_Nhw = np.stack(
        [
            COVERAGES[shape](right, down + unit.centroid_y * extent, extent / 2)
            for shape, unit, extent in zip(SHAPES, units, extents, strict=True)
        ]
    )
    blurred_hw, blurred_Nhw = _blur(patch_hw[rows, columns]), _blur(covers_Nhw)
    residuals = _residuals(blurred_hw, blurred_Nhw)
    best = int(np.argmin(residuals))
    if SHAPES[best] in COMPACT:
        best = _notched_shape(blurred_hw, blurred_Nhw, np.hypot(right, down)) or best
    cover_hw = np.zeros_like(patch_hw)
    cover_hw[rows, columns] = covers_Nhw[best]
    return FittedShape(
        shape=SHAPES[best],
        extent=float(extents[best]),
        x=float(x),
        y=float(y - units[best].centroid_y * extents[best]),
        cover_hw=cover_hw,
        displacement=float(residuals[best] / (units[best].perimeter * extents[best])),
    )


def _span(occupied: np.ndarray) -> slice:
    indices = np.flatnonzero(occupied)
    return slice(max(indices[0] - MARGIN, 0), indices[-1] + MARGIN + 1)


def _residuals(patch_hw: np.ndarray, covers_Nhw: np.ndarray) -> np.ndarray:
    """[N] sums of absolute differences in pixels, at the blur that fits each shape best."""
    least = np.full(len(covers_Nhw), np.inf)
    for passes in BLUR_PASSES:
        for _ in range(passes):
            covers_Nhw = _blur(covers_Nhw)
        least = np.minimum(least, np.abs(covers_Nhw - patch_hw).sum((1, 2)))
    return least


def _notched_shape(
    patch_hw: np.ndarray, covers_Nhw: np.ndarray, distance_hw: np.ndarray
) -> int | None:
    """The index of the notched shape with the outline of the patch, or None."""
    rings_hw = np.rint(distance_hw).astype(int)
    patch = _without_ring_means(patch_hw, rings_hw)
    patch_power = (patch**2).sum()
    best = None, MIN_CORRELATION
    for index in map(SHAPES.index, NOTCHED):
        cover = _without_ring_means(covers_Nhw[index], rings_hw)
        product, cover_power = (patch * cover).sum(), (cover**2).sum()
        correlation = product / np.sqrt(patch_power * cover_power + 1e-9)
        if correlation >= best[1] and product / cover_power >= MIN_AMPLITUDE:
            best = index, correlation
    return best[0]


def _without_ring_means(map_hw: np.ndarray, rings_hw: np.ndarray) -> np.ndarray:
    """A map minus its mean over each circle around the centre."""
    rings = rings_hw.ravel()
    means = np.bincount(rings, map_hw.ravel()) / np.maximum(np.bincount(rings), 1)
    return map_hw - means[rings_hw]


def _blur(maps_hw: np.ndarray) -> np.ndarray:
    """A binomial blur of 3 x 3 over the last two axes, zero outside."""
    padded = np.pad(maps_hw, [(0, 0)] * (maps_hw.ndim - 2) + [(1, 1)] * 2)
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


@functools.cache
def _unit_shape(shape: str) -> _UnitShape:
    extent = 256
    line = np.arange(-8, extent + 8) + 0.5 - extent / 2
    cover_hw = COVERAGES[shape](line[None, :], line[:, None], extent / 2)
    return _UnitShape(
        area=float(cover_hw.sum() / extent**2),
        perimeter=float(np.hypot(*np.gradient(cover_hw)).sum() / extent),
        centroid_y=float(cover_hw.sum(1) @ line / cover_hw.sum() / extent),
    )
