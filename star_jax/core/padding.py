"""How does one program body resize the maps of several scales?

The tokens of each scale come first in an array that is padded to the widest scale. Tables with one
entry per scale, indexed by a traced scale, hold the cell of each token and the matrices that
resample the grid; padding has weight 0. `core/resize.py` does the same at fixed sizes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core import resize
from star_jax.core.resize import MatrixOf
from star_jax.core.schedule import Grids


def place(x_BLC: jax.Array, grids: Grids, index: jax.Array) -> jax.Array:
    """Places the tokens of a scale in the upper left corner of a map.

    Args:
        x_BLC: padded tokens, as many as the last of `grids` has cells; the padding must be finite.
        grids: (height, width) of every scale.
        index: the scale, traced.

    Returns:
        [B, *grids[-1], C].
    """
    cells = jnp.asarray(_token_of_cell(grids))[index]
    return x_BLC[:, cells].reshape(len(x_BLC), *grids[-1], -1)


def take(x_BhwC: jax.Array, grids: Grids, index: jax.Array) -> jax.Array:
    """Takes the tokens of a scale from the upper left corner of a map; the inverse of `place`.

    Args:
        x_BhwC: maps of the last of `grids`.
        grids: (height, width) of every scale.
        index: the scale, traced; an index after the last scale stands for the last scale.

    Returns:
        [B, L, C] padded tokens, as many as the last of `grids` has cells.
    """
    tokens = jnp.asarray(_cell_of_token(grids))[jnp.minimum(index, len(grids) - 1)]
    return x_BhwC.reshape(len(x_BhwC), -1, x_BhwC.shape[-1])[:, tokens]


def enlarge(
    x_BhwC: jax.Array, grids: Grids, index: jax.Array, full: tuple[int, int], matrix: MatrixOf
) -> jax.Array:
    """Resamples the grid of a scale to full size.

    Args:
        x_BhwC: maps whose upper left corner holds the grid.
        grids: (height, width) of every scale.
        index: the scale, traced.
        full: (height, width) of the result.
        matrix: the resampling along one axis, such as `resize.bicubic_matrix`.

    Returns:
        [B, *full, C].
    """
    rows, columns = _matrices(matrix, tuple((grid, full) for grid in grids))
    return resize.resample(x_BhwC, jnp.asarray(rows)[index], jnp.asarray(columns)[index])


def shrink(x_BHWC: jax.Array, grids: Grids, index: jax.Array, matrix: MatrixOf) -> jax.Array:
    """Resamples maps of full size to the grid of a scale, in the upper left corner of a map.

    Args:
        x_BHWC: maps of full size.
        grids: (height, width) of every scale.
        index: the scale, traced; an index after the last scale stands for the last scale.
        matrix: the resampling along one axis, such as `resize.area_matrix`.

    Returns:
        [B, *grids[-1], C].
    """
    index = jnp.minimum(index, len(grids) - 1)
    rows, columns = _matrices(matrix, tuple((x_BHWC.shape[1:3], grid) for grid in grids))
    return resize.resample(x_BHWC, jnp.asarray(rows)[index], jnp.asarray(columns)[index])


@functools.cache
def _matrices(
    matrix: MatrixOf, pairs: tuple[tuple[tuple[int, int], ...], ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The matrices along rows and along columns of each (from, to) pair of grids.

    They are padded with zeros to the largest.
    """
    rows, columns = ([matrix(old[axis], new[axis]) for old, new in pairs] for axis in (0, 1))
    return _stack(rows), _stack(columns)


def _stack(matrices: list[np.ndarray]) -> np.ndarray:
    largest = np.max([matrix.shape for matrix in matrices], axis=0)
    padded = [np.pad(matrix, [(0, n) for n in largest - matrix.shape]) for matrix in matrices]
    return np.stack(padded)


@functools.cache
def _token_of_cell(grids: Grids) -> np.ndarray:
    """[scales, cells of the last grid]: the token in each cell; token 0 outside of a grid."""
    y, x = np.indices(grids[-1]).reshape(2, -1)
    return np.stack([np.where((y < h) & (x < w), y * w + x, 0) for h, w in grids])


@functools.cache
def _cell_of_token(grids: Grids) -> np.ndarray:
    """[scales, tokens of the last grid]: the cell of each token; cell 0 for padding."""
    token = np.arange(np.prod(grids[-1]))
    y_x = [np.divmod(np.where(token < h * w, token, 0), w) for h, w in grids]
    return np.stack([y * grids[-1][1] + x for y, x in y_x])
