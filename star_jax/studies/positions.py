"""What do positional encodings change, everything else being equal?"""

import dataclasses
import itertools

from star_jax.bench.sampling import SamplingJob
from star_jax.errors import UserError
from star_jax.studies.arms import Arm, DataSet
from star_jax.studies.positions_result import NAME
from star_jax.studies.positions_unit import PositionsUnit
from star_jax.studies.reference import ReferenceUnit
from star_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Arms that are made one seed after another.

    Attributes:
        data: the data set.
        arms: the arms.
    """

    data: DataSet
    arms: tuple[Arm, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionsStudy:
    """Stages, made in order.

    Attributes:
        stages: the stages.
        codes: folder of the encoded images, which all units share.

    Raises:
        UserError: two units have one name.
    """

    stages: tuple[Stage, ...]
    codes: str = 'runs/positions/codes'

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f'two units are called {twice[0]!r}: kinds need different names')

    @property
    def name(self) -> str:
        return NAME

    @property
    def timed_runs(self) -> dict[str, Run]:
        """One run of every kind of the first stage."""
        units = {
            arm.kind: PositionsUnit(data=stage.data, arm=arm, seed=0, codes=self.codes)
            for stage in self.stages[:1]
            for arm in stage.arms
        }
        return {kind: unit.run for kind, unit in units.items()}

    @property
    def timed_samplers(self) -> dict[str, SamplingJob]:
        """None: sampling differs in nothing but positions."""
        return {}

    @property
    def units(self) -> list[ReferenceUnit | PositionsUnit]:
        """All units: the references, then within a stage all arms with one seed before the next."""
        sets = {stage.data.name: stage.data for stage in self.stages if stage.data.sampled}
        result = [ReferenceUnit(data=data) for data in sets.values()]
        for stage in self.stages:
            rounds = itertools.zip_longest(*(arm.seeds for arm in stage.arms))
            for round_, arm in itertools.product(rounds, range(len(stage.arms))):
                if round_[arm] is not None:
                    unit = PositionsUnit(
                        data=stage.data, arm=stage.arms[arm], seed=round_[arm], codes=self.codes
                    )
                    result.append(unit)
        return result
