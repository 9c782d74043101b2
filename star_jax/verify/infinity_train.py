"""How is a recorded training step of Infinity repeated? (kind `train_step`)

The step goes from an image to the loss and its gradients, with the recorded flips and dropped
texts.
"""

import functools
import typing
from collections.abc import Callable

import jax
import numpy as np

from star_jax.convert.bsq import IGNORED, bsq_entries
from star_jax.convert.entries import to_state
from star_jax.convert.infinity import infinity_entries
from star_jax.core import condition
from star_jax.core.codes import Targets
from star_jax.core.self_correction import flip_mask
from star_jax.errors import UserError
from star_jax.families.infinity import Infinity
from star_jax.losses import tokens
from star_jax.losses.tokens import TokenLosses
from star_jax.nn.bind import bind
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import (
    ACTIVATIONS,
    FLOORED_GRADIENTS,
    INTEGERS,
    LATENTS,
    LOSSES,
    TOKENIZED,
)
from star_jax.verify.infinity import named
from star_jax.verify.infinity_tokenizer import check_percents, to_recorded, tokenizer_config
from star_jax.verify.infinity_transformer import (
    TEXT,
    dropped_fn,
    infinity_config,
    infinity_params,
    text_of,
)
from star_jax.verify.rules import Rule, inputs

REWEIGHTED = 0.5  # the balance that weights a token by 1 / sqrt(tokens of its scale)
NETWORK, TOKENIZER = 'gpt/', 'vae/'  # prefixes of the tensors of a case with both


class BitTraining:
    """Labels, inputs, logits, losses, metrics and gradients of one step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        option = case.option
        patchify = bool(option('apply_spatial_patchify'))
        self.bsq = tokenizer_config(case, option('vae'), option('full_schedule'), patchify)
        self.infinity = infinity_config(
            case,
            bits=self.bsq.vector_width,
            schedule=_trained_schedule(case),
            reference=option('full_schedule'),
        )
        self.params = infinity_params(case, self.infinity, state_of(case, NETWORK))
        state = state_of(case, TOKENIZER)
        self.tokenizer = cases.convert(case, bsq_entries(self.bsq, state), state, IGNORED)
        self.text = text_of(case, 'in/')
        self.flipped = option('noise_apply_layers') if option('noise_apply_requant') else 0
        check_percents(case, 'in/', option('noise_apply_strength'))
        self.losses = functools.cache(self._losses)

    def rules(self) -> tuple[Rule, ...]:
        run = '([^/]+)'
        return (
            inputs(r'in/(?:image|drop_mask|strength_percent|uniform/s\d+)'),
            inputs(TEXT),
            Rule('mid/features', TOKENIZED, lambda: to_recorded(self.encoded[0])),
            Rule(r'mid/flip_mask/s(\d+)', INTEGERS, lambda s: self.mask(int(s))),
            Rule('mid/x_wo_prefix_all', LATENTS, lambda: self.encoded[1].inputs_BLC),
            Rule('mid/x_wo_prefix', LATENTS, lambda: self.targets.inputs_BLC),
            Rule(r'mid/labels/s(\d+)', INTEGERS, lambda s: self.labels(int(s))),
            Rule('out/logits', ACTIVATIONS, self.logits),
            Rule(f'out/{run}/loss', LOSSES, lambda run: self.losses(run)[0]),
            Rule(f'out/{run}/metrics', LOSSES, self.metrics),
            Rule(
                f'out/{run}/per_scale_L', LOSSES, lambda _: self.per_scale(self.token_losses.nll_BL)
            ),
            Rule(
                f'out/{run}/per_scale_Acc_bit',
                LOSSES,
                lambda _: 100 * self.per_scale(self.token_losses.hit_BL),
            ),
            Rule(
                f'out/{run}/per_scale_Acc_token',
                LOSSES,
                lambda _: 100 * self.per_scale(self.right_BL),
            ),
            Rule(f'grad/{run}/(.+)', FLOORED_GRADIENTS, lambda run, n: self.losses(run)[2][n]),
        )

    def mask(self, step: int) -> jax.Array:
        """Which bits of a scale the recorded numbers flip, [B, 1, h, w, K]."""
        percent = self.case.input('in/strength_percent')[step]
        return flip_mask(self.case.input(f'in/uniform/s{step}'), percent)

    def flips(self, step: int, shape: tuple[int, ...]) -> jax.Array | None:
        return self.mask(step)[:, 0] if step < self.flipped else None

    @functools.cached_property
    def encoded(self) -> tuple[jax.Array, Targets]:
        """Features of the images, and inputs and labels of all scales."""

        def encode(params: dict, images_BHWc: np.ndarray) -> tuple[jax.Array, Targets]:
            tokenizer = bind(self.bsq.build(), params)
            f_BhwK = tokenizer.features(images_BHWc)
            return f_BhwK, tokenizer.corrected(f_BhwK, self.flips)

        images_BHWc = np.moveaxis(self.case.input('in/image'), 1, -1)
        return jax.jit(encode)(self.tokenizer, images_BHWc)

    @property
    def targets(self) -> Targets:
        """Inputs and labels of the scales that are trained."""
        length, every = self.infinity.schedule.length, self.encoded[1]
        return Targets(every.inputs_BLC[:, : length - 1], every.codes_BL[:, :length])

    def labels(self, scale: int) -> jax.Array:
        first, end = self.bsq.schedule.offsets[scale : scale + 2]
        return self.encoded[1].codes_BL[:, first:end]

    def logits(self) -> jax.Array:
        drop_B = self.case.input('in/drop_mask')
        forward = dropped_fn(self.infinity)
        return forward(self.params, self.targets.inputs_BLC, self.text, drop_B)

    def _losses(self, name: str) -> tuple[jax.Array, TokenLosses, dict[str, np.ndarray]]:
        """The loss of a run, the losses of its tokens, and gradients in the original names."""
        run = named(self.case, 'runs', 'name', name)
        schedule, of_bits = self.infinity.schedule, run['bitloss_type']
        if of_bits not in (known := typing.get_args(tokens.BitReduction)):
            raise UserError(
                f'{self.case.path}: bitloss_type of {name} is {of_bits!r}, expected one of '
                f'{", ".join(known)}'
            )
        balance = REWEIGHTED if run['reweight'] else 0.0
        weights_L = tokens.token_weights(schedule, schedule.length, balance)
        differentiate = _loss_fn(self.infinity, self.case.option('label_smoothing'), of_bits)
        drop_B = self.case.input('in/drop_mask')
        (value, losses), gradients = differentiate(
            self.params, self.targets, self.text, drop_B, weights_L
        )
        chunks = self.case.option('options', 'block_chunks')
        return value, losses, to_state(infinity_entries(self.infinity, chunks), gradients)

    @property
    def token_losses(self) -> TokenLosses:
        """The losses of the first run: the recorded ones depend on no option of a run."""
        return self.losses(self.case.option('runs')[0]['name'])[1]

    @property
    def right_BL(self) -> np.ndarray:
        """Tokens counted as right.

        A token of joined cells is right if as many of its bits are right as one cell has (Infinity
        specification 10, bug 12).
        """
        count_BL = np.rint(np.asarray(self.token_losses.hit_BL) * self.infinity.bits)
        return count_BL == self.case.option('codebook_dim')

    def metrics(self, run: str) -> np.ndarray:
        """Loss, loss of the last scale, and the percentages of right bits, of all and of these."""
        last = slice(self.infinity.schedule.offsets[-2], None)
        nll_BL, share_BL = self.token_losses.nll_BL, self.token_losses.hit_BL
        means = [x.mean() for x in (nll_BL, nll_BL[:, last], share_BL, share_BL[:, last])]
        return np.asarray(means, np.float64) * (1, 1, 100, 100)

    def per_scale(self, x_BL: jax.Array) -> np.ndarray:
        """[S] means over the tokens of each scale."""
        parts = np.split(np.asarray(x_BL), self.infinity.schedule.offsets[1:-1], axis=1)
        return np.asarray([part.mean() for part in parts])


def state_of(case: Case, prefix: str) -> dict[str, np.ndarray]:
    """The tensors under a prefix, without it."""
    state = case.state.items()
    return {n.removeprefix(prefix): array for n, array in state if n.startswith(prefix)}


@functools.cache
def _loss_fn(infinity: Infinity, smoothing: float, of_bits: tokens.BitReduction) -> Callable:
    """(params, targets, text, images without text [B], weights [L]) -> loss, tokens; gradients."""

    def loss(params, targets, text, drop_B, weights_L):
        network = infinity.build()
        unprompted = bind(network, params).unprompted(text, text)
        losses = tokens.token_losses(
            network,
            infinity.vocabulary,
            params,
            targets,
            condition.choose(drop_B, text, unprompted),
            smoothing=smoothing,
            of_bits=of_bits,
        )
        return (weights_L * losses.trained_BL).mean(), losses

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _trained_schedule(case: Case) -> list:
    """The trained scales: the first `always_training_scales` of all (Infinity specification 6).

    Raises UserError if the recorded ones are others.
    """
    used, most = case.option('schedule_used'), case.option('always_training_scales')
    if len(used) > most or used != case.option('full_schedule')[: len(used)]:
        raise UserError(
            f'{case.path}: schedule_used has {len(used)} scales, expected the first of '
            f'full_schedule, at most always_training_scales = {most}'
        )
    return used
