"""What do the configs of all decoder transformers share?"""

import dataclasses
import functools

import jax
from flax import linen as nn

from star_jax.core.argument_types import check_types
from star_jax.core.codes import Index
from star_jax.core.sizes import check_codes, check_sizes
from star_jax.errors import UserError
from star_jax.nn import layers
from star_jax.protocols import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers(Family):
    """How many layers a transformer has, and how wide they are.

    Attributes:
        depth: number of transformer blocks.
        width: channels of a token inside the transformer.
        heads: attention heads of a block; a divisor of width.
        drop_path: stochastic depth: probability of skipping the last block; it rises linearly from
            0 at the first block.
    """

    depth: int = 16
    width: int = 1024
    heads: int = 16
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_sizes(depth=self.depth, width=self.width, heads=self.heads)
        if self.width % self.heads:
            raise UserError(f'width {self.width} does not divide into {self.heads} heads')
        if not 0 <= self.drop_path < 1:
            raise UserError(f'drop_path must lie in [0, 1), not {self.drop_path}')

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    def abstract(self) -> dict:
        """Shapes of the parameters, boxed with logical axes."""
        return _abstract(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(Layers):
    """Sizes of a transformer with any kind of codes.

    Attributes:
        mlp_ratio: hidden width of an MLP, as a multiple of width.
    """

    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(**{'mlp_ratio times width': self.mlp_ratio * self.width})

    @property
    def hidden(self) -> int:
        """Channels inside an MLP; rounded, because ratios of whole widths need not be exact."""
        return round(self.mlp_ratio * self.width)

    @property
    def std(self) -> float:
        """Standard deviation of fresh weights."""
        return (1 / (3 * self.width)) ** 0.5

    @property
    def init(self) -> layers.Initializer:
        """Initializer of weights."""
        return nn.initializers.normal(self.std)

    @property
    def out_init(self) -> layers.Initializer:
        """Initializer of the last weights of a residual branch."""
        return nn.initializers.normal(self.std / (2 * self.depth) ** 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexSizes(Sizes):
    """Sizes of a transformer that predicts an index per token.

    Attributes:
        codes: number of codes of the tokenizer.
        channels: channels of the tokenizer's code vectors.
    """

    codes: int = 4096
    channels: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_codes(self.codes)
        check_sizes(channels=self.channels)

    @property
    def vocabulary(self) -> Index:
        return Index(self.codes)

    @property
    def vector_width(self) -> int:
        return self.channels


@functools.lru_cache(maxsize=16)  # tracing it takes longer than reading a model
def _abstract(config: Family) -> dict:
    network, key = config.build(), jax.random.key(0)
    shapes = jax.eval_shape(
        network.init, key, config.abstract_inputs(), config.abstract_condition()
    )
    return shapes['params']
