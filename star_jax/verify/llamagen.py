"""How are recorded functions of LlamaGen computed? (kind `postprocess`)

These kinds have no weights.
"""

import functools

import jax
import numpy as np

from star_jax.core import pixels, resize
from star_jax.verify.cases import Case
from star_jax.verify.comparison import FUNCTIONS, INTEGERS
from star_jax.verify.rules import Rule, inputs


class Postprocessing:
    """Decoded images at the sizes of an evaluation, as floats and as bytes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.resized = functools.cache(self._resized)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('samples'),
            Rule(r'resized_(\d+)', FUNCTIONS, lambda size: np.moveaxis(self.resized(size), -1, 1)),
            Rule(r'uint8_(\d+)', INTEGERS, self.to_bytes),
        )

    def to_bytes(self, size: str) -> jax.Array:
        return pixels.to_nearest_uint8(self.resized(size))

    def _resized(self, size: str) -> jax.Array:
        """[B, size, size, 3], resized before anything is clamped."""
        side = int(size)
        if side not in self.case.option('sizes'):
            raise LookupError(f'sizes lacks {side}')
        images_BHWc = np.moveaxis(self.case.input('samples'), 1, -1)
        return jax.jit(lambda x: resize.bicubic(x, side, side))(images_BHWc)
