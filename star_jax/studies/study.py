"""How do runs become a study?

Configs that differ in what is studied and in nothing else, each with the same seeds, one run after
another through the same loop as any run. A run's folder is `<config>/seed-<n>`; what has ended is
never trained again, so the same command goes on after a stop, adds seeds, or only reports. A run
that comes to nan is noted as failed, and the others go on.
"""

import dataclasses
import gc
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from star_jax import files
from star_jax.checkpoint import config
from star_jax.errors import NotFiniteError, UserError
from star_jax.parallel import startup
from star_jax.studies import origin, results, study_report
from star_jax.studies.summary import summarise
from star_jax.training import train, trainer
from star_jax.training.run import Run, resolve

# Of a model: what is predicted and from what. With other sides or codes, losses are of other tasks.
TASK = ('sides', 'codes', 'channels', 'text_width')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Configs by name, the others compared with the first, each with every one of the seeds.

    The configs' own seeds do not count. Raises UserError where there is no config or seed, a seed
    stands twice, or configs differ in more than their models, whose sides, codes and widths of
    tokenizer and text must be equal too.
    """

    configs: Mapping[str, Run]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.configs or not self.seeds:
            raise UserError('a study needs at least one config and one seed')
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f'seeds must be different, not {self.seeds}')
        if min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise UserError(f'seeds must lie in [0, 2^32), not {self.seeds}')
        for name, run in self.configs.items():
            if unequal := _unequal_conditions(self.baseline, run):
                raise UserError(
                    f'{name} is not trained under the same conditions as {next(iter(self.configs))}'
                    f' ({"; ".join(unequal)}): configs of one study may differ in their model '
                    f'alone, but for {", ".join(TASK)}'
                )

    @property
    def baseline(self) -> Run:
        return next(iter(self.configs.values()))

    def differences(self) -> dict[str, list[str]]:
        """The fields under study: by config, those in which it differs from the first."""
        first = self.baseline
        return {
            name: config.differences(first, dataclasses.replace(run, seed=first.seed))
            for name, run in self.configs.items()
        }

    def rounds(self, out: Path) -> list[list[results.Place]]:
        """All runs, seed after seed: each round holds one of every config."""
        return [
            [
                results.Place(
                    config=name,
                    seed=seed,
                    run=resolve(dataclasses.replace(run, seed=seed)),
                    folder=out / name / f'seed-{seed}',
                )
                for name, run in self.configs.items()
            ]
            for seed in self.seeds
        ]


def main(study: Study, out: Path, console: Console) -> bool:
    """Trains what is missing and reports after every seed; whether to the end.

    Raises UserError, before anything trains, for a folder that belongs to another run or a config
    that does not fit its tokenizer or text encoder.
    """
    startup.start()
    for name in (study_report.JSON, study_report.MARKDOWN, study_report.PLOT):
        files.check_file(out / name)
    rounds = study.rounds(out)
    every_place = [place for places in rounds for place in places]
    for place in every_place:
        train.check_places(place.folder)
        trainer.check(place.folder, place.run)
    open_places = [
        place
        for place in every_place
        if not results.has_ended(place) and not results.failure(place)
    ]
    if open_places and study.baseline.cache:
        train.cache(study.baseline)  # one serves all: their pictures, texts and codes are the same
    sizes = _count_parameters(open_places)
    course = _Course(console, total=len(study.configs) * len(study.seeds), left=len(open_places))
    done, failed = [], []
    for number, places in enumerate(rounds, 1):
        missing = [place for place in places if place in open_places]
        for place in missing:
            if not course.train(place, sizes[place.config]):
                return False
        for place in places:
            if failure := results.failure(place):
                failed.append(failure)
            else:
                done.append(results.read(place))
        if missing or number == len(rounds):
            summary = summarise(done, failed, study.differences(), study.baseline)
            study_report.write(summary, out)
    study_report.show(summary, console)
    console.print(
        'report: '
        + ', '.join(
            str(out / name)
            for name in (study_report.MARKDOWN, study_report.JSON, study_report.PLOT)
        )
    )
    return True


class _Course:
    """The runs that are trained now, and how long the rest will take."""

    def __init__(self, console: Console, total: int, left: int) -> None:
        self._console = console
        self._total, self._left = total, left
        self._seconds: list[float] = []

    def train(self, place: results.Place, parameters: int) -> bool:
        """Trains one run, or goes on with it; whether it came to its end."""
        number = self._total - self._left + 1
        rest = ''
        if self._seconds:
            minutes = self._left * sum(self._seconds) / len(self._seconds) / 60
            rest = f', {minutes:,.0f} minutes left' if minutes >= 1 else ', less than a minute left'
        self._console.rule(
            f'run {number} of {self._total}: {place.config}, seed {place.seed}{rest}'
        )
        origin.note(place.folder, parameters)
        begin = time.monotonic()
        try:
            has_ended = train.main(place.run, place.folder, _job_without_pictures)
        except NotFiniteError as error:
            results.note_failure(place, error.flaw)
            self._console.print(f'failed, and the others go on: {error}', soft_wrap=True)
            has_ended = True
        gc.collect()  # a job refers to itself, and the next one needs its memory
        if not has_ended:
            self._console.print(
                f'the study stopped in run {number} of {self._total}; the same command goes on'
            )
            return False
        self._seconds.append(time.monotonic() - begin)
        self._left -= 1
        return True


def _job_without_pictures(run: Run) -> trainer.Job:
    """Nobody looks at those of a study, and their program is the longest to compile."""
    job = train.job(run)
    job.picture = lambda state: None
    return job


def _unequal_conditions(first: Run, other: Run) -> list[str]:
    """The fields in which two runs differ though they must not."""
    same_model = dataclasses.replace(other, model=first.model, seed=first.seed)
    model = [line for line in config.differences(first, other) if line.startswith('model.')]
    task = [line for line in model if line.split(':')[0].removeprefix('model.') in TASK]
    return config.differences(first, same_model) + task


def _count_parameters(places: list[results.Place]) -> dict[str, int]:
    """By config; builds each once, so that one that cannot be trained is found before hours are."""
    runs = {place.config: place.run for place in places}
    return {name: origin.count_parameters(train.job(run)) for name, run in runs.items()}
