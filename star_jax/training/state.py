"""What does training carry from step to step?"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.checkpoint import weights
from star_jax.parallel import rules


@flax.struct.dataclass
class TrainState:
    """`step` counts updates of the data, int32. `ema` is None unless averages are kept.

    `usage_KV` counts how often each scale chose each code since dead codes were last restarted;
    None where no tokenizer is trained.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt: Any
    usage_KV: jax.Array | None = None

    def update(
        self, gradients: Any, optimizer: optax.GradientTransformation, decay: float
    ) -> 'TrainState':
        """The state after one optimizer step.

        `decay` is that of the averages, once the run is long enough for them: before, they reach
        back over a tenth of it, so that no short run gives its initial weights.
        """
        updates, opt = optimizer.update(gradients, self.opt, self.params)
        params = optax.apply_updates(self.params, updates)
        ema = self.ema
        if ema is not None:
            keep = jnp.minimum(decay, (1 + self.step) / (10 + self.step))
            ema = jax.tree.map(lambda mean, new: keep * mean + (1 - keep) * new, ema, params)
        return self.replace(step=self.step + 1, params=params, ema=ema, opt=opt)


def averaged(state: TrainState) -> Any:
    """The parameters to use: the averages where they are kept."""
    return state.params if state.ema is None else state.ema


def build_state(
    init: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    ema: bool,
    key: jax.Array,
    usage: tuple[int, int] | None = None,
) -> TrainState:
    """The (boxed) state before step 0. `usage` is the shape of the code counts."""
    params = init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        opt=optimizer.init(params),
        usage_KV=jnp.zeros(usage) if usage else None,
    )


def fitted(params: Any, state: TrainState, where: str) -> Any:
    """Parameters that can take the place of those of a state, which may be abstract.

    Raises UserError naming the arrays of `where` that do not fit.
    """
    return weights.unflatten(weights.fit(weights.flatten(params), state.params, where))


def go_on_from(state: TrainState, params: Any) -> TrainState:
    """The state with other, fitted parameters, averages included, on the same devices."""
    placed = rules.shard(params, jax.tree.map(lambda old: old.sharding, state.params))
    ema = None if state.ema is None else jax.tree.map(jnp.copy, placed)
    return state.replace(params=placed, ema=ema)


def abstract_sharded(build: Callable[[jax.Array], TrainState], mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state.

    Raises UserError naming the first array that the mesh does not divide.
    """
    return rules.abstract(jax.eval_shape(build, jax.random.key(0)), mesh)


def init_sharded(
    build: Callable[[jax.Array], TrainState], mesh: Mesh, key: jax.Array
) -> TrainState:
    """A state born sharded: no host or device ever holds all of it."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_sharded(build, mesh))
    return jax.jit(lambda key: nn.unbox(build(key)), out_shardings=where)(key)
