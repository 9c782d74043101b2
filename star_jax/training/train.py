"""How is a run trained, cached and exported, from its config to its model folder?"""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax

import star_jax
from star_jax import files
from star_jax.checkpoint import config
from star_jax.checkpoint.folder import check_free
from star_jax.console import Console
from star_jax.errors import UserError
from star_jax.parallel import peer_watchdog, startup
from star_jax.parallel.mesh import MeshShape
from star_jax.training import cache as caches
from star_jax.training import trainer
from star_jax.training.folder_lock import lock
from star_jax.training.full_disk import disk_watched
from star_jax.training.run import Run, TokenizerRun, resolve, run_class
from star_jax.training.stop_signals import Stop


def main(
    run: Run | TokenizerRun,
    out: Path,
    build: Callable[[Run | TokenizerRun], trainer.Job] | None = None,
) -> bool:
    """Trains a run in a folder; the same call continues an interrupted run.

    The processes that the environment names train together (see `parallel.hosts`).

    Args:
        run: the config.
        out: the folder.
        build: makes the job of a run; `build_job` by default.

    Returns:
        Whether the run is complete; otherwise a signal has stopped it, and it is saved.

    Raises:
        UserError: the config or the folder cannot be used, or another process trains in the folder.
        RunError: the run cannot continue.
    """
    with Stop() as stop:
        check_out(out)
        startup.start(distributed=True)
        logging.getLogger('absl').setLevel(logging.WARNING)
        if jax.process_index() != 0:  # the first warns for all
            logging.getLogger(star_jax.__name__).setLevel(logging.ERROR)
        with peer_watchdog.PeerWatchdog(), disk_watched(out / trainer.CHECKPOINTS):
            peer_watchdog.check_same('settings', json.dumps(config.to_json(run), sort_keys=True))
            job = (build or build_job)(run)
            trainer.check(out, job.run)
            with lock(out):
                console = Console(quiet=jax.process_index() != 0)
                return trainer.fit(job, out, console, stop)


def check_out(out: Path) -> None:
    """Raises UserError if a run cannot write its files to the folder `out`."""
    for folder in (out, out / trainer.CHECKPOINTS, out / trainer.SAMPLES):
        files.check_folder(folder)
    files.check_file(out / trainer.METRICS)
    check_free(out / trainer.MODEL)


def cache(run: Run, features: bool = False) -> Path:
    """Writes encoded images and text features of a run's sets; returns their folder.

    Args:
        run: the config.
        features: write the tokenizer's features instead of its codes.

    Raises:
        UserError: the folder holds something else or cannot be written, or the tokenizer does not
            train with these settings.
    """
    startup.start()
    run = resolve(run)
    run.crops.check_cacheable()
    folder = caches.cache_path(run)
    caches.check_free(folder)
    job = build_job(dataclasses.replace(run, cache=''))
    job.write_cache(folder, features)
    return folder


def export(folder: Path, out: Path) -> Path:
    """Writes a model folder from the newest checkpoint of the run in `folder`.

    Raises UserError if there is no run or no checkpoint yet, or if `out` cannot be written.
    """
    startup.start()
    run = _on_these_devices(read_run(folder))
    check_free(out)
    job = build_job(run)
    state = trainer.newest(job, folder)
    if state is None:
        raise UserError(f'{folder} has no checkpoint yet: let the run come to its first one')
    with files.writing(out):
        job.export(state, out)
    return out


def _on_these_devices(run: Run | TokenizerRun) -> Run | TokenizerRun:
    """The run, with a mesh of the local devices if it was trained on more."""
    try:
        run.mesh.build()
    except UserError:
        return dataclasses.replace(run, mesh=MeshShape())
    return run


def read_run(folder: Path) -> Run | TokenizerRun:
    """The settings of the run in a folder."""
    path = folder / trainer.CONFIG
    fields = config.read_json(path)
    return config.from_json(run_class(fields, str(path)), fields, where=str(path))


def build_job(run: Run | TokenizerRun) -> trainer.Job:
    """The job that a run describes."""
    run = resolve(run)
    if isinstance(run, TokenizerRun):
        from star_jax.training.tokenizer_job import TokenizerJob

        return TokenizerJob(run)
    if run.model.refinement:
        from star_jax.training.refinement_job import RefinementJob

        return RefinementJob(run)
    if run.model.templates:
        from star_jax.training.mixed_job import MixedJob

        return MixedJob(run)
    from star_jax.training.transformer_job import TransformerJob

    return TransformerJob(run)
