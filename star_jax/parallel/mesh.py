"""Which devices does a program run on, and how are they arranged?"""

import collections
import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from star_jax.core.argument_types import whole_number
from star_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor', 'sequence')
REPLICAS = 'data'  # along it, devices differ in the batch alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Number of devices along each mesh axis.

    Attributes:
        data: replicas, which split the batch and go across slices (0: all devices that the other
            axes leave).
        fsdp: devices that split parameters, optimizer state and batch.
        tensor: devices that split attention heads and hidden widths.
        sequence: devices that split the tokens of an image.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = whole_number(axis, getattr(self, axis))
            if axis == 'data' and size < 0:
                raise UserError(
                    'data must not be negative (0: all devices that the other axes leave), '
                    f'not {size}'
                )
            if axis != 'data' and size < 1:
                raise UserError(f'{axis} must be at least 1, not {size}')

    def sizes(self, devices: int) -> tuple[int, int, int, int]:
        """The length of each axis over this number of devices.

        Raises UserError if the product of the axes is another number.
        """
        data = self.data or max(devices // self._replica_size, 1)
        shape = (data, self.fsdp, self.tensor, self.sequence)
        if math.prod(shape) != devices:
            axes = ', '.join(map('{}={}'.format, AXES, shape))
            raise UserError(
                f'a mesh of {axes} needs {math.prod(shape)} devices and there are {devices}; '
                f'choose sizes whose product is {devices}'
            )
        return shape

    def abstract_mesh(self, devices: int) -> AbstractMesh:
        """A mesh of this number of devices without the devices, for shapes and shardings."""
        axis_types = (AxisType.Auto,) * len(AXES)
        return AbstractMesh(self.sizes(devices), AXES, axis_types=axis_types)

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """A mesh over these devices (None: all); raises UserError as `sizes` does."""
        devices = jax.devices() if devices is None else devices
        shape = self.sizes(len(devices))
        # Linen's modules need Auto axes; a mesh is Explicit by default in newer versions.
        axis_types = (AxisType.Auto,) * len(AXES)
        return Mesh(arrange_devices(shape, devices), AXES, axis_types=axis_types)

    def build_on_first(self) -> Mesh:
        """A mesh over the first devices, as many as the axes need.

        Raises UserError if there are fewer.
        """
        devices = jax.devices()
        return self.build(devices[: self.data * self._replica_size or len(devices)])

    @property
    def _replica_size(self) -> int:
        """The number of devices of one replica."""
        return self.fsdp * self.tensor * self.sequence


def arrange_devices(shape: tuple[int, int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of `shape`; neighbours along its last axes are closest.

    The network between slices (TPU slices, GPU nodes) is slow. Devices of several slices are
    therefore divided by slice along `data` and, if there are more slices than replicas, along
    `fsdp`. Raises UserError if the axes do not allow that.
    """
    sizes = collections.Counter(getattr(device, 'slice_index', 0) for device in devices)
    slices, (data, fsdp, *inner) = len(sizes), shape
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = math.gcd(data, slices)
    if fsdp % (slices // outer) or len(set(sizes.values())) > 1:
        raise UserError(
            f'the {len(devices)} devices lie in {slices} slices ({sorted(sizes.values())}), along '
            f'which data={data} and fsdp={fsdp} must split: give data a multiple of {slices}, over '
            'slices of equal size'
        )
    across = (outer, slices // outer)
    within = (data // across[0], fsdp // across[1], *inner)
    return mesh_utils.create_hybrid_device_mesh(
        within, (*across, 1, 1), devices, allow_split_physical_axes=True
    )


def batch_shards(mesh: Mesh) -> int:
    """The number of shards that the mesh splits a batch into."""
    return math.prod(mesh.shape[axis] for axis in ('data', 'fsdp'))


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
