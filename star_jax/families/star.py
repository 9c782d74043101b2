"""Which parts make a STAR model?

Text-conditioned next-scale prediction (STAR specification 3, 5 and 7).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from star_jax.core.condition import TextCondition
from star_jax.core.sizes import check_sizes
from star_jax.errors import UserError
from star_jax.families.scales import Scales
from star_jax.nn.attention import CrossAttention, SelfAttention
from star_jax.nn.attention_dispatch import AUTOMATIC
from star_jax.nn.conditioning import LevelModulation, ModulationOffset, TextStart
from star_jax.nn.kernels import Kernel
from star_jax.nn.layers import Linear
from star_jax.nn.positions import NormalisedRotary, RawRotary
from star_jax.nn.refinement import Refiner
from star_jax.nn.transformer import Head, Mlp, Parts, Transformer
from star_jax.text import TextEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """The refinement head of causal-driven stable sampling (STAR specification 9).

    Attributes:
        first: first scale that the head refines, counted from 0.
        blocks: number of transformer blocks of the head.
    """

    first: int = 9
    blocks: int = 3

    def __post_init__(self) -> None:
        if self.first < 1 or self.blocks < 1:
            raise ValueError(
                f'a refinement needs a first scale and blocks of at least 1, not {self}'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Star(Scales):
    """A STAR transformer; the defaults are the published d16 at 256 px.

    Attributes:
        shared_adaln: modulate all blocks by the scale's embedding, with one shared projection and a
            learned offset per block.
        text_width: width of the text encoder's features.
        logit_norm: normalise features before the projection to logits.
        cross_attention: let every block attend to the text tokens.
        released_cross_attention: every row uses the cross-attention of the first one, as the
            published code does: in training that of the first image on the device, in sampling that
            of the prompted row (a published batch of one).
        refinement: head of stable sampling; one is added in a config file.
    """

    PROMPT = 'caption'

    text_width: int = 1024
    logit_norm: bool = True
    cross_attention: bool = True
    released_cross_attention: bool = False
    refinement: Refinement | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(text_width=self.text_width)
        if self.refinement:
            self._check_refinement(self.refinement)

    def build(
        self,
        dtype: str = 'float32',
        remat: bool = False,
        unroll: int = 1,
        attend: Kernel = AUTOMATIC,
    ) -> Transformer:
        """The network, with activations of `dtype` and attention computed by `attend`."""
        init, settings = self.init, {'dtype': dtype, 'remat': remat, 'unroll': unroll}
        cross = functools.partial(
            CrossAttention,
            self.width,
            self.heads,
            self.text_width,
            self.scores,
            init,
            self.released_cross_attention,
            attend,
        )
        offset = functools.partial(ModulationOffset, self.width, self.offset_init)
        return self.network(
            starter=TextStart(self.width, self.text_width, self.schedule.sizes[0], init),
            block=self.block(
                attend,
                cross_attention=cross if self.cross_attention else None,
                modulation=offset if self.shared_adaln else None,
            ),
            to_logits=Head(self.width, self.codes, self.head_init, self.logit_norm),
            modulator=LevelModulation(self.width, init) if self.shared_adaln else None,
            refiner=self._refiner(self.refinement, attend, **settings) if self.refinement else None,
            **settings,
            mixes_rows=self.cross_attention and self.released_cross_attention,
        )

    def with_cross_attention(self, released: bool) -> 'Star':
        """The same model with the published code's cross-attention, or the corrected one."""
        return dataclasses.replace(self, released_cross_attention=released)

    def prompt_encoder(self, load: Callable[[], TextEncoder]) -> TextEncoder:
        """The text encoder that `load` gives; UserError unless it is of the model's text width."""
        encoder = load()
        if encoder.width != self.text_width:
            raise UserError(
                f'model.text_width is {self.text_width}, but the text encoder {encoder.source} has '
                f'{encoder.width}: set it so, or give the model its own encoder'
            )
        return encoder

    def abstract_condition(self) -> TextCondition:
        """One caption of one token, by shape and type alone."""
        return TextCondition(
            states_BTE=jax.ShapeDtypeStruct((1, 1, self.text_width), jnp.float32),
            mask_BT=jax.ShapeDtypeStruct((1, 1), jnp.int32),
            pooled_BE=jax.ShapeDtypeStruct((1, self.text_width), jnp.float32),
        )

    def _check_refinement(self, refinement: Refinement) -> None:
        """Raises ValueError where the published code has no such head (STAR specification 9)."""
        if not isinstance(self.positions, NormalisedRotary | RawRotary):
            raise ValueError(
                f'a refinement head needs rotary positions, not {type(self.positions).__name__}'
            )
        if self.depth < refinement.blocks:
            raise ValueError(
                f'a refinement head of {refinement.blocks} blocks needs a model of as many layers, '
                f'not {self.depth}'
            )
        if refinement.first >= len(self.sides):
            raise ValueError(
                f'refinement.first must be a scale after the first of {len(self.sides)}, '
                f'not {refinement.first}'
            )

    def _refiner(self, refinement: Refinement, attend: Kernel, **settings: Any) -> Refiner:
        """Its weights start as all others do, and its outputs are not shrunk."""
        init, inner = self.init, (None, 'embed')
        attention = (self.width, self.heads, self.scores, init, init)
        return Refiner(
            schedule=self.schedule,
            first=refinement.first,
            width=self.width,
            depth=refinement.blocks,
            heads=self.heads,
            starter=TextStart(self.width, self.text_width, 1, init),
            embedder=Linear(self.channels, self.width, inner, init),
            merge=Linear(2 * self.width, self.width, inner, init),
            positions=self.positions,
            block=Parts(
                self_attention=functools.partial(SelfAttention, *attention, attend),
                mlp=functools.partial(Mlp, self.width, self.hidden, init, init),
            ),
            to_logits=Head(self.width, self.codes, init),
            init_rows=init,
            **settings,
        )
