"""How are the tokens of one step drawn from its features?

A draw is a part of the sampler: it turns features into codes and the vectors that stand for them.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from star_jax.core.codes import Index, Sampled
from star_jax.core.filters import Filter
from star_jax.core.schedule import Step
from star_jax.core.settings import Settings


class StepFns(NamedTuple):
    """What a draw works with, closed over the parameters.

    `head`: features [R, L, D] -> logits [R, L, V]. `embed`: codes -> vectors. `mix`: weights
    [B, L, V] -> weighted means of the code vectors. `refine`: vectors of fixed tokens [R, L, C],
    features and step -> logits of the refinement head. `trace` asks for what each pass left.
    """

    head: Callable[[jax.Array], jax.Array]
    embed: Callable[[jax.Array], jax.Array]
    mix: Callable[[jax.Array], jax.Array]
    refine: Callable[[jax.Array, jax.Array, Step], jax.Array] | None = None
    trace: bool = False


class SamplingMethod:
    """One rule for every step; `kind` says which neighbours may share a loop body."""

    def kind(self, step: int) -> Hashable:
        return None

    def __call__(
        self,
        keys_B: jax.Array,
        features_RLD: jax.Array,
        weight: jax.Array,
        step: Step,
        step_fns: StepFns,
    ) -> tuple[Sampled, jax.Array]:
        """What was drawn, and the guided logits [B, L, V].

        `features_RLD` are B prompted rows, or B prompted and B unprompted ones; `weight` is the
        step's guidance.
        """
        raise NotImplementedError


@flax.struct.dataclass
class FilteredSampling(SamplingMethod):
    """Guided, filtered, then chosen by `choose(keys_B, logits_BLV) -> codes_BL`."""

    keep: Filter
    choose: Callable[[jax.Array, jax.Array], jax.Array] = flax.struct.field(pytree_node=False)

    def __call__(
        self,
        keys_B: jax.Array,
        features_RLD: jax.Array,
        weight: jax.Array,
        step: Step,
        step_fns: StepFns,
    ) -> tuple[Sampled, jax.Array]:
        logits_BLV = guide(step_fns.head(features_RLD), len(keys_B), weight)
        codes_BL = self.choose(keys_B, self.keep(logits_BLV))
        return Sampled(codes_BL, step_fns.embed(codes_BL)), logits_BLV


def gumbel_noise(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, *shape] standard Gumbel noise, one key per image."""
    return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys_B)


@flax.struct.dataclass
class SmoothSampling(SamplingMethod):
    """Soft mixtures of code vectors, sharper with every scale; for pictures only (section 8).

    The codes it reports are the heaviest of each mixture. `noise(keys_B, shape)` gives Gumbel
    noise [B, *shape].
    """

    steps: int = flax.struct.field(pytree_node=False)
    noise: Callable[[jax.Array, tuple[int, ...]], jax.Array] = flax.struct.field(
        pytree_node=False, default=gumbel_noise
    )

    def __call__(
        self,
        keys_B: jax.Array,
        features_RLD: jax.Array,
        weight: jax.Array,
        step: Step,
        step_fns: StepFns,
    ) -> tuple[Sampled, jax.Array]:
        logits_BLV = guide(step_fns.head(features_RLD), len(keys_B), weight)
        ratio = step.index / max(self.steps - 1, 1)
        gumbel = self.noise(keys_B, logits_BLV.shape[1:])
        weights_BLV = soften(logits_BLV, gumbel, ratio, softness(ratio))
        return Sampled(
            weights_BLV.argmax(-1).astype(jnp.int32), step_fns.mix(weights_BLV)
        ), logits_BLV


def softness(ratio: float | jax.Array) -> jax.Array:
    """The temperature of a mixture: it falls from 0.27 as `ratio` goes from 0 to 1."""
    return jnp.maximum(0.27 * (1 - 0.95 * ratio), 0.005)


def soften(
    logits: jax.Array, gumbel: jax.Array, ratio: float | jax.Array, tau: float | jax.Array
) -> jax.Array:
    """softmax(((1 + ratio) logits + gumbel) / tau)."""
    return jax.nn.softmax(((1 + ratio) * logits + gumbel) / tau)


def choose_largest(keys_B: jax.Array, logits_BLV: jax.Array) -> jax.Array:
    """The most probable code, whatever the keys."""
    return logits_BLV.argmax(-1).astype(jnp.int32)


def guide(logits_RLV: jax.Array, batch: int, weight: jax.Array) -> jax.Array:
    """prompted + weight (prompted - unprompted), or the prompted rows where there are no others."""
    if len(logits_RLV) == batch:
        return logits_RLV
    prompted, unprompted = logits_RLV[:batch], logits_RLV[batch:]
    return prompted + weight * (prompted - unprompted)


def guidance_ramp(guidance: float, steps: int) -> jax.Array:
    """[S] float32 weights, linear from 0 to `guidance`: STAR's cfg (STAR specification 8)."""
    return guidance * jnp.arange(steps, dtype=jnp.float32) / max(steps - 1, 1)


def arguments(settings: Settings, steps: int, codes: Index) -> tuple[jax.Array, SamplingMethod]:
    """The guidance of each of `steps` steps, and the draw."""
    ramp_S = guidance_ramp(settings.guidance, steps)
    if settings.smooth:
        return ramp_S, SmoothSampling(steps=steps)
    return ramp_S, FilteredSampling(keep(settings), codes.sample)


def keep(settings: Settings) -> Filter:
    """Which codes may be drawn."""
    top_p = settings.top_p or None
    return Filter(top_k=settings.top_k, top_p=top_p, temperature=settings.temperature)
