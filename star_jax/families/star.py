"""Which parts make a STAR model?

Text-conditioned next-scale prediction (STAR specification sections 3, 5 and 7).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core.condition import Text
from star_jax.core.schedule import Pyramid
from star_jax.core.sizes import check_sizes
from star_jax.nn import layers
from star_jax.nn.attention import Cosine, CrossAttention, Scaled, SelfAttention
from star_jax.nn.conditioning import LevelModulation, ModulationOffset, TextStart
from star_jax.nn.positions import (
    Learned,
    NoPositions,
    NormalisedRotary,
    RawRotary,
    SinCos,
)
from star_jax.nn.transformer import Head, Mlp, Parts, Transformer

PLAIN_SCORE_SCALE = 0.25  # over sqrt(head width), without qk-norm (specification 3.3)
HEAD_INIT = 0.02  # shrinks the logits' weights at the start (specification 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Star:
    """A STAR transformer; the defaults are the published d16 at 256 px.

    Widths are in channels, `sides` in tokens. `channels` and `codes` are the tokenizer's,
    `text_width` the text encoder's. `drop_path` is the rate of the deepest layer, `keep_tokens`
    how many tokens training keeps (0: all; the rest are dropped from the last scale).
    `released_cross_attention` gives every image the first one's text, as the published code does.
    """

    depth: int = 16
    width: int = 1024
    heads: int = 16
    mlp_ratio: float = 4.0
    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    codes: int = 4096
    channels: int = 32
    text_width: int = 1024
    positions: NormalisedRotary | RawRotary | Learned | SinCos | NoPositions = NormalisedRotary()
    level_embedding: bool = True
    shared_adaln: bool = False
    qk_norm: bool = True
    logit_norm: bool = True
    cross_attention: bool = True
    released_cross_attention: bool = False
    drop_path: float = 0.0
    keep_tokens: int = 0
    gate_init: float = 5e-5

    def __post_init__(self) -> None:
        mlp = self.mlp_ratio * self.width
        of_tokens = (self.codes, self.channels, self.text_width)
        check_sizes(self, self.depth, self.width, self.heads, mlp, *of_tokens)
        if self.width % self.heads:
            raise ValueError(f'width {self.width} does not divide into {self.heads} heads')
        rotary = isinstance(self.positions, NormalisedRotary | RawRotary)
        if rotary and self.width // self.heads % 4:
            raise ValueError(
                f'rotary positions need a head width divisible by 4, not {self.width}/{self.heads}'
            )
        if isinstance(self.positions, SinCos) and self.width % 4:
            raise ValueError(f'sin-cos positions need a width divisible by 4, not {self.width}')
        if not 0 <= self.drop_path < 1:
            raise ValueError(f'drop_path must lie in [0, 1), not {self.drop_path}')
        first = self.schedule.offsets[-2]
        if self.keep_tokens and not first < self.keep_tokens <= self.schedule.length:
            raise ValueError(
                f'keep_tokens must be 0 or lie in ({first}, {self.schedule.length}], '
                f'because only the last scale is thinned; it is {self.keep_tokens}'
            )

    @property
    def schedule(self) -> Pyramid:
        return Pyramid.square(self.sides)

    def build(self, dtype: str = 'float32', remat: bool = False, unroll: int = 1) -> Transformer:
        """The network, with activations of `dtype`."""
        std = (1 / (3 * self.width)) ** 0.5
        init = nn.initializers.normal(std)
        out_init = nn.initializers.normal(std / (2 * self.depth) ** 0.5)
        scores = functools.partial(Cosine, self.heads)
        if not self.qk_norm:
            factor = PLAIN_SCORE_SCALE / (self.width // self.heads) ** 0.5
            scores = functools.partial(Scaled, factor)
        attention = (self.width, self.heads)
        block = Parts(
            self_attention=functools.partial(SelfAttention, *attention, scores, init, out_init),
            mlp=functools.partial(
                Mlp, self.width, int(self.mlp_ratio * self.width), init, out_init
            ),
            cross_attention=functools.partial(
                CrossAttention,
                *attention,
                self.text_width,
                scores,
                init,
                self.released_cross_attention,
            )
            if self.cross_attention
            else None,
            modulation=functools.partial(ModulationOffset, self.width, self._offset_init)
            if self.shared_adaln
            else None,
        )
        return Transformer(
            schedule=self.schedule,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            starter=TextStart(self.width, self.text_width, self.schedule.sizes[0], init),
            embedder=layers.Linear(self.channels, self.width, (None, 'embed'), init),
            positions=self.positions,
            block=block,
            to_logits=Head(
                self.width, self.codes, nn.initializers.normal(std * HEAD_INIT), self.logit_norm
            ),
            init_rows=init,
            level_embedding=self.level_embedding,
            modulator=LevelModulation(self.width, init) if self.shared_adaln else None,
            remat=remat,
            unroll=unroll,
            dtype=dtype,
        )

    def abstract(self) -> dict:
        """The parameters of such a network, by shape and type alone, boxed with logical axes."""
        schedule = self.schedule
        later = schedule.starts[-1] - schedule.starts[1]
        inputs = jax.ShapeDtypeStruct((1, later, self.channels), jnp.float32)
        text = Text(
            states_BTE=jax.ShapeDtypeStruct((1, 1, self.text_width), jnp.float32),
            mask_BT=jax.ShapeDtypeStruct((1, 1), jnp.int32),
            pooled_BE=jax.ShapeDtypeStruct((1, self.text_width), jnp.float32),
        )
        return jax.eval_shape(self.build().init, jax.random.key(0), inputs, text)['params']

    def _offset_init(self, key, shape, dtype=float):
        """N(0, 1 / C); gates shrink to almost nothing, scales and shifts to a half."""
        offset_6D = nn.initializers.normal(self.width**-0.5)(key, shape, dtype)
        return offset_6D.at[:2].multiply(self.gate_init).at[2:].multiply(0.5)
