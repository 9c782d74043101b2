"""How is a scale sampled in several passes, each conditioned on the tokens fixed before?

Causal-driven stable sampling (STAR specification 9.2). Every pass samples a code for every token
and fixes some of them; after the last pass each token was fixed once. The refinement head reads the
fixed tokens. The base model does not, so its passes differ in their random numbers only.
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.codes import Sampled
from star_jax.core.guidance import StepSettings, guide
from star_jax.core.schedule import Schedule, Step
from star_jax.core.settings import StableSettings
from star_jax.core.unmasking import Mode, budgets
from star_jax.errors import UserError
from star_jax.protocols import MethodTrace, SamplingMethod, StepFns
from star_jax.sampling.methods import FilteredSampling

RANDOM_PASSES = 5  # the first passes over a scale fix tokens at random, whatever their confidence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """A published number of passes.

    Attributes:
        passes: passes over a scale.
        base: how many of them, the first ones, the base model makes.
        late: the first scale with `late_passes`; None: there is none.
        late_passes: passes over each scale from `late` on, all by the head.
    """

    passes: int
    base: int = 0
    late: int | None = None
    late_passes: int = 0

    def of_scale(self, scale: int) -> tuple[int, int]:
        """The passes over a scale, and how many of them the base model makes."""
        if self.late is not None and scale >= self.late:
            return self.late_passes, 0
        return self.passes, self.base


VERSIONS = {
    'new': Version(passes=8),
    '1024': Version(passes=8, base=5, late=13, late_passes=15),
}


@dataclasses.dataclass(frozen=True)
class ScalePasses:
    """The passes over one scale.

    Attributes:
        budgets: how many tokens each pass fixes.
        base: how many passes, the first ones, the base model makes.
    """

    budgets: tuple[int, ...]
    base: int


PassPlan = tuple[ScalePasses | None, ...]  # one entry per step; None: sampled at once


class PassTrace(NamedTuple):
    """Intermediate results of one pass; stacked along a new first axis, all passes over a scale.

    Attributes:
        logits_BLV: guided logits.
        codes_BL: the codes that it sampled for every token.
        confidence_BL: their probabilities after the filter.
        fixed_BL: bool, the tokens fixed by the end of the pass.
        vectors_BLC: the vectors of the fixed tokens, 0 for the others.
    """

    logits_BLV: jax.Array
    codes_BL: jax.Array
    confidence_BL: jax.Array
    fixed_BL: jax.Array
    vectors_BLC: jax.Array


class Fixed(NamedTuple):
    """The tokens that are fixed, and their codes; codes of other tokens mean nothing.

    Attributes:
        mask_BL: True for tokens that are fixed.
        codes_BL: their codes, int32.
    """

    mask_BL: jax.Array
    codes_BL: jax.Array

    def fix(self, chosen_BL: jax.Array, codes_BL: jax.Array) -> 'Fixed':
        """The same with the chosen tokens fixed, too; fixed tokens keep their codes."""
        new_BL = chosen_BL & ~self.mask_BL
        return Fixed(self.mask_BL | new_BL, jnp.where(new_BL, codes_BL, self.codes_BL))

    def vectors(self, step_fns: StepFns) -> jax.Array:
        """[B, L, C]: the vectors of fixed tokens, 0 for the others."""
        return step_fns.embed(self.codes_BL) * self.mask_BL[..., None]


@flax.struct.dataclass
class RandomRanking:
    """Ranks tokens by fresh uniform numbers."""

    def __call__(self, keys_B: jax.Array, step: Step, index: jax.Array, tokens: int) -> jax.Array:
        """[B, tokens] float32 in [0, 1): pass `index` fixes the tokens with the largest first."""
        return jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys_B)


@flax.struct.dataclass
class RecordedRanking:
    """Ranks tokens by recorded numbers.

    Attributes:
        uniform_SPBL: [S, passes, B, tokens of the widest step] numbers of the original.
    """

    uniform_SPBL: jax.Array

    def __call__(self, keys_B: jax.Array, step: Step, index: jax.Array, tokens: int) -> jax.Array:
        """The same; an index after the last recorded pass gives the last recorded numbers."""
        return self.uniform_SPBL[step.index, index, : len(keys_B), :tokens]


@flax.struct.dataclass
class StableSampling:
    """Samples some steps in passes, and the others at once.

    The base model is guided by the weight of the step, the head by `guidance` at every step. The
    first `RANDOM_PASSES` passes fix the tokens that `rank` puts first, later ones those with the
    highest confidence. A pass of the base model first fixes as many tokens by confidence alone, as
    published, unless `once` is set.

    Attributes:
        plain: samples the steps without passes.
        in_passes: its filter and its choice of codes serve every pass.
        guidance: the head's guidance weight.
        plan: the passes over every step (static).
        once: a base model's pass fixes its number of tokens only (static).
        rank: the order in which the first passes fix tokens.
    """

    plain: SamplingMethod
    in_passes: FilteredSampling
    guidance: float | jax.Array
    plan: PassPlan = flax.struct.field(pytree_node=False)
    once: bool = flax.struct.field(pytree_node=False, default=False)
    rank: RandomRanking | RecordedRanking = RandomRanking()

    def kind(self, step: int) -> Hashable:
        return self.plan[step] or self.plain.kind(step)

    def __call__(
        self,
        keys_B: jax.Array,
        features_RLD: jax.Array,
        settings: StepSettings,
        step: Step,
        step_fns: StepFns,
    ) -> tuple[Sampled, MethodTrace | None]:
        """The traced logits and probabilities are those of the base model."""
        passes = self.plan[step.like]
        if passes is None:
            return self.plain(keys_B, features_RLD, settings, step, step_fns)
        batch, tokens = len(keys_B), features_RLD.shape[1]
        base_logits = step_fns.head(features_RLD)
        base_BLV = guide(base_logits, batch, settings.guidance)
        # Once for all passes: the logits of the base model don't depend on the fixed tokens.
        base_filtered = self.in_passes.filter(base_BLV, settings.temperature)
        copies = len(features_RLD) // batch

        def refine(fixed: Fixed) -> tuple[jax.Array, jax.Array]:
            vectors_RLC = jnp.concatenate([fixed.vectors(step_fns)] * copies)
            logits_RLV = step_fns.refine(vectors_RLC, features_RLD, step)
            logits_BLV = guide(logits_RLV, batch, self.guidance)
            return logits_BLV, self.in_passes.filter(logits_BLV, settings.temperature)

        def run_pass(
            by_base: bool, fixed: Fixed, xs: tuple[jax.Array, jax.Array]
        ) -> tuple[Fixed, PassTrace | None]:
            index, budget = xs
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
            code_keys, rank_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
            logits_BLV, filtered_BLV = (base_BLV, base_filtered) if by_base else refine(fixed)
            codes_BL = self.in_passes.choose(code_keys, filtered_BLV, step_fns)
            confidence_BL = _probability(filtered_BLV, codes_BL)
            if by_base and not self.once:
                fixed = fixed.fix(_largest(confidence_BL, budget), codes_BL)
            random_BL = self.rank(rank_keys, step, index, tokens)
            order_BL = jnp.where(index < RANDOM_PASSES, random_BL, confidence_BL)
            open_BL = jnp.where(fixed.mask_BL, -1.0, order_BL)
            fixed = fixed.fix(_largest(open_BL, budget), codes_BL)
            if not step_fns.trace:
                return fixed, None
            vectors_BLC = fixed.vectors(step_fns)
            return fixed, PassTrace(logits_BLV, codes_BL, confidence_BL, fixed.mask_BL, vectors_BLC)

        fixed = Fixed(jnp.zeros((batch, tokens), bool), jnp.zeros((batch, tokens), jnp.int32))
        indices, counts = np.arange(len(passes.budgets)), np.asarray(passes.budgets)
        traces = []
        for by_base, part in ((True, slice(passes.base)), (False, slice(passes.base, None))):
            if len(indices[part]):
                body = functools.partial(run_pass, by_base)
                fixed, trace = jax.lax.scan(body, fixed, (indices[part], counts[part]))
                traces.append(trace)
        sampled = Sampled(fixed.codes_BL, step_fns.embed(fixed.codes_BL))
        if not step_fns.trace:
            return sampled, None
        pass_traces = jax.tree.map(lambda *x: jnp.concatenate(x), *traces)
        probs = jax.nn.softmax(base_filtered)
        return sampled, MethodTrace(base_logits, base_BLV, probs, pass_traces)


def plan_passes(
    schedule: Schedule, version: Version, mode: Mode, first: int, last: int
) -> PassPlan:
    """The passes over each step.

    Args:
        schedule: the steps of an image.
        version: how many passes a scale has.
        mode: how many tokens each pass fixes.
        first: the first step that is sampled in passes.
        last: the last one.

    Raises:
        UserError: a scale has too few tokens for its passes (the original crashes there).
    """
    plan: list[ScalePasses | None] = [None] * schedule.steps
    for step in range(first, last + 1):
        passes, base = version.of_scale(step)
        of_passes = budgets(schedule.sizes[step], passes, mode)
        if min(of_passes) < 1:
            raise UserError(
                f'scale {step} has {schedule.sizes[step]} tokens, too few for {passes} passes of '
                f'stable sampling in mode {mode} (the last would fix {of_passes[-1]}): refine '
                'later scales, with stable.first'
            )
        plan[step] = ScalePasses(of_passes, base)
    return tuple(plan)


def plan_of_settings(schedule: Schedule, settings: StableSettings, first_of_head: int) -> PassPlan:
    """The passes that the settings name, for a head of the scales from `first_of_head` on.

    Raises:
        UserError: as for `plan_passes`, and for scales that the schedule does not have.
    """
    first, last = settings.first or first_of_head, settings.last or schedule.steps - 1
    if not first <= last < schedule.steps:
        raise UserError(
            f'stable.first and stable.last name the scales {first} to {last}, expected scales in '
            f'order below {schedule.steps}'
        )
    return plan_passes(schedule, VERSIONS[settings.version], settings.mode, first, last)


def _probability(filtered_BLV: jax.Array, codes_BL: jax.Array) -> jax.Array:
    """[B, L]: the probability of each code after the filter."""
    probs_BLV = jax.nn.softmax(filtered_BLV)
    return jnp.take_along_axis(probs_BLV, codes_BL[..., None], axis=-1)[..., 0]


def _largest(x_BL: jax.Array, count: jax.Array) -> jax.Array:
    """True at the `count` largest of each row, the first ones of equals."""
    order_BL = jnp.argsort(x_BL, axis=-1, descending=True, stable=True)
    return jnp.argsort(order_BL, axis=-1) < count
