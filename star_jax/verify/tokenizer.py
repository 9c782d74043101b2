"""How are the recorded arrays of a tokenizer computed? (kinds `vqvae` and `quantizer`)"""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.convert.entries import to_state
from star_jax.core import resize
from star_jax.core.codes import Sampled
from star_jax.core.schedule import Step
from star_jax.nn.bind import bind
from star_jax.tokenizers.residual_vq import VQ
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import GRADIENTS, INTEGERS, LATENTS, LOSSES
from star_jax.verify.rules import Rule, inputs

K = r'(\d+)'


class Quantiser:
    """Codes, canvases, losses and gradients of recorded features."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.vq = cases.quantiser_config(case)
        self.entries = cases.quantiser_entries(self.vq, case.state)
        self.params = cases.convert(case, self.entries, case.state)

    def rules(self) -> tuple[Rule, ...]:
        return (inputs('f'), *self.common_rules())

    def common_rules(self) -> tuple[Rule, ...]:
        return (
            inputs('train_straight_through_weight'),
            Rule(f'idx_{K}', INTEGERS, self.codes),
            Rule(f'fhat_{K}', LATENTS, lambda k: to_nchw(self.quantised.canvases[int(k)])),
            Rule(f'(?:embed_to|ar)_fhat_{K}', LATENTS, lambda k: to_nchw(self.folded[0][int(k)])),
            Rule('embed_to_fhat_last_one', LATENTS, lambda: to_nchw(self.folded[0][-1])),
            Rule('embed_to_fhat_not_max_scale_last', LATENTS, self.grown),
            Rule(f'ar_next_{K}', LATENTS, self.next_map),
            Rule('var_input', LATENTS, lambda: self.folded[2]),
            Rule('train_fhat', LATENTS, lambda: to_nchw(self.trained[0])),
            Rule(
                'train_straight_through_grad_f',
                LATENTS,
                lambda: to_nchw(self.straight_through_gradient),
            ),
            Rule('train_vq_loss_star_sum_over_scales', LOSSES, lambda: self.trained[1].sum()),
            Rule('train_vq_loss_var_mean_over_scales', LOSSES, lambda: self.trained[1].mean()),
            Rule('train_grad_vqloss_wrt_f', GRADIENTS, lambda: to_nchw(self.trained[3])),
            Rule(r'train_grad_vqloss_wrt_(quantize\..+)', GRADIENTS, lambda n: self.gradients[n]),
        )

    @functools.cached_property
    def f(self) -> jax.Array:
        return to_nhwc(self.case.input('f'))

    @functools.cached_property
    def quantised(self):
        return quantise_fn(self.vq)(self.params, self.f)

    @functools.cached_property
    def folded(self):
        return fold_fn(self.vq)(self.params, self.quantised.codes_BL)

    @functools.cached_property
    def trained(self):
        return loss_fn(self.vq, self.case.option('beta'))(self.params, self.f)

    @functools.cached_property
    def straight_through_gradient(self) -> jax.Array:
        weight = to_nhwc(self.case.input('train_straight_through_weight'))
        return straight_through_fn(self.vq)(self.params, self.f, weight)

    @functools.cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        return to_state(self.entries, self.trained[2])

    def codes(self, k: str) -> jax.Array:
        return self.quantised.codes[int(k)].reshape(len(self.f), -1)

    def next_map(self, k: str) -> np.ndarray:
        canvases, maps, _ = self.folded
        return to_nchw([*maps, canvases[-1]][int(k)])

    def grown(self) -> np.ndarray:
        return to_nchw(grow_fn(self.vq)(self.params, self.quantised.codes))


class Vqvae(Quantiser):
    """Codes, canvases, losses and gradients of recorded images, with encoder and decoder."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.vq = cases.vq_config(case)
        entries = cases.vq_entries(self.vq, case.state)
        self.all_params = cases.convert(case, entries, case.state)
        self.entries = cases.quantiser_entries(self.vq, case.state)
        self.params = {'quantiser': self.all_params['quantiser']}

    def rules(self) -> tuple[Rule, ...]:
        decoded = '(?:reconstructed|fhat_to_img|idxBl_to_img)'
        return (
            inputs('image'),
            Rule('encoder_out', LATENTS, lambda: to_nchw(self.encoded[0])),
            Rule('f', LATENTS, lambda: to_nchw(self.f)),
            Rule('decoder_out_unclamped', LATENTS, lambda: self.decoded),
            Rule(decoded, LATENTS, lambda: self.decoded.clip(-1, 1)),
            Rule(f'reconstructed_upto_scale_{K}', LATENTS, lambda k: self.decode(k).clip(-1, 1)),
            *self.common_rules(),
        )

    @functools.cached_property
    def encoded(self) -> tuple[jax.Array, jax.Array]:
        return encode_fn(self.vq)(self.all_params, to_nhwc(self.case.input('image')))

    @property
    def f(self) -> jax.Array:
        return self.encoded[1]

    @functools.cached_property
    def decoded(self) -> np.ndarray:
        return self.decode('-1')

    def decode(self, k: str) -> np.ndarray:
        return to_nchw(decode_fn(self.vq)(self.all_params, self.quantised.canvases[int(k)]))


def to_nchw(x_BhwC: jax.Array) -> np.ndarray:
    """[B, h, w, C] -> [B, C, h, w], the recorded layout."""
    return np.moveaxis(np.asarray(x_BhwC), -1, 1)


def to_nhwc(x_BChw: np.ndarray) -> np.ndarray:
    """[B, C, h, w] -> [B, h, w, C], the layout of this library."""
    return np.moveaxis(x_BChw, 1, -1)


@functools.cache
def encode_fn(vq: VQ) -> Callable:
    """(params, images_BHWc) -> (encoder output, features), jitted."""

    def encode(params, images_BHWc):
        tokenizer = bind(vq.build(), params)
        return tokenizer.encoder(images_BHWc), tokenizer.features(images_BHWc)

    return jax.jit(encode)


@functools.cache
def decode_fn(vq: VQ) -> Callable:
    """(params, canvas) -> unclamped images, jitted."""
    return jax.jit(lambda params, canvas: bind(vq.build(), params).decode_unclamped(canvas))


@functools.cache
def quantise_fn(vq: VQ) -> Callable:
    """(params, features) -> `Quantised`, jitted."""
    return jax.jit(lambda params, f_BHWC: bind(vq.build(), params).quantise(f_BHWC))


@functools.cache
def fold_fn(vq: VQ) -> Callable:
    """(params, codes) -> (canvases, next maps, teacher-forcing inputs), jitted.

    Canvases and maps come from `advance`, which the sampler uses.
    """

    def fold(params, codes_BL):
        tokenizer = bind(vq.build(), params)
        schedule = tokenizer.schedule
        canvas = tokenizer.blank(len(codes_BL))
        canvases, maps = [], []
        for step in range(schedule.steps):
            codes = codes_BL[:, schedule.offsets[step] : schedule.offsets[step + 1]]
            sampled = Sampled(codes, tokenizer.embed(codes))
            canvas, inputs = tokenizer.advance(canvas, sampled, Step.at(step))
            canvases.append(canvas)
            if inputs is not None:
                grid = schedule.grids[step + 1]
                maps.append(inputs.reshape(len(inputs), *grid, -1))
        return canvases, maps, tokenizer.inputs(codes_BL)

    return jax.jit(fold)


@functools.cache
def grow_fn(vq: VQ) -> Callable:
    """(params, codes of each scale) -> a canvas that grows with the scales, jitted.

    The original code has this route but does not use it.
    """

    def grow(params, codes):
        canvas = None
        for step, (grid, codes_Bhw) in enumerate(zip(vq.grids, codes, strict=True)):
            # Equal grids skip the resizing and keep the phi of the step.
            tokenizer = bind(replace(vq, grids=(grid,) * len(vq.grids)).build(), params)
            added = tokenizer.quantiser.refine(tokenizer.embed(codes_Bhw), Step.at(step))
            canvas = added if canvas is None else resize.bicubic(canvas, *grid) + added
        return canvas

    return jax.jit(grow)


@functools.cache
def loss_fn(vq: VQ, commitment: float) -> Callable:
    """(params, features) -> (straight-through canvas, loss of each scale, gradients), jitted.

    The gradients are those of the summed losses, for parameters and features.
    """

    def total(params, f_BHWC):
        quantised = bind(vq.build(), params).quantise(f_BHWC)
        losses_K = quantised.losses(f_BHWC, commitment)
        return losses_K.sum(), (quantised.straight_through(f_BHWC), losses_K)

    def train(params, f_BHWC):
        (_, (canvas, losses_K)), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(
            params, f_BHWC
        )
        return canvas, losses_K, *gradients

    return jax.jit(train)


@functools.cache
def straight_through_fn(vq: VQ) -> Callable:
    """(params, features, weights) -> the gradient of the features, jitted.

    The loss is the weighted sum of the straight-through canvas.
    """

    def total(f_BHWC, params, weight_BHWC):
        quantised = bind(vq.build(), params).quantise(f_BHWC)
        return jnp.sum(weight_BHWC * quantised.straight_through(f_BHWC))

    return jax.jit(lambda params, f, weight: jax.grad(total)(f, params, weight))
