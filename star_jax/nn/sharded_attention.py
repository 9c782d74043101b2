"""How is attention computed by many devices?

Images and heads are independent, so that each device has its own. Where the rows of an image are
split over devices, each attends with its rows to the keys and values of all, which it gathers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from star_jax.core.cache import AXES, KV, ROWS
from star_jax.core.visibility import ALL, StaticVisibility, TracedVisibility, Visibility
from star_jax.parallel.rules import ActivationSharding
from star_jax.protocols import Kernel


@dataclasses.dataclass(frozen=True)
class ShardedAttention:
    """A kernel of which every device computes its part.

    The split is written out, because the compiler cannot split kernels made for one device.

    Attributes:
        inner: the kernel of one device.
        sharding: how batch, tokens and heads are split over the devices.
    """

    inner: Kernel
    sharding: ActivationSharding

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        if self.sharding.mesh is None:
            return self.inner(q_BLNH, past, new, visibility)
        spec, splits = self.sharding.spec, self.sharding.num_shards('tokens') > 1
        # Heads that share keys stay together: all are whole where the mesh does not divide those.
        heads = 'heads' if new.heads % self.sharding.num_shards('heads') == 0 else None
        queries = spec(q_BLNH.shape, 'batch', 'tokens', heads, None)
        # New keys of the rows themselves are split as these, all others are on every device.
        own = splits and new.rows == q_BLNH.shape[1]
        new_axes = (*AXES[:ROWS], 'tokens' if own else None, *AXES[ROWS + 1 :])
        held = spec(new.keys.shape, *new_axes)
        before = [spec(kv.keys.shape, *AXES) for kv in past]
        if splits and queries[1]:
            visibility = self._per_row(visibility, sum(kv.rows for kv in (*past, new)))

        def attend(
            q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility
        ) -> jax.Array:
            if held[ROWS]:
                gather = functools.partial(jax.lax.all_gather, axis=4 + ROWS, tiled=True)
                new = jax.tree.map(lambda x: gather(x, held[ROWS]), new)
            return self.inner(q_BLNH, past, new, visibility)

        return jax.shard_map(
            attend,
            mesh=self.sharding.mesh,
            in_specs=(
                queries,
                tuple(KV(piece, piece) for piece in before),
                KV(held, held),
                self._specs(visibility, heads),
            ),
            out_specs=queries,
            check_vma=False,  # kernels for one device do not declare the axes along which they vary
        )(q_BLNH, past, new, visibility)

    def _per_row(self, visibility: Visibility, keys: int) -> Visibility:
        """Visibility with bounds that can be split, because devices have different rows."""
        bounds = visibility.bounds
        if not isinstance(bounds, StaticVisibility):
            return visibility
        if visibility.written is None and bounds.sees_all(keys):
            return visibility.replace(bounds=None)
        return visibility.replace(bounds=TracedVisibility(jnp.asarray(bounds.bound_L)))

    def _specs(self, visibility: Visibility, heads: str | None) -> Visibility:
        """How visibility is split: as the queries are."""

        def specs(x: jax.Array | None, *names: str | None) -> PartitionSpec | None:
            return None if x is None else self.sharding.spec(x.shape, *names[-x.ndim :])

        bounds = visibility.bounds
        if isinstance(bounds, TracedVisibility):
            bounds = TracedVisibility(specs(bounds.bound_L, 'tokens'))
        return Visibility(
            bounds=bounds,
            first_B=specs(visibility.first_B, 'batch'),
            end_B=specs(visibility.end_B, 'batch'),
            written=None if visibility.written is None else PartitionSpec(),
            mask=specs(visibility.mask, 'batch', heads, 'tokens', None),
        )
