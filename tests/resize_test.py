"""Does resampling follow STAR specification 1.4 and Infinity specification 3.3?"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.core import resize

PAIRS = [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (3, 8), (5, 4), (8, 3), (13, 16), (16, 10)]


def pooled(x, height, width):
    """Adaptive average pooling, cell by cell."""
    tall, wide = x.shape
    out = np.empty((height, width))
    for i in range(height):
        top, bottom = math.floor(i * tall / height), math.ceil((i + 1) * tall / height)
        for j in range(width):
            left, right = math.floor(j * wide / width), math.ceil((j + 1) * wide / width)
            out[i, j] = x[top:bottom, left:right].mean()
    return out


def kernel(x):
    """Keys' cubic convolution kernel with a = -0.75, as its two pieces."""
    x = abs(x)
    if x < 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def cubic(x, height, width):
    """Bicubic resampling, pixel by pixel and tap by tap, reads clamped to the border."""
    tall, wide = x.shape
    out = np.zeros((height, width))
    for i in range(height):
        y = (i + 0.5) * tall / height - 0.5
        for j in range(width):
            z = (j + 0.5) * wide / width - 0.5
            for row in range(math.floor(y) - 1, math.floor(y) + 3):
                for column in range(math.floor(z) - 1, math.floor(z) + 3):
                    pixel = x[min(max(row, 0), tall - 1), min(max(column, 0), wide - 1)]
                    out[i, j] += kernel(y - row) * kernel(z - column) * pixel
    return out


def test_area_averages_the_cells_that_it_touches():
    expected = [[1 / 2, 1 / 2, 0], [0, 1 / 2, 1 / 2]]
    np.testing.assert_allclose(resize.area_matrix(3, 2), expected)
    np.testing.assert_allclose(resize.area_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(resize.area_matrix(2, 3), [[1, 0], [0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(resize.area_matrix(1, 2), [[1], [1]])


def test_bicubic_weighs_four_taps_and_clamps_them_to_the_border():
    near, far = 0.87890625 - 0.10546875, 0.26171875 - 0.03515625
    expected = [[1.10546875, -0.10546875], [near, far], [far, near], [-0.10546875, 1.10546875]]
    np.testing.assert_allclose(resize.bicubic_matrix(2, 4), expected, atol=1e-7)
    np.testing.assert_allclose(resize.bicubic_matrix(1, 3), np.ones((3, 1)), atol=1e-7)


def test_linear_weighs_two_neighbours_and_clamps_them_to_the_border():
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(resize.linear_matrix(2, 4), expected)
    np.testing.assert_allclose(resize.linear_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(resize.linear_matrix(5, 2)[0], [0.25, 0.75, 0, 0, 0])
    np.testing.assert_allclose(resize.linear_matrix(1, 3), np.ones((3, 1)))


def test_every_axis_between_the_first_and_the_last_is_resampled():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 2)).astype(np.float32)
    found = resize.along_axes(jnp.asarray(x), (2, 4, 3), resize.linear_matrix)
    time, columns = resize.linear_matrix(3, 2), resize.linear_matrix(5, 3)
    np.testing.assert_allclose(found, np.einsum('st,xw,bthwc->bshxc', time, columns, x), atol=1e-5)


@pytest.mark.parametrize(
    'matrix', [resize.area_matrix, resize.bicubic_matrix, resize.linear_matrix]
)
@pytest.mark.parametrize('pair', PAIRS)
def test_resampling_keeps_constants_and_symmetry(matrix, pair):
    weights = matrix(*pair)
    assert weights.shape == pair[::-1]
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


@pytest.mark.parametrize(
    'matrix', [resize.area_matrix, resize.bicubic_matrix, resize.linear_matrix]
)
def test_equal_sizes_change_nothing(matrix):
    np.testing.assert_allclose(matrix(5, 5), np.eye(5), atol=1e-7)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_matrices_have_the_precision_of_the_maps(dtype):
    maps = np.random.default_rng(0).normal(size=(1, 3, 5, 1)).astype(dtype)
    columns = resize.linear_matrix(5, 7)
    with jax.enable_x64(True):
        cubed = resize.bicubic(jnp.asarray(maps), 7, 2)
        linear = resize.along_axes(jnp.asarray(maps), (3, 7), resize.linear_matrix)
        assert cubed.dtype == linear.dtype == dtype
    atol = 2e-6 if dtype == np.float32 else 1e-14
    np.testing.assert_allclose(cubed[0, ..., 0], cubic(maps[0, ..., 0], 7, 2), atol=atol, rtol=0)
    expected = np.einsum('xw,bhwc->bhxc', columns, maps)
    np.testing.assert_allclose(linear, expected, atol=atol, rtol=0)


@pytest.mark.parametrize('shapes', [((4, 4), (3, 3)), ((3, 5), (7, 2)), ((1, 1), (4, 4))])
@pytest.mark.parametrize(('ours', 'theirs'), [(resize.area, pooled), (resize.bicubic, cubic)])
def test_maps_are_resampled_as_specified(shapes, ours, theirs):
    size, wanted = shapes
    maps = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    out = np.asarray(ours(jnp.asarray(maps), *wanted))
    assert out.shape == (2, *wanted, 3)
    for image in range(2):
        for channel in range(3):
            expected = theirs(maps[image, :, :, channel].astype(np.float64), *wanted)
            np.testing.assert_allclose(out[image, :, :, channel], expected, atol=2e-6)
