"""What is an image conditioned on?"""

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


def stack(prompted: Condition, unprompted: Condition) -> Condition:
    """Rows for guidance: B prompted ones over B copies of one unprompted row."""
    batch = len(jax.tree.leaves(prompted)[0])
    return jax.tree.map(
        lambda text, empty: jnp.concatenate([text, jnp.repeat(empty, batch, axis=0)]),
        prompted,
        unprompted,
    )


def choose(drop_B: jax.Array, prompted: Condition, unprompted: Condition) -> Condition:
    """`prompted`, with the unprompted row where `drop_B` is True."""
    return jax.tree.map(
        lambda text, empty: jnp.where(drop_B.reshape(-1, *[1] * (text.ndim - 1)), empty, text),
        prompted,
        unprompted,
    )
