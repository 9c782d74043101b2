"""Collectives take at least as long as the links of their own axes need."""

import itertools

import numpy as np
import pytest

from star_jax.parallel import links
from star_jax.parallel.chips import CHIPS
from star_jax.parallel.collectives import Collective, groups_along, mesh_axes

GB = 10**9
LINK = 50 * GB  # one link of a v5e: 1,600 Gbit/s over four links


def torus(kind: str, *sides: int) -> links.Torus:
    """One slice whose devices are numbered in the order of their places."""
    places = np.array(list(itertools.product(*map(range, sides))))
    return links.Torus(
        chip=CHIPS[kind],
        sides=sides,
        wraps=links.wraps(kind, sides),
        places=places,
        slices=np.zeros(len(places), int),
    )


def collective(groups, kind: str = 'all-gather', sent: int = GB) -> Collective:
    groups = tuple(map(tuple, np.asarray(groups).tolist()))
    size = len(groups[0])
    return Collective(
        kind=kind, group_size=size, local_size=size, count=1, bytes=sent, groups=groups
    )


def numbers(*sides: int) -> np.ndarray:
    return np.arange(np.prod(sides)).reshape(sides)


RINGS = numbers(16, 16)  # a group is a row: all chips along the last axis
PAIRS = numbers(16, 2, 2, 4).swapaxes(2, 3).reshape(-1, 2)  # chips that lie four apart


@pytest.mark.parametrize(
    'kind, sides, groups, links_used',
    [
        ('v5e', (16, 16), RINGS, 2),  # both directions of a ring
        ('v5e', (16, 16), RINGS.T, 2),
        ('v5e', (16, 16), RINGS.reshape(-1, 4), 1),  # a line within a ring: its ends have one link
        ('v5e', (16, 16), RINGS.reshape(-1, 2), 1),
        ('v5e', (16, 16), PAIRS, 1 / 4),  # four pairs share the links between them
        ('v5e', (16, 16), RINGS.reshape(1, -1), 4),  # a group of all chips uses all links
        ('v5e', (8, 8), numbers(8, 8), 1),  # axes of eight chips do not wrap around
        ('v6e', (16, 16), RINGS, 2),
        ('v5p', (4, 4, 4), numbers(16, 4), 2),
        ('v5p', (4, 4, 4), numbers(4, 16), 4),
        ('v5p', (4, 4, 4), numbers(1, 64), 6),
        ('v5p', (2, 4, 4), numbers(8, 4), 1),  # no cube: no rings
    ],
)
def test_a_gather_uses_the_links_of_the_axes_of_its_groups(kind, sides, groups, links_used):
    slice_ = torus(kind, *sides)
    link = CHIPS[kind].links / (2 * len(sides))
    assert slice_.links([collective(groups)]) == pytest.approx(GB / (links_used * link))


def test_collectives_overlap_on_other_axes_and_share_their_own():
    slice_ = torus('v5e', 16, 16)
    along_x, along_y = collective(RINGS.T), collective(RINGS)
    assert slice_.links([along_x, along_y]) == pytest.approx(GB / (2 * LINK))
    assert slice_.links([along_x, along_x]) == pytest.approx(2 * GB / (2 * LINK))
    everywhere = collective(RINGS.reshape(1, -1), sent=2 * GB)
    assert slice_.links([along_x, along_y, everywhere]) == pytest.approx(4 * GB / (4 * LINK))


def test_sums_of_pairs_cross_each_cut_once():
    slice_ = torus('v5e', 16, 16)
    pairs = [collective(PAIRS, kind) for kind in ('all-reduce', 'reduce-scatter', 'all-gather')]
    assert len({slice_.links([item]) for item in pairs}) == 1
    assert slice_.links(pairs) == pytest.approx(3 * slice_.links(pairs[:1]))


def test_pairs_of_source_and_target_cross_the_links_between_them():
    slice_ = torus('v5e', 16, 16)
    for distance in (1, 4):
        pairs = np.stack([RINGS, np.roll(RINGS, -distance, axis=1)], axis=-1).reshape(-1, 2)
        shift = collective(pairs, 'collective-permute')
        assert slice_.links([shift]) == pytest.approx(distance * GB / (2 * LINK))


def test_a_chip_alone_has_no_links():
    assert torus('v5e', 1, 1).links([]) == 0


def test_collectives_between_slices_use_the_network():
    """Two slices of 16 chips: an all-reduce of all, and a gather between pairs of slices."""
    one = torus('v5e', 4, 4)
    places = np.concatenate([one.places, one.places])
    two = links.Torus(
        chip=one.chip,
        sides=one.sides,
        wraps=one.wraps,
        places=places,
        slices=np.repeat([0, 1], 16),
    )
    every = tuple(range(32))
    all_reduce = Collective(
        kind='all-reduce', group_size=32, local_size=16, count=1, bytes=GB, groups=(every,)
    )
    gather = Collective(kind='all-gather', group_size=2, local_size=1, count=1, bytes=GB)
    bound = links.bound(two, [all_reduce, gather])
    assert bound.network == pytest.approx((16 / 31 / 16 + 1) * GB / one.chip.network)
    assert 0 < bound.links < GB / LINK


def test_mesh_axes_name_the_axes_of_groups():
    sizes = (8, 4, 2, 4)
    for axes in (('data',), ('tensor',), ('fsdp', 'sequence'), ('data', 'fsdp', 'tensor')):
        groups = groups_along(axes, sizes)
        assert mesh_axes(collective(groups), sizes) == axes
        assert sorted(itertools.chain(*groups)) == list(range(256))


def test_d30_at_256_px_on_v5e_is_bound_by_its_links():
    """The collectives of the compiled step, in bytes, on the places that its mesh has.

    Along `tensor` the mesh has pairs of chips four apart: each of the 128 chips in columns 4 to 11
    needs 2.58 GB, and 2 x 16 links of 50 GB/s lead there, which takes 0.206 s.
    """
    sizes = (8, 4, 2, 4)
    data, fsdp, tensor, sequence = np.unravel_index(np.arange(256), sizes)
    x = 8 * (fsdp // 2) + 4 * tensor + sequence
    y = 2 * data + fsdp % 2
    slice_ = torus('v5e', 16, 16)
    slice_ = links.Torus(
        chip=slice_.chip,
        sides=slice_.sides,
        wraps=slice_.wraps,
        places=np.stack([x, y], axis=1),
        slices=slice_.slices,
    )
    sent = {
        ('all-gather', 'fsdp'): 2_743_050_240,
        ('all-reduce', 'tensor'): 2_577_512_912,
        ('all-reduce', 'sequence'): 1_962_230_400,
        ('all-gather', 'sequence'): 1_062_312_720,
        ('all-reduce', 'fsdp'): 995_328_048,
        ('reduce-scatter', 'fsdp'): 675_348_480,
    }
    collectives = [
        collective(groups_along((axis,), sizes), kind, size) for (kind, axis), size in sent.items()
    ]
    bound = links.bound(slice_, collectives, sizes)
    assert bound.axes['tensor'] == pytest.approx(128 * 2.577512912 / (2 * 16 * 50))
    assert 0.11 < bound.axes['fsdp'] < 0.13 and 0.04 < bound.axes['sequence'] < 0.06
    in_one_direction = sum(sent.values()) / LINK
    assert max(0.2, max(bound.axes.values())) < bound.links < 2 * in_one_direction
    assert bound.network == 0
