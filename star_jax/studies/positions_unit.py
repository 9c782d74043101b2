"""How is one unit of the study of positions made?

A unit trains one kind of positions with one seed on one data set. It measures the held-out loss
along the training, how many sampled images show what their prompts state, and how the same weights
do at a larger image size, before and after a short training there.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from star_jax.checkpoint import config, folder, models
from star_jax.console import Console
from star_jax.data.shapes import Shapes
from star_jax.studies import held_out, starts, transfer, units
from star_jax.studies.aligned import Aligned, sampled_alignment
from star_jax.studies.arms import Arm, DataSet
from star_jax.studies.held_out import POINTS
from star_jax.studies.positions_result import NAME, Carried, PositionsResult
from star_jax.training import train, trainer
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run, resolve
from star_jax.training.schedules import LearningRate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionsUnit:
    """One arm with one seed on one data set, a `units.Unit`.

    Attributes:
        data: the data set.
        arm: the arm.
        seed: the seed.
        codes: folder of encoded images.
    """

    data: DataSet
    arm: Arm
    seed: int
    codes: str

    result_class = PositionsResult

    @property
    def name(self) -> str:
        levels = '' if self.arm.level_embedding else '-no-levels'
        return f'{self.data.name}-{self.arm.kind}{levels}-{self.seed}'

    @property
    def run(self) -> Run:
        """The training at the first size."""
        run, arm = self.data.run, self.arm
        model = dataclasses.replace(
            run.model, positions=arm.positions, level_embedding=arm.level_embedding
        )
        # The program of sample grids takes the longest to compile.
        pace = dataclasses.replace(run.pace, sample=run.pace.steps // POINTS, images=0)
        return resolve(
            dataclasses.replace(
                run, model=model, pace=pace, seed=self.seed, cache=self._cache(run.model.sides)
            )
        )

    def larger_run(self, init: Path) -> Run:
        """The training at the larger size, from a model folder of that size."""
        run, larger = self.run, self.data.larger
        rate = LearningRate(
            peak=larger.rate * run.optimizer.learning_rate.peak,
            warmup_steps=0,
            end=1.0,
            shape='lin',
        )
        optimizer: AdamW = dataclasses.replace(run.optimizer, learning_rate=rate)
        images = run.data
        if isinstance(images, Shapes):  # one pass over as many scenes as the steps need
            images = dataclasses.replace(images, count=round(larger.steps * run.mean_batch))
        return dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, sides=larger.sides),
            init=str(init),
            data=images,
            optimizer=optimizer,
            pace=Pace(
                steps=larger.steps,
                log=larger.steps,
                sample=larger.steps,
                images=0,
                save=larger.steps,
            ),
            cache=self._cache(larger.sides),
        )

    def trained_in(self, work: Path) -> Path:
        return work

    def measure(self, work: Path, console: Console) -> dict[str, Any] | None:
        return units.or_failure(lambda: self._measure(work), self._head, console)

    def _measure(self, work: Path) -> dict[str, Any] | None:
        run = self.run
        train.cache(run)
        trained = work / 'trained'
        if not train.main(run, trained):
            return None
        model = functools.partial(models.read, trained / trainer.MODEL)
        curve = held_out.curve(trained, run.pace)
        fields = self._head() | {
            'curve': curve,
            'area': statistics.fmean(point.loss for point in curve),
            'fall': curve[-1 - POINTS // 5].loss - curve[-1].loss,
            'aligned': self._aligned(model, work / 'aligned.json'),
        }
        if self.data.larger:
            larger = self._carried(model, work)
            if larger is None:
                return None
            fields['larger'] = larger
        return fields | {'seconds': {'unit': starts.seconds(work)}}

    def _head(self) -> dict[str, Any]:
        """The fields of a result that need no training."""
        run = self.run
        parameters = jax.tree.leaves(run.model.abstract())
        return {
            'study': NAME,
            'kind': self.arm.kind,
            'level_embedding': self.arm.level_embedding,
            'seed': self.seed,
            'data': self.data.name,
            'images': round(run.mean_batch * run.pace.steps),
            'positions': self.arm.positions,
            'settings': self.data.settings,
            'tokenizer': models.digest(run.tokenizer),
            'parameters': sum(math.prod(leaf.shape) for leaf in parameters),
        }

    def _carried(self, model: Callable[[], folder.StoredModel], work: Path) -> Carried | None:
        """Scores of the model at the larger size; None if a stop was requested."""
        larger = self.data.larger
        extended = work / 'extended'
        if not (extended / folder.CONFIG).exists():
            folder.write(extended, self._extend(model()))
        run, trained = self.larger_run(extended), work / 'trained_larger'
        train.cache(run)

        def score() -> dict[str, float]:
            job = train.build_job(run)
            return job.evaluate(job.init())

        before = units.once(work / 'before.json', config.to_json(run), score)
        sampled = functools.partial(models.read, extended)
        aligned_before = self._aligned(sampled, work / 'aligned_before.json')
        if not train.main(run, trained):
            return None
        sampled = functools.partial(models.read, trained / trainer.MODEL)
        aligned_after = self._aligned(sampled, work / 'aligned_after.json')
        return Carried(
            size=sampled().tokenizer.config.at(run.model.schedule).resolution[0],
            steps=larger.steps,
            before=held_out.of_scores(before, 0),
            after=held_out.read(trained)[larger.steps],
            aligned_before=aligned_before,
            aligned_after=aligned_after,
        )

    def _extend(self, model: folder.StoredModel) -> folder.StoredModel:
        """The model at the larger size, not trained there."""
        changed = dataclasses.replace(model.config, sides=self.data.larger.sides)
        params = transfer.extend(model.params, model.config.schedule, changed.schedule)
        return dataclasses.replace(model, config=changed, params=params)

    def _aligned(self, model: Callable[[], folder.StoredModel], path: Path) -> tuple[Aligned, ...]:
        """Alignment of sampled images, kept in a file."""
        if not self.data.sampled:
            return ()

        def score() -> list[dict[str, Any]]:
            scores = sampled_alignment(model(), self.data.run.tokenizer, self.data.sampled)
            return [config.to_json(one) for one in scores]

        settings = {'sampled': self.data.sampled}
        return tuple(config.from_json(Aligned, one) for one in units.once(path, settings, score))

    def _cache(self, sides: Sequence[int]) -> str:
        return str(Path(self.codes) / f'{self.data.name}-{sides[-1]}')
