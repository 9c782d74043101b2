"""What did a finished run reach, where was it trained, and why did another run fail?

Scores are read from a run's `metrics.jsonl`: held-out scores are the metrics whose names begin with
`validation/`. `origin.json`, written when a run starts, records the machines and the number of
parameters, so that a report made later on another machine describes the machines that trained.
"""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax

from star_jax.checkpoint import config, folder
from star_jax.errors import UserError
from star_jax.parallel import machine
from star_jax.training import trainer
from star_jax.training.logger import METRICS
from star_jax.training.run import Run

HELD_OUT = 'validation/'
LOSS = 'loss'
SPEED = 'images_per_second'
FAILURE = 'failure.json'
ORIGIN = 'origin.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study.

    Attributes:
        config: name of its config.
        seed: seed of the run.
        run: the config with that seed.
        folder: the folder of the run.
    """

    config: str
    seed: int
    run: Run
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run.

    Attributes:
        config: name of its config.
        seed: seed of the run.
        parameters: trained parameters.
        final: held-out scores after the last step.
        best: (step, held-out loss) of the lowest held-out loss.
        curve: (step, held-out loss) pairs.
        images_per_second: training images per second, median of the reports of the run.
        step_seconds: seconds per training step, from the same median.
        machines: the machines that it was trained on.
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
    """A run whose loss or state became non-finite.

    Attributes:
        config: name of its config.
        seed: seed of the run.
        parameters: trained parameters.
        reason: which value became non-finite, and at which step.
    """

    config: str
    seed: int
    parameters: int
    reason: str


def record_origin(folder: Path, parameters: int) -> None:
    """Records this machine in the folder of a run, unless it is the last one recorded there."""
    folder.mkdir(parents=True, exist_ok=True)
    machines = read_origin(folder)['machines'] if (folder / ORIGIN).exists() else []
    here = machine.describe()
    if not machines or machines[-1] != here:
        machines.append(here)
    config.write_json(folder / ORIGIN, {'parameters': parameters, 'machines': machines})


def read_origin(folder: Path) -> dict[str, Any]:
    """`parameters`, a number, and `machines`, a list of descriptions."""
    return config.read_json(folder / ORIGIN)


def count_parameters(job: trainer.Job) -> int:
    """Parameters that training changes; averages are not counted."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(job.abstract().params))


def is_finished(study_run: StudyRun) -> bool:
    """Whether a run has written its model folder, which happens last."""
    return (study_run.folder / trainer.MODEL / folder.CONFIG).exists()


def record_failure(study_run: StudyRun, reason: str) -> None:
    """Records in the folder of a run why it failed."""
    config.write_json(study_run.folder / FAILURE, {'reason': reason})


def read_failure(study_run: StudyRun) -> Failure | None:
    """The recorded failure of a run, or None."""
    path = study_run.folder / FAILURE
    if not path.exists():
        return None
    fields = config.read_json(path)
    if not isinstance(fields, dict) or not isinstance(fields.get('reason'), str):
        raise _damaged(path, 'has no reason')
    return Failure(
        config=study_run.config,
        seed=study_run.seed,
        parameters=read_origin(study_run.folder)['parameters'],
        reason=fields['reason'],
    )


def read(study_run: StudyRun) -> Result:
    """The result of a finished run.

    Raises UserError if its metrics or its `origin.json` are missing or damaged.
    """
    path = study_run.folder / METRICS
    lines = _read_lines(path)
    scores = {line['step']: _held_out(line) for line in lines if HELD_OUT + LOSS in line}
    speeds = [line[SPEED] for line in lines if SPEED in line]
    last = study_run.run.pace.steps
    if last not in scores or not speeds:
        raise _damaged(path, f'has no held-out loss at step {last}')
    curve = tuple((step, scores[step][LOSS]) for step in sorted(scores))
    speed = statistics.median(speeds)
    origin = read_origin(study_run.folder)
    return Result(
        config=study_run.config,
        seed=study_run.seed,
        parameters=origin['parameters'],
        final=scores[last],
        best=min(curve, key=lambda point: point[1]),
        curve=curve,
        images_per_second=speed,
        step_seconds=study_run.run.batch / speed,
        machines=tuple(origin['machines']),
    )


def _read_lines(path: Path) -> list[dict[str, float]]:
    try:
        return [json.loads(line) for line in path.read_text('utf-8').splitlines()]
    except (OSError, ValueError) as error:
        raise _damaged(path, 'cannot be read') from error


def _damaged(path: Path, flaw: str) -> UserError:
    return UserError(
        f'{path} {flaw}, although the run has finished: the file is damaged; delete {path.parent} '
        'and give the same command to train the run again'
    )


def _held_out(line: dict[str, float]) -> dict[str, float]:
    return {
        name.removeprefix(HELD_OUT): value
        for name, value in line.items()
        if name.startswith(HELD_OUT)
    }
