"""How does a run end when its disk is full?"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from star_jax import files
from star_jax.checkpoint.training import newest_complete_step, quiet_failed_saves
from star_jax.errors import RunError


@contextlib.contextmanager
def disk_watched(checkpoints: Path) -> Iterator[None]:
    """Turns errors of a full disk into a RunError that names the newest complete checkpoint."""
    try:
        with quiet_failed_saves():
            yield
    except Exception as error:
        if (reason := files.full_disk(error)) is None:
            raise
        step = newest_complete_step(checkpoints)
        safe = f'the checkpoint of step {step} is whole' if step else 'there is no checkpoint yet'
        raise RunError(
            f'nothing more can be written ({reason}), so the run stopped; {safe}: '
            'make room, and the same command goes on'
        ) from error
