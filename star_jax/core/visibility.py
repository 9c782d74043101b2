"""How far does each row see?

In every schedule a row sees the first so many rows and none behind them, so that one number per
row says it all, and no mask of rows by rows is needed.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np

MOST_SPANS = 32  # pieces that one program may unroll


class Span(NamedTuple):
    """Rows `first` to `end` and how far they see: `keys` at most; `within` says how far each of
    them does, where not all see as far."""

    first: int
    end: int
    keys: int
    within: 'StaticVisibility | None'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticVisibility:
    """What is known when a program is built: `runs` of neighbouring rows that see equally many
    leading keys, as (rows, keys)."""

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, keys_L: np.ndarray) -> 'StaticVisibility':
        """From the number of leading keys that each row sees, at least one."""
        if len(keys_L) and min(keys_L) < 1:
            raise ValueError(f'every row must see a key, not {min(keys_L)} of them')
        return cls(tuple((len(list(run)), key) for key, run in itertools.groupby(keys_L.tolist())))

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.runs)

    @functools.cached_property
    def keys_L(self) -> np.ndarray:
        """[rows] int32: how many leading keys each row sees."""
        rows, keys = np.asarray(self.runs, np.int32).reshape(-1, 2).T
        return np.repeat(keys, rows)

    def sees_all(self, keys: int) -> bool:
        """Whether every row sees all of so many keys."""
        return all(visibility >= keys for _, visibility in self.runs)

    def is_causal(self, keys: int) -> bool:
        """Whether row k sees the first k + 1 of equally many keys."""
        return keys == self.rows and self.runs == tuple((1, k + 1) for k in range(keys))

    def spans(self, rows: int) -> tuple[Span, ...]:
        """The rows in few pieces: a run each, but neighbours share one while it has under `rows`.

        Where that would be very many pieces, each is larger.
        """
        least = max(rows, -(-self.rows // MOST_SPANS)) if len(self.runs) > MOST_SPANS else rows
        pieces, piece = [], []
        for run in self.runs:
            piece.append(run)
            if sum(count for count, _ in piece) >= least:
                pieces.append(piece)
                piece = []
        if piece:
            pieces.append(piece)
        parts = [StaticVisibility(tuple(piece)) for piece in pieces]
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
    """The same as an array: [rows] int32, how many leading keys each row sees, at least one."""

    keys_L: jax.Array
