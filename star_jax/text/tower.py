"""What is a text encoder made of?"""

import dataclasses
from collections.abc import Callable, Container

from flax import linen as nn

from star_jax.text.pooling import Pool
from star_jax.text.weights import Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """The parts that one config.json asks for.

    `module(tokens) -> states_BTE`: no token reads one where the mask is 0. `pieces(names)`: how
    a folder with tensors of these names makes its parameters. `pool`: states to one vector. `width`
    E, `vocab` ids, `filler` the id of padding. `length`: tokens per caption unless asked otherwise;
    `longest`: the most that there may be, or None.
    """

    module: nn.Module
    pieces: Callable[[Container[str]], list[Piece]]
    pool: Pool
    width: int
    vocab: int
    filler: int
    length: int
    longest: int | None = None
