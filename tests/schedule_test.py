"""Does a schedule define the order in which tokens are read and sampled, and their visibility?"""

import jax
import numpy as np
import pytest

from star_jax.core.schedule import Group, Pyramid, Raster, Step

PYRAMID = Pyramid(((1, 1), (1, 2), (2, 2)))
RASTER = Raster(2, 2, prefix=3)


def test_pyramid_reads_and_samples_whole_grids():
    assert PYRAMID.sizes == (1, 2, 4)
    assert PYRAMID.reads == (1, 2, 4)
    assert PYRAMID.offsets == (0, 1, 3, 7)
    assert PYRAMID.starts == (0, 1, 3, 7)
    assert (PYRAMID.steps, PYRAMID.length) == (3, 7)
    assert PYRAMID.step_of_row.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert PYRAMID.step_of_token.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert PYRAMID.sampled_rows.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_raster_reads_its_prefix_and_samples_one_token_per_step():
    assert RASTER.sizes == (1, 1, 1, 1)
    assert RASTER.reads == (3, 1, 1, 1)
    assert RASTER.offsets == (0, 1, 2, 3, 4)
    assert RASTER.starts == (0, 3, 4, 5, 6)
    assert (RASTER.steps, RASTER.length) == (4, 4)
    assert RASTER.step_of_row.tolist() == [0, 0, 0, 1, 2, 3]
    assert RASTER.step_of_token.tolist() == [0, 1, 2, 3]
    assert RASTER.sampled_rows.tolist() == [2, 3, 4, 5]


def test_pyramid_row_attends_to_its_step_and_all_earlier_steps():
    assert Pyramid(((1, 1), (1, 2), (1, 3))).mask().astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]


def test_raster_row_attends_to_itself_and_all_earlier_rows():
    assert RASTER.mask().tolist() == np.tri(6, dtype=bool).tolist()


@pytest.mark.parametrize('schedule', [PYRAMID, RASTER])
def test_mask_of_some_rows_is_a_part_of_the_full_mask(schedule):
    kept = np.array([0, 1, 3, 5])
    expected = schedule.mask()[np.ix_(kept, kept)]
    np.testing.assert_array_equal(schedule.mask(kept), expected)
    np.testing.assert_array_equal(jax.jit(schedule.mask)(kept), expected)


@pytest.mark.parametrize(
    ('schedule', 'rows'),
    [(PYRAMID, [[0], [1, 2], [3, 4, 5, 6]]), (RASTER, [[0, 1, 2], [3], [4], [5]])],
)
def test_the_steps_read_all_rows_once_and_in_order(schedule, rows):
    known = [schedule.rows(Step.at(step)) for step in range(schedule.steps)]
    assert [step.tolist() for step in known] == rows
    assert all(isinstance(step, np.ndarray) for step in known)
    for index, expected in enumerate(rows):
        traced = jax.jit(lambda step, like=index: schedule.rows(Step(step, like)))(index)
        assert traced.tolist() == expected


def test_a_traced_step_reads_its_own_rows_with_the_shape_of_another():
    rows = jax.jit(lambda index: RASTER.rows(Step(index, 1)))
    assert [rows(step).tolist() for step in (1, 2, 3)] == [[3], [4], [5]]


def test_steps_follow_one_another():
    assert Step.at(2).next() == Step.at(3)
    assert Step(5, 2).next() == Step(6, 3)


def test_neighbours_of_equal_shapes_share_a_loop_body():
    equal = Pyramid.square((1, 2, 2, 2, 3))
    assert equal.groups() == (Group(0, 1), Group(1, 2), Group(3, 1), Group(4, 1))
    # The second of two equal sides makes the inputs of a third side: nothing to share.
    assert Pyramid.square((1, 2, 2, 3)).groups() == tuple(Group(step, 1) for step in range(4))
    assert Raster(2, 3, prefix=4).groups() == (Group(0, 1), Group(1, 4), Group(5, 1))
    assert Raster(2, 3, prefix=1).groups() == (Group(0, 5), Group(5, 1))
    assert Raster(1, 1, prefix=2).groups() == (Group(0, 1),)


def test_steps_of_different_methods_share_no_loop_body():
    kinds = ('plain', 'plain', 'plain', 'other', 'other', 'plain')
    groups = Raster(2, 3, prefix=4).groups(kinds)
    assert groups == (Group(0, 1), Group(1, 2), Group(3, 2), Group(5, 1))


def test_a_token_counts_to_its_scale_and_a_raster_is_one():
    assert PYRAMID.scale_of_token.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert RASTER.scale_of_token.tolist() == [0, 0, 0, 0]


def test_only_rows_of_the_last_step_are_dropped_each_equally_often():
    keys = jax.random.split(jax.random.key(0), 2000)
    rows = np.asarray(jax.jit(jax.vmap(lambda key: PYRAMID.thin(key, 5)))(keys))
    assert rows.shape == (2000, 5)
    assert (rows[:, :3] == [0, 1, 2]).all()
    assert (np.diff(rows) > 0).all()
    shares = np.bincount(rows[:, 3:].ravel(), minlength=7)[3:] / 2000
    np.testing.assert_allclose(shares, [0.5] * 4, atol=0.05)


def test_schedules_of_equal_fields_are_equal_keys():
    assert Pyramid.square((1, 2)) == Pyramid(((1, 1), (2, 2)))
    assert hash(Raster(2, 2, 3)) == hash(RASTER)


@pytest.mark.parametrize(
    'make',
    [
        lambda: Pyramid(()),
        lambda: Pyramid.square((0, 1)),
        lambda: Pyramid.square((1, 3, 2)),
        lambda: Pyramid(((2, 1), (1, 2))),
        lambda: Raster(0, 2),
        lambda: Raster(2, 2, prefix=0),
    ],
)
def test_invalid_schedules_are_refused(make):
    with pytest.raises(ValueError):
        make()
