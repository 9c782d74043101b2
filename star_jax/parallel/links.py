"""How long do collectives take at least, on the links that join the chips of a pod?

The bounds hold for every algorithm. Chips of a TPU slice form a torus, in which each chip has two
links per axis (one at the end of an axis that does not wrap around). A collective uses the links of
the axes along which its groups extend, and neighbours in a group may be several chips apart. Two
facts bound the time from below:

- Bytes that chips between two faces of the torus need from the others pass the links of the faces.
- Every sent byte crosses at least as many links as the distance of the nearest members of a group.

The GPUs of a node are joined by a switch, so that each GPU has all of its links for any collective.
"""

import collections
import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.settings import Dtype
from star_jax.parallel.chips import Chip, chip_of
from star_jax.parallel.mesh import AXES, REPLICAS

WITH_SUMS = ('all-gather', 'reduce-scatter', 'all-reduce')  # data of a group may pass a cut once


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Communication:
    """Lower bounds of seconds.

    Attributes:
        links: bound for all bytes that stay within a slice or node.
        network: bound for all bytes that leave it.
        axes: bounds for the collectives along some mesh axes, alone, by the axes' names.
    """

    links: float
    network: float
    axes: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switches:
    """Nodes of chips that a switch joins, or slices whose shape does not matter.

    Attributes:
        chip: the rates of one chip.
    """

    chip: Chip

    def links(self, collectives: Sequence[Collective]) -> float:
        """A lower bound of the seconds within a node."""
        return sum(map(_sent_within, collectives)) / self.chip.links


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torus:
    """Slices of chips with links to their neighbours.

    Attributes:
        chip: the rates of one chip.
        sides: chips along each axis of a slice.
        wraps: for each axis, whether its last chip is a neighbour of its first.
        places: the position of each device in its slice, [devices, axes], in the mesh's order.
        slices: the slice of each device, [devices].
    """

    chip: Chip
    sides: tuple[int, ...]
    wraps: tuple[bool, ...]
    places: np.ndarray
    slices: np.ndarray

    @property
    def rate(self) -> float:
        """Bytes/s of one link in one direction."""
        return self.chip.links / (2 * len(self.sides))

    def links(self, collectives: Sequence[Collective]) -> float:
        """A lower bound of the seconds within a slice."""
        return max(self._by_distance(collectives), self._by_cuts(collectives))

    def _by_distance(self, collectives: Sequence[Collective]) -> float:
        """The bound by link crossings, for each set of axes and the collectives within it."""
        crossings: dict[tuple[int, ...], float] = {}
        for item in collectives:
            axes, distance = self._extent(item)
            crossings[axes] = crossings.get(axes, 0) + distance * _sent_within(item)
        numbers = range(len(self.sides))
        bounds = (
            sum(size for inner, size in crossings.items() if set(inner) <= set(axes))
            / (self.rate * sum(map(self._links_per_chip, axes)))
            for count in numbers
            for axes in itertools.combinations(numbers, count + 1)
            if any(map(self._links_per_chip, axes))
        )
        return max(bounds, default=0.0)

    def _by_cuts(self, collectives: Sequence[Collective]) -> float:
        """The bound by the bytes that chips between two faces need from the others."""
        longest = 0.0
        for axis, side in enumerate(self.sides):
            if side == 1:
                continue
            needed = sum(self._needed(item, axis) for item in collectives)
            section = math.prod(self.sides) // side
            longest = max(longest, (needed / (self._faces(axis) * section * self.rate)).max())
        return float(longest)

    def _links_per_chip(self, axis: int) -> float:
        """Links of an axis per chip: two, or fewer on average if it does not wrap around."""
        side = self.sides[axis]
        return 2.0 if self.wraps[axis] else 2 * (side - 1) / side

    def _faces(self, axis: int) -> np.ndarray:
        """Links per row of chips into each slab: [first, length - 1]; infinite for no slab."""
        side = self.sides[axis]
        first, end = np.arange(side)[:, None], np.arange(side)[:, None] + np.arange(1, side)
        if self.wraps[axis]:
            return np.full((side, side - 1), 2.0)
        faces = (first > 0).astype(float) + (end < side)
        return np.where(end > side, np.inf, faces)

    def _extent(self, item: Collective) -> tuple[tuple[int, ...], int]:
        """The axes along which groups extend, and the least distance of two members in links."""
        numbers = tuple(range(len(self.sides)))
        if not item.groups:
            return numbers, 1
        groups_GM = _array(item.groups)
        places_GMA = self.places[groups_GM]
        apart_GMA = np.abs(places_GMA[:, 1:] - places_GMA[:, :1])
        around_GMA = np.where(self.wraps, np.array(self.sides) - apart_GMA, apart_GMA)
        links_GM = np.minimum(apart_GMA, around_GMA).sum(-1)
        links_M = links_GM[self.slices[groups_GM[:, 1:]] == self.slices[groups_GM[:, :1]]]
        axes = tuple(a for a in numbers if np.ptp(places_GMA[..., a], axis=1).any())
        return axes or numbers, max(int(links_M.min(initial=sum(self.sides))), 1) if axes else 1

    def _needed(self, item: Collective, axis: int) -> np.ndarray:
        """Bytes that the chips of each slab of one slice need from others: [first, length - 1]."""
        if not item.groups:
            return np.zeros((self.sides[axis], self.sides[axis] - 1))
        groups_GM = _array(item.groups)
        if item.kind == 'collective-permute':
            return self._moved(groups_GM, axis) * item.bytes
        inside_GFE, local_G = self._inside(groups_GM, axis)
        outside_GFE = local_G[:, None, None] - inside_GFE
        cut_GFE, others = (inside_GFE > 0) & (outside_GFE > 0), item.group_size - 1
        share_GFE = cut_GFE * outside_GFE / others
        if item.kind == 'all-reduce':  # the sum of the others, once
            share_GFE = cut_GFE * item.group_size / (2 * others)
        elif item.kind == 'all-to-all':
            share_GFE = inside_GFE * outside_GFE / others
        return share_GFE.sum(0) * item.bytes

    def _inside(self, groups_GM: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Members of each group in each slab of one slice [G, first, length - 1], and in it [G]."""
        side, local_GM = self.sides[axis], self.slices[groups_GM] == self.slices[0]
        counts_GS = np.zeros((len(groups_GM), side))
        rows_GM = np.broadcast_to(np.arange(len(groups_GM))[:, None], groups_GM.shape)
        places_GM = self.places[groups_GM][..., axis]
        np.add.at(counts_GS, (rows_GM[local_GM], places_GM[local_GM]), 1)
        below_GE = np.pad(np.cumsum(np.tile(counts_GS, 2), axis=1), ((0, 0), (1, 0)))
        firsts = np.arange(side)[:, None]
        return below_GE[:, firsts + np.arange(1, side)] - below_GE[:, firsts], local_GM.sum(1)

    def _moved(self, pairs: np.ndarray, axis: int) -> np.ndarray:
        """Pairs of one slice whose target alone lies in each slab: [first, length - 1]."""
        side = self.sides[axis]
        pairs = pairs[(self.slices[pairs] == self.slices[0]).all(1)]
        source_P, target_P = self.places[pairs][..., axis].T
        first, length = np.arange(side)[:, None, None], np.arange(1, side)[None, :, None]
        inside = [(place_P - first) % side < length for place_P in (source_P, target_P)]
        return (inside[1] & ~inside[0]).sum(-1)


Fabric = Switches | Torus


def bound(
    fabric: Fabric, collectives: Sequence[Collective], sizes: Sequence[int] = ()
) -> Communication:
    """Lower bounds of the seconds that collectives take.

    Args:
        fabric: the links.
        collectives: the collectives of a program, with the bytes that one device sends.
        sizes: the lengths of the mesh axes (): no bounds by axis.
    """
    by_axes: dict[str, list[Collective]] = {}
    for item in collectives:
        if sizes:
            by_axes.setdefault(' and '.join(mesh_axes(item, sizes)), []).append(item)
    return Communication(
        links=fabric.links(collectives),
        network=_network(fabric.chip, collectives),
        axes={
            name: max(fabric.links(items), _network(fabric.chip, items))
            for name, items in sorted(by_axes.items(), key=lambda item: _order(item[0]))
        },
    )


def mesh_axes(item: Collective, sizes: Sequence[int]) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    if item.axes or not item.groups:
        return item.axes or ('unknown axes',)
    numbers = np.unravel_index(_array(item.groups), tuple(sizes))
    along = (np.ptp(number_GM, axis=1).any() for number_GM in numbers)
    return tuple(name for name, differs in zip(AXES, along, strict=True) if differs)


def along(
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


def replica_sum(
    gradients: int, dtype: str, sizes: Sequence[int], *, local_chips: int
) -> Collective:
    """The sum of gradients over the replicas.

    Args:
        gradients: bytes of those of one device, in float32.
        dtype: the dtype in which they are summed.
        sizes: the lengths of the mesh axes.
        local_chips: chips of a slice or node.
    """
    replicas, itemsize = sizes[AXES.index(REPLICAS)], jnp.dtype(dtype).itemsize
    sent = 2 * gradients * itemsize // jnp.dtype('float32').itemsize * (replicas - 1) // replicas
    return along('all-reduce', REPLICAS, sent, sizes, local_chips=local_chips)


def replica_sum_seconds(
    fabric: 'Fabric', gradients: int, sizes: Sequence[int], *, local_chips: int
) -> dict[str, float]:
    """A lower bound of the seconds of `replica_sum` in each dtype that a run can choose."""
    seconds = {}
    for dtype in typing.get_args(Dtype):
        item = replica_sum(gradients, dtype, sizes, local_chips=local_chips)
        communication = bound(fabric, [item])
        seconds[dtype] = max(communication.links, communication.network)
    return seconds


def sum_sentence(seconds: Mapping[str, float], chosen: str) -> str:
    """The seconds of `replica_sum_seconds`, of the `chosen` dtype first."""
    first = f'{_time(seconds[chosen])} per step in {chosen} (--gradient-dtype)'
    others = [f'{_time(value)} in {name}' for name, value in seconds.items() if name != chosen]
    return f'lower bounds of {" and ".join([first, *others])}'


def groups_along(axes: Sequence[str], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that differ along these mesh axes alone."""
    ids, numbers = np.arange(math.prod(sizes)).reshape(sizes), [AXES.index(a) for a in axes]
    ids = np.moveaxis(ids, numbers, range(-len(numbers), 0))
    return tuple(map(tuple, ids.reshape(-1, math.prod(sizes[a] for a in numbers)).tolist()))


def wraps(kind: str, sides: Sequence[int]) -> tuple[bool, ...]:
    """Whether each axis of a TPU slice is a ring.

    In v5e and v6e an axis of 16 chips is a ring; in v5p all axes are rings where the slice consists
    of cubes of 4 x 4 x 4 chips (jax-ml.github.io/scaling-book, part 2).
    """
    if kind == 'v5p':
        return (all(side % 4 == 0 for side in sides),) * len(sides)
    return tuple(side == 16 for side in sides)


def fabric_of(devices: Sequence[jax.Device]) -> Fabric | None:
    """The links between the devices of a mesh, in its order; None for unknown devices."""
    chip = chip_of(devices[0].device_kind)
    if chip is None or chip.chips_per_node:
        return chip and Switches(chip=chip)
    places = np.array([device.coords for device in devices])
    sides = places.max(0) + 1
    return torus(chip, tuple(sides[: chip.axes].tolist()), devices)


def local_chips(devices: Sequence[jax.Device]) -> int:
    """The chips of a slice or node among the devices of a mesh."""
    return max(collections.Counter(map(_slice, devices)).values())


def torus(chip: Chip, sides: tuple[int, ...], devices: Sequence[jax.Device]) -> Torus:
    """The torus of TPU devices in the order of their mesh."""
    return Torus(
        chip=chip,
        sides=sides,
        wraps=wraps(chip.name, sides),
        places=np.array([device.coords[: len(sides)] for device in devices]),
        slices=np.array(list(map(_slice, devices))),
    )


def _time(seconds: float) -> str:
    return f'{seconds:.3f} s' if seconds >= 1 else f'{1000 * seconds:.3g} ms'


def _slice(device: jax.Device) -> int:
    """The number of the slice or node of a device."""
    return getattr(device, 'slice_index', 0) or 0


def _network(chip: Chip, collectives: Sequence[Collective]) -> float:
    """A lower bound of the seconds on the network between slices or nodes."""
    return sum(map(_sent_away, collectives)) / chip.network


def _sent_away(item: Collective) -> float:
    """Bytes that each chip sends to other slices or nodes, on average."""
    others, local = item.group_size - 1, item.local_size
    if local >= item.group_size:
        return 0.0
    if item.kind == 'collective-permute':
        return item.bytes
    away = item.bytes * (item.group_size - local) / others
    return away / local if item.kind in WITH_SUMS else away


def _sent_within(item: Collective) -> float:
    """Bytes that each chip sends to chips of its own slice or node, on average."""
    if item.local_size == 1:
        return 0.0
    return item.bytes - _sent_away(item)


@functools.lru_cache(maxsize=256)
def _array(groups: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Groups of devices, [groups, members]."""
    return np.array(groups)


def _order(name: str) -> tuple[int, ...]:
    known = [AXES.index(axis) for axis in name.split(' and ') if axis in AXES]
    return tuple(known) or (len(AXES),)
