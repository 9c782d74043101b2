"""How long do collectives take at least, on the links that join the chips of a pod?

The bounds hold for every algorithm. Chips of a TPU slice form a torus, in which each chip has two
links per axis (one at the end of an axis that does not wrap around). A collective uses the links of
the axes along which its groups extend, and neighbours in a group may be several chips apart. Two
facts bound the time from below:

- Cut the torus across one axis at two places: the chips between the cuts are a slab, and all data
  that a slab needs from outside cross the links of its two faces, the cuts.
- Every sent byte crosses at least as many links as the distance of the nearest members of a group.

The GPUs of a node are joined by a switch, so that each GPU has all of its links for any collective.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np

from star_jax.parallel.chips import Chip, chip_of
from star_jax.parallel.collectives import Collective, mesh_axes
from star_jax.parallel.mesh import AXES


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
        return sum(item.bytes_within for item in collectives) / self.chip.links


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
            crossings[axes] = crossings.get(axes, 0) + distance * item.bytes_within
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
        """The bound by the bytes that each slab needs from outside."""
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
        groups_GM = item.groups_GM
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
        groups_GM = item.groups_GM
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
    """The torus of TPU devices in the order of their mesh.

    Args:
        chip: the kind of chip.
        sides: chips of a slice along each of its axes.
        devices: the devices of the mesh, in its order.
    """
    return Torus(
        chip=chip,
        sides=sides,
        wraps=wraps(chip.name, sides),
        places=np.array([device.coords[: len(sides)] for device in devices]),
        slices=np.array(list(map(_slice, devices))),
    )


def _slice(device: jax.Device) -> int:
    """The number of the slice or node of a device."""
    return getattr(device, 'slice_index', 0) or 0


def _network(chip: Chip, collectives: Sequence[Collective]) -> float:
    """A lower bound of the seconds on the network between slices or nodes."""
    return sum(item.bytes_away for item in collectives) / chip.network


def _order(name: str) -> tuple[int, ...]:
    known = [AXES.index(axis) for axis in name.split(' and ') if axis in AXES]
    return tuple(known) or (len(AXES),)
