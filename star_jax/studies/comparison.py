"""Are two configs different, or only their seeds?

The same seed means the same data in the same order and equal weights at the start wherever two
models share them, so differences are taken seed by seed. Their interval is Student's: percentiles
of a bootstrap are far too narrow for a handful of seeds.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from scipy import special

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A score of one config over seeds, beside that of the first config.

    `mean` and standard `deviation` over seeds; the mean of the paired `difference` to the first
    config, and the ends of its 95 % interval. None: one seed tells no deviation and no interval,
    and the first config has no difference, nor has one that shares no seed with it.
    """

    mean: float
    deviation: float | None
    difference: float | None
    low: float | None
    high: float | None

    @property
    def is_apart(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.low is not None and not self.low <= 0 <= self.high


def compare(values: Mapping[int, float], first: Mapping[int, float] | None) -> Comparison:
    """One config's scores by seed; `first` has those of the first config, and perhaps not all."""
    every = list(values.values())
    mean, deviation = statistics.fmean(every), _deviation(every)
    differences = [values[seed] - first[seed] for seed in values if seed in (first or {})]
    if not differences:
        return Comparison(mean=mean, deviation=deviation, difference=None, low=None, high=None)
    difference, spread = statistics.fmean(differences), _deviation(differences)
    low = high = None
    if spread is not None:
        count = len(differences)
        reach = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * spread / count**0.5
        low, high = difference - reach, difference + reach
    return Comparison(mean=mean, deviation=deviation, difference=difference, low=low, high=high)


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
