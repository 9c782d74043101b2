"""How strong is classifier-free guidance at each step, and how high is the temperature?"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class StepSettings:
    """Guidance and temperature of every step, as data.

    Attributes:
        guidance: [S] float32 weights w of `guide`. Without unprompted rows they are ignored.
        temperature: [S] float32, by which guided logits are divided before they are filtered.
    """

    guidance: np.ndarray | jax.Array
    temperature: np.ndarray | jax.Array

    def at(self, step: int | jax.Array) -> 'StepSettings':
        """The same with the scalars of one step."""
        return jax.tree.map(lambda x_S: jnp.asarray(x_S)[step], self)

    @property
    def guided(self) -> bool:
        """Whether any step needs unprompted rows; for concrete arrays alone."""
        return bool(np.any(self.guidance))


def guide(logits: jax.Array, batch: int, weight: float | jax.Array) -> jax.Array:
    """[B, ...] prompted + weight (prompted - unprompted).

    `logits` are those of `batch` prompted rows over as many unprompted ones, or of the prompted
    rows alone, which are returned as they are.
    """
    if len(logits) == batch:
        return logits
    prompted, unprompted = logits[:batch], logits[batch:]
    return prompted + weight * (prompted - unprompted)


def linear_ramp(guidance: float, steps: int) -> np.ndarray:
    """[S] float32 weights from 0 to `guidance`: the cfg of STAR and VAR (STAR specification 8)."""
    return np.float32(guidance) * np.arange(steps, dtype=np.float32) / np.float32(max(steps - 1, 1))
