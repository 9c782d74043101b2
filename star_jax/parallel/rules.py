"""How is each array sharded over a mesh?

Parameters and activations name logical axes; one table (`RULES`) maps them to mesh axes. It decides
the shardings of parameters, optimizer state, averages, key/value cache, text encoders and
tokenizers, and through `ActivationSharding` those of the arrays inside a program.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
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
MESH_AXES = dict(RULES)
BATCH_SPEC = PartitionSpec(MESH_AXES['batch'])


def abstract(boxed: Any, mesh: Mesh, owner: str = '') -> Any:
    """The abstract arrays of a tree with their shardings.

    Args:
        boxed: abstract arrays, which may be boxed with their logical axes.
        mesh: the mesh over which they are sharded.
        owner: the model that the arrays belong to, for the error, as in ' of the tokenizer'.

    Returns:
        The tree of `jax.ShapeDtypeStruct`, unboxed.

    Raises:
        UserError: the mesh does not divide an array; it names the first one and the sizes of the
            mesh axis that would fit.
    """
    arrays = nn.unbox(boxed)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    _check_divisible(arrays, shardings, owner)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        arrays,
        shardings,
    )


def shardings(boxed: Any, mesh: Mesh, owner: str = '') -> Any:
    """The `NamedSharding` of every array of a tree; arguments and errors as for `abstract`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(boxed, mesh, owner))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch; its other axes are not split."""
    return NamedSharding(mesh, BATCH_SPEC)


def device_bytes(tree: Any) -> int:
    """Bytes that one device stores of abstract arrays with shardings (random keys are left out)."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def process_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Indices of the rows of a global batch that this process's devices hold, ascending.

    Processes whose devices differ only along axes that do not split the batch hold the same rows.
    """
    held = np.zeros(batch, bool)
    for span in batch_sharding(mesh).addressable_devices_indices_map((batch,)).values():
        held[span] = True
    return np.flatnonzero(held)


def shard(tree: Any, shardings: Any) -> Any:
    """Shards arrays that every process holds in full over the devices of all processes.

    Args:
        tree: host arrays, or global arrays that are to be sharded otherwise.
        shardings: one sharding, or a tree with one for every array.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, Sharding):
        sharding = shardings
        shardings = jax.tree.map(lambda _: sharding, tree)

    def shard_array(x: Any, sharding: Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        array = np.asarray(x)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(shard_array, tree, shardings)


def gather(tree: Any) -> Any:
    """The full arrays of a tree, on the host of every process; all processes must call it.

    Arrays are gathered one after another, so that devices hold at most one full array.
    """

    def gather_array(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(gather_array, tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays, sharded over the batch, from the `process_rows` of every process."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


@dataclasses.dataclass(frozen=True)
class ActivationSharding:
    """Constrains the sharding of arrays inside a program.

    Attributes:
        mesh: the mesh to which `RULES` map logical axes; None: arrays are not constrained.
        mapped: mesh axes that a caller maps over, so that they split no array in here.
    """

    mesh: Mesh | None = None
    mapped: tuple[str, ...] = ()

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`x` with a sharding constraint; `axes` are its logical axes (None: not split)."""
        if self.mesh is None:
            return x
        sharding = NamedSharding(self.mesh, self.spec(x.shape, *axes))
        return jax.lax.with_sharding_constraint(x, sharding)

    def spec(self, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
        """The partition of an array of this shape with these logical axes.

        An axis whose size the mesh does not divide is not split: the few rows of a coarse scale.
        """
        return PartitionSpec(
            *(
                self._mesh_axes(axis) if axis and size % self.num_shards(axis) == 0 else None
                for size, axis in zip(shape, axes, strict=True)
            )
        )

    def constrain_batch(self, tree: Any) -> Any:
        """A tree of arrays constrained to be split along their first axis, the batch, only."""
        return jax.tree.map(lambda x: self(x, 'batch', *[None] * (x.ndim - 1)), tree)

    def padded_length(self, tokens: int, multiple: int = 1) -> int:
        """`tokens`, or the next larger multiple of `multiple` that the mesh divides."""
        unit = math.lcm(self.num_shards('tokens'), multiple)
        return -(-tokens // unit) * unit

    def num_shards(self, axis: str) -> int:
        """The number of shards that a logical axis is split into."""
        return 1 if self.mesh is None else _num_shards(self.mesh, self._mesh_axes(axis))

    def _mesh_axes(self, axis: str) -> str | tuple[str, ...] | None:
        """The mesh axes that split a logical axis."""
        axes = MESH_AXES[axis]
        if isinstance(axes, tuple):
            return tuple(name for name in axes if name not in self.mapped)
        return None if axes in self.mapped else axes


def _check_divisible(arrays: Any, shardings: Any, owner: str) -> None:
    """Raises the UserError that `abstract` documents."""
    sizes: dict[Any, list[int]] = {}  # mesh axis -> sizes of the array axes that it splits
    for leaf, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(shardings), strict=True):
        for size, axis in zip(leaf.shape, sharding.spec, strict=False):
            sizes.setdefault(axis, []).append(size)
    for (path, leaf), sharding in zip(
        jax.tree.leaves_with_path(arrays), jax.tree.leaves(shardings), strict=True
    ):
        for size, axis in zip(leaf.shape, sharding.spec, strict=False):
            shards = _num_shards(sharding.mesh, axis)
            if size % shards:
                name = jax.tree_util.keystr(path, simple=True, separator='/')
                largest = math.gcd(*sizes[axis])
                fits = [str(n) for n in range(1, largest + 1) if largest % n == 0]
                raise UserError(
                    f'{name} of shape {leaf.shape}{owner} does not divide over the mesh '
                    f'{dict(sharding.mesh.shape)}: {axis}={shards} splits its {size:,}; sizes of '
                    f'{axis} that fit are {", ".join(fits)}'
                )


def _num_shards(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of shards of an array axis that these mesh axes split."""
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)
