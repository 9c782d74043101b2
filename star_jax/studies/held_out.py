"""How well did a model predict the held-out images along its training?"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from star_jax import files
from star_jax.errors import UserError
from star_jax.training.logger import HELD_OUT, METRICS
from star_jax.training.run import Pace

POINTS = 10  # equally spaced points of a curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Scores of the held-out images.

    Attributes:
        step: training steps before it.
        loss: mean over all tokens, nats.
        accuracy: share of the tokens whose most likely code is the true one.
        scales: loss of each scale, nats.
    """

    step: int
    loss: float
    accuracy: float
    scales: tuple[float, ...]


def curve(out: Path, pace: Pace) -> tuple[HeldOut, ...]:
    """The scores of a finished run at equally spaced points, the last at its end."""
    points = read(out)
    return tuple(points[step] for step in sorted(points) if step % (pace.steps // POINTS) == 0)


def read(out: Path) -> dict[int, HeldOut]:
    """Held-out scores of a finished run by step. Raises UserError if they are damaged."""
    path = out / METRICS
    try:
        lines = [files.parse_json(line) for line in path.read_text('utf-8').splitlines()]
        scored = [line for line in lines if f'{HELD_OUT}loss' in line]
        return {line['step']: of_scores(line, line['step']) for line in scored}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} is damaged, although the run has finished: delete {out} and give the same '
            'command to train it again'
        ) from error


def of_scores(scores: Mapping[str, float], step: int) -> HeldOut:
    """The scores of one evaluation, after `step` training steps."""
    scales = sorted(
        (int(name.rpartition('/')[2]), value)
        for name, value in scores.items()
        if name.startswith(f'{HELD_OUT}loss/')
    )
    return HeldOut(
        step=step,
        loss=scores[f'{HELD_OUT}loss'],
        accuracy=scores[f'{HELD_OUT}accuracy'],
        scales=tuple(value for _, value in scales),
    )
