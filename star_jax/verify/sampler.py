"""How are recorded refinements computed? (kind `star_sampler`)

Generations use the library's sampler with stable sampling, whose trace holds the arrays of every
pass. The refinement head also runs under teacher forcing, with the published loss.
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
from star_jax.losses import refinement
from star_jax.losses.refinement import ReleasedLoss, Unmasking
from star_jax.protocols import SamplingMethod
from star_jax.sampling.stable import (
    RANDOM_PASSES,
    RecordedRanking,
    StableSampling,
    plan_passes,
)
from star_jax.verify.cases import Case
from star_jax.verify.comparison import GRADIENTS, INTEGERS, LATENTS, LOGITS, LOSSES, NORMS
from star_jax.verify.generate import KNOWN_VERSIONS, OLD, RUN, Generations
from star_jax.verify.rules import Rule, inputs
from star_jax.verify.star import MODE, text_of, with_cross_attention

PASS = rf'{RUN}\.scale(\d+)\.step(\d+)'


class Refinements(Generations):
    """The runs that the config lists, and the refinement head alone."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if self.star.refinement is None:
            raise UserError(f'{case.folder}: a case of this kind needs enable_adaptive_norm')
        self.teacher_forced = functools.cache(self._teacher_forced)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs(r'rand\.scale\d+\.step\d+'),
            inputs('tf_(?:gt_idx|x_BLCv_wo_first_l|mask)|train_mask_[ru]'),
            Rule(r'tokens_per_step\.scale(\d+)', INTEGERS, self.budgets),
            Rule(rf'{PASS}\.idx', INTEGERS, lambda *at: self.pass_array('codes_BL', *at)),
            Rule(rf'{PASS}\.conf', LATENTS, lambda *at: self.pass_array('confidence_BL', *at)),
            Rule(rf'{PASS}\.logits', LOGITS, lambda *at: self.pass_array('logits_BLV', *at)),
            Rule(rf'{PASS}\.mask', INTEGERS, lambda *at: self.pass_array('fixed_BL', *at)),
            Rule(rf'{PASS}\.h', LATENTS, lambda *at: self.pass_array('vectors_BLC', *at)),
            Rule(r'schedule\.(\w+)\.steps(\d+)\.pn(\d+)', INTEGERS, budgets_of_side),
            Rule(r'train_mask\.(\w+)', INTEGERS, self.visible_tokens),
            Rule('tf_embed_Cvae', LATENTS, lambda: self.vectors_BLC),
            Rule(f'tf_base_features_{MODE}', LOGITS, lambda mode: self.teacher_forced(mode)[0]),
            Rule(f'tf_logits_{MODE}', LOGITS, lambda mode: self.teacher_forced(mode)[1]),
            Rule('tf_trainer_loss', LOSSES, lambda: self.trained[0]),
            Rule('tf_trainer_grad_norm', NORMS, lambda: self.trained[1]),
            Rule(r'tf_trainer_grad\.(.+)', GRADIENTS, lambda name: self.trained[2][name]),
            *super().rules(),
        )

    @functools.cached_property
    def plans(self):
        """The passes over every scale, in the recorded version."""
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
        rows = len(self.case.input('encoder_attention_mask')) // 2
        uniform_SPBL = np.zeros((len(sizes), RANDOM_PASSES, rows, max(sizes)), np.float32)
        for scale, planned in enumerate(self.plans):
            for index in range(min(RANDOM_PASSES, len(planned.budgets)) if planned else 0):
                numbers_BL = self.case.input(f'rand.scale{scale}.step{index}')
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

    def pass_array(self, name: str, run: str, scale: str, index: str) -> jax.Array:
        """An array of the trace of one pass over a scale."""
        passes = self.trace(run, scale).method.passes
        if passes is None or int(index) >= len(passes.codes_BL):
            raise LookupError(f'scale {scale} has no pass {index}')
        return getattr(passes, name)[int(index)]

    def budgets(self, scale: str) -> np.ndarray:
        planned = self.plans[int(scale)]
        if planned is None:
            raise LookupError(f'scale {scale} is not refined')
        return np.asarray(planned.budgets)

    def visible_tokens(self, mode: str) -> np.ndarray:
        """The training mask of recorded uniform numbers: 1 where the head reads the token."""
        r_B, u_BL = self.case.input('train_mask_r'), self.case.input('train_mask_u')
        return Unmasking(mode=mode).shown(r_B, u_BL)

    @functools.cached_property
    def refined(self) -> slice:
        """The rows of the refined scales."""
        return slice(self.star.schedule.starts[self.star.refinement.first], None)

    @functools.cached_property
    def vectors_BLC(self) -> jax.Array:
        """Vectors of the refined codes."""
        codebook = self.params['tokenizer']['quantiser']['codebook']
        return codebook[self.case.input('tf_gt_idx')[:, self.refined]]

    @functools.cached_property
    def head_inputs(self) -> tuple:
        """Inputs of the base model, vectors of the visible tokens, and text."""
        inputs = self.case.input('tf_x_BLCv_wo_first_l')
        visible_BL = self.case.input('tf_mask')
        text = jax.tree.map(lambda x: x[: len(inputs)], text_of(self.case))
        return inputs, self.vectors_BLC * visible_BL[..., None], text

    def _teacher_forced(self, mode: str) -> tuple[jax.Array, jax.Array]:
        """Features of the refined tokens, and logits of the head."""
        return head_fn(with_cross_attention(self.star, mode))(
            self.params['model'], *self.head_inputs
        )

    @functools.cached_property
    def trained(self) -> tuple[jax.Array, jax.Array, dict[str, np.ndarray]]:
        """The published loss, gradient norm, and gradients of the head in the original names."""
        codes_BL = self.case.input('tf_gt_idx')[:, self.refined]
        visible_BL = self.case.input('tf_mask') > 0
        star = with_cross_attention(self.star, 'per_sample')
        loss, head = head_gradient_fn(star)(
            self.params['model'], *self.head_inputs, codes_BL, visible_BL
        )
        entries = [entry for entry in star_entries(star) if entry.param_name.startswith('refiner/')]
        return loss, optax.tree.norm(head), to_state(entries, {'refiner': head})


def overwritten(keep: NucleusFilter, first: int) -> NucleusFilter:
    """The filter that version 'old' uses from the first refined scale on.

    Every earlier scale overwrites top-p, and scales 9 and 12 overwrite top-k (STAR specification
    8).
    """
    top_k = keep.top_k if first <= 9 else 300 if first <= 12 else 100
    return NucleusFilter(top_k=top_k, top_p=0.8)


def budgets_of_side(mode: str, passes: str, side: str) -> np.ndarray:
    """The token budgets of a scale as in the original, also for sides that are too small.

    Raises:
        LookupError: the mode is unknown.
    """
    if mode not in unmasking.SHARES:
        raise LookupError(f'unknown mode {mode}')
    return np.asarray(unmasking.budgets(int(side) ** 2, int(passes), mode))


@functools.cache
def head_fn(star: Star) -> Callable:
    """(params, inputs, vectors, text) -> (features, logits) of the refined tokens, jitted."""
    return jax.jit(functools.partial(refinement.refine, star.build()))


@functools.cache
def head_gradient_fn(star: Star) -> Callable:
    """(params, inputs, vectors, text, codes, visible) -> (published loss, gradients), jitted.

    The gradients are those of the head alone.
    """

    def loss(head, params, inputs, vectors_BLC, text, codes_BL, visible_BL):
        params = params | {'refiner': head}
        logits_BLV = refinement.refine(star.build(), params, inputs, vectors_BLC, text)[1]
        return ReleasedLoss()(logits_BLV, codes_BL, visible_BL, star.schedule.length)

    return jax.jit(lambda params, *rest: jax.value_and_grad(loss)(params['refiner'], params, *rest))
