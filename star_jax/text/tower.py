"""What parts make up a text encoder, and how does it pool its states?

An architecture (`bert`, `clip`, `t5`) reads a config.json and returns a `Tower`. A `Pool` turns the
states of a caption into one vector.
"""

import dataclasses
from collections.abc import Callable, Container
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.text.tokens import Tokens
from star_jax.text.weights import WeightMapping


class Pool(Protocol):
    """Turns token states into one vector per caption.

    Attributes:
        reads_padding: the result depends on the states of padding, so that every caption must be
            padded to its full length.
    """

    reads_padding: ClassVar[bool]

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        """[B, E] float32."""
        ...


@dataclasses.dataclass(frozen=True)
class MaskedMean:
    """The mean over the real tokens, as MiniLM was trained."""

    reads_padding: ClassVar[bool] = False

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        weight_BT1 = tokens.mask_BT[:, :, None].astype(jnp.float32)
        total_BE = (states_BTE.astype(jnp.float32) * weight_BT1).sum(1)
        return total_BE / jnp.maximum(weight_BT1.sum(1), 1.0)


@dataclasses.dataclass(frozen=True)
class PaddedMean:
    """The mean over all T positions, padding included (STAR specification 2, for T5)."""

    reads_padding: ClassVar[bool] = True

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        return states_BTE.astype(jnp.float32).mean(1)


@dataclasses.dataclass(frozen=True)
class StateOfToken:
    """The state of the first real token `id`; the first state if the caption has no such token.

    Attributes:
        id: the token's id.
    """

    id: int
    reads_padding: ClassVar[bool] = False

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        return _state_at_first_max(states_BTE, (tokens.ids_BT == self.id) & (tokens.mask_BT > 0))


@dataclasses.dataclass(frozen=True)
class StateOfHighestId:
    """The state of the real token of the highest id: the end of the text in CLIP's vocabulary.

    Folders whose config.json has the wrong end id 2 use it, Stable Diffusion's among them.
    """

    reads_padding: ClassVar[bool] = False

    def __call__(self, states_BTE: jax.Array, tokens: Tokens) -> jax.Array:
        return _state_at_first_max(states_BTE, jnp.where(tokens.mask_BT > 0, tokens.ids_BT, -1))


def _state_at_first_max(states_BTE: jax.Array, score_BT: jax.Array) -> jax.Array:
    first_B11 = jnp.argmax(score_BT, 1)[:, None, None]
    return jnp.take_along_axis(states_BTE, first_B11, 1)[:, 0].astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """The parts of one encoder.

    Attributes:
        module: `module(tokens) -> states_BTE`; no token attends to a token whose mask is 0.
        weight_mappings: function from the tensor names of a folder to the mappings that fill the
            parameters.
        pool: the default pool.
        width: E, channels of a state.
        vocab: number of token ids.
        pad_id: token id of padding.
        default_length: tokens per caption unless the caller chooses.
        max_length: the most tokens per caption, or None.
    """

    module: nn.Module
    weight_mappings: Callable[[Container[str]], list[WeightMapping]]
    pool: Pool
    width: int
    vocab: int
    pad_id: int
    default_length: int
    max_length: int | None = None
