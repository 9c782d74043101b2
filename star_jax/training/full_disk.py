"""How does a run end when its disk is full?"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from star_jax.checkpoint.training import newest_complete_step, quiet_failed_saves
from star_jax.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_watched(checkpoints: Path) -> Iterator[None]:
    """Turns errors of a full disk into a RunError that names the newest complete checkpoint."""
    try:
        with quiet_failed_saves():
            yield
    except Exception as error:
        if (reason := _full_disk(error)) is None:
            raise
        step = newest_complete_step(checkpoints)
        safe = f'the checkpoint of step {step} is whole' if step else 'there is no checkpoint yet'
        raise RunError(
            f'nothing more can be written ({reason}), so the run stopped; {safe}: '
            'make room, and the same command goes on'
        ) from error


def _full_disk(error: BaseException | None) -> str | None:
    """The system's message if an error was caused by a full disk, else None.

    Libraries may keep the message of the original error and nothing else.
    """
    while error is not None:
        for number in FULL:
            message = os.strerror(number)
            if getattr(error, 'errno', None) == number:
                return f'{message}: {error.filename}' if error.filename else message
            if message in str(error):
                return message
        error = error.__cause__ or error.__context__
    return None
