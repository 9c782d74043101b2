"""Which devices does a program run on, and how are they arranged?"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from star_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices lie along each axis.

    `data` holds replicas (0: all devices that the other axes leave), `fsdp` splits parameters and
    batch, `tensor` splits heads and hidden widths.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.data < 0 or min(self.fsdp, self.tensor) < 1:
            raise ValueError(
                f'mesh axes need at least one device each (data: 0 for the rest): {self}'
            )

    def build(self, over: Sequence[jax.Device] | None = None) -> Mesh:
        """A mesh over the given devices, or all; a UserError where they do not divide."""
        devices = jax.device_count() if over is None else len(over)
        split = self.fsdp * self.tensor
        data = self.data or max(devices // split, 1)
        if data * split != devices:
            raise UserError(
                f'a mesh of data={data}, fsdp={self.fsdp}, tensor={self.tensor} needs '
                f'{data * split} devices and there are {devices}; '
                f'choose sizes whose product is {devices}'
            )
        # Linen's logical constraints need Auto axes; make_mesh would make Explicit ones.
        types = (AxisType.Auto,) * len(AXES)
        return jax.make_mesh((data, self.fsdp, self.tensor), AXES, axis_types=types, devices=over)

    def build_on_first(self) -> Mesh:
        """A mesh over as many devices as the axes need; a UserError where there are fewer."""
        devices = jax.devices()
        return self.build(devices[: self.data * self.fsdp * self.tensor or len(devices)])


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in ('data', 'fsdp'))
