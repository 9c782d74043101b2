"""Which single vector stands for a caption?

Each pool is a part of a tower: `pool(states_BTE, tokens) -> pooled_BE`, float32. `padding` says
that it reads the states of padding too, so that a caption must be padded to its full length.
"""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from star_jax.text.tokens import Tokens


class Pool(Protocol):
    """What every pool looks like."""

    padding: ClassVar[bool]

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class RealMean:
    """The mean over the real tokens, as MiniLM was trained."""

    padding: ClassVar[bool] = False

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        weight_BT1 = tokens.mask_BT[:, :, None].astype(jnp.float32)
        total_BE = (states_BTE.astype(jnp.float32) * weight_BT1).sum(1)
        return total_BE / jnp.maximum(weight_BT1.sum(1), 1.0)


@dataclasses.dataclass(frozen=True)
class PaddedMean:
    """The mean over all T positions, padding included (STAR specification 2, for T5)."""

    padding: ClassVar[bool] = True

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        return states_BTE.astype(jnp.float32).mean(1)


@dataclasses.dataclass(frozen=True)
class FirstOf:
    """The state of the first token `id`; of the first token where there is none."""

    id: int
    padding: ClassVar[bool] = False

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        return _at(states_BTE, (tokens.ids_BT == self.id) & (tokens.mask_BT > 0))


@dataclasses.dataclass(frozen=True)
class HighestId:
    """The state of the token of the highest id: in CLIP's vocabulary, the end of the text.

    For folders whose config.json has the wrong end id 2, Stable Diffusion's among them.
    """

    padding: ClassVar[bool] = False

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        return _at(states_BTE, jnp.where(tokens.mask_BT > 0, tokens.ids_BT, -1))


def _at(states_BTE: jax.Array, score_BT: jax.Array) -> jax.Array:
    """The states at the first maximum of the scores."""
    first_B11 = jnp.argmax(score_BT, 1)[:, None, None]
    return jnp.take_along_axis(states_BTE, first_B11, 1)[:, 0].astype(jnp.float32)
