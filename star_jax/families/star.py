"""Which parts make a STAR model?

Text-conditioned next-scale prediction (STAR specification 3, 5 and 7). Guidance, filter and the
fields that STAR and VAR share stand in `families/scales.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from star_jax.core.argument_types import check_types
from star_jax.core.condition import TextCondition
from star_jax.core.settings import Remat
from star_jax.core.sizes import check_sizes
from star_jax.errors import UserError
from star_jax.families.fit import check_text_encoder
from star_jax.families.scales import Scales
from star_jax.nn.attention import CrossAttention
from star_jax.nn.attention_dispatch import AUTOMATIC
from star_jax.nn.conditioning import LevelModulation, ModulationOffset, TextStart
from star_jax.nn.heads import Head
from star_jax.nn.layers import LayerNorm, Linear
from star_jax.nn.refinement import Refiner
from star_jax.nn.transformer import Transformer
from star_jax.protocols import CrossAttentionMode, Kernel, LoadEncoder, PromptEncoder


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
        check_types(self)
        check_sizes(first=self.first, blocks=self.blocks)


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
        remat: Remat = 'none',
        unroll: int = 1,
        attend: Kernel = AUTOMATIC,
    ) -> Transformer:
        """The network, with activations of `dtype` and attention computed by `attend`."""
        init, settings = self.init, {'dtype': dtype, 'remat': remat, 'unroll': unroll}
        cross = functools.partial(
            CrossAttention,
            width=self.width,
            heads=self.heads,
            text_width=self.text_width,
            scores=self.scores,
            kernel_init=init,
            released=self.released_cross_attention,
            attend=attend,
        )
        offset = functools.partial(ModulationOffset, self.width, self.offset_init)
        return self.network(
            starter=TextStart(self.width, self.text_width, self.schedule.sizes[0], init),
            block=self.block(
                attend,
                self.out_init,
                cross_attention=cross if self.cross_attention else None,
                modulation=offset if self.shared_adaln else None,
            ),
            to_logits=Head(
                width=self.width,
                num_logits=self.vocabulary.num_logits,
                kernel_init=self.head_init,
                norm=LayerNorm() if self.logit_norm else None,
            ),
            modulator=LevelModulation(self.width, init) if self.shared_adaln else None,
            refiner=self._refiner(self.refinement, attend, **settings) if self.refinement else None,
            **settings,
            mixes_rows=self.cross_attention and self.released_cross_attention,
        )

    def with_cross_attention(self, mode: CrossAttentionMode) -> 'Star':
        """The same model with the published code's cross-attention, or the corrected one."""
        if mode == 'as_trained':
            return self
        return dataclasses.replace(self, released_cross_attention=mode == 'released')

    def prompt_encoder(self, load: LoadEncoder) -> PromptEncoder:
        """The text encoder that `load` returns; UserError unless it has the model's text width."""
        return check_text_encoder(load(), self.text_width)

    def abstract_condition(self, batch: int = 1, tokens: int = 1) -> TextCondition:
        """Shapes of encoded captions of `tokens` tokens."""
        return TextCondition(
            states_BTE=jax.ShapeDtypeStruct((batch, tokens, self.text_width), jnp.float32),
            mask_BT=jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
            pooled_BE=jax.ShapeDtypeStruct((batch, self.text_width), jnp.float32),
        )

    def _check_refinement(self, refinement: Refinement) -> None:
        """Raises UserError for a head that this model cannot have (STAR specification 9)."""
        if self.positions.rotation(self.schedule, self.head_width) is None:
            raise UserError(
                'a refinement head needs fixed rotary positions, not '
                f'{type(self.positions).__name__}'
            )
        if self.depth < refinement.blocks:
            raise UserError(
                f'a refinement head of {refinement.blocks} blocks needs a model of as many layers, '
                f'not {self.depth}'
            )
        if refinement.first >= self.schedule.steps:
            raise UserError(
                f'refinement.first must be a scale after the first of {self.schedule.steps}, '
                f'not {refinement.first}'
            )

    def _refiner(self, refinement: Refinement, attend: Kernel, **settings: Any) -> Refiner:
        """The refinement head; all its weights use `init`, without depth scaling."""
        init, inner = self.init, (None, 'embed')
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
            block=self.block(attend, init),
            to_logits=Head(self.width, self.vocabulary.num_logits, init, LayerNorm()),
            init_rows=init,
            **settings,
        )
