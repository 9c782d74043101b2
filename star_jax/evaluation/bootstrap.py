"""How sure is a score that comes from a sample of images?"""

import dataclasses

import numpy as np

RESAMPLES = 2_000
CONFIDENCE = 0.95
BLOCK = 1 << 20  # draws held at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A score over `count` images and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    count: int


def mean(values_N: np.ndarray, seed: int) -> Score:
    """The mean of one number (or truth) per image.

    Images are drawn again with replacement; the interval holds the middle 95 % of the means. Of
    equal values it has no width: none of 40 pictures is not surely none of 4,000.
    Raises ValueError where there is no value.
    """
    values_N = np.asarray(values_N, np.float64)
    if values_N.ndim != 1 or not len(values_N):
        raise ValueError(f'expected at least one value per score, not shape {values_N.shape}')
    weights = resamples(len(values_N), seed)
    means = np.concatenate([weights_RN @ values_N for weights_RN in weights]) / len(values_N)
    return interval(float(values_N.mean()), means, len(values_N))


def resamples(count: int, seed: int, times: int = RESAMPLES) -> list[np.ndarray]:
    """How often each of `count` images occurs in each of `times` resamples: blocks [R, count]."""
    rng = np.random.default_rng(seed)
    probs_N = np.full(count, 1 / count)
    rows = max(1, min(times, BLOCK // count))
    return [
        rng.multinomial(count, probs_N, size=min(rows, times - first))
        for first in range(0, times, rows)
    ]


def interval(value: float, resampled_R: np.ndarray, count: int) -> Score:
    """A score of `count` images with the percentiles of its resampled values."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled_R, [tail, 1 - tail])
    return Score(value=value, low=float(low), high=float(high), count=count)
