"""What did a finished run reach, and why could another not finish?

All of it is in the run's own `metrics.jsonl`: held-out scores are the scalars whose names begin
with `validation/`, and any other score that runs report there can be studied.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from star_jax.checkpoint import config, folder
from star_jax.errors import UserError
from star_jax.studies import origin
from star_jax.training import trainer
from star_jax.training.logger import METRICS
from star_jax.training.run import Run

HELD_OUT = 'validation/'
LOSS = 'loss'
SPEED = 'images_per_second'
FAILURE = 'failure.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One run of a study and its folder."""

    config: str
    seed: int
    run: Run
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A run that has ended.

    `final` holds the held-out scores after the last step, `curve` (step, held-out loss) pairs, of
    which `best` is the lowest. `images_per_second` is the median of what the run reported;
    `machines` are those that it was trained on.
    """

    config: str
    seed: int
    parameters: int
    final: dict[str, float]
    best: tuple[int, float]
    curve: tuple[tuple[int, float], ...]
    images_per_second: float
    step_seconds: float
    machines: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that came to what is no number, and would again: `reason` says what, and when."""

    config: str
    seed: int
    parameters: int
    reason: str


def has_ended(place: Place) -> bool:
    """Whether a run has left its model, the last thing that a run does."""
    return (place.folder / trainer.MODEL / folder.CONFIG).exists()


def note_failure(place: Place, reason: str) -> None:
    """Leaves beside a run why it cannot come to its end."""
    config.write_json(place.folder / FAILURE, {'reason': reason})


def failure(place: Place) -> Failure | None:
    """Why a run cannot come to its end, if that is known."""
    path = place.folder / FAILURE
    if not path.exists():
        return None
    fields = config.read_json(path)
    if not isinstance(fields, dict) or not isinstance(fields.get('reason'), str):
        raise _damaged(path, 'tells no reason')
    return Failure(
        config=place.config,
        seed=place.seed,
        parameters=origin.read(place.folder)['parameters'],
        reason=fields['reason'],
    )


def read(place: Place) -> Result:
    """What a run that has ended reported.

    Raises UserError where its report or the note of its origin is missing or damaged.
    """
    path = place.folder / METRICS
    lines = _read_lines(path)
    scores = {line['step']: _held_out(line) for line in lines if HELD_OUT + LOSS in line}
    speeds = [line[SPEED] for line in lines if SPEED in line]
    last = place.run.pace.steps
    if last not in scores or not speeds:
        raise _damaged(path, f'tells of no held-out loss at step {last}')
    curve = tuple((step, scores[step][LOSS]) for step in sorted(scores))
    speed = statistics.median(speeds)
    source = origin.read(place.folder)
    return Result(
        config=place.config,
        seed=place.seed,
        parameters=source['parameters'],
        final=scores[last],
        best=min(curve, key=lambda point: point[1]),
        curve=curve,
        images_per_second=speed,
        step_seconds=place.run.batch / speed,
        machines=tuple(source['machines']),
    )


def _read_lines(path: Path) -> list[dict[str, float]]:
    try:
        return [json.loads(line) for line in path.read_text('utf-8').splitlines()]
    except (OSError, ValueError) as error:
        raise _damaged(path, 'cannot be read') from error


def _damaged(path: Path, flaw: str) -> UserError:
    return UserError(
        f'{path} {flaw}, though the run is over: its report is damaged; delete {path.parent} '
        'and the same command trains it again'
    )


def _held_out(line: dict[str, float]) -> dict[str, float]:
    return {
        name.removeprefix(HELD_OUT): value
        for name, value in line.items()
        if name.startswith(HELD_OUT)
    }
