"""What did the configs of a study reach, over the seeds that it has come to?"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from star_jax.checkpoint import config
from star_jax.studies.comparison import Comparison, compare
from star_jax.studies.results import Failure, Result
from star_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One config: what it differs in, what it costs, and its held-out scores by name.

    `step_seconds` and `images_per_second` are medians over seeds, `best` the lowest loss of every
    run on its way. `curves` are (step, loss) pairs, one curve per seed. `failures` say by seed why
    a run did not end; where none did, there is nothing else to say.
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
    """A study so far: its configs over the seeds that all of them have come to."""

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
    """The summary of runs, and of those that failed.

    `differences` has every config, the first one compared with, and each has a run or a failure.
    """
    machines = [machine for run in runs for machine in run.machines]
    conditions = config.to_json(baseline)
    del conditions['model'], conditions['seed']
    first = _of(next(iter(differences)), runs)
    return Summary(
        seeds=sorted({one.seed for one in (*runs, *failures)}),
        conditions=conditions,
        machines=[one for n, one in enumerate(machines) if one not in machines[:n]],
        outcomes=[
            _outcome(name, _of(name, runs), _of(name, failures), first, differences[name])
            for name in differences
        ],
        runs=list(runs),
    )


def _of(name: str, ones: Sequence[Any]) -> list[Any]:
    return sorted((one for one in ones if one.config == name), key=lambda one: one.seed)


def _outcome(
    name: str,
    own: Sequence[Result],
    failed: Sequence[Failure],
    first: Sequence[Result],
    differences: list[str],
) -> Outcome:
    is_first = bool(first) and first[0].config == name

    def over_seeds(score: Callable[[Result], float]) -> Comparison:
        return compare(
            {run.seed: score(run) for run in own},
            None if is_first else {run.seed: score(run) for run in first},
        )

    return Outcome(
        config=name,
        differences=differences,
        parameters=[*own, *failed][0].parameters,
        step_seconds=statistics.median(run.step_seconds for run in own) if own else None,
        images_per_second=statistics.median(run.images_per_second for run in own) if own else None,
        best=over_seeds(lambda run: run.best[1]) if own else None,
        scores={
            score: over_seeds(lambda run, score=score: run.final[score])
            for score in (own[0].final if own else ())
        },
        curves={run.seed: run.curve for run in own},
        failures={one.seed: one.reason for one in failed},
    )
