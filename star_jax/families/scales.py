"""What do STAR and VAR, the networks over a pyramid of scales of indices, share?"""

import dataclasses
import functools
from typing import Any, Self

import jax
import numpy as np
from flax import linen as nn

from star_jax.core.filters import NucleusFilter
from star_jax.core.guidance import linear_ramp
from star_jax.core.schedule import Grids, Pyramid, show_grids, square_grids
from star_jax.core.settings import Settings
from star_jax.core.templates import Templates
from star_jax.errors import UserError
from star_jax.families.decoder import IndexSizes
from star_jax.nn import layers
from star_jax.nn.attention import Cosine, Scaled, SelfAttention
from star_jax.nn.blocks import BlockParts, Mlp
from star_jax.nn.positions import AnyPositions, NormalisedRotary
from star_jax.nn.transformer import Transformer
from star_jax.protocols import Kernel
from star_jax.tokenizers.residual_vq import VQ

PLAIN_SCORE_SCALE = 0.25  # over sqrt(head width), without qk-norm (STAR specification 3.3)
HEAD_INIT = 0.02  # shrinks the logits' weights at the start (STAR specification 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales(IndexSizes):
    """Sizes and parts of a transformer that predicts an image scale by scale.

    Attributes:
        sides: side of each scale in tokens, from coarse to fine.
        grids: height and width of each scale, in place of sides.
        templates: grids of other aspect ratios, into which training sorts images (none: all images
            are cropped to the model's own size).
        positions: position encoding; another kind is chosen in a config file.
        level_embedding: add a learned vector per scale to its tokens.
        shared_adaln: share one modulation among all blocks, with a learned offset per block.
        qk_norm: normalise queries and keys, and learn a temperature per head.
        keep_tokens: tokens of an image that are trained on; the others are dropped at random from
            the last scale (0: all are kept).
        gate_init: factor on the initial gates of the modulation.
    """

    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    grids: Grids = ()
    templates: Templates = Templates()
    positions: AnyPositions = NormalisedRotary()
    level_embedding: bool = True
    shared_adaln: bool = False
    qk_norm: bool = True
    keep_tokens: int = 0
    gate_init: float = 5e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positions.check(self.width, self.head_width)
        first = self.schedule.offsets[-2]
        if self.keep_tokens and not first < self.keep_tokens <= self.schedule.length:
            raise UserError(
                f'keep_tokens must be 0 or lie in ({first}, {self.schedule.length}], '
                f'because only the last scale is thinned; it is {self.keep_tokens}'
            )

    @property
    def schedule(self) -> Pyramid:
        return Pyramid(self.grids or square_grids(self.sides))

    def at(self, schedule: Pyramid) -> Self:
        """The same model with the grids of a schedule.

        Raises UserError for a model with as many vectors as tokens or scales, if their number
        differs, and for fields that do not fit the grids.
        """
        try:
            other = dataclasses.replace(self, grids=schedule.grids)
        except ValueError as error:
            raise UserError(
                f'the model has no images of {show_grids(schedule.grids[-1:])} tokens: {error}'
            ) from error
        if self.positions.table(self.schedule, self.width, self.init) is not None and (
            schedule.sizes != self.schedule.sizes
        ):
            raise UserError(
                f'{type(self.positions).__name__} positions belong to the tokens of one size of '
                'images: choose rotary positions for several'
            )
        if schedule.steps != self.schedule.steps:
            raise UserError(
                f'the model has {self.schedule.steps} scales, not {schedule.steps}: give templates '
                'with as many'
            )
        return other

    @property
    def head_init(self) -> layers.Initializer:
        """Initializer of the projection to logits."""
        return nn.initializers.normal(self.std * HEAD_INIT)

    @property
    def scores(self) -> Any:
        """The part that compares queries with keys."""
        if self.qk_norm:
            return functools.partial(Cosine, self.heads)
        return functools.partial(Scaled, PLAIN_SCORE_SCALE / self.head_width**0.5)

    def block(self, attend: Kernel, out_init: layers.Initializer, **parts: Any) -> BlockParts:
        """A block of self-attention, computed by `attend`, and MLP, with further `parts`.

        `out_init` is the initializer of the last weights of both.
        """
        return BlockParts(
            self_attention=functools.partial(
                SelfAttention,
                width=self.width,
                heads=self.heads,
                scores=self.scores,
                kernel_init=self.init,
                out_init=out_init,
                attend=attend,
            ),
            mlp=functools.partial(
                Mlp,
                width=self.width,
                hidden=self.hidden,
                kernel_init=self.init,
                out_init=out_init,
            ),
            **parts,
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
        """N(0, 1 / D); gates shrink to almost nothing, scales and shifts to a half."""
        offset_6D = nn.initializers.normal(self.width**-0.5)(key, shape, dtype)
        return offset_6D.at[:2].multiply(self.gate_init).at[2:].multiply(0.5)

    def default_tokenizer(self) -> VQ:
        """The published tokenizer with these scales, codes and channels."""
        return VQ(grids=self.schedule.grids, codes=self.codes, channels=self.channels)

    def guidance_weights(self, guidance: float) -> np.ndarray:
        """[S] float32: a ramp from 0 to the published number (STAR specification 8)."""
        return linear_ramp(guidance, self.schedule.steps)

    def filter(self, settings: Settings) -> NucleusFilter:
        """Top-k, and the nucleus inside it (STAR specification 8)."""
        return NucleusFilter(top_k=settings.top_k, top_p=settings.top_p or None)
