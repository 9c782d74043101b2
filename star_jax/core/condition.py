"""Which arrays condition an image?

A condition is a pytree of arrays with one row per image.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TextCondition:
    """Captions that a frozen text encoder has encoded.

    Attributes:
        states_BTE: float32 token states, zero where the mask is 0.
        mask_BT: int32, 1 for real tokens.
        pooled_BE: float32, one vector per caption.
    """

    states_BTE: jax.Array
    mask_BT: jax.Array
    pooled_BE: jax.Array


@flax.struct.dataclass
class LabelCondition:
    """Class labels.

    Attributes:
        ids_B: int32 numbers of classes; the number after the last class is "no class".
    """

    ids_B: jax.Array


Condition = TextCondition | LabelCondition


def repeat(row: Any, like: Any) -> Any:
    """A condition of one row, repeated to the number of rows of the condition `like`."""
    batch = len(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), row)


def stack(prompted: Any, unprompted: Any) -> Any:
    """The rows of guidance: the prompted rows, then as many unprompted rows."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), prompted, unprompted)


def choose(drop_B: jax.Array, prompted: Any, unprompted: Any) -> Any:
    """The unprompted row where `drop_B` is True, the prompted row elsewhere."""

    def select(prompted: jax.Array, unprompted: jax.Array) -> jax.Array:
        drop = drop_B.reshape(-1, *[1] * (prompted.ndim - 1))
        return jnp.where(drop, unprompted, prompted)

    return jax.tree.map(select, prompted, unprompted)
