"""Which devices exchange how many bytes?

A collective exchanges data within groups of devices; the members of a group differ along some mesh
axes. Within a slice or node data go over its own links (ICI, NVLink), otherwise over the network.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from star_jax.parallel.mesh import AXES

# Collectives that can combine within a slice or node first, so that data leave it once.
HIERARCHICAL = ('all-gather', 'reduce-scatter', 'all-reduce')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a program that have the same kind and the same groups of devices.

    Attributes:
        kind: the operation, such as all-reduce.
        group_size: devices that exchange data with each other.
        local_size: the most devices of a group that belong to one slice or node.
        count: executions per run of the program.
        bytes: bytes that one device sends in all executions.
        groups: the devices of each group by their numbers in the mesh; of a collective-permute
            its pairs of source and target; (): groups of slices, or unknown.
        axes: the mesh axes along which the devices of a group differ; () if they are not named.
    """

    kind: str
    group_size: int
    local_size: int
    count: int
    bytes: int
    groups: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), repr=False)
    axes: tuple[str, ...] = ()

    def times(self, runs: int) -> 'Collective':
        """The same in so many runs of the program."""
        return dataclasses.replace(self, count=runs * self.count, bytes=runs * self.bytes)

    @property
    def groups_GM(self) -> np.ndarray:
        """The groups as an array [groups, members]."""
        return _array(self.groups)

    @property
    def bytes_away(self) -> float:
        """Bytes that each chip sends to other slices or nodes, on average."""
        others, local = self.group_size - 1, self.local_size
        if local >= self.group_size:
            return 0.0
        if self.kind == 'collective-permute':
            return self.bytes
        away = self.bytes * (self.group_size - local) / others
        return away / local if self.kind in HIERARCHICAL else away

    @property
    def bytes_within(self) -> float:
        """Bytes that each chip sends to chips of its own slice or node, on average."""
        return 0.0 if self.local_size == 1 else self.bytes - self.bytes_away


def mesh_axes(item: Collective, sizes: Sequence[int]) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    if item.axes or not item.groups:
        return item.axes or ('unknown axes',)
    numbers = np.unravel_index(item.groups_GM, tuple(sizes))
    differ = (np.ptp(number_GM, axis=1).any() for number_GM in numbers)
    return tuple(name for name, differs in zip(AXES, differ, strict=True) if differs)


def collective_along(
    kind: str, axis: str, sent: int, sizes: Sequence[int], *, local_chips: int, count: int = 1
) -> Collective:
    """A collective along one mesh axis.

    Args:
        kind: the operation.
        axis: the mesh axis.
        sent: bytes that one device sends in all executions.
        sizes: the lengths of the mesh axes.
        local_chips: chips of a slice or node.
        count: executions.
    """
    size, after = sizes[AXES.index(axis)], sizes[AXES.index(axis) + 1 :]
    distance = math.prod(after)  # device numbers from one neighbour to the next
    return Collective(
        kind=kind,
        group_size=size,
        local_size=max(min(size, local_chips // distance), 1),
        count=count,
        bytes=sent,
        groups=groups_along((axis,), sizes),
        axes=(axis,),
    )


def groups_along(axes: Sequence[str], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that differ along these mesh axes alone."""
    ids, numbers = np.arange(math.prod(sizes)).reshape(sizes), [AXES.index(a) for a in axes]
    ids = np.moveaxis(ids, numbers, range(-len(numbers), 0))
    return tuple(map(tuple, ids.reshape(-1, math.prod(sizes[a] for a in numbers)).tolist()))


@functools.lru_cache(maxsize=256)
def _array(groups: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Groups of devices, [groups, members]."""
    return np.array(groups)
