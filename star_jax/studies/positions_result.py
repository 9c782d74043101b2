"""What has a unit of the study of positions measured?"""

import dataclasses
from typing import Any

from star_jax.errors import UserError
from star_jax.nn.positions import AnyPositions
from star_jax.studies.aligned import Aligned
from star_jax.studies.arms import check_kind
from star_jax.studies.held_out import POINTS, HeldOut

NAME = 'positions'  # name of the study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carried:
    """Scores of a model at the larger size.

    Attributes:
        size: side of the images in pixels.
        steps: training steps at that size.
        before: scores without training there.
        after: scores after it.
        aligned_before: alignment without training there, by number of objects.
        aligned_after: alignment after it.
    """

    size: int
    steps: int
    before: HeldOut
    after: HeldOut
    aligned_before: tuple[Aligned, ...]
    aligned_after: tuple[Aligned, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionsResult:
    """The result of a unit.

    Attributes:
        study: 'positions'.
        kind: name of the arm.
        level_embedding: whether a learned vector marks the scale of a token.
        seed: the seed.
        data: name of the data set.
        commit: commit of the code.
        images: images of the training.
        hardware: the machines, as `machine.describe` describes them.
        positions: the positions, with theta and extent.
        settings: digest of what the units on one data set share.
        tokenizer: SHA-256 of the tokenizer's folder.
        parameters: trained parameters.
        curve: held-out scores at equally spaced points of the training, the last at its end.
        area: mean loss of these points, nats.
        fall: how much the loss fell over the last fifth of the steps, nats.
        aligned: alignment of images of the trained size, by number of objects.
        larger: scores at the larger size.
        failure: why the training failed ('': it did not); the scores are then missing.
        seconds: time of all starts of the `unit`; older results have the time since the last start,
            of the `training`, too.
    """

    study: str
    kind: str
    level_embedding: bool
    seed: int
    data: str
    commit: str
    images: int
    hardware: tuple[dict[str, Any], ...]
    positions: AnyPositions
    settings: str
    tokenizer: str
    parameters: int
    curve: tuple[HeldOut, ...] = ()
    area: float | None = None
    fall: float | None = None
    aligned: tuple[Aligned, ...] = ()
    larger: Carried | None = None
    failure: str = ''
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.study != NAME:
            raise UserError(f'a unit of the study {self.study!r}, expected {NAME!r}')
        check_kind(self.kind, self.positions)
        if not self.failure and (len(self.curve) != POINTS or self.area is None):
            raise UserError(f'the curve has {len(self.curve)} points, expected {POINTS}')

    @property
    def arm(self) -> str:
        """The name of its arm: the kind, and whether the level embedding is missing."""
        return self.kind if self.level_embedding else f'{self.kind}, no levels'
