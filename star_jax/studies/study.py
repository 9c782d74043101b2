"""How do runs become a study?

The configs of a study differ in the model and in nothing else. Each is trained with the same seeds,
one run after another, by the trainer of any run. The folder of a run is `<config>/seed-<n>`. A
finished run is never trained again, so the same command continues after a stop, adds seeds, or only
writes the report. A run whose loss becomes non-finite is recorded as failed; the others continue.
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
from star_jax.studies import results, study_report
from star_jax.studies.summary import summarise
from star_jax.training import train, trainer
from star_jax.training.run import Run, resolve

# Fields of a model that define the task: with other scales or codes, losses do not compare.
TASK = ('sides', 'codes', 'channels', 'text_width')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Configs, all trained with every seed and compared with the first.

    Attributes:
        configs: runs by name; their own seeds are not used.
        seeds: the seeds.

    Raises:
        UserError: no config, no seed, a seed that is given twice, or configs that differ in more
            than the model; its scales, codes and widths of tokenizer and text must be equal, too.
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
                    f' ({"; ".join(unequal)}): configs of one study may differ only in their '
                    f'model, without {", ".join(TASK)}'
                )

    @property
    def baseline(self) -> Run:
        return next(iter(self.configs.values()))

    def differences(self) -> dict[str, list[str]]:
        """By config, the fields in which it differs from the first."""
        first = self.baseline
        return {
            name: config.differences(first, dataclasses.replace(run, seed=first.seed))
            for name, run in self.configs.items()
        }

    def rounds(self, out: Path) -> list[list[results.StudyRun]]:
        """All runs, seed by seed: each round holds one run of every config."""
        return [
            [
                results.StudyRun(
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
    """Trains the missing runs and writes the report after every seed.

    Returns whether the study finished; otherwise it was asked to stop. Raises UserError, before
    anything is trained, for a folder that belongs to another run and for a config that does not fit
    its tokenizer or text encoder.
    """
    startup.start()
    for name in (study_report.JSON, study_report.MARKDOWN, study_report.PLOT):
        files.check_file(out / name)
    rounds = study.rounds(out)
    runs = [study_run for round_ in rounds for study_run in round_]
    for study_run in runs:
        train.check_out(study_run.folder)
        trainer.check(study_run.folder, study_run.run)
    missing = [
        study_run
        for study_run in runs
        if not results.is_finished(study_run) and not results.read_failure(study_run)
    ]
    if missing and study.baseline.cache:
        train.cache(study.baseline)  # one cache serves all: images, captions and codes are equal
    sizes = _count_parameters(missing)
    progress = _Progress(console, total=len(runs), remaining=len(missing))
    finished, failed = [], []
    for number, round_ in enumerate(rounds, 1):
        to_train = [study_run for study_run in round_ if study_run in missing]
        for study_run in to_train:
            if not progress.train(study_run, sizes[study_run.config]):
                return False
        for study_run in round_:
            if failure := results.read_failure(study_run):
                failed.append(failure)
            else:
                finished.append(results.read(study_run))
        if to_train or number == len(rounds):
            summary = summarise(finished, failed, study.differences(), study.baseline)
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


class _Progress:
    """Trains the runs of a study and estimates the remaining time."""

    def __init__(self, console: Console, total: int, remaining: int) -> None:
        self._console = console
        self._total, self._remaining = total, remaining
        self._seconds: list[float] = []

    def train(self, study_run: results.StudyRun, parameters: int) -> bool:
        """Trains or continues one run; whether it finished."""
        number = self._total - self._remaining + 1
        estimate = ''
        if self._seconds:
            minutes = self._remaining * sum(self._seconds) / len(self._seconds) / 60
            estimate = f', {minutes:,.0f} minutes left' if minutes >= 1 else ', under a minute left'
        self._console.rule(
            f'run {number} of {self._total}: {study_run.config}, seed {study_run.seed}{estimate}'
        )
        results.record_origin(study_run.folder, parameters)
        start = time.monotonic()
        try:
            is_finished = train.main(study_run.run, study_run.folder, _job_without_samples)
        except NotFiniteError as error:
            results.record_failure(study_run, error.flaw)
            self._console.print(f'failed, the other runs continue: {error}', soft_wrap=True)
            is_finished = True
        gc.collect()  # a job refers to itself, and the next one needs its memory
        if not is_finished:
            self._console.print(
                f'the study stopped in run {number} of {self._total}; the same command continues it'
            )
            return False
        self._seconds.append(time.monotonic() - start)
        self._remaining -= 1
        return True


def _job_without_samples(run: Run) -> trainer.Job:
    """A job that samples no grids: their program takes the longest to compile."""
    job = train.build_job(run)
    job.sample_grid = lambda state: None
    return job


def _unequal_conditions(first: Run, other: Run) -> list[str]:
    """The fields in which two runs differ and must not."""
    same_model = dataclasses.replace(other, model=first.model, seed=first.seed)
    model = [line for line in config.differences(first, other) if line.startswith('model.')]
    task = [line for line in model if line.split(':')[0].removeprefix('model.') in TASK]
    return config.differences(first, same_model) + task


def _count_parameters(runs: list[results.StudyRun]) -> dict[str, int]:
    """Parameters by config; building every job first finds a faulty config before hours pass."""
    configs = {study_run.config: study_run.run for study_run in runs}
    return {name: results.count_parameters(train.build_job(run)) for name, run in configs.items()}
