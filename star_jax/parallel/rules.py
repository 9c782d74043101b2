"""Where on a mesh does each array lie?

Parameters name logical axes; this one table turns them into mesh axes. The batch is split over
`data` and `fsdp`, parameters over `fsdp` and `tensor`.
"""

from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from star_jax.errors import UserError

RULES = (
    ('embed', 'fsdp'),
    ('heads', 'tensor'),
    ('mlp', 'tensor'),
    ('vocab', 'tensor'),
    ('codes', None),
    ('channels', None),
    ('layers', None),
)
BATCH = PartitionSpec(('data', 'fsdp'))


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of (possibly boxed) abstract arrays."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def abstract(boxed: Any, mesh: Mesh, whose: str = '') -> Any:
    """The (possibly boxed) abstract arrays of a tree, unboxed, with their shardings.

    Raises UserError naming the first array that the mesh does not divide, and `whose` it is.
    """

    def place(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Any:
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            raise UserError(
                f'{name} of shape {leaf.shape}{whose} does not divide over the mesh '
                f'{dict(mesh.shape)}, which splits it as {sharding.spec}: choose mesh sizes that '
                'divide it'
            ) from None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, nn.unbox(boxed), shardings(boxed, mesh))


def whole(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Every device holds its part of the batch."""
    return NamedSharding(mesh, BATCH)


def place(batch: Any, mesh: Mesh) -> Any:
    """Arrays of this process as its part of global arrays, split over the batch."""
    where = split(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)
