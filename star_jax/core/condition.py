"""Which arrays condition an image?

A condition is a pytree of arrays with one row per image.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


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

SHORT = 128  # tokens; texts padded to fewer stay as they are


def repeat(row: Any, like: Any) -> Any:
    """A condition of one row, repeated to the number of rows of the condition `like`."""
    batch = len(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), row)


def unpack(states_NE: np.ndarray, lengths: Sequence[int]) -> TextCondition:
    """The padded condition of packed captions: N token states, `lengths` of each caption.

    There is no pooled vector: families that read packed text pool the states themselves.
    """
    states = np.split(states_NE, np.cumsum(lengths)[:-1])
    padded = [np.pad(x, ((0, max(lengths) - len(x)), (0, 0))) for x in states]
    mask_BT = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    pooled_BE = np.zeros((len(lengths), states_NE.shape[1]), np.float32)
    return TextCondition(np.stack(padded), mask_BT.astype(np.int32), pooled_BE)


def trimmed(rows: Condition) -> Condition:
    """Captions on the host without padding that all of them have.

    They stay padded to a half, a quarter and so on of their tokens, at least SHORT, so that few
    programs are compiled. Captions are padded on the right.
    """
    if not isinstance(rows, TextCondition):
        return rows
    count, longest = rows.mask_BT.shape[1], int(np.asarray(rows.mask_BT).sum(1).max(initial=0))
    while count % 2 == 0 and count // 2 >= max(longest, SHORT):
        count //= 2
    return rows.replace(states_BTE=rows.states_BTE[:, :count], mask_BT=rows.mask_BT[:, :count])


def stack(prompted: Any, unprompted: Any) -> Any:
    """The rows of guidance: the prompted rows, then as many unprompted rows.

    The shorter text is padded with zeros, which its mask hides.
    """

    def join(*rows: jax.Array) -> jax.Array:
        sizes = np.max([x.shape for x in rows], axis=0)[1:]
        pads = [((0, 0), *((0, n) for n in sizes - x.shape[1:])) for x in rows]
        return jnp.concatenate([jnp.pad(x, pad) for x, pad in zip(rows, pads, strict=True)])

    return jax.tree.map(join, prompted, unprompted)


def choose(drop_B: jax.Array, prompted: Any, unprompted: Any) -> Any:
    """The unprompted row where `drop_B` is True, the prompted row elsewhere.

    Args:
        drop_B: bool, one per image.
        prompted: a pytree with one row per image.
        unprompted: another one of the same shapes.
    """

    def select(prompted: jax.Array, unprompted: jax.Array) -> jax.Array:
        drop = drop_B.reshape(-1, *[1] * (prompted.ndim - 1))
        return jnp.where(drop, unprompted, prompted)

    return jax.tree.map(select, prompted, unprompted)
