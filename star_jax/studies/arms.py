"""What does a study of positions compare, and on which data?"""

import dataclasses

from star_jax.checkpoint import config
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.nn.positions import (
    AnyPositions,
    Learned,
    MixedRotary,
    NoPositions,
    NormalisedRotary,
    RawRotary,
    RoundedRotary,
    SinCos,
)
from star_jax.studies import units
from star_jax.studies.held_out import POINTS
from star_jax.training.run import Run

KINDS = {
    'normalised': NormalisedRotary,
    'rounded': RoundedRotary,
    'raw': RawRotary,
    'mixed': MixedRotary,
    'learned': Learned,
    'sincos': SinCos,
    'none': NoPositions,
}


def check_kind(kind: str, positions: AnyPositions) -> None:
    """Raises UserError unless `kind` is a name in KINDS, with a suffix or not, of `positions`."""
    known = KINDS.get(kind.partition('-')[0])
    if known is None:
        raise UserError(
            f'there is no kind {kind!r} of positions: choose of {", ".join(KINDS)}, with a suffix '
            'such as -theta10 or without'
        )
    if not isinstance(positions, known):
        raise UserError(f'{kind} are {known.__name__}, not {type(positions).__name__}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One kind of model, with the seeds that it is trained with.

    Attributes:
        kind: its name: a name in KINDS, with a suffix or not.
        positions: its positions.
        level_embedding: whether a learned vector marks the scale of a token.
        seeds: seeds of the initial parameters and of the order of the data.
    """

    kind: str
    positions: AnyPositions
    level_embedding: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        check_kind(self.kind, self.positions)
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f'seeds must be different, not {", ".join(map(str, self.seeds))}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargerSize:
    """The image size to which trained models are carried.

    Attributes:
        sides: sides of the scales: the sides of the training, and one more.
        steps: training steps at that size.
        rate: constant learning rate of these steps, as a share of the peak of the training.
    """

    sides: tuple[int, ...]
    steps: int
    rate: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set and the settings of all units on it.

    Attributes:
        name: its name.
        run: the training; its positions, level embedding and seed are those of a unit.
        sampled: images whose alignment is scored, for one and for two objects each (0: none; only
            scenes of shapes can be scored).
        larger: the size to which models are carried (None: none).
    """

    name: str
    run: Run
    sampled: int = 0
    larger: LargerSize | None = None

    def __post_init__(self) -> None:
        if self.run.pace.steps % POINTS:
            raise UserError(
                f'a curve has {POINTS} equally spaced points: expected a multiple of {POINTS} '
                f'steps, not {self.run.pace.steps}'
            )
        if self.sampled and not isinstance(self.run.data, Shapes):
            raise UserError(f'only shapes can be scored, not {type(self.run.data).__name__}')

    @property
    def settings(self) -> str:
        """A digest of everything that all units on this data set share."""
        shared = dataclasses.replace(self.run, seed=0, cache='')
        fields = config.to_json(dataclasses.replace(self, run=shared))
        for name in ('positions', 'level_embedding'):
            del fields['run']['model'][name]
        return units.digest(fields)
