"""How are keys and values cached between the steps of sampling (the key/value cache)?

The order of their axes is decided here alone: heads before rows, so that the rows of a head are
neighbours in memory, for one new row as for many. Kernels read `KV` through its methods or by
einsum letters: K key/value heads, M rows, H head width.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.schedule import Group, Schedule, Step
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
        """What `merge_heads` made these of."""
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
        The joined array, whose rows behind the last visible key hold arbitrary numbers, and the
        visibility over it.
    """
    if not past:
        return new, visibility
    pieces = (*past, new)
    joined = KV(*(jnp.concatenate(arrays, axis=ROWS) for arrays in zip(*pieces, strict=True)))
    if visibility.written is None:
        return joined, visibility
    bounds = visibility.bounds
    if bounds is None:
        bounds = TracedVisibility((visibility.written + new.rows)[None])
    elif isinstance(bounds, StaticVisibility):
        bounds = TracedVisibility(jnp.asarray(bounds.bound_L))
    return joined.write(new, visibility.written), visibility.replace(bounds=bounds, written=None)


@flax.struct.dataclass
class Cache:
    """Keys and values of the rows that a later step reads, written once per step.

    Attributes:
        kv: [depth, R, K, rows, H], where R are the rows of the batch.
    """

    kv: KV

    @staticmethod
    def rows_kept(schedule: Schedule, groups: tuple[Group, ...], keep_last: bool = False) -> int:
        """How many rows a cache must hold for steps in these groups.

        No step reads the rows of the last one, but a bucket that contains it writes them, because
        one body serves all of its steps. `keep_last`: keep them, too, for the caller to read.
        """
        return schedule.starts[-1 if keep_last or groups[-1].padded else -2]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> 'Cache':
        """A cache of keys and values of this `shape`, [depth, R, K, rows, H]."""
        return cls(KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))

    def write(self, new: KV, schedule: Schedule, step: Step) -> 'Cache':
        """The cache with the keys and values of a step.

        A last step that the cache has no rows for is not written. Raises ValueError for a padded
        step that could end behind it: such a write would be moved over earlier rows.

        Args:
            new: keys and values of the step in every layer, [depth, R, K, rows of the step, H].
            schedule: the steps of an image.
            step: the step.
        """
        start = schedule.rows(step)[0]
        if isinstance(step.index, int) and start >= self.kv.rows:
            return self
        known = step.padded or isinstance(step.index, int)
        end = schedule.starts[step.like + 1]
        if known and end > self.kv.rows:
            raise ValueError(f'a cache of {self.kv.rows} rows, but a step writes up to row {end}')
        return Cache(self.kv.write(new, start))

    def past(self, schedule: Schedule, step: Step) -> tuple[tuple[KV, ...], Visibility]:
        """The pieces of keys and values before a step, and what its rows attend to.

        A step at a known row takes the rows before it; a traced one takes all that any of its
        group may read, of which `written` are.
        """
        first, end = schedule.starts[step.like : step.like + 2]
        if isinstance(step.index, int):
            bounds = StaticVisibility.of(schedule.visible_rows[first:end])
            return (self.kv.part(0, first),) if first else (), Visibility(bounds=bounds)
        rows = schedule.rows(step)
        bound_L = jnp.asarray(schedule.visible_rows, jnp.int32)[rows]
        if np.ptp(schedule.visible_rows[first:end]) == 0:
            bound_L = bound_L[:1]  # all rows of a step attend to the same keys
        kept = first if step.padded else self.kv.rows
        visibility = Visibility(bounds=TracedVisibility(bound_L), written=rows[0])
        return (self.kv.part(0, kept),), visibility
