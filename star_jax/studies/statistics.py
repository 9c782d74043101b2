"""Which differences between the arms of a study are more than chance?

Every arm has been run with the same seeds, and a score is modelled as arm + seed + residual. The
residual, pooled over all arms, gives the standard error of a difference: three seeds alone would
leave two degrees of freedom. Several comparisons share one error rate by Holm's correction.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
ERROR_RATE = 0.05  # error rate of all primary comparisons together

Scores = Mapping[tuple[str, int], float]  # by arm and seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of a score between two arms.

    Attributes:
        value: estimate, first arm minus second.
        low: lower end of its unadjusted 95 % interval.
        high: upper end.
        p: two-sided p value, unadjusted.
        freedom: residual degrees of freedom.
    """

    value: float
    low: float
    high: float
    p: float
    freedom: int


def difference(scores: Scores, first: str, second: str) -> Difference | None:
    """The difference of two arms in the additive model; None where it cannot be estimated.

    Args:
        scores: a score by arm and seed; some may be missing.
        first: an arm.
        second: the arm that is subtracted.
    """
    arms = sorted({arm for arm, _ in scores})
    seeds = sorted({seed for _, seed in scores})
    if first not in arms or second not in arms:
        return None
    keys = sorted(scores)
    design = np.array(
        [
            [*(arm == one for one in arms), *(seed == one for one in seeds[1:])]
            for arm, seed in keys
        ],
        np.float64,
    )
    values = np.array([scores[key] for key in keys])
    contrast = np.array([(arm == first) - (arm == second) for arm in arms], np.float64)
    contrast = np.concatenate([contrast, np.zeros(len(seeds) - 1)])
    effects, _, rank, _ = np.linalg.lstsq(design, values)
    freedom = len(values) - int(rank)
    inverse = np.linalg.pinv(design.T @ design)
    estimable = np.allclose(inverse @ (design.T @ design) @ contrast, contrast)
    if freedom < 1 or not estimable:
        return None
    variance = np.square(values - design @ effects).sum() / freedom
    error = float(np.sqrt(variance * contrast @ inverse @ contrast))
    value = float(contrast @ effects)
    if not error:  # no spread at all: a t statistic would divide by zero
        p = 1.0 if np.isclose(value, 0) else 0.0
        return Difference(value=value, low=value, high=value, p=p, freedom=freedom)
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Difference(
        value=value, low=value - half_width, high=value + half_width, p=p, freedom=freedom
    )


def by_seed(scores: Scores, first: str, second: str) -> tuple[float, ...]:
    """The score of the first arm minus that of the second, of every seed that both have."""
    seeds = sorted(seed for arm, seed in scores if arm == first and (second, seed) in scores)
    return tuple(scores[first, seed] - scores[second, seed] for seed in seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order: below 0.05 all together err in 5 % at most."""
    count = len(p_values)
    adjusted, largest = [0.0] * count, 0.0
    for rank, index in enumerate(np.argsort(p_values, kind='stable')):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
