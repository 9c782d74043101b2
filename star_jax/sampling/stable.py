"""How is a scale drawn in several passes, each looking at what the earlier ones fixed?

Causal-driven stable sampling (STAR specification 9.2). Every pass draws a code for every token,
and fixes some of them; in the end each token was fixed once. The refinement head sees the fixed
ones; the base model does not, so that its passes differ only in luck.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.codes import Index, Sampled
from star_jax.core.filters import Filter
from star_jax.core.schedule import Schedule, Step
from star_jax.core.settings import Settings
from star_jax.core.settings import Stable as Wanted
from star_jax.core.unmasking import Mode, budgets
from star_jax.errors import UserError
from star_jax.nn.transformer import Transformer
from star_jax.sampling import methods
from star_jax.sampling.methods import SamplingMethod, StepFns, guide

LUCKY = 5  # passes of a scale that fix tokens at random, whatever their confidence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """One of the published ways: `passes` over a scale, the first `base` of them by the base model.

    Scales from `late` on take `late_passes`, all by the head.
    """

    passes: int
    base: int = 0
    late: int | None = None
    late_passes: int = 0

    def of_scale(self, scale: int) -> tuple[int, int]:
        """How many passes it takes, and how many of them are the base model's."""
        if self.late is not None and scale >= self.late:
            return self.late_passes, 0
        return self.passes, self.base


VERSIONS = {
    'new': Version(passes=8),
    '1024': Version(passes=8, base=5, late=13, late_passes=15),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Budgets of every pass over a scale, and how many passes are the base model's."""

    budgets: tuple[int, ...]
    base: int


Plans = tuple[Plan | None, ...]  # of every step; None: drawn at once


class Pass(NamedTuple):
    """What one pass left: codes and confidence of every token, and the tokens fixed by then with
    their vectors (zero for the others)."""

    logits_BLV: jax.Array
    codes_BL: jax.Array
    confidence_BL: jax.Array
    fixed_BL: jax.Array
    vectors_BLC: jax.Array


class Fixed(NamedTuple):
    """Which tokens are fixed, and with which code; other codes mean nothing."""

    mask_BL: jax.Array
    codes_BL: jax.Array

    def fix(self, chosen_BL: jax.Array, codes_BL: jax.Array) -> 'Fixed':
        """With the chosen tokens fixed too; those that were already keep their codes."""
        new_BL = chosen_BL & ~self.mask_BL
        return Fixed(self.mask_BL | new_BL, jnp.where(new_BL, codes_BL, self.codes_BL))


@flax.struct.dataclass
class RandomRanking:
    """Fresh uniform numbers."""

    def __call__(self, keys_B: jax.Array, step: Step, index: jax.Array, tokens: int) -> jax.Array:
        """[B, tokens] float32 in [0, 1): the larger, the sooner pass `index` fixes a token."""
        return jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys_B)


@flax.struct.dataclass
class RecordedRanking:
    """Given numbers [S, passes, B, widest step], as of the original's first five passes."""

    uniform_SPBL: jax.Array

    def __call__(self, keys_B: jax.Array, step: Step, index: jax.Array, tokens: int) -> jax.Array:
        """Of later passes, which rank by confidence, those of the last recorded one."""
        return self.uniform_SPBL[step.index, index, : len(keys_B), :tokens]


@flax.struct.dataclass
class Stable(SamplingMethod):
    """`plans` says which steps are drawn in passes; the others are drawn by `plain`.

    In a pass, codes are guided, filtered by `keep`, and chosen by `choose(keys_B, logits_BLV)`. The
    base model is guided by the step's weight, the head by `guidance` at every step. The first five
    passes fix the tokens that `rank` puts first, later ones those whose code is most probable. A
    base model's pass first fixes as many by confidence alone, as published, unless `once` is set.
    """

    plain: SamplingMethod
    keep: Filter
    guidance: float | jax.Array
    choose: Callable[[jax.Array, jax.Array], jax.Array] = flax.struct.field(pytree_node=False)
    plans: Plans = flax.struct.field(pytree_node=False)
    once: bool = flax.struct.field(pytree_node=False, default=False)
    rank: RandomRanking | RecordedRanking = RandomRanking()

    def kind(self, step: int) -> Hashable:
        return self.plans[step] or self.plain.kind(step)

    def __call__(
        self,
        keys_B: jax.Array,
        features_RLD: jax.Array,
        weight: jax.Array,
        step: Step,
        step_fns: StepFns,
    ) -> tuple[Sampled, jax.Array]:
        """The guided logits that it returns are those of the base model."""
        plan = self.plans[step.like]
        if plan is None:
            return self.plain(keys_B, features_RLD, weight, step, step_fns)
        batch, tokens = len(keys_B), features_RLD.shape[1]
        base_BLV = guide(step_fns.head(features_RLD), batch, weight)
        kept_BLV = self.keep(base_BLV)  # once: the base model says the same in every pass
        rows = len(features_RLD) // batch

        def refined(fixed: Fixed) -> tuple[jax.Array, jax.Array]:
            vectors_RLC = jnp.concatenate([_vectors(fixed, step_fns)] * rows)
            logits_RLV = step_fns.refine(vectors_RLC, features_RLD, step)
            logits_BLV = guide(logits_RLV, batch, self.guidance)
            return logits_BLV, self.keep(logits_BLV)

        def visit(by_base: bool, fixed: Fixed, turn: tuple) -> tuple[Fixed, Pass | None]:
            index, budget = turn
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
            draw_keys, rank_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
            logits = (base_BLV, kept_BLV) if by_base else refined(fixed)
            codes_BL, sure_BL = self._draw(draw_keys, logits[1])
            if by_base and not self.once:
                fixed = fixed.fix(_largest(sure_BL, budget), codes_BL)
            lucky_BL = self.rank(rank_keys, step, index, tokens)
            order_BL = jnp.where(index < LUCKY, lucky_BL, sure_BL)
            open_BL = jnp.where(fixed.mask_BL, -1.0, order_BL)
            fixed = fixed.fix(_largest(open_BL, budget), codes_BL)
            left = (logits[0], codes_BL, sure_BL, fixed.mask_BL, _vectors(fixed, step_fns))
            return fixed, Pass(*left) if step_fns.trace else None

        fixed = Fixed(jnp.zeros((batch, tokens), bool), jnp.zeros((batch, tokens), jnp.int32))
        turns = (np.arange(len(plan.budgets)), np.asarray(plan.budgets))
        left = []
        for by_base, part in ((True, slice(plan.base)), (False, slice(plan.base, None))):
            xs = tuple(x[part] for x in turns)
            if len(xs[0]):
                fixed, passes = jax.lax.scan(lambda *at, b=by_base: visit(b, *at), fixed, xs)
                left.append(passes)
        passes = jax.tree.map(lambda *x: jnp.concatenate(x), *left)
        vectors_BLC = step_fns.embed(fixed.codes_BL)
        return Sampled(fixed.codes_BL, vectors_BLC, passes), base_BLV

    def _draw(self, keys_B: jax.Array, kept_BLV: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes, and their probabilities among those that the filter has left."""
        codes_BL = self.choose(keys_B, kept_BLV)
        probs_BLV = jax.nn.softmax(kept_BLV)
        sure_BL1 = jnp.take_along_axis(probs_BLV, codes_BL[..., None], axis=-1)
        return codes_BL, sure_BL1[..., 0]


def plan(schedule: Schedule, version: Version, mode: Mode, first: int, last: int) -> Plans:
    """The passes over each step; the steps from `first` to `last` are drawn in passes.

    Raises UserError where a scale has too few tokens for them, as the original crashes there.
    """
    plans: list[Plan | None] = [None] * schedule.steps
    for step in range(first, last + 1):
        passes, base = version.of_scale(step)
        of_passes = budgets(schedule.sizes[step], passes, mode)
        if min(of_passes) < 1:
            raise UserError(
                f'scale {step} has {schedule.sizes[step]} tokens, too few for {passes} passes of '
                f'stable sampling in mode {mode} (the last would fix {of_passes[-1]}): refine '
                'later scales, with stable.first'
            )
        plans[step] = Plan(of_passes, base)
    return tuple(plans)


def arguments(
    settings: Settings, network: Transformer, codes: Index
) -> tuple[jax.Array, SamplingMethod]:
    """The guidance of each step, and the draw, plain or stable.

    Raises UserError where the network has no refinement head for stable sampling, and as
    `plan_wanted` does.
    """
    schedule = network.schedule
    ramp_S, plain = methods.arguments(settings, schedule.steps, codes)
    if settings.stable.version == 'off':
        return ramp_S, plain
    if network.refiner is None:
        raise UserError(
            'stable sampling needs a model with a refinement head, which this one has not: train '
            'one on it (a config whose model has a refinement, and --init), or leave it off'
        )
    return ramp_S, Stable(
        plain=plain,
        keep=methods.keep(settings),
        guidance=settings.guidance,
        choose=codes.sample,
        plans=plan_wanted(schedule, settings.stable, network.refiner.first),
        once=settings.stable.once,
    )


def plan_wanted(schedule: Schedule, wanted: Wanted, made_for: int) -> Plans:
    """The passes that settings ask for, of a head made for the scales from `made_for` on.

    Raises UserErrors as `plan` does, and for scales that there are not.
    """
    first, last = wanted.first or made_for, wanted.last or schedule.steps - 1
    if not first <= last < schedule.steps:
        raise UserError(
            f'stable.first and stable.last ask for the scales {first} to {last}, expected scales '
            f'in order below {schedule.steps}'
        )
    return plan(schedule, VERSIONS[wanted.version], wanted.mode, first, last)


def _vectors(fixed: Fixed, step_fns: StepFns) -> jax.Array:
    """[B, L, C]: zero where nothing is fixed."""
    return step_fns.embed(fixed.codes_BL) * fixed.mask_BL[..., None]


def _largest(x_BL: jax.Array, count: jax.Array) -> jax.Array:
    """True at the `count` largest of each row, the first ones of equals."""
    order_BL = jnp.argsort(x_BL, axis=-1, descending=True, stable=True)
    return jnp.argsort(order_BL, axis=-1) < count
