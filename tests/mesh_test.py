"""How are devices arranged, and which meshes are refused?"""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.parallel import rules
from star_jax.parallel.mesh import AXES, MeshShape, arrange

D30 = Star(depth=30, width=1920, heads=30)


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX looks at of a device that is not there."""

    id: int
    slice_index: int
    platform: str = 'gpu'
    device_kind: str = 'NVIDIA H100'


def devices(*slices: int) -> list[Device]:
    """So many devices in each slice, in an order that mixes the slices."""
    places = [(row, one) for one, count in enumerate(slices) for row in range(count)]
    return [Device(id, one) for id, (_, one) in enumerate(sorted(places))]


def crossed(shape: tuple[int, ...], *slices: int) -> list[str]:
    """The mesh axes along which one comes to another slice."""
    arranged = np.vectorize(lambda device: device.slice_index)(arrange(shape, devices(*slices)))
    assert arranged.shape == shape
    return [name for axis, name in enumerate(AXES) if np.diff(arranged, axis=axis).any()]


@pytest.mark.parametrize(
    ('shape', 'axes'),
    [
        ((4, 2, 1, 1), ['data']),
        ((4, 1, 2, 1), ['data']),
        ((8, 1, 1, 1), ['data']),
        ((2, 4, 1, 1), ['data', 'fsdp']),
        ((1, 8, 1, 1), ['fsdp']),
        ((1, 4, 1, 2), ['fsdp']),
    ],
)
def test_slices_lie_along_the_outer_axes(shape, axes):
    assert crossed(shape, 2, 2, 2, 2) == axes


def test_one_slice_is_no_matter():
    assert crossed((2, 2, 1, 2), 8) == []


@pytest.mark.parametrize(
    ('shape', 'slices'),
    [((1, 2, 4, 1), (2, 2, 2, 2)), ((1, 1, 1, 8), (4, 4)), ((4, 2, 1, 1), (6, 2))],
)
def test_slices_that_the_outer_axes_do_not_divide_are_refused(shape, slices):
    with pytest.raises(UserError, match=f'in {len(slices)} slices.*data={shape[0]} and'):
        arrange(shape, devices(*slices))


def test_a_mesh_has_all_axes():
    mesh = MeshShape(fsdp=2, sequence=2).build()
    assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 1, 'sequence': 2}
    with pytest.raises(UserError, match='sequence=3 needs 6 devices and there are 8'):
        MeshShape(fsdp=2, sequence=3).build()


@pytest.mark.parametrize(
    ('axis', 'ways', 'sentence'),
    [
        (
            'fsdp',
            256,
            r'1920.* fsdp=256 splits its 1,920; sizes of fsdp that fit are 1, .*, 64, 128$',
        ),
        ('tensor', 4, r'log_scale.* tensor=4 splits its 30; sizes of tensor that fit are 1, 2$'),
    ],
)
def test_a_mesh_that_the_model_does_not_divide_is_refused_with_what_fits(axis, ways, sentence):
    sizes = dict.fromkeys(AXES, 1) | {axis: ways}
    with pytest.raises(UserError, match=sentence):
        rules.abstract(D30.abstract(), AbstractMesh(tuple(sizes.values()), AXES))


def test_a_mesh_that_fits_is_not_refused():
    placed = rules.abstract(D30.abstract(), AbstractMesh((2, 128, 2, 8), AXES))
    assert any('fsdp' in leaf.sharding.spec for leaf in jax.tree.leaves(placed))


def test_rows_are_filled_up_to_what_the_mesh_divides():
    mesh = MeshShape(data=2, sequence=4).build()
    assert [rules.ActivationSharding(mesh).rows(count) for count in (9451, 8800, 1)] == [
        9452,
        8800,
        4,
    ]
    assert rules.ActivationSharding().rows(9451) == 9451


def test_axes_that_the_mesh_does_not_divide_stay_whole():
    layout = rules.ActivationSharding(MeshShape(data=2, tensor=2, sequence=2).build())
    names = ('batch', 'tokens', 'heads', None)
    assert layout.spec((4, 6, 2, 8), *names) == PartitionSpec(
        ('data', 'fsdp'), 'sequence', 'tensor', None
    )
    assert layout.spec((1, 9, 3, 8), *names) == PartitionSpec(*[None] * 4)
    with pytest.raises(KeyError):
        layout.spec((4,), 'rows')  # a name that the table does not know
