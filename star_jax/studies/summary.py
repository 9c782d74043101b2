"""What did the configs of a study reach, over the seeds that have finished?

The same seed means the same data in the same order and equal initial weights wherever two models
share them, so differences are paired by seed. Their interval is Student's: percentiles of a
bootstrap are far too narrow for a handful of seeds.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats

from star_jax.checkpoint import config
from star_jax.studies.results import Failure, Result
from star_jax.training.run import Run

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A score of one config over seeds, compared with the first config.

    Attributes:
        mean: mean over seeds.
        deviation: standard deviation over seeds; None for one seed.
        difference: mean of the differences to the first config, paired by seed; None for the first
            config, and for a config that shares no seed with it.
        low: lower end of the 95 % interval of the difference; None for fewer than two pairs.
        high: upper end of that interval.
    """

    mean: float
    deviation: float | None
    difference: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return self.low is not None and not self.low <= 0 <= self.high


def compare(values: Mapping[int, float], first: Mapping[int, float] | None) -> Comparison:
    """Compares scores by seed with those of the first config, which may lack some seeds."""
    scores = list(values.values())
    seeds = [seed for seed in values if seed in (first or {})]
    difference = low = high = None
    if seeds:
        differences = [values[seed] - first[seed] for seed in seeds]
        difference = statistics.fmean(differences)
        if len(set(differences)) > 1:
            interval = stats.ttest_1samp(differences, 0).confidence_interval(CONFIDENCE)
            low, high = float(interval.low), float(interval.high)
        elif len(differences) > 1:
            low = high = difference  # no spread: a t statistic would divide by zero
    return Comparison(
        mean=statistics.fmean(scores),
        deviation=statistics.stdev(scores) if len(scores) > 1 else None,
        difference=difference,
        low=low,
        high=high,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One config of a study.

    Attributes:
        config: its name.
        differences: the fields in which it differs from the first config.
        parameters: trained parameters.
        step_seconds: seconds per training step, median over seeds.
        images_per_second: training images per second, median over seeds.
        best: lowest held-out loss during each run.
        scores: held-out scores by name.
        curves: (step, held-out loss) pairs by seed.
        failures: by seed, why a run did not finish. If none did, the other fields are empty.
    """

    config: str
    differences: list[str]
    parameters: int
    step_seconds: float | None
    images_per_second: float | None
    best: Comparison | None
    scores: dict[str, Comparison]
    curves: dict[int, tuple[tuple[int, float], ...]]
    failures: dict[int, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A study so far: its configs over the seeds that every config has run.

    Attributes:
        seeds: these seeds.
        conditions: the fields of a run that all configs share.
        machines: the machines that trained, as `machine.describe` describes them.
        outcomes: one per config.
        runs: every finished run.
    """

    seeds: list[int]
    conditions: dict[str, Any]
    machines: list[dict[str, Any]]
    outcomes: list[Outcome]
    runs: list[Result]


def summarise(
    runs: Sequence[Result],
    failures: Sequence[Failure],
    differences: Mapping[str, list[str]],
    baseline: Run,
) -> Summary:
    """The summary of finished and failed runs.

    Args:
        runs: finished runs.
        failures: runs that failed.
        differences: for every config, the fields in which it differs from the first; every config
            has a run or a failure.
        baseline: the run of the first config.
    """
    machines = [machine for run in runs for machine in run.machines]
    conditions = config.to_json(baseline)
    del conditions['model'], conditions['seed']
    first = _of_config(next(iter(differences)), runs)
    return Summary(
        seeds=sorted({run.seed for run in (*runs, *failures)}),
        conditions=conditions,
        machines=[machine for n, machine in enumerate(machines) if machine not in machines[:n]],
        outcomes=[
            _outcome(
                name, _of_config(name, runs), _of_config(name, failures), first, differences[name]
            )
            for name in differences
        ],
        runs=list(runs),
    )


def _of_config(name: str, runs: Sequence[Any]) -> list[Any]:
    return sorted((run for run in runs if run.config == name), key=lambda run: run.seed)


def _outcome(
    name: str,
    finished: Sequence[Result],
    failed: Sequence[Failure],
    first: Sequence[Result],
    differences: list[str],
) -> Outcome:
    is_first = bool(first) and first[0].config == name

    def over_seeds(score: Callable[[Result], float]) -> Comparison:
        return compare(
            {run.seed: score(run) for run in finished},
            None if is_first else {run.seed: score(run) for run in first},
        )

    def median(score: Callable[[Result], float]) -> float | None:
        return statistics.median(map(score, finished)) if finished else None

    return Outcome(
        config=name,
        differences=differences,
        parameters=[*finished, *failed][0].parameters,
        step_seconds=median(lambda run: run.step_seconds),
        images_per_second=median(lambda run: run.images_per_second),
        best=over_seeds(lambda run: run.best[1]) if finished else None,
        scores={
            score: over_seeds(lambda run, score=score: run.final[score])
            for score in (finished[0].final if finished else ())
        },
        curves={run.seed: run.curve for run in finished},
        failures={run.seed: run.reason for run in failed},
    )
