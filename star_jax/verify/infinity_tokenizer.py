"""How are the recorded arrays of Infinity's tokenizer computed?

Kinds `quantizer`, `tokenizer` and `self_correction`. Recorded maps have their channels before a
time axis, [B, K, t, h, w], and bits have them last.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.convert.bsq import IGNORED, bsq_entries, quantiser_entries
from star_jax.core import resize
from star_jax.core.codes import Sampled, Targets
from star_jax.core.schedule import Step
from star_jax.core.self_correction import SelfCorrection, flip_mask
from star_jax.errors import UserError
from star_jax.losses.tokenizer import bit_entropies
from star_jax.nn.bind import bind
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_bsq import BSQ, ResidualBSQ
from star_jax.tokenizers.sign_quantiser import BitTrace, Sizes, code_vectors, quantise
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import ACTIVATIONS, INTEGERS, LATENTS, TOKENIZED
from star_jax.verify.infinity import images, named
from star_jax.verify.rules import Rule, inputs

VARIANT = '(?:(.+)/)?'
S = r'/s(\d+)'
UNUSED = Autoencoder(width=1, multipliers=(1,), blocks=1, groups=1, attention=False)


class BitQuantisers:
    """Bits, canvases and gradients of recorded features, for every variant of the options."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.variant = functools.cache(lambda name: _Variant(case, name))

    def rules(self) -> tuple[Rule, ...]:
        def rule(name: str, compute: Callable[..., Any], group: str = LATENTS) -> Rule:
            return Rule(
                f'{VARIANT}out/{name}',
                group,
                lambda variant, *scale: compute(self.variant(variant), *map(int, scale)),
            )

        return (
            inputs(f'{VARIANT}in/.+'),
            rule('quantized', lambda v: v.recorded(v.quantised)),
            rule(f'bits{S}', lambda v, s: v.trace.bits[s], INTEGERS),
            rule(f'area_inputs{S}', lambda v, s: v.next_map(s, resize.area_matrix)),
            rule(f'trilinear_inputs{S}', lambda v, s: v.next_map(s, resize.linear_matrix)),
            rule(f'codes{S}', lambda v, s: to_recorded(code_vectors(v.trace.bits[s]))),
            rule('summed_codes', lambda v: to_recorded(v.summed)),
            rule('grad_x', lambda v: v.recorded(v.gradient)),
            rule('small_residual_fraction', lambda v: v.trace.small_shares),
            rule('aux_losses', lambda v: np.zeros(len(v.sizes), np.float32)),
            rule('per_sample_entropy', lambda v: v.entropies.per_sample),
            rule('codebook_entropy', lambda v: v.entropies.codebook),
            rule('avg_prob', lambda v: v.entropies.probs_K2),
            rule('zero_bits', lambda v: v.zero_bits, INTEGERS),
        )


class _Variant:
    """One set of options; arrays and tensors are prefixed with its name."""

    def __init__(self, case: Case, name: str | None) -> None:
        self.case, self.prefix = case, f'{name}/' if name else ''
        if name:
            entry = named(case, 'variants', 'name', name)
            bits, features, options = entry['bits'], entry['dim'], entry['options']
            self.sizes = _sizes(entry['schedule'])
        else:
            bits, features, options = case.option('codebook_dim'), 0, {}
            self.sizes = _sizes(case.option('schedule'))
        self.detached = not options.get('remove_residual_detach', False)
        self.bsq = cases.build(
            case,
            BSQ,
            autoencoder=UNUSED,
            grids=((1, 1),),
            bits=bits,
            features=features,
            normalised=options.get('ln_before_quant', False),
            decay=options.get('use_decay_factor', False),
        )
        prefix = f'{name}.' if name else ''
        state = {key: array for key, array in case.state.items() if key.startswith(prefix)}
        entries = quantiser_entries(self.bsq, prefix)
        self.params = cases.convert(case, entries, state, IGNORED).get('quantiser', {})

    def input(self, name: str) -> np.ndarray:
        """A recorded map as [B, t, h, w, K]."""
        x = self.case.input(f'{self.prefix}in/{name}')
        return np.moveaxis(x if x.ndim == 5 else x[:, :, None], 1, -1)

    def recorded(self, x: jax.Array) -> np.ndarray:
        """A map in the layout of the recorded input: with a time axis if that has one."""
        x_BKthw = to_recorded(x)
        return x_BKthw if self.case.input(f'{self.prefix}in/x').ndim == 5 else x_BKthw[:, :, 0]

    @functools.cached_property
    def computed(self) -> tuple[jax.Array, BitTrace]:
        return _quantise_fn(self.bsq, self.sizes, self.detached)(self.params, self.input('x'))

    @property
    def quantised(self) -> jax.Array:
        return self.computed[0]

    @property
    def trace(self) -> BitTrace:
        return self.computed[1]

    @functools.cached_property
    def summed(self) -> jax.Array:
        """The sum of the codes of all bits, at full size."""
        codes = [code_vectors(bits) for bits in self.trace.bits]
        return sum(resize.along_axes(x, self.sizes[-1], resize.linear_matrix) for x in codes)

    @functools.cached_property
    def gradient(self) -> jax.Array:
        fn = _gradient_fn(self.bsq, self.sizes, self.detached)
        return fn(self.input('x'), self.params, self.input('cotangent'))

    @functools.cached_property
    def entropies(self):
        z = self.case.input(f'{self.prefix}in/entropy_z')
        return bit_entropies(z, self.case.option('inv_temperature'))

    @property
    def zero_bits(self) -> jax.Array:
        x = self.input('zero_x')
        return quantise(x, (x.shape[1:-1],)).bits[0]

    def next_map(self, scale: int, matrix: resize.MatrixOf) -> np.ndarray:
        return to_recorded(_next_map(self.trace, self.sizes, scale, matrix))


class BitTokenizer:
    """Features, bits and reconstructions of recorded images."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.bsq = tokenizer_config(case, case.config, case.option('schedule'))
        self.params = cases.convert(case, bsq_entries(self.bsq, case.state), case.state, IGNORED)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('in/image'),
            Rule('out/features', TOKENIZED, lambda: to_recorded(self.features)),
            Rule(f'out/bits{S}', INTEGERS, lambda s: self.trace.bits[int(s)][:, None]),
            Rule('out/quantized', TOKENIZED, lambda: to_recorded(self.trace.canvases[-1])),
            Rule(f'out/area_inputs{S}', TOKENIZED, self.area_inputs),
            Rule('out/recon_unclamped', TOKENIZED, lambda: to_recorded(self.decoded)),
            Rule('out/recon', TOKENIZED, lambda: to_recorded(self.decoded.clip(-1, 1))),
            Rule('out/summed_codes', TOKENIZED, lambda: to_recorded(self.summed[:, None])),
            Rule('out/recon_from_bits', TOKENIZED, self.decoded_bits),
            Rule(r'mid/enc_h(\d+)', ACTIVATIONS, lambda i: to_recorded(self.hidden[int(i)])),
            Rule('mid/enc_mid0', ACTIVATIONS, lambda: to_recorded(self.hidden[-1])),
            Rule('mid/enc_mid1', ACTIVATIONS, lambda: to_recorded(self.middle)),
        )

    @functools.cached_property
    def encoded(self) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Features, and the outputs of the encoder's modules."""
        return _features_fn(self.bsq)(self.params, np.moveaxis(self.case.input('in/image'), 1, -1))

    @property
    def features(self) -> jax.Array:
        return self.encoded[0]

    @property
    def hidden(self) -> list[jax.Array]:
        """Maps after the first convolution, and after every residual block and downsampling."""
        blocks, levels = self.bsq.autoencoder.blocks, len(self.bsq.autoencoder.widths)
        names = ['conv_in']
        for level in range(levels):
            names += [f'down_{level}_block_{block}' for block in range(blocks)]
            names += [f'down_{level}_downsample'] * (level < levels - 1)
        return [self.encoded[1][name] for name in names]

    @property
    def middle(self) -> jax.Array:
        return self.encoded[1]['mid_block_2']

    @functools.cached_property
    def trace(self) -> BitTrace:
        return jax.jit(functools.partial(quantise, sizes=self.bsq.cells))(self.features)

    @functools.cached_property
    def summed(self) -> jax.Array:
        """The canvas that sampling builds from the bits."""
        tokens = [bits.reshape(len(bits), -1, bits.shape[-1]) for bits in self.trace.bits]
        return canvas_fn(self.bsq)(jnp.concatenate(tokens, axis=1))

    @functools.cached_property
    def decoded(self) -> jax.Array:
        return _decode_fn(self.bsq)(self.params, self.trace.canvases[-1])

    def decoded_bits(self) -> np.ndarray:
        return to_recorded(_decode_fn(self.bsq)(self.params, self.summed).clip(-1, 1))

    def area_inputs(self, scale: str) -> np.ndarray:
        x_BhwK = _next_map(self.trace, self.bsq.cells, int(scale), resize.area_matrix)
        return to_recorded(x_BhwK[:, None])


class SelfCorrections:
    """Inputs and labels of training with recorded flips."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.variant = functools.cache(lambda name: Corrected(case, name))

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('.+/in/.+'),
            Rule(f'(.+)/out/flip_mask{S}', INTEGERS, lambda v, s: self.variant(v).mask(int(s))),
            Rule(f'(.+)/out/labels{S}', INTEGERS, lambda v, s: self.variant(v).labels(int(s))),
            Rule('(.+)/out/x_wo_prefix', LATENTS, lambda v: self.variant(v).targets.inputs_BLC),
            Rule(f'(.+)/mid/quantized_before_flip{S}', LATENTS, self.codes),
        )

    def codes(self, variant: str, scale: str) -> np.ndarray:
        codes = self.variant(variant).trace.codes[int(scale)]
        return to_recorded(codes[:, None])


class Corrected:
    """One variant of a self-correction."""

    def __init__(self, case: Case, name: str) -> None:
        entry = named(case, 'variants', 'name', name)
        self.case, self.name = case, name
        self.bsq = cases.build(
            case,
            BSQ,
            autoencoder=UNUSED,
            grids=images(entry['transformer_schedule'], case),
            bits=case.option('codebook_dim'),
            patchify=bool(entry['apply_spatial_patchify']),
        )
        if images(entry['vae_schedule'], case) != self.bsq.cells:
            raise UserError(
                f'{case.path}: vae_schedule of {name} is not {self.bsq.cells}, as follows from '
                'its transformer_schedule'
            )
        self.flipped = entry['noise_apply_layers'] if entry['noise_apply_requant'] else 0
        check_percents(case, f'{name}/in/', entry['noise_apply_strength'])

    def mask(self, step: int) -> jax.Array:
        """Which bits of a scale the recorded numbers flip, [B, 1, h, w, K]."""
        percent = self.case.input(f'{self.name}/in/strength_percent')[step]
        return flip_mask(self.case.input(f'{self.name}/in/uniform/s{step}'), percent)

    def flips(self, step: int, shape: tuple[int, ...]) -> jax.Array | None:
        return self.mask(step)[:, 0] if step < self.flipped else None

    @functools.cached_property
    def computed(self) -> tuple[Targets, BitTrace]:
        tokenizer = bind(self.bsq.build(), {})
        f_BhwK = np.moveaxis(self.case.input(f'{self.name}/in/features'), 1, -1)

        def correct(f_BhwK: jax.Array) -> tuple[Targets, BitTrace]:
            return tokenizer.corrected(f_BhwK, self.flips), tokenizer.quantise(f_BhwK, self.flips)

        return jax.jit(correct)(f_BhwK)

    @property
    def targets(self) -> Targets:
        return self.computed[0]

    @property
    def trace(self) -> BitTrace:
        return self.computed[1]

    def labels(self, step: int) -> jax.Array:
        first, end = self.bsq.schedule.offsets[step : step + 2]
        return self.targets.codes_BL[:, first:end]


def check_percents(case: Case, prefix: str, strength: float) -> None:
    """Checks that the recorded rates of flips are possible at a strength (negative: no flips).

    Raises UserError if one is larger.
    """
    correction = SelfCorrection(strength=max(strength, 0))
    percents = case.arrays.get(f'{prefix}strength_percent', np.zeros(0, int))
    if (percents >= correction.rates).any():
        raise UserError(
            f'{case.path}: {prefix}strength_percent exceeds {correction.rates - 1}, the largest '
            f'percentage at noise_apply_strength = {correction.strength}'
        )


def tokenizer_config(
    case: Case, sizes: Mapping[str, Any], schedule: list[list[int]], patchify: bool = False
) -> BSQ:
    """The tokenizer whose autoencoder has the original options `sizes`, at a token schedule."""
    autoencoder = cases.build(
        case,
        Autoencoder,
        width=sizes['base_ch'],
        multipliers=tuple(sizes['ch_mult']),
        blocks=sizes['num_res_blocks'],
        groups=0,
        attention=False,
    )
    if sizes['patch_size'] != autoencoder.downsampling:
        raise UserError(
            f'{case.path}: patch_size is {sizes["patch_size"]}, but ch_mult has '
            f'{len(autoencoder.multipliers)} levels, which make {autoencoder.downsampling}'
        )
    return cases.build(
        case,
        BSQ,
        autoencoder=autoencoder,
        grids=images(schedule, case),
        bits=case.option('codebook_dim'),
        patchify=patchify,
    )


def to_recorded(x: jax.Array) -> np.ndarray:
    """[B, ..., K] -> [B, K, ...]"""
    return np.moveaxis(np.asarray(x), -1, 1)


@functools.cache
def canvas_fn(bsq: BSQ) -> Callable:
    """Codes -> the last canvas of sampling, jitted."""

    def fold(codes_BLK):
        tokenizer = bind(bsq.build(), {})
        canvas = tokenizer.blank(len(codes_BLK))
        for step in range(tokenizer.schedule.steps):
            canvas, _ = tokenizer.advance(
                canvas, _sampled(tokenizer, codes_BLK, step), Step.at(step)
            )
        return canvas

    return jax.jit(fold)


def _sampled(tokenizer, codes_BLK: jax.Array, step: int) -> Sampled:
    first, end = tokenizer.schedule.offsets[step : step + 2]
    codes = codes_BLK[:, first:end]
    return Sampled(codes, tokenizer.embed(codes))


def _sizes(schedule: list[list[int]]) -> Sizes:
    return tuple(tuple(size) for size in schedule)


def _next_map(trace: BitTrace, sizes: Sizes, scale: int, matrix: resize.MatrixOf) -> jax.Array:
    """The map that a scale reads, resampled by `matrix` from the canvas before it."""
    if not 0 < scale < len(sizes):
        raise LookupError(f'scale {scale} of {len(sizes)} has no inputs')
    return resize.along_axes(trace.canvases[scale - 1], sizes[scale], matrix)


@functools.cache
def _quantise_fn(bsq: BSQ, sizes: Sizes, detached: bool) -> Callable:
    """(params, x) -> (quantised, `BitTrace`), jitted."""

    def run(params, x):
        module = bind(ResidualBSQ(bsq), params)
        trace = quantise(module.enter(x), sizes, bsq.decay, detached)
        return module.leave(trace.canvases[-1]), trace

    return jax.jit(run)


@functools.cache
def _gradient_fn(bsq: BSQ, sizes: Sizes, detached: bool) -> Callable:
    """(x, params, cotangent) -> the gradient of x, jitted."""

    def total(x, params, cotangent):
        module = bind(ResidualBSQ(bsq), params)
        trace = quantise(module.enter(x), sizes, bsq.decay, detached)
        return jnp.sum(cotangent * module.leave(trace.canvases[-1]))

    return jax.jit(jax.grad(total))


@functools.cache
def _features_fn(bsq: BSQ) -> Callable:
    """(params, images) -> (features, outputs of the encoder's modules by name), jitted."""

    def run(params, images_BHWc):
        features, captured = bsq.build().apply(
            {'params': params},
            images_BHWc,
            method='features',
            capture_intermediates=True,
            mutable=['intermediates'],
        )
        encoder = captured['intermediates']['encoder']
        outputs = {
            name: module['__call__'][0]
            for name, module in encoder.items()
            if isinstance(module, Mapping)
        }
        return features, outputs

    return jax.jit(run)


@functools.cache
def _decode_fn(bsq: BSQ) -> Callable:
    """(params, canvas) -> unclamped images, jitted."""
    return jax.jit(lambda params, canvas: bind(bsq.build(), params).decode_unclamped(canvas))
