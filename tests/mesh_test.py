"""How are devices arranged, and which meshes are refused?"""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.parallel import rules
from star_jax.parallel.mesh import AXES, MeshShape, arrange_devices

D30 = Star(depth=30, width=1920, heads=30)


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that JAX reads when it arranges a mesh."""

    id: int
    slice_index: int
    platform: str = 'gpu'
    device_kind: str = 'NVIDIA H100'


def devices(*slices: int) -> list[Device]:
    """Devices of slices with these sizes, in an order that mixes the slices."""
    positions = [(row, index) for index, count in enumerate(slices) for row in range(count)]
    return [Device(id, index) for id, (_, index) in enumerate(sorted(positions))]


def axes_across_slices(shape: tuple[int, ...], *slices: int) -> list[str]:
    """The mesh axes along which neighbours lie in different slices."""
    slice_index = np.vectorize(lambda device: device.slice_index)
    arranged = slice_index(arrange_devices(shape, devices(*slices)))
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
def test_arrange_devices_puts_slices_along_the_outer_axes(shape, axes):
    assert axes_across_slices(shape, 2, 2, 2, 2) == axes


def test_arrange_devices_accepts_one_slice():
    assert axes_across_slices((2, 2, 1, 2), 8) == []


@pytest.mark.parametrize(
    ('shape', 'slices'),
    [((1, 2, 4, 1), (2, 2, 2, 2)), ((1, 1, 1, 8), (4, 4)), ((4, 2, 1, 1), (6, 2))],
)
def test_arrange_devices_refuses_slices_that_the_outer_axes_do_not_divide(shape, slices):
    with pytest.raises(UserError, match=f'in {len(slices)} slices.*data={shape[0]} and'):
        arrange_devices(shape, devices(*slices))


def test_mesh_shape_builds_all_axes():
    mesh = MeshShape(fsdp=2, sequence=2).build()
    assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 1, 'sequence': 2}
    with pytest.raises(UserError, match='sequence=3 needs 6 devices and there are 8'):
        MeshShape(fsdp=2, sequence=3).build()


@pytest.mark.parametrize(
    ('axis', 'shards', 'sentence'),
    [
        (
            'fsdp',
            256,
            r'1920.* fsdp=256 splits its 1,920; sizes of fsdp that fit are 1, .*, 64, 128$',
        ),
        ('tensor', 4, r'log_scale.* tensor=4 splits its 30; sizes of tensor that fit are 1, 2$'),
    ],
)
def test_abstract_refuses_a_mesh_that_does_not_divide_the_model(axis, shards, sentence):
    sizes = dict.fromkeys(AXES, 1) | {axis: shards}
    with pytest.raises(UserError, match=sentence):
        rules.abstract(D30.abstract(), AbstractMesh(tuple(sizes.values()), AXES))


def test_abstract_accepts_a_mesh_that_divides_the_model():
    params = rules.abstract(D30.abstract(), AbstractMesh((2, 128, 2, 8), AXES))
    assert any('fsdp' in leaf.sharding.spec for leaf in jax.tree.leaves(params))


def test_padded_length_rounds_up_to_a_multiple_of_the_shards():
    mesh = MeshShape(data=2, sequence=4).build()
    sharding = rules.ActivationSharding(mesh)
    assert [sharding.padded_length(tokens) for tokens in (9451, 8800, 1)] == [9452, 8800, 4]
    assert rules.ActivationSharding().padded_length(9451) == 9451


def test_spec_does_not_split_axes_that_the_mesh_does_not_divide():
    sharding = rules.ActivationSharding(MeshShape(data=2, tensor=2, sequence=2).build())
    names = ('batch', 'tokens', 'heads', None)
    assert sharding.spec((4, 6, 2, 8), *names) == PartitionSpec(
        ('data', 'fsdp'), 'sequence', 'tensor', None
    )
    assert sharding.spec((1, 9, 3, 8), *names) == PartitionSpec(*[None] * 4)
    with pytest.raises(KeyError):
        sharding.spec((4,), 'rows')  # an axis that the table does not have
