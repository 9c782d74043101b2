"""How many tokens of a scale are fixed in each pass, and how many are shown in training?

Causal-driven stable sampling draws a scale in several passes, few tokens first (STAR specification
9). A mode says how the share of fixed tokens goes with a number r, which falls from 1 to 0.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

Mode = Literal['arccos', 'root', 'linear', 'square', 'cosine']

# Of numpy and JAX arrays alike: the array's own library does the work.
SHARES: dict[str, Callable[[Any, Any], Any]] = {
    'arccos': lambda xp, r: xp.acos(r) / (math.pi / 2),
    'root': lambda xp, r: 1 - xp.sqrt(r),
    'linear': lambda xp, r: 1 - r,
    'square': lambda xp, r: 1 - r**2,
    'cosine': lambda xp, r: xp.cos(r * (math.pi / 2)),
}


def share(mode: Mode, r: Any) -> Any:
    """The share of fixed tokens at `r`, an array in [0, 1], in its dtype."""
    return SHARES[mode](r.__array_namespace__(), r)


def budgets(tokens: int, passes: int, mode: Mode = 'arccos') -> tuple[int, ...]:
    """How many of `tokens` each pass fixes, `tokens` in all (STAR specification 9.2).

    As in the original the last pass gets what the rounding of the others leaves, which is nothing
    or less for very few tokens.
    """
    r_S = 1 - np.arange(passes, dtype=np.float32) / np.float32(max(passes - 1, 1))
    shares_S = share(mode, r_S)
    rounded_S = np.rint(shares_S / shares_S.sum() * np.float32(tokens)).astype(int)
    budgets_S = np.maximum(rounded_S, 1)
    budgets_S[-1] += tokens - budgets_S.sum()
    return tuple(budgets_S.tolist())
