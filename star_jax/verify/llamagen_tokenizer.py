"""How are the recorded arrays of LlamaGen's tokenizer computed? (kind `vq`)

Recorded maps have their channels second, [B, C, h, w].
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.convert import entries
from star_jax.convert.raster_vq import IGNORED, raster_vq_entries
from star_jax.losses.tokenizer import code_entropies
from star_jax.nn.bind import bind
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import (
    BYTES,
    HIDDEN,
    INTEGERS,
    OBJECTIVES,
    QUANTISER_GRADIENTS,
    TOKENIZED,
)
from star_jax.verify.rules import Rule, inputs

MIDDLE = {'mid0': 'mid_block_1', 'mid1_attn': 'mid_attn_1', 'mid2': 'mid_block_2'}
BUFFER = 'quantize.codebook_used'  # the codes of the last steps


class Forward(NamedTuple):
    """The arrays that the tokenizer computes from images; maps are NHWC.

    Attributes:
        encoded: output of the encoder.
        projected: the features that are normalised and quantised.
        quantised: straight-through values.
        codes_Bhw: the codes.
        margin: second-smallest minus smallest squared distance of each cell.
        decoded: reconstructions of `quantised`, not clamped.
        encoder: outputs of the encoder's modules by name.
        decoder: outputs of the decoder's modules by name.
    """

    encoded: jax.Array
    projected: jax.Array
    quantised: jax.Array
    codes_Bhw: jax.Array
    margin: jax.Array
    decoded: jax.Array
    encoder: Mapping[str, jax.Array]
    decoder: Mapping[str, jax.Array]


class Losses(NamedTuple):
    """The training losses, each with its weight.

    Attributes:
        rec: reconstruction.
        vq: distance of the code vectors to the features.
        commit: distance of the features to the code vectors.
        entropy: entropy of the codes.
    """

    rec: jax.Array
    vq: jax.Array
    commit: jax.Array
    entropy: jax.Array

    @property
    def total(self) -> jax.Array:
        return sum(self)


class VqTokenizer:
    """Features, codes, reconstructions, losses and gradients of recorded images."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = tokenizer_config(case)
        self.entries = raster_vq_entries(self.config)
        self.params = cases.convert(case, self.entries, case.state, IGNORED)

    def rules(self) -> tuple[Rule, ...]:
        def tokenized(name: str, compute: Callable[[], jax.Array]) -> Rule:
            return Rule(name, TOKENIZED, lambda: _recorded(compute()))

        return (
            inputs('image|random_codes'),
            tokenized('encoder_out', lambda: self.forward.encoded),
            tokenized('quant_conv_out', lambda: self.forward.projected),
            tokenized('quant', lambda: self.forward.quantised),
            Rule('indices', INTEGERS, lambda: self.forward.codes_Bhw.reshape(-1)),
            Rule('codes_bn', INTEGERS, lambda: self.codes_BL),
            Rule('index_margin', TOKENIZED, lambda: self.forward.margin.reshape(-1)),
            tokenized('recon', lambda: self.forward.decoded),
            tokenized('entry_cf', lambda: self.vectors(self.codes_BL)),
            tokenized('recon_from_codes', lambda: self.decode(self.codes_BL)),
            tokenized('recon_from_random_codes', self.decode_random),
            Rule('recon_uint8_nhwc', BYTES, self.to_bytes),
            Rule(r'act\.enc_level(\d+)_down', HIDDEN, self.downsampled),
            Rule(r'act\.dec_level(\d+)_up', HIDDEN, self.upsampled),
            Rule(r'act\.(enc|dec)_(mid0|mid1_attn|mid2)', HIDDEN, self.middle),
            Rule('train_(rec|vq|commit|entropy|total)', OBJECTIVES, self.loss),
            Rule(r'grad\.(.+)', QUANTISER_GRADIENTS, lambda name: self.gradients[name]),
            Rule('train_codebook_used_tail', INTEGERS, self.recent_tail),
            Rule('train_codebook_usage', OBJECTIVES, self.recent_share),
        )

    @property
    def images(self) -> np.ndarray:
        return np.moveaxis(self.case.input('image'), 1, -1)

    @functools.cached_property
    def forward(self) -> Forward:
        return _forward_fn(self.config)(self.params, self.images)

    @property
    def codes_BL(self) -> jax.Array:
        return self.forward.codes_Bhw.reshape(len(self.images), -1)

    def vectors(self, codes_BL: jax.Array) -> jax.Array:
        """[B, h, w, C]: the code vectors as the decoder reads them."""
        return _vectors_fn(self.config)(self.params, codes_BL)

    def decode(self, codes_BL: jax.Array) -> jax.Array:
        return _decode_fn(self.config)(self.params, self.vectors(codes_BL))

    def decode_random(self) -> jax.Array:
        return self.decode(self.case.input('random_codes'))

    def to_bytes(self) -> jax.Array:
        return self.config.build().to_uint8(self.forward.decoded)

    def downsampled(self, level: str) -> np.ndarray:
        return _recorded(self.forward.encoder[f'down_{level}_downsample'])

    def upsampled(self, block: str) -> np.ndarray:
        """The map after an upsampling, counted from the lowest resolution."""
        level = len(self.config.autoencoder.widths) - 1 - int(block)
        return _recorded(self.forward.decoder[f'up_{level}_upsample'])

    def middle(self, side: str, name: str) -> np.ndarray:
        outputs = {'enc': self.forward.encoder, 'dec': self.forward.decoder}[side]
        return _recorded(outputs[MIDDLE[name]])

    @functools.cached_property
    def trained(self) -> tuple[Losses, Mapping[str, np.ndarray]]:
        """The losses, and the gradients of their sum by original name."""
        option = self.case.option
        train = _train_fn(
            self.config,
            option('commit_loss_beta'),
            option('entropy_loss_ratio'),
            option('entropy_temperature'),
        )
        losses, gradients = train(self.params, self.images)
        return losses, entries.to_state(self.entries, jax.tree.map(np.asarray, gradients))

    @property
    def gradients(self) -> Mapping[str, np.ndarray]:
        return self.trained[1]

    def loss(self, name: str) -> jax.Array:
        return getattr(self.trained[0], name)

    @functools.cached_property
    def recent(self) -> np.ndarray:
        """The recorded buffer, with the codes of these images at its end."""
        buffer, codes = self.case.state[BUFFER], np.asarray(self.codes_BL).reshape(-1)
        return np.concatenate([buffer, codes])[-len(buffer) :]

    def recent_tail(self) -> np.ndarray:
        return self.recent[-len(self.case.input('train_codebook_used_tail')) :]

    def recent_share(self) -> float:
        """The share of the codebook in the buffer; its initial zeros count as a code."""
        return len(np.unique(self.recent)) / self.config.codes


def tokenizer_config(case: Case) -> RasterVQ:
    """The tokenizer of the original options, for the recorded images."""
    option = case.option
    autoencoder = cases.build(
        case,
        Autoencoder,
        width=option('ch'),
        multipliers=tuple(option('ch_mult')),
        blocks=option('num_res_blocks'),
        latent=option('z_channels'),
        fused_attention=False,
    )
    height, width = case.input('image').shape[2:]
    down = autoencoder.downsampling
    return cases.build(
        case,
        RasterVQ,
        autoencoder=autoencoder,
        grid=(height // down, width // down),
        codes=option('codebook_size'),
        channels=option('codebook_embed_dim'),
        normalised=option('codebook_l2_norm'),
    )


def _recorded(x_BhwC: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(x_BhwC), -1, 1)


@functools.cache
def _forward_fn(config: RasterVQ) -> Callable[..., Forward]:
    """(params, images) -> `Forward`, jitted."""

    def run(params: Any, images_BHWc: jax.Array) -> Forward:
        def whole(module, images_BHWc):
            f_BhwC = module.features(images_BHWc)
            quantised = module.quantise(f_BhwC)
            straight = quantised.straight_through(f_BhwC)
            distances = module.quantiser.distances(f_BhwC)
            return quantised, straight, distances, module.decode_unclamped(straight)

        outputs, captured = config.build().apply(
            {'params': params},
            images_BHWc,
            method=whole,
            capture_intermediates=True,
            mutable=['intermediates'],
        )
        quantised, straight, distances, decoded = outputs
        two = -jax.lax.top_k(-distances, 2)[0]
        captured = captured['intermediates']
        return Forward(
            encoded=captured['encoder']['__call__'][0],
            projected=captured['quant_conv']['__call__'][0],
            quantised=straight,
            codes_Bhw=quantised.codes[0],
            margin=two[..., 1] - two[..., 0],
            decoded=decoded,
            encoder=_outputs(captured['encoder']),
            decoder=_outputs(captured['decoder']),
        )

    return jax.jit(run)


def _outputs(captured: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The outputs of the modules inside of a module."""
    inner = {name: part for name, part in captured.items() if isinstance(part, Mapping)}
    return {name: part['__call__'][0] for name, part in inner.items()}


@functools.cache
def _vectors_fn(config: RasterVQ) -> Callable:
    """(params, codes [B, L]) -> code vectors [B, h, w, C], jitted."""

    def run(params: Any, codes_BL: jax.Array) -> jax.Array:
        vectors_BLC = bind(config.build(), params).embed(codes_BL)
        return vectors_BLC.reshape(-1, *config.grid, config.channels)

    return jax.jit(run)


@functools.cache
def _decode_fn(config: RasterVQ) -> Callable:
    """(params, canvas) -> unclamped images, jitted."""
    return jax.jit(lambda params, canvas: bind(config.build(), params).decode_unclamped(canvas))


@functools.cache
def _train_fn(config: RasterVQ, commitment: float, entropy: float, temperature: float) -> Callable:
    """(params, images) -> (losses, gradients of their sum), jitted."""

    def total(params: Any, images_BHWc: jax.Array) -> tuple[jax.Array, Losses]:
        module = bind(config.build(), params)
        f_BhwC = module.features(images_BHWc)
        quantised = module.quantise(f_BhwC)
        decoded = module.decode_unclamped(quantised.straight_through(f_BhwC))
        entropies = code_entropies(module.quantiser.distances(f_BhwC), temperature)
        losses = Losses(
            rec=jnp.square(decoded - images_BHWc).mean(),
            vq=quantised.distortions(f_BhwC)[0],
            commit=commitment * quantised.commitments(f_BhwC)[0],
            entropy=entropy * (entropies.per_sample - entropies.codebook),
        )
        return losses.total, losses

    def run(params: Any, images_BHWc: jax.Array) -> tuple[Losses, Any]:
        gradients, losses = jax.grad(total, has_aux=True)(params, images_BHWc)
        return losses, gradients

    return jax.jit(run)
