"""How are keys and values cached between the steps of sampling (the key/value cache)?

The order of their axes is decided here alone: heads before rows, so that the rows of a head are
neighbours in memory, for one new row as for many. Kernels read `KV` through its methods or by
einsum letters: K key/value heads, M rows, H head width.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from star_jax.core.visibility import StaticVisibility, TracedVisibility, Visibility

HEADS, ROWS = -3, -2
AXES = ('batch', 'heads', None, None)  # logical axes of keys and of values


class KV(NamedTuple):
    """Keys and values of some rows. Query head i reads key/value head i // (N / K).

    Attributes:
        keys: [..., B, K, M, H], after normalisation and rotation.
        values: [..., B, K, M, H].
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def from_rows(cls, k_BMKH: jax.Array, v_BMKH: jax.Array) -> 'KV':
        """Makes it from arrays [B, M, K, H], the axis order of the projections."""
        return cls(k_BMKH.swapaxes(HEADS, ROWS), v_BMKH.swapaxes(HEADS, ROWS))

    def to_rows(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, M, K, H]."""
        return self.keys.swapaxes(HEADS, ROWS), self.values.swapaxes(HEADS, ROWS)

    @property
    def rows(self) -> int:
        return self.keys.shape[ROWS]

    @property
    def heads(self) -> int:
        return self.keys.shape[HEADS]

    def part(self, first: int, end: int) -> 'KV':
        """The rows from `first` to `end`."""
        if (first, end) == (0, self.rows):
            return self
        return KV(*(jax.lax.slice_in_dim(x, first, end, axis=x.ndim + ROWS) for x in self))

    def merge_heads(self, count: int) -> 'KV':
        """[..., K / count, M, count * H]: groups of heads as one, with their channels in order."""
        return KV(*(_merge_heads(x, count) for x in self))

    def split_heads(self, count: int) -> 'KV':
        """The inverse of `merge_heads`."""
        return KV(*(_split_heads(x, count) for x in self))

    def write(self, new: 'KV', first: int | jax.Array) -> 'KV':
        """These keys and values, with the rows of `new` written from row `first` on."""
        return KV(
            *(
                jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=x.ndim + ROWS)
                for x, y in zip(self, new, strict=True)
            )
        )


def _merge_heads(x: jax.Array, count: int) -> jax.Array:
    *batch, heads, rows, width = x.shape
    grouped = x.reshape(*batch, heads // count, count, rows, width).swapaxes(-3, -2)
    return grouped.reshape(*batch, heads // count, rows, count * width)


def _split_heads(x: jax.Array, count: int) -> jax.Array:
    *batch, groups, rows, width = x.shape
    heads = x.reshape(*batch, groups, rows, count, width // count).swapaxes(-3, -2)
    return heads.reshape(*batch, groups * count, rows, width // count)


def join(past: tuple[KV, ...], new: KV, visibility: Visibility) -> tuple[KV, Visibility]:
    """Joins all keys and values in one array, in the order of their numbers.

    Args:
        past: earlier pieces; with `visibility.written`, so many of their rows are written.
        new: the keys and values of the rows that attend.
        visibility: which keys each row attends to.

    Returns:
        The joined array, whose rows after the last visible key are undefined, and the
        visibility over it.
    """
    if not past:
        return new, visibility
    joined = join_rows((*past, new))
    if visibility.written is None:
        return joined, visibility
    bounds = visibility.bounds
    if bounds is None:
        bounds = TracedVisibility((visibility.written + new.rows)[None])
    elif isinstance(bounds, StaticVisibility):
        bounds = TracedVisibility(jnp.asarray(bounds.bound_L))
    return joined.write(new, visibility.written), visibility.replace(bounds=bounds, written=None)


def join_rows(pieces: Iterable[KV]) -> KV:
    """The rows of all pieces in one array, in their order."""
    return KV(*(jnp.concatenate(arrays, axis=ROWS) for arrays in zip(*pieces, strict=True)))
