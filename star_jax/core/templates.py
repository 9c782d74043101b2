"""Which grids does an image of a given aspect ratio have?

The published templates of Infinity (Infinity specification 2.1): for each of fifteen ratios of
height to width thirteen grids, from coarse to fine. The name of a resolution selects the first of
them. Images are 16 px a cell.
"""

from collections.abc import Mapping

from star_jax.core.schedule import Grids

# Height / width -> height x width of every scale; the inverse of a ratio has the sides swapped.
_TALL = {
    1.0: '1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64',
    1.25: '1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56',
    1.333: '1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54',
    1.5: '1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52',
    1.75: '1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48',
    2.0: '1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45',
    2.5: '1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40',
    3.0: '1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37',
}
_INVERSE = {1.25: 0.8, 1.333: 0.75, 1.5: 0.666, 1.75: 0.571, 2.0: 0.5, 2.5: 0.4, 3.0: 0.333}

# How many scales an image has at each published resolution, named by its area in pixels.
RESOLUTIONS: Mapping[str, int] = {'0.06M': 7, '0.25M': 10, '0.60M': 12, '1M': 13}


def _published() -> dict[float, Grids]:
    templates = {}
    for ratio, sides in _TALL.items():
        grids = tuple(tuple(map(int, side.split('x'))) for side in sides.split())
        templates[ratio] = grids
        if ratio in _INVERSE:
            templates[_INVERSE[ratio]] = tuple((width, height) for height, width in grids)
    return templates


# In the published order, which decides between templates that are equally near.
PUBLISHED: Mapping[float, Grids] = _published()
