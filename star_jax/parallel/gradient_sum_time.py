"""How long does the sum of gradients over the replicas of a mesh take at least?

The sum itself is computed by `Replicas` in `star_jax/training/gradients.py`.
"""

import typing
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from star_jax.core.settings import Dtype
from star_jax.parallel.collectives import Collective, collective_along
from star_jax.parallel.links import Fabric, bound
from star_jax.parallel.mesh import AXES, REPLICAS


def replica_sum(
    gradients: int, dtype: str, sizes: Sequence[int], *, local_chips: int
) -> Collective:
    """The sum of gradients over the replicas.

    Args:
        gradients: bytes of the float32 gradients on one device.
        dtype: the dtype in which they are summed.
        sizes: the lengths of the mesh axes.
        local_chips: chips of a slice or node.
    """
    replicas, itemsize = sizes[AXES.index(REPLICAS)], jnp.dtype(dtype).itemsize
    sent = 2 * gradients * itemsize // jnp.dtype('float32').itemsize * (replicas - 1) // replicas
    return collective_along('all-reduce', REPLICAS, sent, sizes, local_chips=local_chips)


def replica_sum_seconds(
    fabric: Fabric, gradients: int, sizes: Sequence[int], *, local_chips: int
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


def _time(seconds: float) -> str:
    return f'{seconds:.3f} s' if seconds >= 1 else f'{1000 * seconds:.3g} ms'
