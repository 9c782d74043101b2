"""What has the benchmark of a study's kinds measured?"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from star_jax.checkpoint import config
from star_jax.errors import UserError
from star_jax.studies import provenance
from star_jax.studies.cells import Cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindCost:
    """Time and memory of the program of one kind.

    Attributes:
        seconds: median time of a call.
        seconds_per_image: the same for one image.
        ratio: median over rounds of its time over that of the first kind.
        ratios: this ratio in every round.
        gflop: arithmetic of a call, billions of operations.
        bytes: memory of arguments and temporaries.
    """

    seconds: float
    seconds_per_image: float
    ratio: float
    ratios: tuple[float, ...]
    gflop: float
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostResult:
    """The result of `study cost`.

    Attributes:
        study: the name of the study.
        commit: commit of the code.
        hardware: the machine, as `machine.describe` describes it.
        rounds: how often every kind was timed.
        text_tokens: tokens of a caption.
        training: costs by kind, by the number of images of a step in words.
        sampling: costs by kind, by the number of images of a call in words.
    """

    study: str
    commit: str
    hardware: dict[str, Any]
    rounds: int
    text_tokens: int
    training: dict[str, dict[str, KindCost]]
    sampling: dict[str, dict[str, KindCost]]

    def __post_init__(self) -> None:
        if not all(kinds and all(one.ratios for one in kinds.values()) for kinds in self._parts()):
            raise UserError('a part has no kinds, or a kind no ratios')

    def _parts(self) -> list[dict[str, KindCost]]:
        return [*self.training.values(), *self.sampling.values()]

    def parts(self) -> list[Cells | str]:
        """One table per number of images, and a sentence about their origin."""
        tables = [
            _cells(f'{part}, {images}: median of {self.rounds} rounds in turn', kinds)
            for part, measured in (('Training', self.training), ('Sampling', self.sampling))
            for images, kinds in measured.items()
        ]
        made = provenance.sentence('Cost', [self.commit], [self.hardware])
        return [*tables, f'{made} Captions have {self.text_tokens} tokens.']


def read(path: Path, study: str) -> CostResult:
    """The result in a file. Raises UserError if it is missing, damaged or of another study.

    Args:
        path: the file.
        study: the name of the study.
    """
    try:
        result = config.read(path, CostResult)
    except UserError as error:
        raise UserError(f'{error}: expected a file of `star-jax study cost`') from error
    if result.study != study:
        raise UserError(
            f'{path} is the cost of the study {result.study!r}, and the units are of {study!r}: '
            'give the file of that study'
        )
    return result


def _cells(title: str, kinds: Mapping[str, KindCost]) -> Cells:
    rows = [
        [
            kind,
            f'{1000 * one.seconds_per_image:.2f}',
            f'{one.ratio:.3f} ({min(one.ratios):.3f} to {max(one.ratios):.3f})',
            f'{one.gflop:.2f}',
            f'{one.bytes / 2**20:.1f}',
        ]
        for kind, one in kinds.items()
    ]
    first = next(iter(kinds))
    columns = ['kind', 'ms per image', f'time / {first}', 'GFLOP a call', 'MiB']
    return Cells(title=title, columns=columns, rows=rows)
