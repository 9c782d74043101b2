"""How many tokens of a scale does each pass fix, and how many does training show?

Causal-driven stable sampling fixes the tokens of a scale in several passes, few tokens first (STAR
specification 9). A mode maps a number r, which falls from 1 to 0, to the share of fixed tokens.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

Mode = Literal['arccos', 'root', 'linear', 'square', 'cosine']

# (array namespace, r) -> share: numpy arrays are computed by numpy, JAX arrays by JAX.
SHARES: dict[str, Callable[[Any, Any], Any]] = {
    'arccos': lambda xp, r: xp.acos(r) / (math.pi / 2),
    'root': lambda xp, r: 1 - xp.sqrt(r),
    'linear': lambda xp, r: 1 - r,
    'square': lambda xp, r: 1 - r**2,
    'cosine': lambda xp, r: xp.cos(r * (math.pi / 2)),
}


def share(mode: Mode, r: Any) -> Any:
    """The share of fixed tokens at `r`, an array in [0, 1], in the dtype of `r`."""
    return SHARES[mode](r.__array_namespace__(), r)


def budgets(tokens: int, passes: int, mode: Mode = 'arccos') -> tuple[int, ...]:
    """How many tokens each pass fixes, in all `tokens` (STAR specification 9.2).

    As in the original, the last pass gets what the rounding of the others leaves: 0 or less where
    a scale has very few tokens.

    Args:
        tokens: tokens of the scale.
        passes: number of passes.
        mode: how the share of fixed tokens falls (`share`).
    """
    r_S = 1 - np.arange(passes, dtype=np.float32) / np.float32(max(passes - 1, 1))
    shares_S = share(mode, r_S)
    rounded_S = np.rint(shares_S / shares_S.sum() * np.float32(tokens)).astype(int)
    budgets_S = np.maximum(rounded_S, 1)
    budgets_S[-1] += tokens - budgets_S.sum()
    return tuple(budgets_S.tolist())
