"""How are the recorded arrays of tokenizers computed? (kinds `vqvae` and `quantizer`)"""

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
from star_jax.tokenizers.residual_vq import VQ, VQTokenizer
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import GRADIENTS, INTEGERS, LATENTS, LOSSES
from star_jax.verify.rules import Rule, given

K = r'(\d+)'


class Quantising:
    """Codes, canvases and losses of given features."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.vq = cases.quantiser_of(case)
        self.entries = cases.quantiser_entries(self.vq, case.state)
        self.params = cases.convert(case, self.entries, case.state)

    def rules(self) -> tuple[Rule, ...]:
        return (given('f'), *self.common_rules())

    def common_rules(self) -> tuple[Rule, ...]:
        return (
            given('train_straight_through_weight'),
            Rule(f'idx_{K}', INTEGERS, self.codes),
            Rule(f'fhat_{K}', LATENTS, lambda k: first(self.quantised.canvases[int(k)])),
            Rule(f'(?:embed_to|ar)_fhat_{K}', LATENTS, lambda k: first(self.folded[0][int(k)])),
            Rule('embed_to_fhat_last_one', LATENTS, lambda: first(self.folded[0][-1])),
            Rule('embed_to_fhat_not_max_scale_last', LATENTS, self.grown),
            Rule(f'ar_next_{K}', LATENTS, self.next_map),
            Rule('var_input', LATENTS, lambda: self.folded[2]),
            Rule('train_fhat', LATENTS, lambda: first(self.trained[0])),
            Rule('train_straight_through_grad_f', LATENTS, lambda: first(self.straight)),
            Rule('train_vq_loss_star_sum_over_scales', LOSSES, lambda: self.trained[1].sum()),
            Rule('train_vq_loss_var_mean_over_scales', LOSSES, lambda: self.trained[1].mean()),
            Rule('train_grad_vqloss_wrt_f', GRADIENTS, lambda: first(self.trained[3])),
            Rule(r'train_grad_vqloss_wrt_(quantize\..+)', GRADIENTS, lambda n: self.gradients[n]),
        )

    @functools.cached_property
    def f(self) -> jax.Array:
        return last(self.case.given('f'))

    @functools.cached_property
    def quantised(self):
        return quantising(self.vq)(self.params, self.f)

    @functools.cached_property
    def folded(self):
        return folding(self.vq)(self.params, self.quantised.codes_BL)

    @functools.cached_property
    def trained(self):
        return training(self.vq, self.case.option('beta'))(self.params, self.f)

    @functools.cached_property
    def straight(self) -> jax.Array:
        weight = last(self.case.given('train_straight_through_weight'))
        return straightening(self.vq)(self.params, self.f, weight)

    @functools.cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        return to_state(self.entries, self.trained[2])

    def codes(self, k: str) -> jax.Array:
        return self.quantised.codes[int(k)].reshape(len(self.f), -1)

    def next_map(self, k: str) -> np.ndarray:
        canvases, maps, _ = self.folded
        return first([*maps, canvases[-1]][int(k)])

    def grown(self) -> np.ndarray:
        return first(growing(self.vq)(self.params, self.quantised.codes))


class Vqvae(Quantising):
    """The same from images, and back to images."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.vq = cases.vq_of(case)
        everything = cases.vq_entries(self.vq, case.state)
        self.all_params = cases.convert(case, everything, case.state)
        self.entries = cases.quantiser_entries(self.vq, case.state)
        self.params = {'quantiser': self.all_params['quantiser']}

    def rules(self) -> tuple[Rule, ...]:
        painted = '(?:reconstructed|fhat_to_img|idxBl_to_img)'
        return (
            given('image'),
            Rule('encoder_out', LATENTS, lambda: first(self.encoded[0])),
            Rule('f', LATENTS, lambda: first(self.f)),
            Rule('decoder_out_unclamped', LATENTS, lambda: self.painted),
            Rule(painted, LATENTS, lambda: self.painted.clip(-1, 1)),
            Rule(f'reconstructed_upto_scale_{K}', LATENTS, lambda k: self.paint(k).clip(-1, 1)),
            *self.common_rules(),
        )

    @functools.cached_property
    def encoded(self) -> tuple[jax.Array, jax.Array]:
        return encoding(self.vq)(self.all_params, last(self.case.given('image')))

    @property
    def f(self) -> jax.Array:
        return self.encoded[1]

    @functools.cached_property
    def painted(self) -> np.ndarray:
        return self.paint('-1')

    def paint(self, k: str) -> np.ndarray:
        return first(painting(self.vq)(self.all_params, self.quantised.canvases[int(k)]))


def first(x_BhwC: jax.Array) -> np.ndarray:
    """Channels first, as recorded."""
    return np.moveaxis(np.asarray(x_BhwC), -1, 1)


def last(x_BChw: np.ndarray) -> np.ndarray:
    """Channels last, as everything here wants them."""
    return np.moveaxis(x_BChw, 1, -1)


@functools.cache
def encoding(vq: VQ) -> Callable:
    """Images -> encoder output and features."""

    def encode(params, images_BHWc):
        apply = functools.partial(vq.build().apply, {'params': params}, images_BHWc)
        return apply(method=lambda tokenizer, x: tokenizer.encoder(x)), apply(method='features')

    return jax.jit(encode)


@functools.cache
def painting(vq: VQ) -> Callable:
    """Canvas -> unclamped image."""
    return jax.jit(
        lambda params, x: vq.build().apply({'params': params}, x, method='decode_unclamped')
    )


@functools.cache
def quantising(vq: VQ) -> Callable:
    """Features -> their quantisation."""
    return jax.jit(lambda params, f: vq.build().apply({'params': params}, f, method='quantise'))


@functools.cache
def folding(vq: VQ) -> Callable:
    """Codes -> canvases, next maps and teacher-forcing inputs, by the sampler's own `advance`."""
    tokenizer = vq.build()

    def fold(params, codes_BL):
        apply = functools.partial(tokenizer.apply, {'params': params})
        schedule = tokenizer.schedule
        canvas = apply(len(codes_BL), method='blank')
        canvases, maps = [], []
        for step in range(schedule.steps):
            codes = codes_BL[:, schedule.offsets[step] : schedule.offsets[step + 1]]
            drawn = Sampled(codes, apply(codes, method='embed'))
            canvas, inputs = apply(canvas, drawn, Step.at(step), method='advance')
            canvases.append(canvas)
            if inputs is not None:
                grid = schedule.grids[step + 1]
                maps.append(inputs.reshape(len(inputs), *grid, -1))
        return canvases, maps, apply(codes_BL, method='inputs')

    return jax.jit(fold)


@functools.cache
def growing(vq: VQ) -> Callable:
    """Codes per scale -> a canvas that grows with the scales (experimental in the reference)."""

    def grow(params, codes):
        canvas = None
        for step, (grid, codes_Bhw) in enumerate(zip(vq.grids, codes, strict=True)):
            # Sides that are all alike keep the step's phi and leave out the resizing.
            small = replace(vq, grids=(grid,) * len(vq.grids)).build()
            apply = functools.partial(small.apply, {'params': params})
            vectors = apply(codes_Bhw, method='embed')
            added = apply(vectors, Step.at(step), method=_refine)
            canvas = added if canvas is None else resize.bicubic(canvas, *grid) + added
        return canvas

    return jax.jit(grow)


def _refine(tokenizer: VQTokenizer, vectors_BhwC: jax.Array, step: Step) -> jax.Array:
    return tokenizer.quantiser.refine(vectors_BhwC, step)


@functools.cache
def training(vq: VQ, commitment: float) -> Callable:
    """Features -> straight-through canvas, losses per scale, gradients of their sum."""

    def total(params, f_BHWC):
        quantised = vq.build().apply({'params': params}, f_BHWC, method='quantise')
        losses_K = quantised.losses(f_BHWC, commitment)
        return losses_K.sum(), (quantised.straight_through(f_BHWC), losses_K)

    def train(params, f_BHWC):
        (_, (canvas, losses_K)), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(
            params, f_BHWC
        )
        return canvas, losses_K, *gradients

    return jax.jit(train)


@functools.cache
def straightening(vq: VQ) -> Callable:
    """The gradient to the features of a weighted sum of the straight-through canvas."""

    def total(f_BHWC, params, weight_BHWC):
        quantised = vq.build().apply({'params': params}, f_BHWC, method='quantise')
        return jnp.sum(weight_BHWC * quantised.straight_through(f_BHWC))

    return jax.jit(lambda params, f, weight: jax.grad(total)(f, params, weight))
