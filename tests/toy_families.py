"""Three families from outside of the package, each with what no published STAR or VAR needs.

`BitScales`: bits as codes, features as the tokenizer's output, labels that are flipped in training,
and an unconditional embedding that learns. `WideStar`: grids that are not square and a temperature
per step. `PrefixRaster`: a raster after a padded text prefix, RMSNorm and SwiGLU, shared key/value
heads, and unconditional rows that are constants.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import pixels, resize
from star_jax.core.codes import Bits, Index, Sampled, Targets
from star_jax.core.condition import TextCondition
from star_jax.core.filters import NucleusFilter
from star_jax.core.schedule import Grids, Pyramid, Raster, Schedule, Step
from star_jax.core.settings import Settings
from star_jax.families.decoder import IndexSizes
from star_jax.families.registry import register_family, register_tokenizer
from star_jax.families.star import Star
from star_jax.nn import layers
from star_jax.nn.attention import Scaled, SelfAttention
from star_jax.nn.attention_dispatch import AUTOMATIC
from star_jax.nn.blocks import BlockParts, SwiGlu
from star_jax.nn.conditioning import TextStart
from star_jax.nn.heads import Head
from star_jax.nn.positions import NoPositions, Positions
from star_jax.nn.transformer import Transformer
from star_jax.protocols import PromptEncoder, TokenizerConfig

DOWNSAMPLING = 4


# Bits over a pyramid


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitTokenizer(TokenizerConfig):
    """Signs of pooled pixels, scale by scale.

    Attributes:
        grids: (height, width) of each scale.
        bits: bits of a token.
        flips: probability with which training flips a bit that the next scales then correct.
    """

    grids: Grids = ((1, 1), (2, 2), (4, 4))
    bits: int = 3
    flips: float = 0.2

    @property
    def schedule(self) -> Pyramid:
        return Pyramid(self.grids)

    @property
    def vocabulary(self) -> Bits:
        return Bits(self.bits)

    @property
    def vector_width(self) -> int:
        return self.bits

    @property
    def resolution(self) -> tuple[int, int]:
        height, width = self.grids[-1]
        return DOWNSAMPLING * height, DOWNSAMPLING * width

    def at(self, schedule: Schedule) -> 'BitTokenizer':
        return dataclasses.replace(self, grids=schedule.grids)

    def build(self, dtype: str = 'float32') -> 'BitTokenizerModule':
        return BitTokenizerModule(self)

    def abstract(self) -> dict:
        images = jax.ShapeDtypeStruct((1, *self.resolution, 3), jnp.float32)
        return jax.eval_shape(self.build().init, jax.random.key(0), images)['params']


class BitTokenizerModule(nn.Module):
    """The canvas adds up signs, half as large at every scale."""

    config: BitTokenizer

    @property
    def schedule(self) -> Pyramid:
        return self.config.schedule

    @property
    def codes(self) -> Bits:
        return self.config.vocabulary

    @property
    def resolution(self) -> tuple[int, int]:
        return self.config.resolution

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.orthogonal(), (None, 'channels'))
        self.project = self.param('project', init, (3, self.config.bits))

    def __call__(self, images):
        return self.encode(images)

    def encode(self, images):
        """Features [B, h, w, K]: a cache holds them, because codes depend on the flips."""
        return resize.area(images, *self.schedule.grids[-1]) @ self.project

    def training_targets(self, encoded, key) -> Targets:
        canvas, codes, inputs = self.blank(len(encoded)), [], []
        for step, grid in enumerate(self.schedule.grids):
            rest = resize.area(encoded - canvas, *grid).reshape(len(encoded), -1, self.config.bits)
            bits = (rest > 0).astype(jnp.int8)
            codes.append(bits)
            flip = jax.random.bernoulli(
                jax.random.fold_in(key, step), self.config.flips, bits.shape
            )
            used = jnp.where(flip, 1 - bits, bits)
            canvas, following = self.advance(canvas, Sampled(used, self.embed(used)), Step.at(step))
            inputs.append(following)
        return Targets(jnp.concatenate(inputs[:-1], axis=1), jnp.concatenate(codes, axis=1))

    def inputs(self, codes_BLK):
        canvas, inputs = self.blank(len(codes_BLK)), []
        for step in range(self.schedule.steps - 1):
            first, end = self.schedule.offsets[step : step + 2]
            bits = codes_BLK[:, first:end]
            canvas, following = self.advance(canvas, Sampled(bits, self.embed(bits)), Step.at(step))
            inputs.append(following)
        return jnp.concatenate(inputs, axis=1)

    def embed(self, codes_BLK):
        return 2.0 * codes_BLK - 1

    def blank(self, batch):
        return jnp.zeros((batch, *self.schedule.grids[-1], self.config.bits))

    def advance(self, canvas, sampled, step):
        grid = self.schedule.grids[step.like]
        vectors = sampled.vectors_BLC.reshape(len(canvas), *grid, -1)
        canvas = canvas + 0.5 ** (step.like + 1) * resize.bicubic(vectors, *self.schedule.grids[-1])
        return canvas, self.following(canvas, step)

    def following(self, canvas, step):
        after = step.next()
        if after.like == self.schedule.steps:
            return None
        inputs = resize.area(canvas, *self.schedule.grids[after.like])
        return inputs.reshape(len(inputs), -1, self.config.bits)

    def decode(self, canvas):
        images = (canvas @ self.project.T).clip(-1, 1)
        return images.repeat(DOWNSAMPLING, axis=1).repeat(DOWNSAMPLING, axis=2)

    def to_uint8(self, images):
        return pixels.to_uint8(images)


class LearnedEmptyStart(nn.Module):
    """A text start whose unprompted condition is learned."""

    width: int
    text_width: int
    kernel_init: layers.Initializer

    def setup(self) -> None:
        self.begin = TextStart(self.width, self.text_width, 1, self.kernel_init)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.5), (None,))
        self.pooled = self.param('unprompted', init, (self.text_width,))

    def __call__(self, text: TextCondition) -> jax.Array:
        return self.begin(text)

    def text(self, text: TextCondition) -> tuple[None, None]:
        return None, None

    def summary(self, text: TextCondition) -> None:
        return None

    def padding(self, text: TextCondition) -> None:
        return None

    def unprompted(self, text: TextCondition, empty: TextCondition) -> TextCondition:
        return text.replace(pooled_BE=jnp.broadcast_to(self.pooled, text.pooled_BE.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitScales(IndexSizes):
    """Bits over a pyramid, with an unconditional embedding that learns."""

    depth: int = 2
    width: int = 16
    heads: int = 2
    grids: Grids = ((1, 1), (2, 2), (4, 4))
    bits: int = 3
    text_width: int = 32

    @property
    def schedule(self) -> Pyramid:
        return Pyramid(self.grids)

    @property
    def vocabulary(self) -> Bits:
        return Bits(self.bits)

    @property
    def vector_width(self) -> int:
        return self.bits

    def default_tokenizer(self) -> BitTokenizer:
        return BitTokenizer(grids=self.grids, bits=self.bits)

    def build(self, dtype='float32', remat='none', unroll=1, attend=AUTOMATIC) -> Transformer:
        scores = functools.partial(Scaled, self.head_width**-0.5)
        return Transformer(
            schedule=self.schedule,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            starter=LearnedEmptyStart(self.width, self.text_width, self.init),
            embedder=layers.Linear(self.bits, self.width, (None, 'embed'), self.init),
            positions=NoPositions(),
            block=BlockParts(
                self_attention=functools.partial(
                    SelfAttention,
                    width=self.width,
                    heads=self.heads,
                    scores=scores,
                    kernel_init=self.init,
                    out_init=self.out_init,
                    attend=attend,
                ),
                mlp=functools.partial(
                    SwiGlu,
                    width=self.width,
                    hidden=self.hidden,
                    kernel_init=self.init,
                    out_init=self.out_init,
                ),
            ),
            to_logits=Head(self.width, self.vocabulary.num_logits, self.init, layers.LayerNorm()),
            init_rows=self.init,
            levels_count=5,
            remat=remat,
            unroll=unroll,
            dtype=dtype,
        )

    def abstract_condition(self, batch: int = 1, tokens: int = 1) -> TextCondition:
        return abstract_text(batch, tokens, self.text_width)

    def prompt_encoder(self, load) -> PromptEncoder:
        return load()

    def guidance_weights(self, guidance: float) -> np.ndarray:
        return np.full(self.schedule.steps, max(guidance - 1, 0), np.float32)

    def filter(self, settings: Settings) -> NucleusFilter:
        return NucleusFilter(top_k=settings.top_k, top_p=settings.top_p or None)


# Grids that are not square


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideStar(Star):
    """STAR on wide images, sampled hotter at coarse scales."""

    grids: Grids = ((1, 1), (1, 2), (2, 4))

    def temperatures(self, temperature: float) -> np.ndarray:
        return temperature * np.linspace(2, 1, self.schedule.steps, dtype=np.float32)


# A raster after a text prefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrayTokenizer(TokenizerConfig):
    """The nearest of a few levels of gray for every square of pixels.

    Attributes:
        height: tokens of an image along its height.
        width: tokens along its width.
        levels: codes.
        prefix: rows of text before the image; the tokenizer knows them by its schedule.
    """

    height: int = 3
    width: int = 4
    levels: int = 8
    prefix: int = 4

    @property
    def schedule(self) -> Raster:
        return Raster(self.height, self.width, self.prefix)

    @property
    def vocabulary(self) -> Index:
        return Index(self.levels)

    @property
    def vector_width(self) -> int:
        return 1

    @property
    def resolution(self) -> tuple[int, int]:
        return DOWNSAMPLING * self.height, DOWNSAMPLING * self.width

    def at(self, schedule: Raster) -> 'GrayTokenizer':
        return dataclasses.replace(
            self, height=schedule.height, width=schedule.width, prefix=schedule.prefix
        )

    def build(self, dtype: str = 'float32') -> 'GrayTokenizerModule':
        return GrayTokenizerModule(self)

    def abstract(self) -> dict:
        images = jax.ShapeDtypeStruct((1, *self.resolution, 3), jnp.float32)
        return jax.eval_shape(self.build().init, jax.random.key(0), images)['params']


class GrayTokenizerModule(nn.Module):
    """The canvas is the array of codes."""

    config: GrayTokenizer

    @property
    def schedule(self) -> Raster:
        return self.config.schedule

    @property
    def codes(self) -> Index:
        return self.config.vocabulary

    @property
    def resolution(self) -> tuple[int, int]:
        return self.config.resolution

    def setup(self) -> None:
        self.levels = self.param(
            'levels',
            nn.with_logical_partitioning(
                lambda *_: jnp.linspace(-1, 1, self.config.levels), ('codes',)
            ),
            (self.config.levels,),
        )

    def __call__(self, images):
        return self.encode(images)

    def encode(self, images):
        gray = resize.area(images.mean(-1, keepdims=True), self.config.height, self.config.width)
        distance = jnp.abs(gray - self.levels)
        return distance.argmin(-1).reshape(len(images), -1).astype(jnp.int32)

    def training_targets(self, encoded, key) -> Targets:
        return Targets(self.inputs(encoded), encoded)

    def inputs(self, codes_BL):
        return self.embed(codes_BL[:, :-1])

    def embed(self, codes_BL):
        return self.levels[codes_BL][..., None]

    def blank(self, batch):
        return jnp.zeros((batch, self.schedule.length), jnp.int32)

    def advance(self, canvas, sampled, step):
        codes = sampled.codes_BL
        canvas = jax.lax.dynamic_update_slice_in_dim(canvas, codes, step.index, axis=1)
        last = step.like + 1 == self.schedule.steps
        return canvas, None if last else sampled.vectors_BLC

    def decode(self, canvas):
        gray = self.levels[canvas].reshape(-1, self.config.height, self.config.width, 1)
        images = gray.repeat(DOWNSAMPLING, axis=1).repeat(DOWNSAMPLING, axis=2)
        return images.repeat(3, axis=-1)

    def to_uint8(self, images):
        """Rounded in another way than STAR."""
        return (127.5 * images + 128).clip(0, 255).astype(jnp.uint8)


class PrefixStart(nn.Module):
    """Projected text at the end of the prefix; the rows without a prompt are constant."""

    width: int
    text_width: int
    prefix: int
    kernel_init: layers.Initializer

    def setup(self) -> None:
        axes = (None, 'embed')
        self.project = layers.Linear(self.text_width, self.width, axes, self.kernel_init)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, None))
        self.empty = self.param('empty', init, (self.prefix, self.text_width))

    def __call__(self, text: TextCondition) -> jax.Array:
        states_BTE, length_B = self._aligned(text)
        real_BT = jnp.arange(self.prefix) >= self.prefix - length_B[:, None]
        return self.project(states_BTE) * real_BT[..., None]

    def text(self, text: TextCondition) -> tuple[None, None]:
        return None, None

    def summary(self, text: TextCondition) -> None:
        return None

    def padding(self, text: TextCondition) -> jax.Array:
        return self.prefix - self._aligned(text)[1]

    def unprompted(self, text: TextCondition, empty: TextCondition) -> TextCondition:
        """The constant rows, masked with the prompt's own mask."""
        states_BTE, length_B = self._aligned(text)
        shift_BT = (jnp.arange(self.prefix) - length_B[:, None]) % self.prefix
        constant = jnp.take_along_axis(
            jnp.broadcast_to(self.empty, states_BTE.shape), shift_BT[..., None], axis=1
        )
        count = text.states_BTE.shape[1]
        constant = jnp.pad(constant, ((0, 0), (0, max(count - self.prefix, 0)), (0, 0)))[:, :count]
        return text.replace(states_BTE=constant)

    def _aligned(self, text: TextCondition) -> tuple[jax.Array, jax.Array]:
        """[B, prefix, E] states at the end of the prefix, and how many of them are real."""
        length_B = jnp.minimum(text.mask_BT.sum(-1), self.prefix)
        states_BTE = text.states_BTE.astype(jnp.float32)[:, : self.prefix]
        missing = self.prefix - states_BTE.shape[1]
        states_BTE = jnp.pad(states_BTE, ((0, 0), (0, missing), (0, 0)))
        shift_BT = (jnp.arange(self.prefix) + length_B[:, None]) % self.prefix
        return jnp.take_along_axis(states_BTE, shift_BT[..., None], axis=1), length_B


class PrefixRotary(Positions):
    """Rotary positions over a raster; the rows of the prefix are zero, as in LlamaGen."""

    rotary = True

    def rotation(self, schedule: Raster, head_width: int) -> np.ndarray:
        y, x = np.divmod(np.arange(schedule.length), schedule.width)
        freqs = 100.0 ** -(np.arange(0, head_width, 4) / head_width)
        angles = np.concatenate([x[:, None] * freqs, y[:, None] * freqs], axis=1)[:-1]
        table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
        return np.pad(table, ((schedule.prefix, 0), (0, 0), (0, 0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixRaster(IndexSizes):
    """A raster after a padded text prefix, made of Llama's parts."""

    constants = frozenset({'starter/empty'})

    depth: int = 2
    width: int = 16
    heads: int = 4
    kv_heads: int = 2
    codes: int = 8
    channels: int = 1
    tokens_high: int = 3
    tokens_wide: int = 4
    prefix: int = 4
    text_width: int = 32

    @property
    def schedule(self) -> Raster:
        return Raster(self.tokens_high, self.tokens_wide, self.prefix)

    def default_tokenizer(self) -> GrayTokenizer:
        return GrayTokenizer(
            height=self.tokens_high,
            width=self.tokens_wide,
            levels=self.codes,
            prefix=self.prefix,
        )

    def build(self, dtype='float32', remat='none', unroll=1, attend=AUTOMATIC) -> Transformer:
        norm = functools.partial(layers.RMSNorm, self.width)
        return Transformer(
            schedule=self.schedule,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            starter=PrefixStart(self.width, self.text_width, self.prefix, self.init),
            embedder=layers.Linear(1, self.width, (None, 'embed'), self.init),
            positions=PrefixRotary(),
            block=BlockParts(
                self_attention=functools.partial(
                    SelfAttention,
                    width=self.width,
                    heads=self.heads,
                    kv_heads=self.kv_heads,
                    scores=functools.partial(Scaled, self.head_width**-0.5),
                    kernel_init=self.init,
                    out_init=self.out_init,
                    biases=(),
                    attend=attend,
                ),
                mlp=functools.partial(
                    SwiGlu,
                    width=self.width,
                    hidden=self.hidden,
                    kernel_init=self.init,
                    out_init=self.out_init,
                ),
                norm=norm,
            ),
            to_logits=Head(self.width, self.codes, self.init, norm()),
            init_rows=self.init,
            level_embedding=False,
            remat=remat,
            unroll=unroll,
            dtype=dtype,
        )

    def abstract_inputs(self, batch: int = 1) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, self.schedule.length - 1, 1), np.float32)

    def abstract_condition(self, batch: int = 1, tokens: int = 1) -> TextCondition:
        return abstract_text(batch, tokens, self.text_width)

    def prompt_encoder(self, load) -> PromptEncoder:
        return load()

    def guidance_weights(self, guidance: float) -> np.ndarray:
        return np.full(self.schedule.steps, max(guidance - 1, 0), np.float32)

    def filter(self, settings: Settings) -> NucleusFilter:
        return NucleusFilter(top_k=settings.top_k, top_p=settings.top_p or None)


def abstract_text(batch: int, tokens: int, width: int) -> TextCondition:
    """Shapes of encoded captions."""
    return TextCondition(
        states_BTE=jax.ShapeDtypeStruct((batch, tokens, width), jnp.float32),
        mask_BT=jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
        pooled_BE=jax.ShapeDtypeStruct((batch, width), jnp.float32),
    )


def register() -> dict[str, Any]:
    """Registers all three; their configs by name."""
    register_tokenizer('bit_tokenizer', BitTokenizer)
    register_tokenizer('gray_tokenizer', GrayTokenizer)
    configs = {
        'bit_scales': BitScales(),
        'wide_star': WideStar(
            depth=2, width=32, heads=2, sides=(1, 2, 4), codes=32, channels=4, text_width=32
        ),
        'prefix_raster': PrefixRaster(),
    }
    for name, config in configs.items():
        register_family(name, type(config))
    return configs
