"""How are maps of tokens and latents resized?

The resamplings that the published tokenizers were trained with, as matrices along one axis (STAR
specification 1.4, Infinity specification 3.3). `jax.image.resize` differs from them by up to 0.3.
Matrices are float64 on the host and rounded where they are used, to the maps' dtype, float32 at
least.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Matrix = np.ndarray | jax.Array
MatrixOf = Callable[[int, int], np.ndarray]  # (size in, size out) -> matrix along one axis

CUBIC_A = -0.75  # steepness of the cubic kernel, the value of the published code


@functools.cache
def area_matrix(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in] float64: adaptive average pooling.

    Output i averages the inputs floor(i n / m) ... ceil((i + 1) n / m) - 1.
    """
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        first, end = i * size_in // size_out, -(-(i + 1) * size_in // size_out)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


@functools.cache
def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in] float64: cubic convolution at half-pixel centres, no antialiasing.

    Taps outside the axis are clamped to its ends.
    """
    matrix = np.zeros((size_out, size_in))
    centres = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    for i, centre in enumerate(centres):
        base = int(np.floor(centre))
        for tap in range(base - 1, base + 3):
            matrix[i, np.clip(tap, 0, size_in - 1)] += _cubic(abs(centre - tap))
    return matrix


@functools.cache
def linear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in] float64: linear interpolation at half-pixel centres, no antialiasing."""
    matrix = np.zeros((size_out, size_in))
    centres = np.maximum((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0)
    for i, centre in enumerate(centres):
        low = int(centre)
        matrix[i, low] += 1 - (centre - low)
        matrix[i, min(low + 1, size_in - 1)] += centre - low
    return matrix


def _cubic(x: float) -> float:
    a = CUBIC_A
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def area(x_BhwC: jax.Array, height: int, width: int) -> jax.Array:
    """Adaptive average pooling of NHWC maps to `height` x `width`."""
    return _resample(x_BhwC, height, width, area_matrix)


def bicubic(x_BhwC: jax.Array, height: int, width: int) -> jax.Array:
    """Bicubic resampling of NHWC maps to `height` x `width`."""
    return _resample(x_BhwC, height, width, bicubic_matrix)


def _resample(x_BhwC: jax.Array, height: int, width: int, matrix: MatrixOf) -> jax.Array:
    if x_BhwC.shape[1:3] == (height, width):
        return x_BhwC
    rows, columns = matrix(x_BhwC.shape[1], height), matrix(x_BhwC.shape[2], width)
    return resample(x_BhwC, rows, columns)


def along_axes(x: jax.Array, sizes: Sequence[int], matrix: MatrixOf) -> jax.Array:
    """Maps [B, ..., C] with any number of axes between, each resampled to its size.

    Args:
        x: the maps.
        sizes: new sizes of the axes between the first and the last.
        matrix: `area_matrix`, `bicubic_matrix` or `linear_matrix`.
    """
    for axis, size in enumerate(sizes, 1):
        if x.shape[axis] != size:
            weights = matrix(x.shape[axis], size).astype(_dtype(x))
            x = jnp.tensordot(weights, x, ((1,), (axis,)), precision='highest')
            x = jnp.moveaxis(x, 0, axis)
    return x


def resample(x_BhwC: jax.Array, rows_yh: Matrix, columns_xw: Matrix) -> jax.Array:
    """NHWC maps times a matrix along each axis.

    Args:
        x_BhwC: the maps.
        rows_yh: weights of the old rows in each new row.
        columns_xw: weights of the old columns in each new column.

    Returns:
        [B, y, x, C].
    """
    rows_yh, columns_xw = rows_yh.astype(_dtype(x_BhwC)), columns_xw.astype(_dtype(x_BhwC))
    # Full precision: these maps feed a nearest-code search, where bfloat16 changes codes.
    return jnp.einsum('yh,xw,BhwC->ByxC', rows_yh, columns_xw, x_BhwC, precision='highest')


def _dtype(x: jax.Array) -> np.dtype:
    """The dtype of the matrices that resample maps."""
    return jnp.result_type(x, jnp.float32)
