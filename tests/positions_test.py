"""Do tables of positions say where a token stands?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from star_jax.core import positions
from star_jax.core.schedule import Pyramid
from star_jax.nn.positions import (
    Learned,
    MixedRotary,
    NoPositions,
    NormalisedRotary,
    RawRotary,
    ReferenceRotary,
    RoundedRotary,
    SinCos,
)

SIDES = (1, 2, 3, 5)
SCHEDULE = Pyramid.square(SIDES)
rotate = jax.jit(positions.rotate)


def fixed_rotation(xy: np.ndarray) -> np.ndarray:
    return positions.rotation(positions.rotary_angles(xy, 8, 100.0))


def scales(rows):
    """Rows of a table, scale by scale."""
    return np.split(np.asarray(rows), SCHEDULE.offsets[1:-1])


def test_cells_are_counted_row_by_row():
    expected = [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert positions.grid_xy(2, 3).tolist() == expected


def test_an_extent_stretches_each_axis_by_itself():
    expected = [[0, 0], [32, 0], [64, 0], [0, 64], [32, 64], [64, 64]]
    assert positions.grid_xy(2, 3, 64).tolist() == expected
    assert positions.grid_xy(1, 1, 64).tolist() == [[0, 0]]
    assert positions.grid_xy(1, 3, 64).tolist() == [[0, 0], [32, 0], [64, 0]]


def test_normalised_coordinates_span_the_same_extent_at_every_scale():
    first, *later = scales(positions.pyramid_xy(SCHEDULE.grids, 64))
    assert first.tolist() == [[0, 0]]
    for xy in later:
        assert xy.min(0).tolist() == [0, 0]
        assert xy.max(0).tolist() == [64, 64]


def test_raw_coordinates_count_the_cells_of_each_scale():
    for side, xy in zip(SIDES, scales(positions.pyramid_xy(SCHEDULE.grids)), strict=True):
        assert xy.max(0).tolist() == [side - 1, side - 1]


def test_first_half_of_the_planes_rotates_with_x_and_the_other_with_y():
    table = positions.rotary_angles(np.array([[3.0, 5.0]]), head_dim=8, theta=100)
    np.testing.assert_allclose(table, [[3, 0.3, 5, 0.5]], rtol=1e-6)
    assert table.dtype == np.float32


def test_sines_and_cosines_of_x_come_before_those_of_y():
    table = positions.sincos_table(np.array([[3.0, 5.0]]), width=8, theta=100)
    waves = [np.sin([3, 0.3]), np.cos([3, 0.3]), np.sin([5, 0.5]), np.cos([5, 0.5])]
    np.testing.assert_allclose(table, [np.concatenate(waves)], rtol=1e-6)


@pytest.mark.parametrize('table', [positions.rotary_angles, positions.sincos_table])
def test_widths_that_do_not_divide_by_four_are_refused(table):
    with pytest.raises(ValueError, match='divisible by 4'):
        table(np.zeros((1, 2)), 6, 100.0)


def test_neighbouring_channels_rotate_together():
    x = np.arange(4.0, dtype=np.float32).reshape(1, 1, 1, 4)
    quarter = positions.rotation(np.array([[np.pi / 2, 0]], np.float32))
    np.testing.assert_allclose(rotate(x, quarter).ravel(), [-1, 0, 2, 3], atol=1e-6)


def test_scores_of_rotated_vectors_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 8)).astype(np.float32)

    def score(*places):
        rotations = (fixed_rotation(np.array([xy])) for xy in places)
        rotated = [np.asarray(rotate(x, r)) for x, r in zip((q, k), rotations, strict=True)]
        return np.multiply(*rotated).sum(-1)

    near = score((3.0, 1.0), (1.0, 2.0))
    np.testing.assert_allclose(near, score((13.0, 5.0), (11.0, 6.0)), atol=1e-5)
    assert np.abs(near - score((3.0, 1.0), (2.0, 2.0))).max() > 1e-3
    assert np.abs(near - score((3.0, 1.0), (1.0, 3.0))).max() > 1e-3


def test_rotation_keeps_lengths_and_works_in_float32():
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 8)).astype(np.float32)
    rotation = fixed_rotation(positions.grid_xy(2, 2, 64))
    lengths = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(rotate(x, rotation), axis=-1), lengths, rtol=1e-5)
    half = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    assert jax.eval_shape(rotate, half, rotation).dtype == jnp.float32


@pytest.mark.parametrize('extent', [16.0, 64.0])
def test_the_last_corner_has_one_angle_at_every_scale_only_when_normalised(extent):
    corners = np.array(SCHEDULE.offsets[2:]) - 1
    normalised = NormalisedRotary(theta=100.0, extent=extent).rotation(SCHEDULE, 8)
    expected = np.broadcast_to([extent, extent / 10, extent, extent / 10], (len(corners), 4))
    np.testing.assert_allclose(normalised[corners], positions.rotation(expected), atol=1e-6)
    raw = RawRotary(theta=100.0).rotation(SCHEDULE, 8)
    last = positions.rotation(np.array(SIDES[1:], np.float32) - 1)
    np.testing.assert_allclose(raw[corners, 0], last, atol=1e-6)


def test_only_learned_positions_have_parameters():
    rows = np.arange(SCHEDULE.length)

    def parameters(kind):
        module = kind.table(SCHEDULE, 8, jax.nn.initializers.normal())
        return module and jax.eval_shape(module.init, jax.random.key(0), rows)

    assert parameters(NoPositions()) is None
    assert parameters(RawRotary()) is None
    assert parameters(SinCos()) == {}
    (table,) = jax.tree.leaves(parameters(Learned()))
    assert table.shape == (SCHEDULE.length, 8)
    for kind in (NoPositions(), Learned(), SinCos()):
        assert kind.rotation(SCHEDULE, 8) is None and not kind.rotary


def test_mixed_frequencies_start_in_two_perpendicular_directions():
    module = MixedRotary(theta=100.0).frequencies(depth=2, heads=3, head_width=8)
    (frequencies,) = jax.tree.leaves(nn.unbox(module.init(jax.random.key(0))))
    assert frequencies.shape == (2, 3, 4, 2)
    lengths = np.linalg.norm(frequencies, axis=-1)
    np.testing.assert_allclose(lengths, np.broadcast_to([1, 0.1, 1, 0.1], (2, 3, 4)), rtol=1e-5)
    first, second = frequencies[..., :2, :], frequencies[..., 2:, :]
    np.testing.assert_allclose((first * second).sum(-1), 0, atol=1e-6)
    assert len(np.unique(np.round(frequencies[..., 0, 0], 4))) == 6  # another direction per head


def test_mixed_rotation_along_the_axes_is_the_fixed_rotation():
    """Frequencies that point along x and along y are those of the fixed kind."""
    fixed = NormalisedRotary(theta=100.0, extent=32.0).rotation(SCHEDULE, 8)
    magnitudes = 100.0 ** -(np.arange(0, 8, 4) / 8)
    along_x, along_y = np.zeros((2, 2)), np.zeros((2, 2))
    along_x[:, 0], along_y[:, 1] = magnitudes, magnitudes
    frequencies = jnp.asarray(np.concatenate([along_x, along_y])[None], jnp.float32)
    coordinates = MixedRotary(theta=100.0, extent=32.0).coordinates(SCHEDULE)
    mixed = positions.learned_rotation(jnp.asarray(coordinates), frequencies)
    np.testing.assert_allclose(mixed[:, 0], fixed, atol=1e-5)


def test_rounded_coordinates_lie_on_the_reference_grid():
    xy = positions.rounded_xy(((1, 1), (3, 3), (2, 5)), (16, 16))
    np.testing.assert_array_equal(xy[0], [0, 0])
    np.testing.assert_array_equal(xy[1:4, 0], [0, 5, 11])
    np.testing.assert_array_equal(xy[10:15, 0], [0, 3, 6, 10, 13])
    np.testing.assert_array_equal(xy[10::5, 1], [0, 8])
    halves = positions.rounded_xy(((1, 4),), (1, 6))[:, 0]  # 0, 1.5, 3, 4.5
    np.testing.assert_array_equal(halves, [0, 2, 3, 4])


def test_reference_grid_is_a_field_or_that_of_the_schedule():
    schedule = Pyramid(((1, 1), (3, 3)), reference=(16, 16))
    by_schedule = RoundedRotary(theta=100.0).rotation(schedule, 8)
    by_field = RoundedRotary(theta=100.0, reference=(16, 16)).rotation(Pyramid.square((1, 3)), 8)
    np.testing.assert_array_equal(by_schedule, by_field)
    assert Pyramid.square((1, 3)).reference_grid == (3, 3)


@pytest.mark.parametrize('grid', [(49, 30), (30, 49), (103, 103), (8, 6)])
def test_the_longer_side_of_an_interpolated_grid_has_128_cells(grid):
    """128 / 49 x 49 rounds to a number below 128, which only the shorter side is cut to."""
    schedule = Pyramid(((1, 1), grid))
    last = ReferenceRotary(mode='interpolated').rotation(schedule, 4)[-1]
    high, wide = grid
    rows, columns = (128, int(128 / high * wide)) if high >= wide else (int(128 / wide * high), 128)
    expected = [[np.cos(end - 1), np.sin(end - 1)] for end in (rows, columns)]
    np.testing.assert_allclose(last, expected, atol=1e-6)


def test_every_head_has_a_rotation_of_its_own():
    x = np.random.default_rng(0).normal(size=(1, 4, 2, 8)).astype(np.float32)
    rotations = [fixed_rotation(positions.grid_xy(2, 2, extent)) for extent in (3, 5)]
    together = rotate(x, np.stack(rotations, axis=1))
    for head, rotation in enumerate(rotations):
        alone = rotate(x[:, :, head : head + 1], rotation)
        np.testing.assert_allclose(together[:, :, head : head + 1], alone, atol=1e-6)


def test_sin_cos_rows_are_taken_by_index():
    module = SinCos(theta=100.0, extent=8.0).table(SCHEDULE, 8, jax.nn.initializers.normal())
    whole = positions.sincos_table(positions.pyramid_xy(SCHEDULE.grids, 8.0), 8, 100.0)
    np.testing.assert_allclose(module.apply({}, np.array([1, 7])), whole[[1, 7]], atol=1e-6)
