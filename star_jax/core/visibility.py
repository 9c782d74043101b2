"""Which keys may a row attend to?

Keys are numbered, the keys of the past first. In every schedule a row attends to the keys below one
number, its upper bound, so that no mask of rows by keys is needed. `Schedule.visible_rows` in
`core/schedule.py` decides the upper bounds: block-causal in a `Pyramid`, causal in a `Raster`. An
image may also hide the keys before a number of its own (a prompt padded on the left) or from a
number on (one padded on the right).

A pyramid of the grids 1 x 1 and 2 x 2, all five rows at once: row 0 attends to key 0, rows 1 to 4
attend to all five keys. The upper bounds are (1, 5, 5, 5, 5), kept as the runs ((1, 1), (4, 5)). In
sampling its second step has four rows and, after the one key of the past, five keys: ((4, 5),).
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

MAX_SPANS = 32  # spans of rows that one program may unroll


class Span(NamedTuple):
    """Neighbouring rows of queries, and the keys that they attend to.

    Attributes:
        first: the first row.
        end: the row after the last one.
        keys: the largest upper bound of the rows, in keys.
        within: the upper bounds of the rows where they differ; None: all are `keys`.
    """

    first: int
    end: int
    keys: int
    within: 'StaticVisibility | None'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticVisibility:
    """Upper bounds that are known when a program is built.

    Attributes:
        runs: (rows, keys) of neighbouring rows with the same upper bound.
    """

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, bound_L: np.ndarray) -> 'StaticVisibility':
        """Makes it from the upper bound of each row; ValueError unless all are at least 1."""
        if len(bound_L) and min(bound_L) < 1:
            raise ValueError(f'every row must attend to a key, not to {min(bound_L)} of them')
        return cls(tuple((len(list(run)), key) for key, run in itertools.groupby(bound_L.tolist())))

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.runs)

    @functools.cached_property
    def bound_L(self) -> np.ndarray:
        """[rows] int32: the upper bound of each row."""
        rows, keys = np.asarray(self.runs, np.int32).reshape(-1, 2).T
        return np.repeat(keys, rows)

    def sees_all(self, keys: int) -> bool:
        """Whether every row attends to all of the first `keys` keys."""
        return all(bound >= keys for _, bound in self.runs)

    def is_causal(self, keys: int) -> bool:
        """Whether row k attends to the first k + 1 of as many keys as rows."""
        return keys == self.rows and self.runs == tuple((1, k + 1) for k in range(keys))

    def spans(self, rows: int) -> tuple[Span, ...]:
        """The rows in few spans: one per run, but neighbours share one while it has under `rows`.

        Where that would be more than MAX_SPANS, each is larger.
        """
        least = max(rows, -(-self.rows // MAX_SPANS)) if len(self.runs) > MAX_SPANS else rows
        groups, group = [], []
        for run in self.runs:
            group.append(run)
            if sum(count for count, _ in group) >= least:
                groups.append(group)
                group = []
        if group:
            groups.append(group)
        parts = [StaticVisibility(tuple(group)) for group in groups]
        ends = list(itertools.accumulate(part.rows for part in parts))
        return tuple(
            Span(
                end - part.rows,
                end,
                most,
                None if part.sees_all(most) else part,
            )
            for end, part in zip(ends, parts, strict=True)
            for most in [max(keys for _, keys in part.runs)]
        )


class TracedVisibility(NamedTuple):
    """Upper bounds as an array.

    Attributes:
        bound_L: [rows] int32, or [1] where all rows have the same; at least 1.
    """

    bound_L: jax.Array


@flax.struct.dataclass
class Visibility:
    """Which keys each row of a call of a kernel attends to; by default all of them.

    A row with the upper bound u attends to the keys from min(first, u - 1) up to u: no row attends
    to nothing, and in a causal order a row of hidden padding attends to itself alone.

    Attributes:
        bounds: the upper bound of each row, counted over the past and the new keys; None: all keys.
        first_B: [B] int32, the keys before it are hidden in that image; None: none are.
        end_B: [B] int32, at least 1: the keys from it on are hidden in that image; None: none are.
        written: scalar int32, the number of past rows that are written. New keys are numbered from
            there on, and the rest of the past is hidden. None: all of the past is written.
        mask: for visibility that is no interval: bool, broadcasts to [B, N, L, M] over the past
            and the new keys, True where a row attends. The other fields are None beside it.
            Only the kernels that write scores to memory take it.
    """

    bounds: StaticVisibility | TracedVisibility | None = None
    first_B: jax.Array | None = None
    end_B: jax.Array | None = None
    written: jax.Array | None = None
    mask: jax.Array | None = None


ALL = Visibility()


def masks(visibility: Visibility, counts: tuple[int, ...]) -> list[jax.Array | None]:
    """A mask for each piece of keys, of `counts` rows, the new ones last.

    Each is [B or 1, N or 1, L or 1, rows of the piece]; None: the whole piece is visible.
    """
    starts = list(itertools.accumulate(counts, initial=0))
    if visibility.mask is not None:
        mask = visibility.mask
        mask_BNLM = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        return jnp.split(mask_BNLM, starts[1:-1], axis=-1)
    past = starts[-2] if visibility.written is None else visibility.written
    upper_11L1, lower_B1L1, end_B111 = None, None, None
    if visibility.bounds is not None:
        upper_11L1 = jnp.asarray(visibility.bounds.bound_L)[None, None, :, None]
    if visibility.first_B is not None:
        total = jnp.full((1, 1, 1, 1), past + counts[-1], jnp.int32)
        last_11L1 = (total if upper_11L1 is None else upper_11L1) - 1
        lower_B1L1 = jnp.minimum(visibility.first_B[:, None, None, None], last_11L1)
    if visibility.end_B is not None:
        end_B111 = visibility.end_B[:, None, None, None]
    found = []
    for start, count in zip(starts, counts, strict=False):
        new = start == starts[-2]
        number_111M = (past if new else start) + jnp.arange(count)[None, None, None, :]
        visible = []
        if upper_11L1 is not None and not _sees_all(visibility, start + count):
            visible.append(number_111M < upper_11L1)
        if lower_B1L1 is not None:
            visible.append(number_111M >= lower_B1L1)
        if end_B111 is not None:
            visible.append(number_111M < end_B111)
        if visibility.written is not None and not new:
            visible.append(number_111M < visibility.written)
        found.append(functools.reduce(jnp.logical_and, visible) if visible else None)
    return found


def _sees_all(visibility: Visibility, keys: int) -> bool:
    """Whether the upper bounds of all rows are known to include the first `keys` keys."""
    return (
        visibility.written is None
        and isinstance(visibility.bounds, StaticVisibility)
        and visibility.bounds.sees_all(keys)
    )


def pack(states_BTE: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states with the visible ones first, and how many these are, [B] int32, at least 1.

    `mask_BT` is positive where a state is visible. Attention to states without positions does not
    depend on their order, so that lengths serve any such mask.
    """
    hidden_BT = mask_BT <= 0
    order_BT = jnp.argsort(hidden_BT, axis=1, stable=True)
    packed_BTE = jnp.take_along_axis(states_BTE, order_BT[:, :, None], axis=1)
    return packed_BTE, jnp.maximum((~hidden_BT).sum(1, dtype=jnp.int32), 1)
