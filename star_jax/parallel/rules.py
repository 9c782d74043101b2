"""Where on a mesh does each array lie?

Parameters and activations name logical axes; this one table turns them into mesh axes. By it are
placed parameters, optimizer state, averages, the sampler's keys and values, text towers and
tokenizers, and through `Layout` the arrays inside a program.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from star_jax.errors import UserError

RULES = (
    ('batch', ('data', 'fsdp')),
    ('tokens', 'sequence'),
    ('embed', 'fsdp'),
    ('heads', 'tensor'),
    ('mlp', 'tensor'),
    ('vocab', 'tensor'),
    ('codes', None),
    ('channels', None),
    ('layers', None),
)
AXES_OF = dict(RULES)
BATCH = PartitionSpec(AXES_OF['batch'])


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of (possibly boxed) abstract arrays."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def abstract(boxed: Any, mesh: Mesh, whose: str = '') -> Any:
    """The (possibly boxed) abstract arrays of a tree, unboxed, with their shardings.

    Raises UserError naming the first array that the mesh does not divide, `whose` it is, and the
    sizes of the mesh axis that would fit.
    """
    arrays, where = nn.unbox(boxed), shardings(boxed, mesh)
    _check(arrays, where, whose)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        arrays,
        where,
    )


def places(boxed: Any, mesh: Mesh, whose: str = '') -> Any:
    """The shardings of a tree, as `abstract` has them, and with its errors."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(boxed, mesh, whose))


def whole(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Every device holds its part of the batch."""
    return NamedSharding(mesh, BATCH)


def rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Numbers of the rows of a global batch that this process's devices hold, ascending.

    Processes whose devices differ only along axes that do not split the batch hold the same rows.
    """
    held = np.zeros(batch, bool)
    for span in split(mesh).addressable_devices_indices_map((batch,)).values():
        held[span] = True
    return np.flatnonzero(held)


def put(tree: Any, where: Any) -> Any:
    """Arrays that every process holds whole, on devices of all: a sharding, or one for each."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    if isinstance(where, Sharding):
        where = jax.tree.map(lambda _: where, tree)

    def place_parts(x: Any, sharding: Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

    return jax.tree.map(place_parts, tree, where)


def gather(tree: Any) -> Any:
    """The arrays of a tree whole, on the host of every process; all of them must call it.

    One after another, so that devices hold no more than one of them whole.
    """

    def take(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(take, tree)


def place(batch: Any, mesh: Mesh) -> Any:
    """The `rows` of this process as its part of global arrays, split over the batch."""
    where = split(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)


@dataclasses.dataclass(frozen=True)
class ActivationSharding:
    """Where the arrays inside a program lie: on `mesh` as the table says, or anywhere (None)."""

    mesh: Mesh | None = None

    def __call__(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x`, whose axes have these logical names (None: whole on every device)."""
        if self.mesh is None:
            return x
        where = NamedSharding(self.mesh, self.spec(x.shape, *names))
        return jax.lax.with_sharding_constraint(x, where)

    def spec(self, shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
        """How an array of this shape is split, whose axes have these logical names.

        An axis whose size the mesh does not divide stays whole: the few rows of a coarse scale.
        """
        return PartitionSpec(
            *(
                AXES_OF[name] if name and size % self.ways(name) == 0 else None
                for size, name in zip(shape, names, strict=True)
            )
        )

    def batch(self, tree: Any) -> Any:
        """A tree of arrays whose first axis is the batch, and whose others are whole."""
        return jax.tree.map(lambda x: self(x, 'batch', *[None] * (x.ndim - 1)), tree)

    def rows(self, count: int) -> int:
        """`count`, or the next larger number of rows that the mesh divides."""
        ways = self.ways('tokens')
        return -(-count // ways) * ways

    def ways(self, name: str) -> int:
        """Into how many parts an axis of this name is split."""
        return 1 if self.mesh is None else _ways(self.mesh, AXES_OF[name])


def _check(arrays: Any, where: Any, whose: str) -> None:
    """Raises UserError as `abstract` says."""
    lengths: dict[Any, list[int]] = {}  # of the axes that each mesh axis splits
    for leaf, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(where), strict=True):
        for size, axis in zip(leaf.shape, sharding.spec, strict=False):
            lengths.setdefault(axis, []).append(size)
    for (path, leaf), sharding in zip(
        jax.tree.leaves_with_path(arrays), jax.tree.leaves(where), strict=True
    ):
        for size, axis in zip(leaf.shape, sharding.spec, strict=False):
            ways = _ways(sharding.mesh, axis)
            if size % ways:
                name = jax.tree_util.keystr(path, simple=True, separator='/')
                most = math.gcd(*lengths[axis])
                fits = [str(n) for n in range(1, most + 1) if most % n == 0]
                raise UserError(
                    f'{name} of shape {leaf.shape}{whose} does not divide over the mesh '
                    f'{dict(sharding.mesh.shape)}: {axis}={ways} splits its {size:,}; sizes of '
                    f'{axis} that fit are {", ".join(fits)}'
                )


def _ways(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts a mesh splits what lies along these of its axes."""
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)
