"""The story of a run."""

import logging
from pathlib import Path

from rich.console import Console

from star_jax.checkpoint import config
from star_jax.errors import UserError
from star_jax.parallel import startup
from star_jax.training import loop
from star_jax.training.run import Run, TokenizerRun
from star_jax.training.state import TrainState


def main(run: Run | TokenizerRun, out: Path) -> TrainState:
    """Trains what `run` says in the folder `out`; the same call again goes on."""
    startup.start()
    logging.getLogger('absl').setLevel(logging.WARNING)
    return loop.fit(job(run), out, Console())


def export(folder: Path, out: Path) -> Path:
    """Writes a model folder from the newest checkpoint of the run in `folder`.

    Raises UserError where there is no run, or no checkpoint yet.
    """
    startup.start()
    run = read_run(folder)
    work = job(run)
    state = loop.newest(work, folder)
    if state is None:
        raise UserError(f'{folder} has no checkpoint yet: let the run come to its first one')
    work.export(state, out)
    return out


def read_run(folder: Path) -> Run | TokenizerRun:
    """The settings of the run in a folder; a tokenizer's are told by their fields."""
    path = folder / loop.CONFIG
    fields = config.read_json(path)
    is_tokenizer = isinstance(fields, dict) and 'objective' in fields
    return config.from_json(TokenizerRun if is_tokenizer else Run, fields, where=str(path))


def job(run: Run | TokenizerRun) -> loop.Job:
    """The parts of a run."""
    if isinstance(run, TokenizerRun):
        from star_jax.training.tokenizer import TokenizerJob

        return TokenizerJob(run)
    from star_jax.training.transformer import TransformerJob

    return TransformerJob(run)
