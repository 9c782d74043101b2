"""How are the units of a study made?

A study is a list of units, each described by a few fields: one kind of model, one seed, one data
set. Making a unit ends with one small JSON file; the units without a file are made in order, so the
same command continues after a stop, on the same machine or with a part of the units on another.
"""

import contextlib
import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from star_jax import files
from star_jax.bench.sampling import SamplingJob
from star_jax.checkpoint import config
from star_jax.console import Console
from star_jax.errors import NotFiniteError, UserError
from star_jax.parallel import startup
from star_jax.studies import provenance, starts
from star_jax.training.folder_lock import lock
from star_jax.training.run import Run

MAX_BYTES = 50_000  # bytes of a unit's file, which is committed


class Unit(Protocol):
    """One unit of a study.

    Attributes:
        name: its name, which is that of its file, without the suffix.
        result_class: the dataclass of its result, whose fields `commit` and `hardware` are filled
            in by the caller.
    """

    name: str
    result_class: type

    def trained_in(self, work: Path) -> Path:
        """The folder that keeps its training and the record of its starts.

        Args:
            work: the folder of the unit.
        """
        ...

    def measure(self, work: Path, console: Console) -> dict[str, Any] | None:
        """The fields of the result, or None if a stop was requested; the same call continues.

        Args:
            work: the folder of the unit, with the results of an interrupted call.
            console: shows the progress.

        Raises:
            UserError: something that the unit needs is missing.
        """
        ...


class Study(Protocol):
    """A list of units.

    Attributes:
        name: the name of the study.
        units: all units, in the order in which they are made.
        timed_runs: one run of every kind, whose training steps `study cost` compares.
        timed_samplers: sampling by every kind whose time and memory it compares, too.
    """

    name: str
    units: Sequence[Unit]
    timed_runs: Mapping[str, Run]
    timed_samplers: Mapping[str, SamplingJob]


def load(path: Path) -> Study:
    """The study of a Python file that defines `study`.

    Raises UserError as `config.load_run`, and for an object that is no study.
    """
    if path.suffix != '.py':
        raise UserError(f"{path}: expected a .py file that defines 'study'")
    study = config.load_run(path, name='study')
    if not _is_study(study):
        raise UserError(
            f"{path}: 'study' is a {type(study).__name__}, expected a study, with a name, units, "
            'timed_runs and timed_samplers'
        )
    if not files.is_file_name(study.name):
        raise UserError(
            f'{path}: the study is called {study.name!r}, expected a name for files and folders'
        )
    return study


def _is_study(study: object) -> bool:
    """Whether an object of a Python file, which may be of any class, has the fields of a study."""
    try:
        return (
            isinstance(study.name, str)
            and all(map(_is_unit, study.units))
            and all(isinstance(run, Run) for run in study.timed_runs.values())
            and all(isinstance(job, SamplingJob) for job in study.timed_samplers.values())
        )
    except UserError:
        raise
    except Exception:
        return False


def _is_unit(unit: Any) -> bool:
    return (
        files.is_file_name(unit.name)
        and isinstance(unit.result_class, type)
        and callable(unit.trained_in)
        and callable(unit.measure)
    )


def run(
    study: Study, results: Path, work: Path, console: Console, only: Sequence[str] = ()
) -> bool:
    """Makes the units that have no file yet, in order. Returns whether all of them exist now.

    A damaged file is made again. A unit that cannot be made is named, and the next one is made.

    Args:
        study: the study.
        results: the folder of the units' files.
        work: the folder of checkpoints and intermediate results.
        console: shows the progress.
        only: names of the units to make (none: all).

    Raises:
        UserError: a name in `only` is unknown, a folder cannot be used, or some units could not be
            made; it names them and the reasons.
    """
    startup.start()
    files.check_folder(results)
    files.check_folder(work)
    chosen = _choose(study.units, only)
    commit = provenance.read_commit()
    missing = [unit for unit in chosen if not _is_made(unit, results, console)]
    refused, seconds = {}, []
    for number, unit in enumerate(missing):
        done = len(chosen) - len(missing) + number
        console.rule(f'unit {done + 1} of {len(chosen)}: {unit.name}{_estimate(seconds, missing)}')
        start = time.monotonic()
        try:
            is_made = _make(unit, results, work / unit.name, commit, console)
        except UserError as error:
            refused[unit.name] = str(error)
            console.print(f'{unit.name} is left out: {error}', soft_wrap=True, highlight=False)
            continue
        finally:
            gc.collect()  # a job refers to itself, and the next one needs its memory
            jax.clear_caches()
        if not is_made:
            console.print(f'stopped in {unit.name}; the same command continues it')
            return False
        seconds.append(time.monotonic() - start)
    if refused:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in refused.items())
        raise UserError(f'{len(refused)} units could not be made ({reasons})')
    return True


def read(path: Path, choose: Callable[[Any], type]) -> Any:
    """The result in a unit's file. Raises UserError if the file is missing or damaged.

    Args:
        path: the file.
        choose: gives the class of the result, from the JSON tree of the file.
    """
    try:
        fields = config.read_json(path)
        return config.from_json(choose(fields), fields, where=str(path))
    except UserError as error:
        raise UserError(
            f'{path} is damaged ({error}): `star-jax study run` makes this unit again'
        ) from error


def or_failure(
    measure: Callable[[], dict[str, Any] | None],
    head: Callable[[], dict[str, Any]],
    console: Console,
) -> dict[str, Any] | None:
    """The result of `measure()`, or `head()` and the field `failure` if a loss became non-finite.

    Args:
        measure: trains, and returns the fields of the result.
        head: gives the fields that need no training.
        console: shows the failure.
    """
    try:
        return measure()
    except NotFiniteError as error:
        console.print(f'failed, the other units continue: {error}', soft_wrap=True)
        return head() | {'failure': error.flaw}


def digest(tree: Any) -> str:
    """A name of a JSON tree, which only equal trees share."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def once(path: Path, settings: Any, compute: Callable[[], Any]) -> Any:
    """The JSON tree that `compute()` returned, kept in a file: it is computed once.

    Args:
        path: the file.
        settings: what the result depends on, as a JSON tree; it is computed again with others.
        compute: computes it.
    """
    key = digest(settings)
    with contextlib.suppress(UserError):
        kept = config.read_json(path)
        if isinstance(kept, dict) and kept.get('settings') == key:
            return kept['result']
    path.parent.mkdir(parents=True, exist_ok=True)
    config.write_json(path, {'settings': key, 'result': compute()})
    return config.read_json(path)['result']


def _choose(units: Sequence[Unit], only: Sequence[str]) -> list[Unit]:
    names = [unit.name for unit in units]
    if unknown := sorted(set(only) - set(names)):
        raise UserError(f'there is no unit {unknown[0]!r}: choose of {", ".join(names)}')
    return [unit for unit in units if not only or unit.name in only]


def _is_made(unit: Unit, results: Path, console: Console) -> bool:
    path = _path(unit, results)
    if not path.exists():
        return False
    try:
        read(path, lambda _: unit.result_class)
    except UserError as error:
        console.print(f'made again: {error}', soft_wrap=True, highlight=False)
        return False
    return True


def _make(unit: Unit, results: Path, work: Path, commit: str, console: Console) -> bool:
    """Makes one unit and writes its file. Returns False if a stop was requested."""
    hardware = starts.record(unit.trained_in(work), commit)
    with lock(work):
        fields = unit.measure(work, console)
    if fields is None:
        return False
    result = unit.result_class(**fields, commit=commit, hardware=hardware)
    size = len(config.json_text(config.to_json(result)).encode())
    if size > MAX_BYTES:
        raise UserError(f'a result of {size:,} bytes, expected {MAX_BYTES:,} at most')
    results.mkdir(parents=True, exist_ok=True)
    config.write(_path(unit, results), result)
    return True


def _path(unit: Unit, results: Path) -> Path:
    return results / f'{unit.name}.json'


def _estimate(seconds: Sequence[float], missing: Sequence[Unit]) -> str:
    """The remaining time in words, from the units that were made; '' before the first."""
    if not seconds:
        return ''
    hours = (len(missing) - len(seconds)) * sum(seconds) / len(seconds) / 3600
    return f', {hours:,.1f} hours left'


def unit_files(folder: Path) -> list[Path]:
    """The JSON files of a folder of results, by name.

    Raises UserError if there is no folder, or none in it.
    """
    paths = sorted(folder.glob('*.json')) if folder.is_dir() else []
    if not paths:
        raise UserError(
            f'{folder} has no results of units: give a folder in which `star-jax study run` wrote'
        )
    return paths


def study_of(folder: Path) -> str:
    """The name of the study of the results in a folder ('': none can be read).

    Raises UserError as `unit_files`.
    """
    for path in unit_files(folder):
        with contextlib.suppress(UserError):
            fields = config.read_json(path)
            if isinstance(fields, dict) and files.is_file_name(fields.get('study')):
                return fields['study']
    return ''
