"""What does training carry from step to step?"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.parallel import rules
from star_jax.training.optimizer import parameter_name


@flax.struct.dataclass
class TrainState:
    """Parameters and everything that changes with them.

    Attributes:
        step: number of updates by the data so far, int32.
        params: the parameters that are trained.
        ema: their exponential moving average; None if there is none.
        opt: the state of the optimizer.
        usage_KV: how often each scale used each code since unused codes were last restarted,
            float32; None unless a tokenizer is trained.
        adversary: the state of a discriminator that trains beside; None if there is none.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt: Any
    usage_KV: jax.Array | None = None
    adversary: Any = None

    @classmethod
    def start(
        cls,
        params: Any,
        optimizer: optax.GradientTransformation,
        *,
        ema: bool,
        usage: tuple[int, int] | None = None,
        adversary: Any = None,
    ) -> 'TrainState':
        """The state before step 0, boxed if the parameters are.

        Args:
            params: the parameters, or their shapes and dtypes under `eval_shape`.
            optimizer: the optimizer.
            ema: keep a moving average of the parameters.
            usage: the shape of `usage_KV`, if a tokenizer is trained.
            adversary: the state of a discriminator, boxed if the parameters are.
        """
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            opt=optimizer.init(params),
            usage_KV=jnp.zeros(usage) if usage else None,
            adversary=adversary,
        )

    def update(
        self,
        gradients: Any,
        optimizer: optax.GradientTransformation,
        decay: float,
        constants: frozenset[str] = frozenset(),
    ) -> 'TrainState':
        """The state after one optimizer step.

        Args:
            gradients: gradients of the parameters.
            optimizer: the optimizer that the state was started with.
            decay: decay of the moving average. Early in a run the average covers a tenth of the
                steps only, so that a short run does not return its initial weights.
            constants: names of the parameters that do not change; they are not averaged.
        """
        updates, opt = optimizer.update(gradients, self.opt, self.params)
        params = optax.apply_updates(self.params, updates)
        ema = self.ema
        if ema is not None:
            keep = jnp.minimum(decay, (1 + self.step) / (10 + self.step))

            def average(path: tuple, mean: jax.Array, new: jax.Array) -> jax.Array:
                if parameter_name(path) in constants:
                    return new
                return keep * mean + (1 - keep) * new

            ema = jax.tree_util.tree_map_with_path(average, ema, params)
        return self.replace(step=self.step + 1, params=params, ema=ema, opt=opt)

    @property
    def averaged(self) -> Any:
        """The parameters to evaluate and export: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


Start = Callable[[Any], TrainState]  # parameters -> the state before step 0


def abstract_state(start: Start, params: Any, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state that starts with abstract, boxed parameters.

    Raises UserError naming the first array that the mesh does not divide.
    """
    return rules.abstract(jax.eval_shape(start, params), mesh)


def init_sharded(
    start: Start, init: Callable[[jax.Array], Any], mesh: Mesh, key: jax.Array
) -> TrainState:
    """The state before step 0, born sharded: no host or device ever holds all of it.

    Args:
        start: makes the state of parameters.
        init: makes the boxed parameters of a key.
        mesh: the devices.
        key: the key of the parameters.
    """
    init = jax.jit(init)  # traced once, for the shapes and for the values
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, abstract_state(start, jax.eval_shape(init, key), mesh)
    )
    return jax.jit(lambda key: nn.unbox(start(init(key))), out_shardings=shardings)(key)
