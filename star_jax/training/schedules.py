"""How large is a step, and how strong the decay, at each iteration?

STAR specification 6. Iterations are micro-iterations, counted from 0. Every function takes
a Python, numpy or traced integer and returns at least float32, within 1e-6 of the peak.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from star_jax.core.argument_types import check_types
from star_jax.core.sizes import check_not_negative
from star_jax.errors import UserError

HOLDS = {'lin0': 0.05, 'lin': 0.15, 'exp': 0.15, 'lin00': 0.0}  # share of the run at the peak
SHAPES = ('cos', *HOLDS)
BROKEN_LINE = re.compile(r'lin(0?\.\d+)')  # lin0.5: two lines that meet at half the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A linear warm-up to the peak, then a decay.

    Attributes:
        peak: highest learning rate.
        warmup_steps: steps from the start to the peak (published runs: 2 % of their steps).
        start: learning rate of the first step, as a share of peak.
        end: learning rate of the last step, as a share of peak.
        shape: shape of the decay: lin0, lin, lin00, cos, exp, or lin<tau> such as lin0.5, two lines
            that meet at the share tau of the run.
        per_images: peak is the highest learning rate of this many images per update, and others
            have one in proportion (0: peak for any number; VAR and Infinity: 256).
    """

    peak: float = 1e-4
    warmup_steps: int = 200
    start: float = 0.005
    end: float = 0.01
    shape: str = 'lin0'
    per_images: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(peak=self.peak, warmup_steps=self.warmup_steps, start=self.start)
        if self.warmup_steps >= 2**31:
            raise UserError(f'warmup_steps must lie below 2^31, not {self.warmup_steps}')
        if self.per_images < 0:
            raise UserError(f'per_images must not be negative (0: any), not {self.per_images}')
        if not self.end > 0:
            raise UserError(f'end must be positive, not {self.end}')
        if self.shape not in SHAPES and not self._tau:
            raise UserError(
                f'shape must be one of {", ".join(SHAPES)} or lin<tau> with 0 < tau < 1, '
                f'such as lin0.5, not {self.shape!r}'
            )

    @property
    def _tau(self) -> float:
        """The share of the steps at which a broken line breaks; 0 for the other shapes."""
        match = BROKEN_LINE.fullmatch(self.shape)
        return float(match.group(1)) if match else 0.0

    def for_images(self, images: float) -> 'LearningRate':
        """The learning rate where an update is made of so many images."""
        if not self.per_images:
            return self
        peak = self.peak * images / self.per_images
        return dataclasses.replace(self, peak=peak, per_images=0)

    def at(self, step: int | jax.Array, total_steps: int) -> jax.Array:
        """The learning rate of iteration `step` of `total_steps`."""
        step = jnp.asarray(step)
        warm = self.start + (1 - self.start) * step / max(self.warmup_steps, 1)
        fallen = (step - self.warmup_steps) / max(total_steps - 1 - self.warmup_steps, 1)
        falling = self._fall(fallen.astype(float))
        return self.peak * jnp.where(step < self.warmup_steps, warm, falling)

    def _fall(self, u: jax.Array) -> jax.Array:
        """The multiplier after the share `u` of the iterations that follow the warm-up."""
        end, rest = self.end, 1 - u
        if self._tau:
            middle = (1 + end + (1 - end) * (1 - self._tau)) / 2
            early = 1 + (middle - 1) * u / self._tau
            return jnp.where(u < self._tau, early, end + (middle - end) * rest / (1 - self._tau))
        if self.shape == 'cos':
            return end + (1 - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * u))
        hold = HOLDS[self.shape]
        if self.shape == 'exp':
            late = jnp.exp((u - hold) / (1 - hold) * math.log(end))
        else:
            late = end + (1 - end) * rest / (1 - hold)
        return jnp.where(u < hold, 1.0, late)


def weight_decay_at(
    step: int | jax.Array, total_steps: int, first: float, last: float
) -> jax.Array:
    """The weight decay of iteration `step`: half a cosine from `first` to `last`.

    Args:
        step: the iteration, from 0.
        total_steps: iterations of the run.
        first: weight decay at the start.
        last: weight decay at the end.
    """
    turn = jnp.pi * jnp.asarray(step) / max(total_steps - 1, 1)
    return last + (first - last) * (0.5 + 0.5 * jnp.cos(turn))
