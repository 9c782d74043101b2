"""Which parts make an Infinity transformer?

Text-conditioned prediction of bits, scale by scale (Infinity specification 5): the pooled text
starts the sequence and modulates every layer, and every layer attends to the text.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.codes import Bits, Codes, Index
from star_jax.core.condition import TextCondition
from star_jax.core.filters import BitFilter, NucleusFilter
from star_jax.core.schedule import Grids, Pyramid, square_grids
from star_jax.core.settings import Remat, Settings
from star_jax.core.sizes import check_codes, check_sizes
from star_jax.core.templates import PUBLISHED, RESOLUTIONS, Templates
from star_jax.errors import UserError
from star_jax.families.decoder import Sizes
from star_jax.families.fit import check_text_encoder
from star_jax.nn import layers
from star_jax.nn.attention import Cosine, CrossAttention, Scaled, SelfAttention, rotate_last
from star_jax.nn.attention_dispatch import AUTOMATIC
from star_jax.nn.blocks import BlockParts, Mlp, SwiGlu
from star_jax.nn.conditioning import ModulationOffset, PooledStart, VectorModulation
from star_jax.nn.heads import Head, ModulatedHead
from star_jax.nn.positions import AnyPositions, ReferenceRotary
from star_jax.nn.transformer import Transformer
from star_jax.protocols import Kernel, LoadEncoder, PromptEncoder
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.tokenizers.sign_quantiser import PATCH

# Depth, width and heads of the published sizes (Infinity specification 8), and what else differs.
SIZES = {
    '125M': (12, 768, 8, {}),
    '361M': (16, 1152, 12, {}),
    '940M': (24, 1536, 16, {}),
    '2.2B': (32, 2080, 20, {}),
    '4.7B': (40, 2688, 24, {}),
    '2B': (32, 2048, 16, {}),
    '8B': (40, 3584, 28, {'bits': 56}),
    '20B': (58, 4608, 36, {'drop_path': 0.25}),
}
PATCHED_BITS = 56  # bits of a token of the published 8B model
LEVELS = 15  # rows of the level embedding, for any schedule
UNIT = 256  # hidden widths are multiples of it
POOL_WIDTH = 128  # channels of the text for each pooling head
WIDE, WIDE_POOL_WIDTH = 4096, 64  # the same in wider models
HEAD_INIT = 0.02  # shrinks the logits' weights at the start
UNPROMPTED_STD, UNPROMPTED_BOUND = 1.2, 2.0  # learned rows, times sqrt(text width)


def hidden_channels(width: int, mlp_ratio: float, swiglu: bool) -> int:
    """Channels inside an MLP, a multiple of 256 (Infinity specification 5.5).

    Halves are rounded to even; widths so small that 0 is left fall back to `width`. A SwiGLU has
    two thirds of them and no such fallback.
    """
    plain = UNIT * round(width * mlp_ratio / UNIT) or width
    return UNIT * round(2 * plain / 3 / UNIT) if swiglu else plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infinity(Sizes):
    """An Infinity transformer; the defaults are the published 125M at 256 px.

    Attributes:
        depth: number of transformer blocks.
        width: channels of a token inside the transformer.
        heads: attention heads of a block; a divisor of width.
        drop_path: stochastic depth: probability of skipping the last block; it rises linearly from
            0 at the first block.
        bits: bits of a token.
        indexed: predict one of 2^bits codes instead of the bits; for comparisons, not published.
        grids: (height, width) of each scale in tokens, the first 1 x 1.
        reference: (height, width) of the grid that positions refer to: the last grid of the longest
            published schedule of the same aspect ratio (0 0: the last grid).
        templates: grids of other aspect ratios, into which training sorts images.
        text_width: width of the text encoder's features.
        text_rows: learned rows that stand for a text without a prompt, and tokens of a prompt that
            the model reads: the rest of a longer one is cut off.
        positions: position encoding; another kind is chosen in a config file.
        levels_every: add the level embedding before every so many blocks (0: once).
        shared_adaln: share one modulation among all blocks, with a learned offset per block.
        modulated_head: modulate the norm before the logits (False: a norm with a learned scale).
        head_layers: linear layers of the head, 1 or 2.
        qk_norm: normalise queries and keys, and learn a temperature per head.
        score_temperature: divisor of attention scores without qk_norm.
        rms_norm: RMSNorm instead of LayerNorm.
        swiglu: SwiGLU instead of an MLP with GELU.
        input_norm: normalise the inputs of every scale.
        cross_scale: initial value of a learned scale on the output of cross-attention (negative: no
            scale).
        row_multiple: teacher forcing pads the rows to a multiple of this number.
        gate_init: factor on the initial gates of the modulation.
        modulation_init: factor on its initial scales and shifts, and on those of the head.
    """

    depth: int = 12
    width: int = 768
    heads: int = 8
    drop_path: float = 0.1
    bits: int = 32
    indexed: bool = False
    grids: Grids = square_grids((1, 2, 4, 6, 8, 12, 16))
    reference: tuple[int, int] = (64, 64)
    templates: Templates = PUBLISHED
    text_width: int = 2048
    text_rows: int = 512
    positions: AnyPositions = ReferenceRotary()
    levels_every: int = 0
    shared_adaln: bool = True
    modulated_head: bool = True
    head_layers: int = 1
    qk_norm: bool = True
    score_temperature: float = 1.0
    rms_norm: bool = False
    swiglu: bool = False
    input_norm: bool = False
    cross_scale: float = -1.0
    row_multiple: int = 1
    gate_init: float = 5e-6
    modulation_init: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(bits=self.bits, text_width=self.text_width, text_rows=self.text_rows)
        if self.indexed:
            check_codes(2**self.bits)
        check_sizes(
            row_multiple=self.row_multiple,
            hidden=self.hidden,
            levels_every=max(self.levels_every, 1),
        )
        for name, grids in {'grids': self.grids, **self.templates.by_name}.items():
            Pyramid(grids)  # refuses grids that shrink, or none
            if grids[0] != (1, 1):
                what = 'grids' if grids is self.grids else f'the template {name}'
                raise UserError(
                    f'the first of {what} must be 1 x 1, the row of the pooled text, not '
                    f'{grids[0][0]} x {grids[0][1]}: put 1 x 1 before it'
                )
        if self.schedule.steps > LEVELS:
            raise UserError(f'grids has {self.schedule.steps} scales, expected at most {LEVELS}')
        if self.width % self.pool_heads:
            raise UserError(
                f'width {self.width} does not divide into the {self.pool_heads} heads that pool a '
                f'text of width {self.text_width}: choose a multiple of {self.pool_heads}'
            )
        if self.head_layers not in (1, 2):
            raise UserError(f'head_layers must be 1 or 2, not {self.head_layers}')
        if self.score_temperature <= 0 or self.levels_every < 0:
            raise UserError(
                'score_temperature must be positive and levels_every not negative, not '
                f'{self.score_temperature} and {self.levels_every}'
            )
        self.positions.check(self.width, self.head_width)

    @classmethod
    def published(cls, size: str, resolution: str = '0.06M') -> 'Infinity':
        """The published model of a size, with square images (Infinity specification 8).

        Args:
            size: a key of `SIZES`, such as 2B.
            resolution: a key of `RESOLUTIONS`.

        Raises:
            KeyError: there is no such size or resolution.
        """
        depth, width, heads, others = SIZES[size]
        grids = PUBLISHED.by_name['1.0']
        return cls(
            depth=depth,
            width=width,
            heads=heads,
            grids=grids[: RESOLUTIONS[resolution]],
            reference=grids[-1],
            **others,
        )

    @property
    def schedule(self) -> Pyramid:
        return Pyramid(self.grids, self.reference)

    def at(self, schedule: Pyramid) -> 'Infinity':
        """The same model with the grids and the reference grid of a schedule."""
        return dataclasses.replace(self, grids=schedule.grids, reference=schedule.reference)

    @property
    def vocabulary(self) -> Codes:
        return Index(2**self.bits) if self.indexed else Bits(self.bits)

    @property
    def vector_width(self) -> int:
        return self.bits

    @property
    def pool_heads(self) -> int:
        """Heads that pool the text."""
        each = WIDE_POOL_WIDTH if self.width > WIDE else POOL_WIDTH
        return max(self.text_width // each, 1)

    @property
    def hidden(self) -> int:
        """Channels inside an MLP."""
        return hidden_channels(self.width, self.mlp_ratio, self.swiglu)

    def build(
        self,
        dtype: str = 'float32',
        remat: Remat = 'none',
        unroll: int = 1,
        attend: Kernel = AUTOMATIC,
    ) -> Transformer:
        """The network, with activations of `dtype` and attention computed by `attend`."""
        modulation = functools.partial(VectorModulation, self.width, self._modulation_kernel)
        if self.shared_adaln:
            modulation = functools.partial(ModulationOffset, self.width, self._offset)
        return Transformer(
            schedule=self.schedule,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            starter=PooledStart(
                width=self.width,
                text_width=self.text_width,
                heads=self.pool_heads,
                text_rows=self.text_rows,
                kernel_init=self.init,
                unprompted_init=self._unprompted_init,
            ),
            embedder=self._embedder(),
            positions=self.positions,
            block=self._block(attend, modulation),
            to_logits=self._head(),
            init_rows=self.init,
            levels_count=LEVELS,
            levels_every=self.levels_every,
            modulator=VectorModulation(self.width, self.init) if self.shared_adaln else None,
            remat=remat,
            unroll=unroll,
            dtype=dtype,
            row_multiple=self.row_multiple,
        )

    def abstract_condition(self, batch: int = 1, tokens: int = 1) -> TextCondition:
        """Shapes of encoded captions of `tokens` tokens."""
        return TextCondition(
            states_BTE=jax.ShapeDtypeStruct((batch, tokens, self.text_width), jnp.float32),
            mask_BT=jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
            pooled_BE=jax.ShapeDtypeStruct((batch, self.text_width), jnp.float32),
        )

    def default_tokenizer(self) -> BSQ:
        """The published tokenizer with these scales and bits; one has tokens of 2 x 2 cells."""
        if self.bits != PATCHED_BITS:
            return BSQ(grids=self.grids, bits=self.bits, indexed=self.indexed)
        autoencoder = dataclasses.replace(BSQ.autoencoder, multipliers=(1, 2, 4, 4))
        return BSQ(
            autoencoder=autoencoder, grids=self.grids, bits=PATCHED_BITS // PATCH**2, patchify=True
        )

    def prompt_encoder(self, load: LoadEncoder) -> PromptEncoder:
        """The text encoder that `load` returns, for prompts of at most `text_rows` tokens.

        Raises UserError unless it has the model's text width.
        """
        return check_text_encoder(load(most=self.text_rows), self.text_width)

    def guidance_weights(self, guidance: float) -> np.ndarray:
        """[S] float32: the published number less 1, at every scale; off at 1.

        Below 1 the weight is negative, as published: 0 samples the unprompted rows.
        """
        return np.full(self.schedule.steps, guidance - 1, np.float32)

    def filter(self, settings: Settings) -> BitFilter | NucleusFilter:
        """Top-k and the nucleus over the two values of a bit; top-p is off at 0 and at 1."""
        top_p = settings.top_p if settings.top_p < 1 else 0
        kind = NucleusFilter if self.indexed else BitFilter
        return kind(top_k=settings.top_k, top_p=top_p or None)

    def _block(self, attend: Kernel, modulation: Callable[[], nn.Module]) -> BlockParts:
        """Normalised queries and keys rotate last."""
        sizes = {'width': self.width, 'kernel_init': self.init, 'out_init': self.out_init}
        plain = self.head_width**-0.5
        scores = functools.partial(Scaled, plain / self.score_temperature)
        if self.qk_norm:
            scores = functools.partial(Cosine, self.heads)
        scaled = functools.partial(layers.LayerScale, self.width, self.cross_scale)
        return BlockParts(
            self_attention=functools.partial(
                SelfAttention,
                heads=self.heads,
                scores=scores,
                attend=attend,
                order=rotate_last,
                **sizes,
            ),
            mlp=functools.partial(SwiGlu if self.swiglu else Mlp, hidden=self.hidden, **sizes),
            norm=layers.PlainRMSNorm if self.rms_norm else layers.LayerNorm,
            cross_attention=functools.partial(
                CrossAttention,
                heads=self.heads,
                text_width=self.width,
                scores=functools.partial(Scaled, plain),
                attend=attend,
                **sizes,
            ),
            cross_norm=functools.partial(self._affine_norm, self.width),
            cross_scale=scaled if self.cross_scale >= 0 else None,
            modulation=modulation,
        )

    def _head(self) -> nn.Module:
        logits = {
            'width': self.width,
            'num_logits': self.vocabulary.num_logits,
            'kernel_init': nn.initializers.normal(self.std * HEAD_INIT),
            'inner_init': self.init if self.head_layers == 2 else None,
        }
        if not self.modulated_head:
            return Head(norm=self._affine_norm(self.width), **logits)
        return ModulatedHead(
            modulation_init=nn.initializers.normal(self.std * self.modulation_init),
            norm=layers.rms_norm if self.rms_norm else layers.layer_norm,
            **logits,
        )

    def _embedder(self) -> nn.Module:
        linear = layers.Linear(self.bits, self.width, (None, 'embed'), self.init)
        if not self.input_norm:
            return linear
        return layers.NormedLinear(self._affine_norm(self.bits, axis=None), linear)

    def _affine_norm(self, width: int, axis: str | None = 'embed') -> nn.Module:
        norm = layers.RMSNorm if self.rms_norm else layers.AffineLayerNorm
        return norm(width, eps=1e-6, axis=axis)

    @property
    def _factors_61(self) -> jax.Array:
        """Factors on fresh gates, scales and shifts, two of each."""
        return jnp.asarray([self.gate_init] * 2 + [self.modulation_init] * 4)[:, None]

    def _offset(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = float) -> jax.Array:
        return self._factors_61 * nn.initializers.normal(self.width**-0.5)(key, shape, dtype)

    def _modulation_kernel(
        self, key: jax.Array, shape: tuple[int, int], dtype: Any = float
    ) -> jax.Array:
        kernel_D6D = self.init(key, shape, dtype).reshape(shape[0], 6, -1)
        return (self._factors_61 * kernel_D6D).reshape(shape)

    @property
    def _unprompted_init(self) -> layers.Initializer:
        bound = UNPROMPTED_BOUND / UNPROMPTED_STD
        std = UNPROMPTED_STD / self.text_width**0.5
        return nn.initializers.truncated_normal(std, lower=-bound, upper=bound)
