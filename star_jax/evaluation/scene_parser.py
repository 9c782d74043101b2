"""What does a picture of the embedded set show?

Read by classical vision, without any learned part, so that a score means the same thing for every
model. The rim names the background; every pixel goes to the nearest colour, and the flat middle
of a colour claims the edge around it; what a colour then covers is a shape, or is cut into pieces
that are (`silhouettes`). What no shape explains is counted as strange, never taken for a thing.
"""

import dataclasses

import numpy as np

from star_jax.core.resize import area_matrix
from star_jax.data.scenes import COLOURS, Scene, Thing
from star_jax.errors import UserError
from star_jax.evaluation import silhouettes
from star_jax.evaluation.silhouettes import Silhouette

# Larger pictures are averaged down to this side. Scenes keep every place a pixel of it clear of
# the next one, every size two and every relation four.
SIDE = 64

# Nothing further than this from a colour has its name, or is it. Two of the ten are 117 apart or
# more; behind a small tokenizer (23 to 27 dB) all flat middles were within 64, 99 % within 52.
COLOUR_DISTANCE = 90.0
# Large things come as close as half a pixel to the rim, a blurred one tints it; this much is clear.
RIM_SHARE = 0.75

# An edge passes near third colours, in a band of one or two pixels: a colour is there only where 8
# of the 9 pixels around have it. The thinnest part of a thing is 5 pixels wide, so the flat middle
# of the least thing is some 30 pixels. Blurred edges are wider: within 4 pixels of a middle, the
# colours between its own and the background's are its edge.
CORE_NEIGHBOURS = 8
CORE_PIXELS = 10
EDGE = 4
REACH = 8  # pixels from the flat middle of a large star to its tips, and to spare

FRINGE = 3  # pixels around the covered ones that hold the rest of a blurred edge
DUST_PIXELS = 16  # less than this is a speck that nobody would name; the least star has 140
# Pixels covered by half are part of a patch. Things of one colour, 1.5 pixels apart, may touch.
CUTS = (0.5, 0.75, 0.9)

# How far the outline of a thing may be off on average, in pixels. Rings of that tokenizer reach
# 1.0, all else 0.8. An ellipse of 6 : 5 has 0.7, of 4 : 3 1.1; a half disc, a T and an L 2.
DISPLACEMENT = 1.0
# Which sizes, in pixels, can be called small or large: the set has 20 to 30.
EXTENTS = (14.0, 42.0)

# A strange texture has no flat middle, but leaves a patch of wrong pixels, more than an edge wide.
# What was read rightly behind that tokenizer left at most 22 of them.
WRONG_PIXELS = 24

_NAMES = tuple(COLOURS)
_PALETTE_N3 = np.array(list(COLOURS.values()), np.float64)
_POWER_N = (_PALETTE_N3**2).sum(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What was recognised in a picture.

    `strange` has the colour of each patch that is no thing, '' where that has no name either.
    """

    things: tuple[Thing, ...]
    background: str | None
    strange: tuple[str, ...] = ()

    @property
    def scene(self) -> Scene | None:
        """The scene, if all of the picture was recognised."""
        if self.strange or self.background is None:
            return None
        return Scene(things=self.things, background=self.background)


def read(image_hwc: np.ndarray) -> Scene | None:
    """The scene that a picture shows, None where it shows anything else; as `inspect`."""
    return inspect(image_hwc).scene


def inspect(image_hwc: np.ndarray) -> Reading:
    """All that can be read in a uint8 RGB picture (S, S, 3), S at least 64; else `UserError`."""
    picture_hwc = _shrink(image_hwc)
    ground = _ground(picture_hwc)
    if ground is None:
        return Reading(things=(), background=None, strange=('',))
    background = int(_nearest(ground))
    cores = _cores(_nearest(picture_hwc), ground, background)
    owners_hw = _grow(cores)
    canvas_hwc = np.broadcast_to(ground, picture_hwc.shape).copy()
    things, strange = [], []
    for label, core_hw in cores.items():
        colour = np.median(picture_hwc[core_hw], axis=0)
        if _distance(colour, _PALETTE_N3[label]) > COLOUR_DISTANCE:
            strange.append('')
            continue
        patch_hw = _patch(picture_hwc - ground, colour - ground, owners_hw == label)
        for found in _explain(patch_hw):
            if found is None:
                strange.append(_NAMES[label])
            else:
                things.append(_thing(found, _NAMES[label]))
                canvas_hwc += found.cover_hw[:, :, None] * (colour - ground)
    wrong_hw = _distance(picture_hwc, canvas_hwc) > COLOUR_DISTANCE
    if not strange and _middle(wrong_hw).sum() >= WRONG_PIXELS:
        strange.append('')
    return Reading(things=tuple(things), background=_NAMES[background], strange=tuple(strange))


def _thing(found: Silhouette, colour: str) -> Thing:
    return Thing(
        shape=found.shape,
        colour=colour,
        extent=found.extent / SIDE,
        x=found.x / SIDE,
        y=found.y / SIDE,
    )


def _shrink(image_hwc: np.ndarray) -> np.ndarray:
    """float64 (64, 64, 3)."""
    side = len(image_hwc)
    if image_hwc.shape != (side, side, 3) or image_hwc.dtype != np.uint8 or side < SIDE:
        raise UserError(
            f'a picture to read is a square of uint8 RGB with {SIDE} pixels a side or more, '
            f'not {image_hwc.dtype} {image_hwc.shape}'
        )
    picture_hwc = image_hwc.astype(np.float64)
    if side == SIDE:
        return picture_hwc
    matrix = area_matrix(side, SIDE).astype(np.float64)
    rows = matrix @ picture_hwc.reshape(side, -1)
    return matrix @ rows.reshape(SIDE, side, 3)


def _nearest(colours_c: np.ndarray) -> np.ndarray:
    """The numbers of the nearest of the ten colours, (...) from (..., 3)."""
    return np.argmin(_POWER_N - 2 * colours_c @ _PALETTE_N3.T, axis=-1)


def _distance(one_c: np.ndarray, other_c: np.ndarray) -> np.ndarray:
    return np.sqrt(((one_c - other_c) ** 2).sum(-1))


def _ground(picture_hwc: np.ndarray) -> np.ndarray | None:
    """The colour (3,) of the picture's rim, if it has one."""
    rim_N3 = np.concatenate(
        [picture_hwc[0], picture_hwc[-1], picture_hwc[1:-1, 0], picture_hwc[1:-1, -1]]
    )
    ground = np.median(rim_N3, axis=0)
    named = _distance(_PALETTE_N3[_nearest(ground)], ground) <= COLOUR_DISTANCE
    plain = (_distance(rim_N3, ground) <= COLOUR_DISTANCE).mean() >= RIM_SHARE
    return ground if named and plain else None


def _cores(labels_hw: np.ndarray, ground: np.ndarray, background: int) -> dict[int, np.ndarray]:
    """The flat middles (h, w) of each colour that is neither the background's nor an edge's."""
    counts = np.bincount(labels_hw.ravel(), minlength=len(_NAMES))
    counts[background] = 0
    labels = np.flatnonzero(counts >= CORE_PIXELS).tolist()
    cores = _broad({label: _middle(labels_hw == label) for label in labels})
    edges = {label: _between(ground, label) & cores.keys() for label in cores}
    for label, between in edges.items():
        near_hw = _widen(cores[label], EDGE) if between else None
        for other in between:
            cores[other] = cores[other] & ~near_hw
    return _broad(cores)


def _broad(cores: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {label: core_hw for label, core_hw in cores.items() if core_hw.sum() >= CORE_PIXELS}


def _between(ground: np.ndarray, label: int) -> set[int]:
    """The other colours that an edge between the ground and a colour passes."""
    steps = np.linspace(0, 1, 21)[:, None]
    passed = _nearest(ground + steps * (_PALETTE_N3[label] - ground))
    return set(passed.tolist()) - {label}


def _middle(mask_hw: np.ndarray) -> np.ndarray:
    """Where a mask is more than an edge wide."""
    padded = np.pad(mask_hw, 1).astype(np.int8)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    count_hw = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return mask_hw & (count_hw >= CORE_NEIGHBOURS)


def _widen(mask_hw: np.ndarray, pixels: int) -> np.ndarray:
    padded = np.pad(mask_hw, pixels)
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * pixels + 1, axis)
        padded = windows.any(-1)
    return padded


def _grow(cores: dict[int, np.ndarray]) -> np.ndarray:
    """The colour whose middle is next to each pixel (h, w), -1 where none is within reach."""
    owners_hw = np.full((SIDE, SIDE), -1, np.int8)
    for label, core_hw in cores.items():
        owners_hw[core_hw] = label
    for _ in range(REACH):
        for lines in (owners_hw, owners_hw.T):
            before = lines.copy()
            for to, of in ((slice(1, None), slice(-1)), (slice(-1), slice(1, None))):
                np.copyto(lines[to], before[of], where=lines[to] < 0)
    return owners_hw


def _patch(off_hwc: np.ndarray, change: np.ndarray, owned_hw: np.ndarray) -> np.ndarray:
    """How much of each pixel (h, w) a colour covers: 0 is the ground, 1 the colour."""
    share_hw = np.where(owned_hw, off_hwc @ (change / (change @ change)), 0.0)
    near_hw = _widen(share_hw > CUTS[0], FRINGE)
    return np.where(near_hw, np.clip(share_hw, 0.0, 1.0), 0.0)


def _explain(patch_hw: np.ndarray) -> list[Silhouette | None]:
    """The shapes that make a patch: one if it fits, else those of its pieces; None is no shape."""
    if patch_hw.sum() < DUST_PIXELS:
        return []
    best = silhouettes.fit(patch_hw)
    if best.displacement <= DISPLACEMENT and EXTENTS[0] <= best.extent <= EXTENTS[1]:
        return [best]
    pieces = _cut(patch_hw)
    if len(pieces) == 1:
        return [None]
    return [found for piece_hw in pieces for found in _explain(piece_hw)]


def _cut(patch_hw: np.ndarray) -> list[np.ndarray]:
    """A patch cut along its empty rows, or columns: the boxes of two things never overlap."""
    for least in CUTS:
        for axis in (0, 1):
            full = np.flatnonzero((patch_hw > least).any(1 - axis))
            last = np.flatnonzero(np.diff(full) > 1)
            if len(last):
                between = (full[last] + full[last + 1]) / 2
                piece = np.searchsorted(between, np.arange(SIDE))
                piece = np.expand_dims(piece, 1 - axis)
                return [np.where(piece == n, patch_hw, 0.0) for n in range(len(between) + 1)]
    return [patch_hw]
