"""How are the codes of one step sampled from its features?

A sampling method is a part of the sampler (`protocols.SamplingMethod`): it turns features into
codes and into the vectors that stand for them.
"""

from collections.abc import Callable, Hashable

import flax.struct
import jax
import jax.numpy as jnp

from star_jax.core.codes import Sampled
from star_jax.core.guidance import StepSettings, guide
from star_jax.core.schedule import Step
from star_jax.protocols import Filter, MethodTrace, StepFns


@flax.struct.dataclass
class FilteredSampling:
    """Logits are guided and filtered, then every token's code is sampled from what is left.

    Attributes:
        filter: chooses the codes that may be sampled, and has the temperature.
        greedy: take the most probable codes, whatever the keys (static).
    """

    filter: Filter
    greedy: bool = flax.struct.field(pytree_node=False, default=False)

    def kind(self, step: int) -> Hashable:
        return None

    def __call__(
        self,
        keys_B: jax.Array,
        features_RLD: jax.Array,
        settings: StepSettings,
        step: Step,
        step_fns: StepFns,
    ) -> tuple[Sampled, MethodTrace | None]:
        logits = step_fns.head(features_RLD)
        guided = guide(logits, len(keys_B), settings.guidance)
        filtered = self.filter(guided, settings.temperature)
        codes = self.choose(keys_B, filtered, step_fns)
        trace = MethodTrace(logits, guided, jax.nn.softmax(filtered)) if step_fns.trace else None
        return Sampled(codes, step_fns.embed(codes)), trace

    def choose(self, keys_B: jax.Array, filtered: jax.Array, step_fns: StepFns) -> jax.Array:
        """[B, L, ...] codes, given filtered logits [B, L, ..., V]."""
        if self.greedy:
            return step_fns.codes.top(filtered)
        return step_fns.codes.sample(keys_B, filtered)


def gumbel_noise(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, *shape] standard Gumbel noise, one key per image."""
    return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys_B)


@flax.struct.dataclass
class SmoothSampling:
    """Soft mixtures of code vectors, sharper with every scale (STAR specification 8).

    They serve the appearance only: the codes that it returns are the heaviest of each mixture. It
    ignores the temperature of its steps.

    Attributes:
        steps: the number of steps of the schedule (static).
        noise: (keys_B, shape) -> Gumbel noise [B, *shape] (static).
    """

    steps: int = flax.struct.field(pytree_node=False)
    noise: Callable[[jax.Array, tuple[int, ...]], jax.Array] = flax.struct.field(
        pytree_node=False, default=gumbel_noise
    )

    def kind(self, step: int) -> Hashable:
        return None

    def __call__(
        self,
        keys_B: jax.Array,
        features_RLD: jax.Array,
        settings: StepSettings,
        step: Step,
        step_fns: StepFns,
    ) -> tuple[Sampled, MethodTrace | None]:
        logits = step_fns.head(features_RLD)
        guided = guide(logits, len(keys_B), settings.guidance)
        ratio = step.index / max(self.steps - 1, 1)
        noise = self.noise(keys_B, guided.shape[1:])
        weights = soften(guided, noise, ratio, softness(ratio))
        trace = MethodTrace(logits, guided, weights) if step_fns.trace else None
        return Sampled(step_fns.codes.top(weights), step_fns.mix(weights)), trace


def softness(ratio: float | jax.Array) -> jax.Array:
    """The temperature of a mixture: it falls from 0.27 as `ratio` goes from 0 to 1."""
    return jnp.maximum(0.27 * (1 - 0.95 * ratio), 0.005)


def soften(
    logits: jax.Array, gumbel: jax.Array, ratio: float | jax.Array, tau: float | jax.Array
) -> jax.Array:
    """softmax(((1 + ratio) logits + gumbel) / tau).

    Args:
        logits: [B, L, V].
        gumbel: noise of the same shape.
        ratio: progress over the steps, from 0 to 1.
        tau: temperature of the mixture.
    """
    return jax.nn.softmax(((1 + ratio) * logits + gumbel) / tau)
