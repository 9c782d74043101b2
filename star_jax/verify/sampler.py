"""How are recorded refinements computed? (kind `star_sampler`)

Generations by the project's one sampler with its stable draw, whose trace returns what every pass
left; and the head under teacher forcing, with the published loss.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from star_jax.convert.entries import to_state
from star_jax.convert.star import star_entries
from star_jax.core import unmasking
from star_jax.core.filters import NucleusFilter
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.protocols import SamplingMethod
from star_jax.sampling.stable import (
    RANDOM_PASSES,
    RecordedRanking,
    StableSampling,
    plan_passes,
)
from star_jax.training import refinement
from star_jax.training.refinement import ReleasedLoss, Unmasking
from star_jax.verify.cases import Case
from star_jax.verify.comparison import GRADIENTS, INTEGERS, LATENTS, LOGITS, LOSSES, NORMS
from star_jax.verify.generate import KNOWN_VERSIONS, OLD, RUN, Generations
from star_jax.verify.rules import Rule, given
from star_jax.verify.star import MODE, text_of, with_cross_attention

PASS = rf'{RUN}\.scale(\d+)\.step(\d+)'


class Refinements(Generations):
    """The runs that the config lists, and the head alone."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if self.star.refinement is None:
            raise UserError(f'{case.folder}: a case of this kind needs enable_adaptive_norm')
        self.forced = functools.cache(self._forced)

    def rules(self) -> tuple[Rule, ...]:
        return (
            given(r'rand\.scale\d+\.step\d+'),
            given('tf_(?:gt_idx|x_BLCv_wo_first_l|mask)|train_mask_[ru]'),
            Rule(r'tokens_per_step\.scale(\d+)', INTEGERS, self.budgets),
            Rule(rf'{PASS}\.idx', INTEGERS, lambda *at: self.left('codes_BL', *at)),
            Rule(rf'{PASS}\.conf', LATENTS, lambda *at: self.left('confidence_BL', *at)),
            Rule(rf'{PASS}\.logits', LOGITS, lambda *at: self.left('logits_BLV', *at)),
            Rule(rf'{PASS}\.mask', INTEGERS, lambda *at: self.left('fixed_BL', *at)),
            Rule(rf'{PASS}\.h', LATENTS, lambda *at: self.left('vectors_BLC', *at)),
            Rule(r'schedule\.(\w+)\.steps(\d+)\.pn(\d+)', INTEGERS, budgets_of_side),
            Rule(r'train_mask\.(\w+)', INTEGERS, self.shown),
            Rule('tf_embed_Cvae', LATENTS, lambda: self.vectors_BLC),
            Rule(f'tf_base_features_{MODE}', LOGITS, lambda mode: self.forced(mode)[0]),
            Rule(f'tf_logits_{MODE}', LOGITS, lambda mode: self.forced(mode)[1]),
            Rule('tf_trainer_loss', LOSSES, lambda: self.trained[0]),
            Rule('tf_trainer_grad_norm', NORMS, lambda: self.trained[1]),
            Rule(r'tf_trainer_grad\.(.+)', GRADIENTS, lambda name: self.trained[2][name]),
            *super().rules(),
        )

    @functools.cached_property
    def plans(self):
        """The passes over every scale, of the version that was recorded."""
        version = self.case.option('sample_version')
        if version not in KNOWN_VERSIONS:
            raise UserError(
                f'{self.case.path}: sample_version must be one of {", ".join(KNOWN_VERSIONS)}, '
                f'not {version!r}'
            )
        schedule, first = self.star.schedule, self.star.refinement.first
        return plan_passes(schedule, KNOWN_VERSIONS[version], 'arccos', first, schedule.steps - 1)

    @functools.cached_property
    def ranking(self) -> RecordedRanking:
        """The recorded uniform numbers, padded to one array."""
        sizes = self.star.schedule.sizes
        rows = len(self.case.given('encoder_attention_mask')) // 2
        uniform_SPBL = np.zeros((len(sizes), RANDOM_PASSES, rows, max(sizes)), np.float32)
        for scale, planned in enumerate(self.plans):
            for index in range(min(RANDOM_PASSES, len(planned.budgets)) if planned else 0):
                numbers_BL = self.case.given(f'rand.scale{scale}.step{index}')
                uniform_SPBL[scale, index, :, : sizes[scale]] = numbers_BL
        return RecordedRanking(jnp.asarray(uniform_SPBL))

    def _method(self, run: dict[str, Any]) -> SamplingMethod:
        plain = self._unrefined(run)
        if not run['refine']:
            return plain
        if self.run_option(run, 'more_smooth', False):
            raise UserError(f'{self.case.folder}: a run cannot be smooth and refined')
        old = self.case.option('sample_version') == OLD
        first = self.star.refinement.first
        return StableSampling(
            plain=plain,
            in_passes=plain.replace(filter=overwritten(plain.filter, first)) if old else plain,
            guidance=self.run_option(run, 'cfg'),
            plan=self.plans,
            rank=self.ranking,
        )

    def left(self, what: str, run: str, scale: str, index: str) -> jax.Array:
        """What a pass over a scale left."""
        passes = self.trace(run, scale).method.passes
        if passes is None or int(index) >= len(passes.codes_BL):
            raise LookupError(f'scale {scale} takes no pass {index}')
        return getattr(passes, what)[int(index)]

    def budgets(self, scale: str) -> np.ndarray:
        planned = self.plans[int(scale)]
        if planned is None:
            raise LookupError(f'scale {scale} is not refined')
        return np.asarray(planned.budgets)

    def shown(self, mode: str) -> np.ndarray:
        r_B, u_BL = self.case.given('train_mask_r'), self.case.given('train_mask_u')
        return Unmasking(mode=mode).shown(r_B, u_BL)

    @functools.cached_property
    def refined(self) -> slice:
        return slice(self.star.schedule.starts[self.star.refinement.first], None)

    @functools.cached_property
    def vectors_BLC(self) -> jax.Array:
        """Vectors of the refined codes."""
        codebook = self.params['tokenizer']['quantiser']['codebook']
        return codebook[self.case.given('tf_gt_idx')[:, self.refined]]

    @functools.cached_property
    def head_inputs(self) -> tuple:
        """Inputs of the base model, vectors of the tokens shown, and text."""
        inputs = self.case.given('tf_x_BLCv_wo_first_l')
        shown_BL = self.case.given('tf_mask')
        text = jax.tree.map(lambda x: x[: len(inputs)], text_of(self.case))
        return inputs, self.vectors_BLC * shown_BL[..., None], text

    def _forced(self, mode: str) -> tuple[jax.Array, jax.Array]:
        """Features of the refined tokens and the head's logits."""
        return guessing(with_cross_attention(self.star, mode))(
            self.params['model'], *self.head_inputs
        )

    @functools.cached_property
    def trained(self) -> tuple[jax.Array, jax.Array, dict[str, np.ndarray]]:
        """The published loss, and norm and gradients of the head, in the reference's names."""
        codes_BL = self.case.given('tf_gt_idx')[:, self.refined]
        shown_BL = self.case.given('tf_mask') > 0
        star = with_cross_attention(self.star, 'per_sample')
        loss, head = differentiating(star)(
            self.params['model'], *self.head_inputs, codes_BL, shown_BL
        )
        entries = [one for one in star_entries(star) if one.ours.startswith('refiner/')]
        return loss, optax.tree.norm(head), to_state(entries, {'refiner': head})


def overwritten(keep: NucleusFilter, first: int) -> NucleusFilter:
    """What version 'old' has made of a filter when it comes to its first refined scale.

    Each scale before sets the nucleus, and those from 9 and from 12 on the number of codes
    (STAR specification 8).
    """
    top_k = keep.top_k if first <= 9 else 300 if first <= 12 else 100
    return NucleusFilter(top_k=top_k, top_p=0.8)


def budgets_of_side(mode: str, passes: str, side: str) -> np.ndarray:
    """As the original computes them, also for sides that are too small."""
    if mode not in unmasking.SHARES:
        raise LookupError(f'there is no mode {mode}')
    return np.asarray(unmasking.budgets(int(side) ** 2, int(passes), mode))


@functools.cache
def guessing(star: Star) -> Callable:
    """Parameters, inputs, vectors and text -> features and logits of refined tokens."""
    return jax.jit(functools.partial(refinement.guess, star.build()))


@functools.cache
def differentiating(star: Star) -> Callable:
    """The same, codes and which are shown -> the published loss and its gradients to the head."""

    def loss(head, params, inputs, vectors_BLC, text, codes_BL, shown_BL):
        params = params | {'refiner': head}
        logits_BLV = refinement.guess(star.build(), params, inputs, vectors_BLC, text)[1]
        return ReleasedLoss()(logits_BLV, codes_BL, shown_BL, star.schedule.length)

    return jax.jit(lambda params, *rest: jax.value_and_grad(loss)(params['refiner'], params, *rest))
