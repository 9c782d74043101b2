"""Which parts make a STAR model?

Text-conditioned next-scale prediction (STAR specification sections 3, 5 and 7).
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from star_jax.core.condition import Text
from star_jax.core.sizes import check_sizes
from star_jax.families.scales import Scales
from star_jax.nn.attention import CrossAttention
from star_jax.nn.conditioning import LevelModulation, ModulationOffset, TextStart
from star_jax.nn.transformer import Head, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Star(Scales):
    """A STAR transformer; the defaults are the published d16 at 256 px.

    `text_width` is the text encoder's. `released_cross_attention` gives every image the first one's
    text, as the published code does.
    """

    UNTAGGED: ClassVar[bool] = True  # runs from before there were other families name none

    text_width: int = 1024
    logit_norm: bool = True
    cross_attention: bool = True
    released_cross_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, self.text_width)

    def build(self, dtype: str = 'float32', remat: bool = False, unroll: int = 1) -> Transformer:
        """The network, with activations of `dtype`."""
        init = self.init
        cross = functools.partial(
            CrossAttention,
            self.width,
            self.heads,
            self.text_width,
            self.scores,
            init,
            self.released_cross_attention,
        )
        offset = functools.partial(ModulationOffset, self.width, self.offset_init)
        return self.network(
            starter=TextStart(self.width, self.text_width, self.schedule.sizes[0], init),
            block=self.block(
                cross_attention=cross if self.cross_attention else None,
                modulation=offset if self.shared_adaln else None,
            ),
            to_logits=Head(self.width, self.codes, self.head_init, self.logit_norm),
            modulator=LevelModulation(self.width, init) if self.shared_adaln else None,
            remat=remat,
            unroll=unroll,
            dtype=dtype,
        )

    def abstract_condition(self) -> Text:
        """One caption of one token, by shape and type alone."""
        return Text(
            states_BTE=jax.ShapeDtypeStruct((1, 1, self.text_width), jnp.float32),
            mask_BT=jax.ShapeDtypeStruct((1, 1), jnp.int32),
            pooled_BE=jax.ShapeDtypeStruct((1, self.text_width), jnp.float32),
        )
