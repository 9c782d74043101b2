"""How do the gradients of micro-batches and replicas become the gradient of one update?

Replicas, along the mesh axis `data`, keep their gradients apart, add them up over the micro-batches
of an update, and sum them once at its end, in a dtype of choice. Where one micro-batch makes an
update and its gradients are summed in the dtype in which they are computed, they need not be apart:
the compiler then sums those of a layer while the backward pass computes the next.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from star_jax.core.settings import Dtype
from star_jax.parallel.mesh import REPLICAS
from star_jax.parallel.rules import ActivationSharding

Gradients = Any
Parts = Any  # what a step reports of a micro-batch, to be summed over replicas
# (what is carried, inputs, their number) -> gradients, parts, what is carried on
MicroStep = Callable[[Any, Any, int | jax.Array], tuple[Gradients, Parts, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicas:
    """The parts of a batch of which the gradients are kept apart.

    Attributes:
        mesh: the devices, with one part for each index of `data`; None: nothing is apart, and the
            batch is the only part.
        dtype: the dtype in which gradients are summed over the parts.
    """

    mesh: Mesh | AbstractMesh | None = None
    dtype: Dtype = 'float32'

    @property
    def count(self) -> int:
        """The number of parts."""
        return 1 if self.mesh is None else self.mesh.shape[REPLICAS]

    def map(self, function: Callable[[Any], Any], batch: Any) -> Any:
        """The results of `function` of every part, along a first axis if parts are apart.

        Args:
            function: must constrain no array along `data` (`Transformer.within_replica`).
            batch: arrays with one row per image.
        """
        if self.mesh is None:
            return function(batch)
        parts = jax.tree.map(self._split, batch)
        results = jax.vmap(function, spmd_axis_name=REPLICAS)(parts)
        return jax.tree.map(self._keep_apart, results)

    def sum(self, tree: Any) -> Any:
        """The sum of results of `map` over the parts."""
        return self._sum(tree, 'float32')

    def sum_gradients(self, gradients: Gradients) -> Gradients:
        """The same for gradients, in the dtype for them."""
        return self._sum(gradients, self.dtype)

    def _sum(self, tree: Any, dtype: Dtype) -> Any:
        if self.mesh is None:
            return tree

        def add(x: jax.Array) -> jax.Array:  # `x.sum` would add bfloat16 numbers in float32
            zero = jnp.zeros((), dtype)
            return jax.lax.reduce(x.astype(dtype), zero, jax.lax.add, (0,)).astype(x.dtype)

        return jax.tree.map(add, tree)

    def _split(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [parts, B / parts, ...], which moves nothing between devices."""
        x = x.reshape(self.count, -1, *x.shape[1:])
        within = ActivationSharding(self.mesh, mapped=(REPLICAS,)).spec(x.shape[1:2], 'batch')
        sharding = NamedSharding(self.mesh, PartitionSpec(REPLICAS, *within))
        return jax.lax.with_sharding_constraint(x, sharding)

    def _keep_apart(self, x: jax.Array) -> jax.Array:
        """An array [parts, ...] whose other axes are sharded as the compiler chooses."""
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        sharding = NamedSharding(self.mesh, PartitionSpec(REPLICAS, *others))
        return jax.lax.with_sharding_constraint(x, sharding)


def accumulate(
    step: MicroStep, batches: Sequence[Any], carried: Any = None
) -> tuple[Gradients, Parts, Any]:
    """The mean gradients of micro-batches, which run one after another.

    No more than the sum of their gradients is kept.

    Args:
        step: the gradients of a micro-batch, and what it reports.
        batches: the inputs of each micro-batch.
        carried: a value that each micro-batch passes to the next; this one is for the first.

    Returns:
        The gradients, the reports along a first axis, and what the last micro-batch hands on.
    """
    if len(batches) == 1:
        gradients, parts, carried = step(carried, batches[0], 0)
        return gradients, jax.tree.map(lambda x: jnp.asarray(x)[None], parts), carried
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *batches)

    def run(carry: tuple[Gradients, Any], batch: tuple[Any, jax.Array]) -> tuple[tuple, Parts]:
        total, carried = carry
        gradients, parts, carried = step(carried, *batch)
        return (add(total, gradients), carried), parts

    abstract, _, _ = jax.eval_shape(step, carried, batches[0], 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    numbered = (stacked, jnp.arange(len(batches)))
    (total, carried), parts = jax.lax.scan(run, (zeros, carried), numbered)
    return mean(total, len(batches)), parts, carried


def add(total: Gradients, gradients: Gradients) -> Gradients:
    """The sum of the gradients so far and those of one more micro-batch."""
    return jax.tree.map(jnp.add, total, gradients)


def mean(total: Gradients, count: int) -> Gradients:
    """The mean of the gradients of `count` micro-batches, from their sum."""
    return jax.tree.map(lambda x: x / count, total)
