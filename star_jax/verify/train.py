"""How is a recorded training run repeated? (kind `star_train`)"""

import functools
import re

import jax
import numpy as np
import optax

from star_jax.convert.entries import to_state
from star_jax.convert.star import IGNORED, star_entries
from star_jax.errors import UserError
from star_jax.nn.bind import bind
from star_jax.training import gradients
from star_jax.training.optimizer import AdamW, decayed, gradient_norm
from star_jax.training.schedules import LearningRate
from star_jax.verify import cases
from star_jax.verify.cases import AFTER, Case
from star_jax.verify.comparison import INTEGERS, LATENTS, LOSSES, NORMS, PARAMETERS, SCHEDULES
from star_jax.verify.rules import Rule, inputs
from star_jax.verify.star import TEXT, mean_nll, text_of, with_cross_attention
from star_jax.verify.tokenizer import to_nhwc

STEP = r'step(\d+)\.'


class Training:
    """Training steps: frozen tokenizer, loss, gradients and optimizer."""

    def __init__(self, case: Case) -> None:
        self.case = case
        mode = case.optional('cross_attention', 'corrected').partition(':')[0]
        self.star = with_cross_attention(cases.star_config(case), mode)
        self.params = cases.star_params(case, self.star)
        self.vq, self.tokenizer = case.tokenizer
        numbers = [int(match[1]) for name in case.arrays if (match := re.match(STEP, name))]
        self.steps = np.arange(max(numbers, default=-1) + 1)
        self.total = case.option('optimizer', 'max_iterations')
        self.optimizer = optimizer_of(case)
        self._check_decay()
        self.encoded = functools.cache(self._encoded)

    def rules(self) -> tuple[Rule, ...]:
        peak = self.optimizer.learning_rate.peak
        return (
            inputs(f'{STEP}image'),
            inputs(STEP + TEXT),
            Rule(f'{STEP}gt_idx', INTEGERS, lambda step: self.encoded(int(step))[0]),
            Rule(f'{STEP}x_BLCv_wo_first_l', LATENTS, lambda step: self.encoded(int(step))[1]),
            Rule('lr', SCHEDULES, self.rates, peak),
            Rule('weight_decay', SCHEDULES, self.decays),
            Rule('losses', LOSSES, lambda: self.trained[0]),
            Rule('grad_norm_before_clip', NORMS, lambda: self.trained[1]),
            Rule(rf'{AFTER}\.(.+)', PARAMETERS, lambda name: self.trained[2][name]),
        )

    def _check_decay(self) -> None:
        """Raises UserError if the config lists other parameters as decaying than ours."""
        masks = jax.tree.map(
            lambda leaf, decays: np.full(leaf.shape, decays), self.params, decayed(self.params)
        )
        state = to_state(star_entries(self.star), masks)
        for option, decays in (
            ('parameters_with_weight_decay', True),
            ('parameters_without_weight_decay', False),
        ):
            listed = self.case.optional(option)
            ours = {name for name, mask in state.items() if mask.all() == decays}
            if listed is not None and ours != {n for n in listed if not n.endswith(IGNORED)}:
                raise UserError(f'{self.case.path}: {option} lists other parameters than ours')

    def rates(self) -> jax.Array:
        return self.optimizer.learning_rate.at(self.steps, self.total)

    def decays(self) -> jax.Array:
        return self.optimizer.decay_at(self.steps, self.total)

    def _encoded(self, step: int) -> tuple[jax.Array, jax.Array]:
        """Codes of the images of a step, and the inputs of the transformer."""
        return self._encode(self.tokenizer, to_nhwc(self.case.input(f'step{step}.image')))

    @functools.cached_property
    def _encode(self):
        def encode(params, images):
            tokenizer = bind(self.vq.build(), params)
            codes_BL = tokenizer.encode(images)
            return codes_BL, tokenizer.inputs(codes_BL)

        return jax.jit(encode)

    @functools.cached_property
    def trained(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Losses, gradient norms (0 where no update is made), and the state dict after the last."""
        rows = tuple(range(self.star.schedule.length))
        smoothing = self.case.optional('label_smoothing', 0.0)
        loss = functools.partial(mean_nll, self.star, rows, smoothing=smoothing)
        optimizer, accumulate = self.optimizer.build(self.total), self.optimizer.accumulate

        @jax.jit
        def micro_step(total, params, inputs, text, codes_BL):
            value, gradient = jax.value_and_grad(loss)(params, inputs, text, codes_BL)
            return gradients.add(total, gradient), value

        @jax.jit
        def update(total, params, opt):
            updates, opt = optimizer.update(gradients.mean(total, accumulate), opt, params)
            return optax.apply_updates(params, updates), opt, gradient_norm(opt)

        params, opt = self.params, jax.jit(optimizer.init)(self.params)
        none = jax.tree.map(np.zeros_like, params)
        losses, norms, total = [], np.zeros(len(self.steps), np.float32), none
        for step in self.steps:
            codes_BL, inputs = self.encoded(int(step))
            text = text_of(self.case, f'step{step}.')
            total, value = micro_step(total, params, inputs, text, codes_BL)
            losses.append(value)
            if (step + 1) % accumulate == 0:
                params, opt, norms[step] = update(total, params, opt)
                total = none
        before = self.case.state.items()
        unchanged = {name: array for name, array in before if name.endswith(IGNORED)}
        after = unchanged | to_state(star_entries(self.star), params)
        return np.asarray(losses), norms, after


def optimizer_of(case: Case) -> AdamW:
    """The optimizer of the original options."""
    option = functools.partial(case.option, 'optimizer')
    if not option('name').startswith('AdamW'):
        raise UserError(f'{case.path}: optimizer.name must start with AdamW')
    beta1, beta2 = option('betas')
    try:
        return AdamW(
            learning_rate=LearningRate(
                peak=option('peak_lr'),
                warmup_steps=round(option('warmup_iterations')),
                start=option('wp0'),
                end=option('wpe'),
                shape=option('schedule'),
            ),
            weight_decay=option('weight_decay'),
            weight_decay_end=option('weight_decay_end'),
            beta1=beta1,
            beta2=beta2,
            epsilon=option('eps'),
            clip=option('grad_clip_global_norm'),
            accumulate=case.option('gradient_accumulation'),
        )
    except ValueError as error:
        raise UserError(f'{case.folder}: {error}') from error
