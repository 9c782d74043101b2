"""What are the numbers of a study of positions measured against?

How well the tokenizer of the study shows scenes at each size, which bounds every model on its
codes, and the alignment of the shipped model, with the prompts and the settings of the units.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from star_jax.checkpoint import models
from star_jax.console import Console
from star_jax.core.schedule import Pyramid, square_grids
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.evaluation import alignment
from star_jax.evaluation.reconstruction import compile_reconstruction
from star_jax.files import SHIPPED
from star_jax.studies.aligned import BATCH, OBJECTS, Aligned, sampled_alignment
from star_jax.studies.arms import DataSet
from star_jax.studies.positions_result import NAME

KIND = 'reference'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readable:
    """Reconstructions at one size.

    Attributes:
        size: side of the images in pixels.
        count: number of scenes.
        share: share of the reconstructions in which everything that their caption states is read.
        psnr: mean, dB.
    """

    size: int
    count: int
    share: float
    psnr: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """The result of the reference unit; the first eight fields are those of every unit.

    Attributes:
        study: 'positions'.
        kind: 'reference'.
        level_embedding: whether the shipped model has one.
        seed: 0: image i is sampled with seed i.
        data: name of the data set.
        commit: commit of the code.
        images: 0: nothing is trained.
        hardware: the machine, as `machine.describe` describes it.
        settings: digest of what the units on the data set share.
        tokenizer: SHA-256 of the tokenizer's folder.
        readable: reconstructions at each size.
        shipped: alignment of the shipped model, by number of objects.
    """

    study: str
    kind: str
    level_embedding: bool
    seed: int
    data: str
    commit: str
    images: int
    hardware: tuple[dict[str, Any], ...]
    settings: str
    tokenizer: str
    readable: tuple[Readable, ...]
    shipped: tuple[Aligned, ...]

    def __post_init__(self) -> None:
        if (self.study, self.kind) != (NAME, KIND):
            raise UserError(f'a unit {self.kind!r} of the study {self.study!r}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceUnit:
    """Measures the tokenizer of a data set and the shipped model, a `units.Unit`.

    Attributes:
        data: the data set.
    """

    data: DataSet

    result_class = ReferenceResult

    @property
    def name(self) -> str:
        return f'{self.data.name}-{KIND}'

    def trained_in(self, work: Path) -> Path:
        return work

    def measure(self, work: Path, console: Console) -> dict[str, Any]:
        run, shipped = self.data.run, models.read(SHIPPED)
        schedules = [run.model.schedule]
        if self.data.larger:
            schedules.append(Pyramid(square_grids(self.data.larger.sides)))
        shipped = dataclasses.replace(shipped, sampling=run.sampling)
        return {
            'study': NAME,
            'kind': KIND,
            'level_embedding': shipped.config.level_embedding,
            'seed': 0,
            'data': self.data.name,
            'images': 0,
            'settings': self.data.settings,
            'tokenizer': models.digest(run.tokenizer),
            'readable': tuple(self._readable(schedule) for schedule in schedules),
            'shipped': tuple(sampled_alignment(shipped, SHIPPED, self.data.sampled)),
        }

    def _readable(self, schedule: Pyramid) -> Readable:
        stored = models.read_tokenizer(self.data.run.tokenizer)
        stored = dataclasses.replace(stored, config=stored.config.at(schedule))
        reconstruct = compile_reconstruction(stored, None, BATCH)
        right, ratios = [], []
        for objects in OBJECTS:
            count = self.data.sampled
            scenes = Shapes(count=count, split='validation', objects=(objects,), phrasings=1)
            source = scenes.open(stored.config.resolution)
            images = []
            for batch in reconstruct(source):
                images.extend(batch.images)
                ratios.extend(batch.psnr_N)
            right += [
                alignment.is_aligned(image, source.captions(index)[0])
                for index, image in enumerate(images)
            ]
        return Readable(
            size=stored.config.resolution[0],
            count=len(right),
            share=float(np.mean(right)),
            psnr=float(np.mean(ratios)),
        )
