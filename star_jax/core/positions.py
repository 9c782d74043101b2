"""Which coordinates does a token have, and how do they rotate queries and keys?

The tables are functions of the schedule alone. Normalised coordinates stretch every grid to the
same extent, so that a coarse token has the coordinates of its pixels (STAR specification 3.2).
"""

import jax
import jax.numpy as jnp
import numpy as np


def grid_xy(height: int, width: int, extent: float | None = None) -> np.ndarray:
    """[height * width, 2] float64 (x, y) of each cell in row order.

    Args:
        height: cells along the height.
        width: cells along the width.
        extent: stretches any grid to [0, extent]; a side of one cell stays at 0 (None: coordinates
            are the numbers of the cells).
    """
    y, x = np.divmod(np.arange(height * width, dtype=np.float64), width)
    xy_N2 = np.stack([x, y], axis=-1)
    if extent is not None:
        xy_N2 *= extent / np.maximum([width - 1, height - 1], 1)
    return xy_N2


def pyramid_xy(grids: tuple[tuple[int, int], ...], extent: float | None = None) -> np.ndarray:
    """[L, 2] float64 coordinates of every token of a pyramid, scale after scale."""
    return np.concatenate([grid_xy(h, w, extent) for h, w in grids])


def rounded_xy(grids: tuple[tuple[int, int], ...], reference: tuple[int, int]) -> np.ndarray:
    """[L, 2] coordinates of every token, stretched to a reference grid (height, width) and rounded.

    Products are float32 and halves are rounded to even (Infinity specification 5.4).
    """
    coordinates = []
    for height, width in grids:
        stretch_2 = np.float32([reference[1] / width, reference[0] / height])
        coordinates.append(np.rint(grid_xy(height, width).astype(np.float32) * stretch_2))
    return np.concatenate(coordinates).astype(np.float64)


def rotary_angles(xy_L2: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """[L, head_dim / 2] float32 angles: half of the planes rotate with x, half with y.

    Args:
        xy_L2: coordinates of the rows.
        head_dim: channels of a head, a multiple of 4 (STAR specification 3.2).
        theta: base of the frequencies.

    Raises:
        ValueError: another head_dim.
    """
    if head_dim % 4:
        raise ValueError(f'rotary positions need a head width divisible by 4, not {head_dim}')
    freqs_F = theta ** -(np.arange(0, head_dim, 4) / head_dim)
    angles_L2F = xy_L2[:, :, None] * freqs_F
    return angles_L2F.reshape(len(xy_L2), head_dim // 2).astype(np.float32)


def rotation(angles_LP: np.ndarray) -> np.ndarray:
    """[L, P, 2] float32: cosine and sine of every angle."""
    return np.stack([np.cos(angles_LP), np.sin(angles_LP)], axis=-1).astype(np.float32)


def raster_rotation(
    height: int, width: int, prefix: int, head_dim: int, theta: float
) -> np.ndarray:
    """Cosines and sines of a raster after a prefix (LlamaGen specification 2.3).

    Half of the planes rotate with the row of a cell, half with its column. In the rows of the
    prefix both are 0, which makes queries and keys vanish there.

    Args:
        height: cells along the height.
        width: cells along the width.
        prefix: rows before the first cell.
        head_dim: channels of a head, a multiple of 4.
        theta: base of the frequencies.

    Returns:
        [prefix + height * width, P, 2] float32.
    """
    yx_N2 = grid_xy(height, width)[:, ::-1]
    table_NP2 = rotation(rotary_angles(yx_N2, head_dim, theta))
    return np.pad(table_NP2, ((prefix, 0), (0, 0), (0, 0)))


def interpolated_rotation(
    grids: tuple[tuple[int, int], ...],
    extents: tuple[float, float],
    head_dim: int,
    theta: float,
) -> np.ndarray:
    """Cosines and sines, interpolated between those of whole coordinates.

    Half of the planes rotate with the row, half with the column. An interpolated row is shorter
    than 1 (Infinity specification 5.4, mode 1).

    Args:
        grids: (height, width) of every scale.
        extents: the first and the last cell of an axis have the coordinates 0 and `extents` - 1
            (rows, columns); an axis of one cell has 0.
        head_dim: channels of a head, a multiple of 4.
        theta: base of the frequencies.

    Returns:
        [L, P, 2] float32.
    """
    freqs_F = theta ** -(np.arange(0, head_dim, 4) / head_dim)

    def along(size: int, extent: float) -> np.ndarray:
        place_N = np.arange(size) * (extent - 1) / max(size - 1, 1)
        low_N = np.minimum(np.floor(place_N), extent - 1)
        corners_2NF = np.stack([low_N, np.minimum(low_N + 1, extent - 1)])[..., None] * freqs_F
        low_NF2, high_NF2 = np.stack([np.cos(corners_2NF), np.sin(corners_2NF)], axis=-1)
        return low_NF2 + (place_N - low_N)[:, None, None] * (high_NF2 - low_NF2)

    scales = []
    for height, width in grids:
        y, x = np.divmod(np.arange(height * width), width)
        halves = along(height, extents[0])[y], along(width, extents[1])[x]
        scales.append(np.concatenate(halves, axis=1))
    return np.concatenate(scales).astype(np.float32)


def learned_rotation(xy_L2: jax.Array, frequencies_NP2: jax.Array) -> jax.Array:
    """[L, N, P, 2] float32: cosine and sine of x fx + y fy, for the frequencies of one layer."""
    frequencies_NP2 = frequencies_NP2.astype(jnp.float32)
    angles_LNP = jnp.einsum('LC,NPC->LNP', xy_L2, frequencies_NP2, precision='highest')
    return jnp.stack([jnp.cos(angles_LNP), jnp.sin(angles_LNP)], axis=-1)


def rotate(x_BLNH: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotates the channel pairs (2j, 2j+1) of every head by angle j; float32.

    Args:
        x_BLNH: queries or keys.
        rotation: [L, P, 2] cosines and sines for all heads, or [L, N, P, 2].
    """
    x_BLNP2 = x_BLNH.astype(jnp.float32).reshape(*x_BLNH.shape[:-1], -1, 2)
    rotation_LNP2 = rotation if rotation.ndim == 4 else rotation[:, None]
    cos_LNP, sin_LNP = rotation_LNP2[..., 0], rotation_LNP2[..., 1]
    a, b = x_BLNP2[..., 0], x_BLNP2[..., 1]
    rotated = jnp.stack([a * cos_LNP - b * sin_LNP, a * sin_LNP + b * cos_LNP], axis=-1)
    return rotated.reshape(x_BLNH.shape)


def sincos_table(xy_L2: np.ndarray, width: int, theta: float = 10000.0) -> np.ndarray:
    """[L, width] float32: sines and cosines of x in the first half, of y in the second.

    This is the two-dimensional form of Vaswani et al. 2017, section 3.5.

    Args:
        xy_L2: coordinates of the rows.
        width: channels, a multiple of 4.
        theta: base of the frequencies.

    Raises:
        ValueError: another width.
    """
    if width % 4:
        raise ValueError(f'sin-cos positions need a width divisible by 4, not {width}')
    freqs_F = theta ** -(np.arange(0, width, 4) / width)
    angles_L2F = xy_L2[:, :, None] * freqs_F
    waves = np.concatenate([np.sin(angles_L2F), np.cos(angles_L2F)], axis=-1)
    return waves.reshape(len(xy_L2), width).astype(np.float32)
