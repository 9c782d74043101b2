"""How do gradients become updates?

AdamW as the published runs use it (STAR specification 6): clipping by the global norm,
weight decay on matrices only, and both schedules counted in micro-iterations.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from star_jax.core.argument_types import check_types
from star_jax.core.sizes import check_not_negative
from star_jax.errors import UserError
from star_jax.training.schedules import LearningRate, weight_decay_at

OF_LEVELS = {'pair', 'signal'}  # the modulation from level embeddings
CLIP_EPSILON = 1e-6  # the published clipping adds it to the norm
MOST_MICRO_BATCHES = 1024  # micro-batches of a step, all inputs of one program


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay, clipping and gradient accumulation.

    Attributes:
        learning_rate: schedule of the learning rate.
        weight_decay: weight decay at the start of the run.
        weight_decay_end: weight decay at its end, along half a cosine (0: as at the start).
        beta1: decay of the running mean of the gradients.
        beta2: decay of the running mean of their squares.
        epsilon: constant added to the denominator of an update.
        clip: largest global norm of gradients; longer ones are scaled.
        accumulate: micro-batches whose mean gradient makes the update of a step; schedules count
            micro-batches.
    """

    learning_rate: LearningRate = LearningRate()
    weight_decay: float = 0.05
    weight_decay_end: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 2.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.accumulate <= MOST_MICRO_BATCHES:
            raise UserError(
                f'accumulate must lie in [1, {MOST_MICRO_BATCHES}], not {self.accumulate}'
            )
        if self.clip <= 0:
            raise UserError(f'clip must be positive, not {self.clip}')
        if self.epsilon <= 0:
            raise UserError(f'epsilon must be positive, not {self.epsilon}')
        check_not_negative(weight_decay=self.weight_decay, weight_decay_end=self.weight_decay_end)
        for name in ('beta1', 'beta2'):
            if not 0 <= (beta := getattr(self, name)) < 1:
                raise UserError(f'{name} must lie in [0, 1), not {beta}')

    def for_batch(self, images: float) -> 'AdamW':
        """This optimizer, with the learning rate of micro-batches of so many images."""
        rate = self.learning_rate.for_images(images * self.accumulate)
        return dataclasses.replace(self, learning_rate=rate)

    def build(
        self,
        total_steps: int,
        decays: Callable[[Any], Any] | None = None,
        constants: frozenset[str] = frozenset(),
    ) -> optax.GradientTransformation:
        """The transformation of a run.

        Args:
            total_steps: micro-iterations of the whole run, `accumulate` for each update.
            decays: parameters -> True for those that decay; `decayed` by default.
            constants: names of the parameters that have no gradient and no update.
        """

        def decay(update: jax.Array) -> jax.Array:
            return self.decay_at(self._last_step(update), total_steps)

        def rate(update: jax.Array) -> jax.Array:
            return self.learning_rate.at(self._last_step(update), total_steps)

        optimizer = optax.chain(
            clip_by_norm(self.clip),
            optax.scale_by_adam(self.beta1, self.beta2, self.epsilon),
            optax.add_decayed_weights(decay, decays or decayed),
            optax.scale_by_learning_rate(rate),
        )
        return hold(optimizer, constants) if constants else optimizer

    def decay_at(self, step: int | jax.Array, total_steps: int) -> jax.Array:
        """The weight decay of micro-iteration `step`."""
        last = self.weight_decay_end or self.weight_decay
        return weight_decay_at(step, total_steps, self.weight_decay, last)

    def _last_step(self, update: jax.Array) -> jax.Array:
        """The micro-iteration at which an update happens."""
        return (update + 1) * self.accumulate - 1


class ClipState(NamedTuple):
    """The state of clipping.

    Attributes:
        norm_before_clip: global norm of the last gradient, before clipping, float32.
    """

    norm_before_clip: jax.Array


def clip_by_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, limit / (norm + 1e-6)), so that their global norm is `limit`."""

    def init(params: Any) -> ClipState:
        return ClipState(jnp.zeros((), jnp.float32))

    def update(gradients: Any, state: ClipState, params: Any = None) -> tuple[Any, ClipState]:
        norm = optax.tree.norm(gradients)
        factor = jnp.minimum(1.0, limit / (norm + CLIP_EPSILON))
        clipped = jax.tree.map(lambda leaf: leaf * factor, gradients)
        return clipped, ClipState(norm.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def hold(
    optimizer: optax.GradientTransformation, constants: frozenset[str]
) -> optax.GradientTransformation:
    """The optimizer, with zero gradients and updates for the parameters of these names."""

    def zero(path: tuple, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if parameter_name(path) in constants else leaf

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients = jax.tree_util.tree_map_with_path(zero, gradients)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree_util.tree_map_with_path(zero, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def parameter_name(path: tuple) -> str:
    """The '/'-joined name of a parameter, from its path in a tree, which may be boxed."""
    return '/'.join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def gradient_norm(state: Any) -> jax.Array:
    """The global norm of the last gradient, before clipping."""
    return optax.tree.get(state, 'norm_before_clip')


def decayed(params: Any) -> Any:
    """True for parameters that decay: kernels, except those of the modulation by level embeddings.

    Layers are stacked, so the rank of an array does not distinguish a bias from a matrix: the names
    do. Biases, level embeddings, positions, offsets and score scales never decay; the vectors of
    classes decay.
    """

    def decays(path: tuple, leaf: Any) -> bool:
        names = parameter_name(path).split('/')
        if names[-1] == 'table':
            return 'classes' in names
        return names[-1] == 'kernel' and not OF_LEVELS & set(names)

    return jax.tree_util.tree_map_with_path(decays, params)


def everything(params: Any) -> Any:
    """True for every parameter: the published refinement head decays so."""
    return jax.tree.map(lambda leaf: True, params)
