"""How precise is a score that is computed from a sample of images?

A resample is a count per image, so that KID, which is no mean over images, uses the resamples, too.
`scipy.stats.bootstrap` has no counts, and gives other numbers.
"""

import dataclasses

import numpy as np

RESAMPLES = 2_000
CONFIDENCE = 0.95
BLOCK = 1 << 20  # weights in memory at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A score with its 95 % bootstrap interval.

    Attributes:
        value: the score of all images.
        low: lower end of the interval.
        high: upper end of the interval.
        count: number of images.
    """

    value: float
    low: float
    high: float
    count: int


def mean(values_N: np.ndarray, seed: int) -> Score:
    """The mean over images, with the interval of the means of random resamples.

    Resamples have N images, with replacement; the interval holds the middle 95 % of their means.
    The interval of equal values has width 0, although 0 hits of 40 do not prove 0 of 4,000.

    Args:
        values_N: one number or bool per image.
        seed: seed of the resamples.

    Raises:
        ValueError: there is no value, or more than one axis.
    """
    values_N = np.asarray(values_N, np.float64)
    if values_N.ndim != 1 or not len(values_N):
        raise ValueError(f'expected at least one value per score, not shape {values_N.shape}')
    weights = resample_weights(len(values_N), seed)
    means = np.concatenate([weights_RN @ values_N for weights_RN in weights]) / len(values_N)
    return score(float(values_N.mean()), means, len(values_N))


def resample_weights(count: int, seed: int, resamples: int = RESAMPLES) -> list[np.ndarray]:
    """How often each image occurs in each resample: blocks of shape [R, count]."""
    rng = np.random.default_rng(seed)
    probs_N = np.full(count, 1 / count)
    rows = max(1, min(resamples, BLOCK // count))
    return [
        rng.multinomial(count, probs_N, size=min(rows, resamples - first))
        for first in range(0, resamples, rows)
    ]


def score(value: float, resampled_R: np.ndarray, count: int) -> Score:
    """The score of `count` images, with percentiles of its resampled values as the interval.

    Args:
        value: the score of all images.
        resampled_R: the scores of the resamples.
        count: number of images.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled_R, [tail, 1 - tail])
    return Score(value=value, low=float(low), high=float(high), count=count)
