"""Is there time to save a run between the notice of a preemption and its end?"""

import dataclasses
from collections.abc import Mapping

from star_jax.errors import UserError

VARIABLE = 'STAR_JAX_NOTICE'  # seconds; for machines that are not recognised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notice:
    """How long a run may continue after SIGTERM.

    Attributes:
        seconds: the time.
        holder: the machine or pod that gets the notice, with an article.
    """

    seconds: float
    holder: str

    def plan(self, size: int) -> str:
        """The deadline for writing a checkpoint of `size` bytes, for the summary of a run."""
        return (
            f'{size / 1e9:,.2f} GB; {self.holder} has {self.seconds:g} s after the notice of a '
            f'preemption: it fits if written at {size / self.seconds / 1e9:,.2g} GB/s or more'
        )

    def fits(self, seconds: float) -> bool:
        """Whether a save that takes so long ends in time."""
        return seconds <= self.seconds

    def compare(self, size: int, seconds: float, interval: int) -> str:
        """One sentence about a save that took so long, of a run that saves every few steps.

        Args:
            size: bytes that were saved.
            seconds: time of the save.
            interval: steps between two saves.
        """
        took = f'saving {size / 1e9:,.2f} GB took {seconds:,.1f} s, and {self.holder} has'
        if self.fits(seconds):
            return f'{took} {self.seconds:g} s after the notice of a preemption: nothing is lost'
        return (
            f'{took} only {self.seconds:g} s after the notice of a preemption, which loses the '
            f'work since the last checkpoint, up to {interval} steps: save more often '
            '(--pace.save), or to a faster file store'
        )


def find(environment: Mapping[str, str]) -> Notice | None:
    """The notice that the machines of a run have; None if it is unknown.

    Raises UserError if STAR_JAX_NOTICE is no positive number.
    """
    if given := environment.get(VARIABLE):
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float('inf'):
            raise UserError(f'{VARIABLE} must be a number of seconds above 0, not {given!r}')
        return Notice(seconds=seconds, holder='this machine')
    if 'KUBERNETES_SERVICE_HOST' in environment:  # the node itself has 30 s
        return Notice(seconds=15, holder='a pod on a spot node of GKE')
    if 'SLURM_JOB_ID' in environment:  # --signal=TERM@300
        return Notice(seconds=300, holder='a job of launch/slurm.sh')
    return None
