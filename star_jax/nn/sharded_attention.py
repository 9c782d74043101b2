"""How is attention computed by many devices?

Images and heads are independent, so that each device has its own. Where the rows of an image lie on
several devices, each attends with its rows to the keys and values of all, which it gathers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from star_jax.core.visibility import StaticVisibility, TracedVisibility
from star_jax.nn.kernels import KV, Kernel, Visibility
from star_jax.parallel.rules import ActivationSharding


@dataclasses.dataclass(frozen=True)
class ShardedAttention:
    """The kernel `inner`, of which every device computes the part that `layout` gives it.

    Written out instead of left to the compiler, which cannot split kernels made for one device.
    """

    inner: Kernel
    sharding: ActivationSharding

    def __call__(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        if self.sharding.mesh is None:
            return self.inner(q_BLNH, kv, visibility)
        count, splits = kv.keys.shape[1], self.sharding.num_shards('tokens') > 1
        queries = self.sharding.spec(q_BLNH.shape, 'batch', 'tokens', 'heads', None)
        # The keys of the rows themselves lie where these do, all others on every device.
        rows = 'tokens' if count == q_BLNH.shape[1] or not splits else None
        held = self.sharding.spec(kv.keys.shape, 'batch', rows, 'heads', None)
        if (
            splits and queries[1] and isinstance(visibility, StaticVisibility)
        ):  # each device has other rows
            visibility = (
                None
                if visibility.sees_all(count)
                else TracedVisibility(jnp.asarray(visibility.keys_L))
            )

        def attend(q_BLNH: jax.Array, kv: KV, visibility: Visibility) -> jax.Array:
            if splits and held[1]:
                gather = functools.partial(jax.lax.all_gather, axis=1, tiled=True)
                kv = jax.tree.map(lambda x: gather(x, held[1]), kv)
            return self.inner(q_BLNH, kv, visibility)

        return jax.shard_map(
            attend,
            mesh=self.sharding.mesh,
            in_specs=(queries, KV(held, held), self._sight(visibility)),
            out_specs=queries,
            check_vma=False,  # kernels made for one device do not say along which axes they vary
        )(q_BLNH, kv, visibility)

    def _sight(self, visibility: Visibility) -> PartitionSpec | Visibility:
        """How what may be seen is split: as the queries are."""
        names = ('tokens',)
        if not isinstance(visibility, TracedVisibility):
            names = ('batch', 'heads', 'tokens', None)
        return jax.tree.map(lambda x: self.sharding.spec(x.shape, *names[-x.ndim :]), visibility)
