"""Which parts make a LlamaGen model?

A plain Llama predicts the codes of an image token by token in raster order, after a prefix: the
vector of a class, or the projected states of a text (LlamaGen specification 2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.argument_types import choice
from star_jax.core.classes import Classes, check_classes
from star_jax.core.codes import Index
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.filters import LOWEST_TEMPERATURE, SortedFilter
from star_jax.core.schedule import Raster
from star_jax.core.settings import Remat, Settings
from star_jax.core.sizes import check_codes, check_sizes
from star_jax.errors import UserError
from star_jax.families.decoder import Layers
from star_jax.families.fit import check_text_encoder
from star_jax.nn import layers
from star_jax.nn.attention import Scaled, SelfAttention
from star_jax.nn.attention_dispatch import AUTOMATIC
from star_jax.nn.blocks import BlockParts, SwiGlu
from star_jax.nn.conditioning import LabelPrefix, TextPrefix
from star_jax.nn.heads import PlainHead
from star_jax.nn.positions import RasterPositions, RasterRotary
from star_jax.nn.transformer import Transformer
from star_jax.protocols import Kernel, LoadEncoder, PromptEncoder
from star_jax.text.cleaning import clean
from star_jax.tokenizers.raster_vq import RasterVQ

Cleaning = Literal['published', 'none']
CLEANINGS: dict[Cleaning, Callable[[str], str] | None] = {'published': clean, 'none': None}

STD = 0.02  # of all fresh weights (LlamaGen specification 2.7)
UNIT = 256  # published hidden widths are multiples of it
INIT = nn.initializers.normal(STD)

# Depth, heads and width of the published sizes (LlamaGen specification 2.1).
SIZES = {
    'B': (12, 12, 768),
    'L': (24, 16, 1024),
    'XL': (36, 20, 1280),
    'XXL': (48, 24, 1536),
    '3B': (24, 32, 3200),
    'XXXL': (48, 40, 2560),
    '1B': (22, 32, 2048),
    '7B': (32, 32, 4096),
}


def swiglu_width(width: int, multiplier: float = 1.0, unit: int = UNIT) -> int:
    """Channels inside a SwiGLU: two thirds of 4 `width`, times a number, rounded up to `unit`.

    Both products are truncated first (LlamaGen specification 2.2).
    """
    hidden = int(multiplier * int(2 * 4 * width / 3))
    return -(-hidden // unit) * unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama(Layers):
    """Sizes and parts of a Llama over a raster, whatever its prefix is; the defaults are GPT-B.

    Attributes:
        depth: number of transformer blocks.
        width: channels of a token inside the transformer.
        heads: attention heads of a block; a divisor of width.
        kv_heads: heads of keys and values, a divisor of heads; neighbours share one (0: as many as
            heads).
        hidden: channels inside a feed-forward part.
        grid: (height, width) of an image in tokens.
        codes: number of codes of the tokenizer.
        channels: channels of the tokenizer's code vectors, which the model does not read.
        positions: position encoding; another kind is chosen in a config file.
        norm_epsilon: added to mean squares before their root.
        row_dropout: rate of dropout of the embedded rows, in training.
        dropout: rate of dropout after attention and after the feed-forward part, in training (0
            where drop_path is positive, as published).
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 0
    hidden: int = 2048
    grid: tuple[int, int] = (16, 16)
    codes: int = 16384
    channels: int = 8
    positions: RasterPositions = RasterRotary()
    norm_epsilon: float = 1e-5
    row_dropout: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_codes(self.codes)
        check_sizes(hidden=self.hidden, channels=self.channels, grid=self.grid)
        if len(self.grid) != 2:
            raise UserError(f'grid is a height and a width in tokens, not {self.grid}')
        if self.kv_heads and (self.kv_heads < 0 or self.heads % self.kv_heads):
            raise UserError(
                f'kv_heads must be 0 or divide the {self.heads} heads, not {self.kv_heads}'
            )
        if not 0 < self.norm_epsilon < 1:
            raise UserError(f'norm_epsilon must lie in (0, 1), not {self.norm_epsilon}')
        for name in ('row_dropout', 'dropout'):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f'{name} must lie in [0, 1), not {getattr(self, name)}')
        self.positions.check(self.width, self.head_width)

    @classmethod
    def published(cls, size: str, **fields: Any) -> 'Llama':
        """The published model of a size (LlamaGen specification 2.1).

        Args:
            size: a key of `SIZES`: B, L, XL, XXL, 3B, XXXL, 1B or 7B.
            **fields: other fields of the model.

        Raises:
            KeyError: there is no such size.
        """
        depth, heads, width = SIZES[size]
        sizes = {'depth': depth, 'heads': heads, 'width': width, 'hidden': swiglu_width(width)}
        return cls(**(sizes | fields))

    @property
    def prefix(self) -> int:
        """Rows of the condition before the first token."""
        raise NotImplementedError

    @property
    def starter(self) -> nn.Module:
        """The module that makes these rows."""
        raise NotImplementedError

    @property
    def schedule(self) -> Raster:
        return Raster(*self.grid, self.prefix)

    @property
    def vocabulary(self) -> Index:
        return Index(self.codes)

    @property
    def vector_width(self) -> int:
        return self.channels

    def build(
        self,
        dtype: str = 'float32',
        remat: Remat = 'none',
        unroll: int = 1,
        attend: Kernel = AUTOMATIC,
    ) -> Transformer:
        """The network, with activations of `dtype` and attention computed by `attend`."""
        norm = functools.partial(layers.RMSNorm, self.width, self.norm_epsilon)
        return Transformer(
            schedule=self.schedule,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            starter=self.starter,
            embedder=layers.CodeEmbedding(self.codes, self.width, INIT),
            positions=self.positions,
            block=BlockParts(
                self_attention=functools.partial(
                    SelfAttention,
                    width=self.width,
                    heads=self.heads,
                    scores=functools.partial(Scaled, self.head_width**-0.5),
                    kernel_init=INIT,
                    out_init=INIT,
                    attend=attend,
                    kv_heads=self.kv_heads,
                    biases=(),
                ),
                mlp=functools.partial(
                    SwiGlu,
                    width=self.width,
                    hidden=self.hidden,
                    kernel_init=INIT,
                    out_init=INIT,
                ),
                norm=norm,
                dropout=0.0 if self.drop_path else self.dropout,
            ),
            to_logits=PlainHead(self.width, self.codes, nn.initializers.zeros, norm()),
            init_rows=INIT,
            level_embedding=False,
            remat=remat,
            unroll=unroll,
            dtype=dtype,
            row_dropout=self.row_dropout,
        )

    def default_tokenizer(self) -> RasterVQ:
        """The published tokenizer with this grid, these codes and channels."""
        return RasterVQ(grid=self.grid, codes=self.codes, channels=self.channels)

    def abstract_inputs(self, batch: int = 1) -> jax.ShapeDtypeStruct:
        """Shapes of the codes of all tokens but the last."""
        return jax.ShapeDtypeStruct((batch, self.schedule.length - 1), np.int32)

    def guidance_weights(self, guidance: float) -> np.ndarray:
        """[S] float32: the published number less 1 at every step; off at 1 and below."""
        return np.full(self.schedule.steps, max(guidance - 1, 0), np.float32)

    def temperatures(self, temperature: float) -> np.ndarray:
        """[S] float32: 0 is allowed and means 1e-5."""
        return np.full(self.schedule.steps, max(temperature, LOWEST_TEMPERATURE), np.float32)

    def filter(self, settings: Settings) -> SortedFilter:
        """Top-k, then the most probable codes in order; top-p is off at 0 and at 1."""
        top_p = settings.top_p if settings.top_p < 1 else 0
        return SortedFilter(top_k=settings.top_k, top_p=top_p or None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaGen(Llama):
    """A class-conditional LlamaGen transformer; the defaults are GPT-B at 256 px.

    Attributes:
        classes: number of classes.
        names: names of the classes in order, as the labels of the data spell them (none: labels are
            numbers from 0).
    """

    classes: int = 1000
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_classes(self.classes, self.names)

    @property
    def prefix(self) -> int:
        return 1

    @property
    def starter(self) -> LabelPrefix:
        return LabelPrefix(self.width, self.classes, INIT)

    def prompt_encoder(self, load: LoadEncoder) -> Classes:
        """The table of classes; `load` is not called."""
        return Classes(self.classes, self.names)

    def abstract_condition(self, batch: int = 1, tokens: int = 1) -> LabelCondition:
        """Shapes of labels."""
        return LabelCondition(ids_B=jax.ShapeDtypeStruct((batch,), jnp.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaGenText(Llama):
    """A text-conditional LlamaGen transformer; the defaults are GPT-XL at 256 px.

    Attributes:
        depth: number of transformer blocks.
        width: channels of a token inside the transformer.
        heads: attention heads of a block; a divisor of width.
        hidden: channels inside a feed-forward part.
        text_width: width of the text encoder's features.
        text_rows: rows of the prefix; texts are shortened to so many tokens.
        cleaning: how prompts are cleaned before they are encoded: as published, or not at all.
    """

    constants: ClassVar[frozenset[str]] = frozenset({'starter/empty'})

    depth: int = 36
    width: int = 1280
    heads: int = 20
    hidden: int = 3584
    text_width: int = 2048
    text_rows: int = 120
    cleaning: Cleaning = 'published'

    def __post_init__(self) -> None:
        super().__post_init__()
        choice('cleaning', self.cleaning, Cleaning)
        check_sizes(text_width=self.text_width, text_rows=self.text_rows)

    @property
    def prefix(self) -> int:
        return self.text_rows

    @property
    def starter(self) -> TextPrefix:
        empty_init = nn.initializers.normal(self.text_width**-0.5)
        return TextPrefix(self.width, self.text_width, self.text_rows, INIT, empty_init)

    def prompt_encoder(self, load: LoadEncoder) -> PromptEncoder:
        """The text encoder that `load` gives, for prompts of at most `text_rows` tokens, cleaned.

        Raises UserError unless it is of the model's text width.
        """
        encoder = check_text_encoder(load(most=self.text_rows), self.text_width)
        return dataclasses.replace(encoder, clean=CLEANINGS[self.cleaning])

    def abstract_condition(self, batch: int = 1, tokens: int = 1) -> TextCondition:
        """Shapes of encoded captions of `tokens` tokens."""
        return TextCondition(
            states_BTE=jax.ShapeDtypeStruct((batch, tokens, self.text_width), jnp.float32),
            mask_BT=jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
            pooled_BE=jax.ShapeDtypeStruct((batch, self.text_width), jnp.float32),
        )
