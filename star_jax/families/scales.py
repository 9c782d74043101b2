"""What do all networks over a pyramid of scales share, whatever they are conditioned on?"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.classes import Classes
from star_jax.core.filters import NucleusFilter
from star_jax.core.guidance import linear_ramp
from star_jax.core.schedule import Pyramid
from star_jax.core.settings import Settings
from star_jax.core.sizes import check_sizes
from star_jax.nn import layers
from star_jax.nn.attention import Cosine, Scaled, SelfAttention
from star_jax.nn.attention_dispatch import AUTOMATIC
from star_jax.nn.kernels import Kernel
from star_jax.nn.positions import (
    Learned,
    NoPositions,
    NormalisedRotary,
    RawRotary,
    SinCos,
)
from star_jax.nn.transformer import Mlp, Parts, Transformer
from star_jax.text import TextEncoder

PLAIN_SCORE_SCALE = 0.25  # over sqrt(head width), without qk-norm (STAR specification 3.3)
HEAD_INIT = 0.02  # shrinks the logits' weights at the start (STAR specification 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """Sizes and parts of a transformer that predicts an image scale by scale.

    Attributes:
        depth: number of transformer blocks.
        width: channels of a token inside the transformer.
        heads: attention heads of a block; a divisor of width.
        mlp_ratio: hidden width of the MLP, as a multiple of width.
        sides: side of each scale in tokens, from coarse to fine.
        codes: number of entries of the tokenizer's codebook.
        channels: channels of the tokenizer's code vectors.
        positions: position encoding; another kind is chosen in a config file.
        level_embedding: add a learned vector per scale to its tokens.
        shared_adaln: share one modulation among all blocks, with a learned offset per block.
        qk_norm: normalise queries and keys, and learn a temperature per head.
        drop_path: stochastic depth: probability of skipping the last block; earlier blocks are
            skipped less often, in proportion to their depth.
        keep_tokens: tokens of an image that are trained on; the others are dropped at random from
            the last scale (0: all are kept).
        gate_init: factor on the initial gates of the modulation.
    """

    PROMPT: ClassVar[Literal['caption', 'label']]  # what of an example prompts such a model
    refinement = None  # the head that refines what is drawn, where a family can have one

    depth: int = 16
    width: int = 1024
    heads: int = 16
    mlp_ratio: float = 4.0
    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    codes: int = 4096
    channels: int = 32
    positions: NormalisedRotary | RawRotary | Learned | SinCos | NoPositions = NormalisedRotary()
    level_embedding: bool = True
    shared_adaln: bool = False
    qk_norm: bool = True
    drop_path: float = 0.0
    keep_tokens: int = 0
    gate_init: float = 5e-5

    def __post_init__(self) -> None:
        check_sizes(depth=self.depth, width=self.width, heads=self.heads)
        check_sizes(codes=self.codes, channels=self.channels)
        check_sizes(**{'mlp_ratio times width': self.mlp_ratio * self.width})
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

    @property
    def hidden(self) -> int:
        """The width inside an MLP; rounded, because ratios of whole widths need not be exact."""
        return round(self.mlp_ratio * self.width)

    @property
    def std(self) -> float:
        """The standard deviation with which weights start."""
        return (1 / (3 * self.width)) ** 0.5

    @property
    def init(self) -> layers.Initializer:
        return nn.initializers.normal(self.std)

    @property
    def head_init(self) -> layers.Initializer:
        return nn.initializers.normal(self.std * HEAD_INIT)

    @property
    def scores(self) -> Any:
        """The part that compares queries with keys."""
        if self.qk_norm:
            return functools.partial(Cosine, self.heads)
        return functools.partial(Scaled, PLAIN_SCORE_SCALE / (self.width // self.heads) ** 0.5)

    def block(self, attend: Kernel, **more: Any) -> Parts:
        """A block of self-attention, computed by `attend`, and MLP, with `more` parts."""
        out_init = nn.initializers.normal(self.std / (2 * self.depth) ** 0.5)
        attention = (self.width, self.heads, self.scores, self.init, out_init)
        return Parts(
            self_attention=functools.partial(SelfAttention, *attention, attend),
            mlp=functools.partial(Mlp, self.width, self.hidden, self.init, out_init),
            **more,
        )

    def network(self, **parts: Any) -> Transformer:
        """The network of these sizes with the given `parts` and settings."""
        return Transformer(
            schedule=self.schedule,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            embedder=layers.Linear(self.channels, self.width, (None, 'embed'), self.init),
            positions=self.positions,
            init_rows=self.init,
            level_embedding=self.level_embedding,
            **parts,
        )

    def offset_init(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = float) -> jax.Array:
        """N(0, 1 / C); gates shrink to almost nothing, scales and shifts to a half."""
        offset_6D = nn.initializers.normal(self.width**-0.5)(key, shape, dtype)
        return offset_6D.at[:2].multiply(self.gate_init).at[2:].multiply(0.5)

    def guidance_weights(self, guidance: float) -> np.ndarray:
        """[S] float32: a ramp from 0 to the published number (STAR specification 8)."""
        return linear_ramp(guidance, self.schedule.steps)

    def temperatures(self, temperature: float) -> np.ndarray:
        """[S] float32: the same temperature at every scale."""
        return np.full(self.schedule.steps, temperature, np.float32)

    def filter(self, settings: Settings) -> NucleusFilter:
        """Top-k, and the nucleus inside it (STAR specification 8)."""
        return NucleusFilter(top_k=settings.top_k, top_p=settings.top_p or None)

    def with_cross_attention(self, released: bool) -> 'Scales':
        """The same model with the published code's cross-attention, or the corrected one."""
        raise ValueError(
            f'a {type(self).__name__} has no cross-attention, so that nothing is released or '
            'corrected in it: leave cross_attention out'
        )

    def prompt_encoder(self, load: Callable[[], TextEncoder]) -> TextEncoder | Classes:
        """What turns prompts into conditions: what `load` gives, if text does.

        Raises UserError where that does not fit the model.
        """
        raise NotImplementedError

    def build(
        self,
        dtype: str = 'float32',
        remat: bool = False,
        unroll: int = 1,
        attend: Kernel = AUTOMATIC,
    ) -> Transformer:
        """The network, with activations of `dtype` and attention computed by `attend`."""
        raise NotImplementedError

    def abstract_condition(self) -> Any:
        """The condition of one image, by shape and type alone."""
        raise NotImplementedError

    def abstract(self) -> dict:
        """The parameters of such a network, by shape and type alone, boxed with logical axes."""
        return _abstract(self)


@functools.lru_cache(maxsize=16)  # traced again for every reader, it takes longer than the reading
def _abstract(config: Scales) -> dict:
    later = config.schedule.starts[-1] - config.schedule.starts[1]
    inputs = jax.ShapeDtypeStruct((1, later, config.channels), jnp.float32)
    network, condition = config.build(), config.abstract_condition()
    return jax.eval_shape(network.init, jax.random.key(0), inputs, condition)['params']
