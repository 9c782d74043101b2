"""The story of a run."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console

import star_jax
from star_jax import files
from star_jax.checkpoint import config
from star_jax.checkpoint.folder import check_free
from star_jax.errors import UserError
from star_jax.parallel import peer_watchdog, startup
from star_jax.parallel.mesh import MeshShape
from star_jax.training import cache as caches
from star_jax.training import faults, trainer
from star_jax.training.run import Run, TokenizerRun, kind_of, resolve


def main(
    run: Run | TokenizerRun,
    out: Path,
    build: Callable[[Run | TokenizerRun], trainer.Job] | None = None,
) -> bool:
    """Trains what `run` says in the folder `out`; the same call again goes on.

    `build` makes the parts of the run, by default as `job` does. Returns whether the run came to
    its end; else it was asked to stop, by SIGTERM or SIGINT, and has saved where it is. Several
    processes train together where the environment says so (see `parallel.hosts`). Raises
    UserError for what was given wrong or a folder that another process is training in, and RunError
    where a run cannot go on.
    """
    with faults.Stop() as stop:
        check_places(out)
        startup.start(distributed=True)
        logging.getLogger('absl').setLevel(logging.WARNING)
        if jax.process_index() != 0:  # the first warns for all
            logging.getLogger(star_jax.__name__).setLevel(logging.ERROR)
        with peer_watchdog.PeerWatchdog(), faults.disk_watched(out / trainer.CHECKPOINTS):
            peer_watchdog.check_same('settings', json.dumps(config.to_json(run), sort_keys=True))
            work = (build or job)(run)
            trainer.check(out, work.run)
            with faults.lock(out):
                console = Console(quiet=jax.process_index() != 0)
                return trainer.fit(work, out, console, stop)


def check_places(out: Path) -> None:
    """Raises UserError where a run cannot write in the folder `out` what it will leave there."""
    for folder in (out, out / trainer.CHECKPOINTS, out / trainer.SAMPLES):
        files.check_folder(folder)
    files.check_file(out / trainer.METRICS)
    check_free(out / trainer.MODEL)


def cache(run: Run) -> Path:
    """Writes the codes and text features of a run's sets, and returns their folder.

    Raises UserError where the folder holds something else or cannot be written.
    """
    startup.start()
    run = resolve(run)
    if run.enlarge > 1:
        raise UserError(
            f'enlarge {run.enlarge} shows another part of a picture each time, and a cache holds '
            'the codes of one: train without a cache, or with --enlarge 1'
        )
    folder = caches.place(run)
    caches.check_free(folder)
    work = job(dataclasses.replace(run, cache=''))
    work.origin.write(folder, work.pictures, work.encode)
    return folder


def export(folder: Path, out: Path) -> Path:
    """Writes a model folder from the newest checkpoint of the run in `folder`.

    Raises UserError where there is no run, or no checkpoint yet, or `out` cannot be written.
    """
    startup.start()
    run = _on_these_devices(read_run(folder))
    check_free(out)
    work = job(run)
    state = trainer.newest(work, folder)
    if state is None:
        raise UserError(f'{folder} has no checkpoint yet: let the run come to its first one')
    with files.writing(out):
        work.export(state, out)
    return out


def _on_these_devices(run: Run | TokenizerRun) -> Run | TokenizerRun:
    """The run, with a mesh of what is here where it was trained on more."""
    try:
        run.mesh.build()
    except UserError:
        return dataclasses.replace(run, mesh=MeshShape())
    return run


def read_run(folder: Path) -> Run | TokenizerRun:
    """The settings of the run in a folder."""
    path = folder / trainer.CONFIG
    fields = config.read_json(path)
    return config.from_json(kind_of(fields, str(path)), fields, where=str(path))


def job(run: Run | TokenizerRun) -> trainer.Job:
    """The parts of a run."""
    run = resolve(run)
    if isinstance(run, TokenizerRun):
        from star_jax.training.tokenizer import TokenizerJob

        return TokenizerJob(run)
    if run.model.refinement:
        from star_jax.training.refinement_job import HeadJob

        return HeadJob(run)
    from star_jax.training.transformer import TransformerJob

    return TransformerJob(run)
