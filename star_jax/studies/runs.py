"""Which of several runs makes the better model, everything else being equal?

A study of runs trains its tokenizers first, then every contender with every seed. A unit ends with
the held-out loss along its training and the alignment of images that it samples.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from flax import linen as nn

from star_jax.bench.sampling import SamplingJob
from star_jax.checkpoint import config, folder, models
from star_jax.console import Console
from star_jax.core.settings import Settings
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.evaluation.reconstruction import compile_reconstruction
from star_jax.protocols import Family
from star_jax.studies import held_out, starts, units
from star_jax.studies.aligned import BATCH, Aligned, best_settings, sampled_alignment
from star_jax.studies.held_out import POINTS
from star_jax.studies.runs_result import RunResult, TokenizerResult
from star_jax.training import train, trainer
from star_jax.training.run import Run, TokenizerRun, resolve
from star_jax.training.summary import count_parameters

TOKENIZER = 'tokenizer'  # first word of the names of their units
SAMPLED = 250  # images of each number of objects, unless a study has another number
FAILURE = 'failure.json'  # beside the checkpoints of a tokenizer: why its training failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A run that is compared with others.

    Attributes:
        name: its name.
        run: the settings; seed, tokenizer and cache are those of its units.
        tokenizer: name of a tokenizer of the study.
        indexed: its tokens are one index instead of the bits of the tokenizer.
        seeds: seeds of the initial parameters and of the order of the data.
        choices: sampling settings, of which every unit uses those that are best on training scenes
            (none: the settings of the run).
    """

    name: str
    run: Run
    tokenizer: str
    indexed: bool = False
    seeds: tuple[int, ...] = (0, 1)
    choices: tuple[Settings, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunsStudy:
    """Tokenizers, and contenders that train on their codes.

    Attributes:
        name: the name of the study.
        tokenizers: the runs that train its tokenizers, by name.
        contenders: the compared runs; the first is the one that the others are compared with.
        folder: folder of the tokenizers and the encoded images, which the units share.
        sampled: images of each number of objects that a unit samples.
        chosen_by: images of each number of objects that choose the sampling settings of a unit.

    Raises:
        UserError: two units have one name, a contender names no tokenizer of the study, or its
            steps do not divide into the points of a curve.
    """

    name: str
    tokenizers: tuple[tuple[str, TokenizerRun], ...]
    contenders: tuple[Contender, ...]
    folder: str
    sampled: int = SAMPLED
    chosen_by: int = 50

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f'two units are called {twice[0]!r}: give them different names')
        known = [name for name, _ in self.tokenizers]
        for one in self.contenders:
            if one.tokenizer not in known:
                raise UserError(
                    f'{one.name} names the tokenizer {one.tokenizer!r}, and the study has '
                    f'{", ".join(known)}'
                )
            if one.run.pace.steps % POINTS:
                raise UserError(
                    f'a curve has {POINTS} equally spaced points: expected a multiple of {POINTS} '
                    f'steps, not {one.run.pace.steps} of {one.name}'
                )

    @property
    def timed_runs(self) -> dict[str, Run]:
        """One run of every contender."""
        return {one.name: one.run for one in self.contenders}

    @property
    def timed_samplers(self) -> dict[str, SamplingJob]:
        """One sampling job of every contender, with the decoder of its tokenizer."""
        tokenizers = dict(self.tokenizers)
        return {
            one.name: SamplingJob(
                model=one.run.model,
                autoencoder=tokenizers[one.tokenizer].model.autoencoder,
                settings=(*one.choices, one.run.sampling)[0],
            )
            for one in self.contenders
        }

    @property
    def units(self) -> list['TokenizerUnit | RunUnit']:
        """All units: the tokenizers, then all contenders with one seed before the next seed."""
        result: list[TokenizerUnit | RunUnit] = [
            TokenizerUnit(study=self.name, tokenizer=name, run=run, folder=self.folder)
            for name, run in self.tokenizers
        ]
        seeds = sorted({seed for one in self.contenders for seed in one.seeds})
        for seed in seeds:
            result += [
                RunUnit(
                    study=self.name,
                    contender=one,
                    baseline=self.contenders[0].name,
                    seed=seed,
                    folder=self.folder,
                    sampled=self.sampled,
                    chosen_by=self.chosen_by,
                )
                for one in self.contenders
                if seed in one.seeds
            ]
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerUnit:
    """Trains a tokenizer and measures its reconstructions, a `units.Unit`.

    Attributes:
        study: the name of the study.
        tokenizer: the name of the tokenizer.
        run: its training.
        folder: where the trained tokenizer stays.
    """

    study: str
    tokenizer: str
    run: TokenizerRun
    folder: str

    result_class = TokenizerResult

    @property
    def name(self) -> str:
        return f'{TOKENIZER}-{self.tokenizer}'

    def trained_in(self, work: Path) -> Path:
        return tokenizer_folder(self.folder, self.tokenizer)

    def measure(self, work: Path, console: Console) -> dict[str, Any] | None:
        out = self.trained_in(work)
        fields = units.or_failure(lambda: self._measure(out), self._head, console)
        if fields and 'failure' in fields:
            config.write_json(out / FAILURE, fields['failure'])
        return fields

    def _measure(self, out: Path) -> dict[str, Any] | None:
        if not train.main(self.run, out):
            return None
        stored = models.read_tokenizer(out / trainer.MODEL)
        source = Shapes(count=BATCH, split='validation').open(stored.config.resolution)
        batches = compile_reconstruction(stored, None, BATCH)(source)
        ratios = [float(ratio) for batch in batches for ratio in batch.psnr_N]
        return self._head() | {
            'tokenizer_digest': models.digest(out / trainer.MODEL),
            'psnr': sum(ratios) / len(ratios),
            'seconds': starts.seconds(out),
        }

    def _head(self) -> dict[str, Any]:
        images = round(self.run.mean_batch * self.run.pace.steps)
        return {'study': self.study, 'tokenizer': self.tokenizer, 'images': images}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunUnit:
    """One contender with one seed, a `units.Unit`.

    Attributes:
        study: the name of the study.
        contender: the contender.
        baseline: the name of the contender with which the others are compared.
        seed: the seed.
        folder: folder of the tokenizers and the encoded images.
        sampled: images of each number of objects that are sampled.
        chosen_by: images of each number of objects that choose the sampling settings.
    """

    study: str
    contender: Contender
    baseline: str
    seed: int
    folder: str
    sampled: int
    chosen_by: int

    result_class = RunResult

    @property
    def name(self) -> str:
        return f'{self.contender.name}-{self.seed}'

    @property
    def run(self) -> Run:
        """The training, on codes or features from a cache."""
        one = self.contender
        run, features = one.run, one.run.correction.active
        # The program of sample grids takes the longest to compile.
        pace = dataclasses.replace(run.pace, sample=run.pace.steps // POINTS, images=0)
        kind = 'features' if features else 'indices' if one.indexed else 'codes'
        cache = Path(self.folder) / 'encoded' / f'{one.tokenizer}-{kind}'
        return resolve(
            dataclasses.replace(
                run, seed=self.seed, pace=pace, tokenizer=str(self._tokenizer), cache=str(cache)
            )
        )

    @property
    def settings(self) -> str:
        """A digest of the contender's run and of how its images are sampled."""
        run = dataclasses.replace(self.run, seed=0)
        return units.digest(config.to_json(run) | self._sampling)

    def trained_in(self, work: Path) -> Path:
        return work

    def measure(self, work: Path, console: Console) -> dict[str, Any] | None:
        return units.or_failure(lambda: self._measure(work), self._head, console)

    def _measure(self, work: Path) -> dict[str, Any] | None:
        run = self._prepared()
        train.cache(run, features=run.correction.active)
        trained = work / 'trained'
        if not train.main(run, trained):
            return None

        def score() -> dict[str, Any]:
            model = models.read(trained / trainer.MODEL)
            choices = self.contender.choices or (model.sampling,)
            chosen = choices[0]
            if len(choices) > 1:
                chosen = best_settings(model, run.tokenizer, choices, self.chosen_by)
            model = dataclasses.replace(model, sampling=chosen)
            aligned = sampled_alignment(model, run.tokenizer, self.sampled)
            return {
                'sampling': config.to_json(chosen),
                'aligned': [config.to_json(one) for one in aligned],
            }

        scores = units.once(work / 'aligned.json', self._sampling, score)
        return self._head() | {
            'curve': held_out.curve(trained, run.pace),
            'aligned': tuple(config.from_json(Aligned, one) for one in scores['aligned']),
            'sampling': config.from_json(Settings, scores['sampling']),
            'seconds': {'unit': starts.seconds(work)},
        }

    @property
    def _sampling(self) -> dict[str, Any]:
        """How images are sampled, as JSON without what is usual: digests depend on it."""
        fields, choices = {}, self.contender.choices
        if choices:
            fields |= {'choices': [config.to_json(one) for one in choices], 'by': self.chosen_by}
        if self.sampled != SAMPLED:
            fields['sampled'] = self.sampled
        return fields

    @property
    def _out(self) -> Path:
        """The folder of the run that trains the tokenizer."""
        return tokenizer_folder(self.folder, self.contender.tokenizer)

    @property
    def _tokenizer(self) -> Path:
        """The model folder of the tokenizer, as the contender needs it."""
        one = self.contender
        name = f'{one.tokenizer}-indexed' if one.indexed else one.tokenizer
        return tokenizer_folder(self.folder, name) / trainer.MODEL

    def _prepared(self) -> Run:
        """The run; UserError if the unit of its tokenizer is not made yet, or has failed."""
        one, place, out = self.contender, self._tokenizer, self._out
        original = out / trainer.MODEL
        if not (original / folder.CONFIG).exists():
            if (out / FAILURE).exists():
                raise UserError(
                    f'the training of the tokenizer {one.tokenizer} failed '
                    f'({config.read_json(out / FAILURE)}): change its run in the study'
                )
            raise UserError(
                f'the tokenizer {one.tokenizer} is not trained yet: make the unit '
                f'{TOKENIZER}-{one.tokenizer} first'
            )
        if not (place / folder.CONFIG).exists():
            stored = models.read_tokenizer(original)
            indexed = dataclasses.replace(stored.config, indexed=True)
            folder.write(place, dataclasses.replace(stored, config=indexed))
        return self.run

    def _head(self) -> dict[str, Any]:
        """The fields of a result that need no training."""
        run = self.run
        return {
            'study': self.study,
            'contender': self.contender.name,
            'baseline': self.baseline,
            'seed': self.seed,
            'images': round(run.mean_batch * run.pace.steps),
            'settings': self.settings,
            'tokenizer': self.contender.tokenizer,
            'tokenizer_digest': models.digest(self._out / trainer.MODEL),
            'parameters': trained_parameters(run.model),
            'tokens': run.model.schedule.length,
            'numbers': math.prod(run.model.vocabulary.shape),
        }


def trained_parameters(model: Family) -> int:
    """Numbers in the parameters of a model, except for its constants."""
    return count_parameters(nn.unbox(model.abstract()), model.constants)


def tokenizer_folder(place: str, name: str) -> Path:
    """The folder of the run that trains a tokenizer."""
    return Path(place) / 'tokenizers' / name
