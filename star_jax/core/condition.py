"""What is an image conditioned on?"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TextCondition:
    """Encoded captions, as a frozen text encoder gives them.

    `states_BTE`: token states, zero where the mask is 0. `mask_BT`: int32, 1 for real tokens.
    `pooled_BE`: one vector per caption.
    """

    states_BTE: jax.Array
    mask_BT: jax.Array
    pooled_BE: jax.Array


@flax.struct.dataclass
class LabelCondition:
    """Numbers of classes; `ids_B` int32, the number behind the last class for no class."""

    ids_B: jax.Array


Condition = TextCondition | LabelCondition


def repeat(row: Any, like: Any) -> Any:
    """A condition of one row, as many times as the condition `like` has rows."""
    batch = len(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), row)


def stack(prompted: Any, unprompted: Any) -> Any:
    """The rows of guidance: prompted rows, then as many unprompted ones."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), prompted, unprompted)


def choose(drop_B: jax.Array, prompted: Any, unprompted: Any) -> Any:
    """`prompted`, with the unprompted row where `drop_B` is True."""
    return jax.tree.map(
        lambda text, empty: jnp.where(drop_B.reshape(-1, *[1] * (text.ndim - 1)), empty, text),
        prompted,
        unprompted,
    )
