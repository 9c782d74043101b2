"""How does classifier-free guidance change logits, with which weight and temperature at each step?

A family turns its published guidance number into one weight per step: `guidance_weights` in
`families/scales.py` (STAR, VAR), `families/infinity.py` and `families/llamagen.py`.
"""

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
        mixing: [S, depth, 2, 2] float32 matrices of `mix_rows`, for guidance after layers (None:
            guidance changes the logits alone).
    """

    guidance: np.ndarray | jax.Array
    temperature: np.ndarray | jax.Array
    mixing: np.ndarray | jax.Array | None = None

    def at(self, step: int | jax.Array) -> 'StepSettings':
        """The settings of one step, as scalars."""
        return jax.tree.map(lambda x_S: jnp.asarray(x_S)[step], self)

    @property
    def guided(self) -> bool:
        """Whether any step needs unprompted rows; for concrete arrays alone."""
        return self.mixing is not None or bool(np.any(self.guidance))


def guide(logits: jax.Array, batch: int, weight: float | jax.Array) -> jax.Array:
    """Classifier-free guidance: prompted + weight (prompted - unprompted).

    Args:
        logits: [2 B, ...] of prompted rows over as many unprompted ones, or [B, ...] of prompted
            rows alone, which are returned as they are.
        batch: number of images B.
        weight: the weight w of the step; 0 gives the prompted logits.

    Returns:
        [B, ...] guided logits.
    """
    if len(logits) == batch:
        return logits
    prompted, unprompted = logits[:batch], logits[batch:]
    return prompted + weight * (prompted - unprompted)


def mix_rows(x_RLD: jax.Array, mixing_22: jax.Array) -> jax.Array:
    """Replaces prompted and unprompted rows by weighted sums of both.

    Args:
        x_RLD: [2 B, L, D], prompted over unprompted rows.
        mixing_22: weights [to, from].

    Returns:
        [2 B, L, D] in the same order.
    """
    both = x_RLD.reshape(2, -1, *x_RLD.shape[1:])
    mixed = jnp.einsum('ij,j...->i...', mixing_22.astype(x_RLD.dtype), both, precision='highest')
    return mixed.reshape(x_RLD.shape)


def layer_mixing(weights_S: np.ndarray, depth: int, layers: tuple[int, ...]) -> np.ndarray:
    """[S, depth, 2, 2] float32 mixing for guidance of these weights after some `layers`.

    Both halves become the guided rows there (Infinity specification 7); everywhere else, and in
    steps of weight 0, they stay as they are.

    Args:
        weights_S: weights w of `guide`.
        depth: layers of the network.
        layers: negative numbers, -1 for the last layer.
    """
    mixing = np.tile(np.eye(2, dtype=np.float32), (len(weights_S), depth, 1, 1))
    for step in np.flatnonzero(weights_S):
        mixing[step, list(layers)] = [1 + weights_S[step], -weights_S[step]]
    return mixing


def linear_ramp(guidance: float, steps: int) -> np.ndarray:
    """[S] float32 weights from 0 to `guidance`: the cfg of STAR and VAR (STAR specification 8)."""
    return np.float32(guidance) * np.arange(steps, dtype=np.float32) / np.float32(max(steps - 1, 1))
