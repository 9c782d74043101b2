"""Which class does a word mean?"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from star_jax.core.condition import LabelCondition
from star_jax.errors import UserError

SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class Classes:
    """Reads the prompts of a class-conditional model, as a text encoder does those of others.

    A prompt is the name of a class, or its number; '' is no class. `names` has one name for each of
    `count` classes, or none.
    """

    count: int
    names: tuple[str, ...] = ()

    field = 'label'  # of an example, which prompts a model
    sha256 = ''

    @property
    def params(self) -> dict:
        """Nothing is computed."""
        return {}

    @functools.cached_property
    def identity(self) -> str:
        """Hex digest of all that decides what a prompt means."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()

    def reference(self) -> None:
        """The names lie in the model's own config."""

    def encode(self, prompts: Sequence[str]) -> LabelCondition:
        """The classes of prompts, numpy int32; UserError where there is no such class."""
        return LabelCondition(
            ids_B=np.array([self._number(prompt) for prompt in prompts], np.int32)
        )

    def tokenize(self, prompts: Sequence[str]) -> LabelCondition:
        """The host's part of `encode`: all of it."""
        return self.encode(prompts)

    def abstract_params(self) -> dict:
        """No parameters."""
        return {}

    def abstract_tokens(self, rows: int) -> LabelCondition:
        """Shapes of the labels of so many prompts."""
        return jax.eval_shape(lambda: self.encode([''] * rows))

    def apply(self, params: dict, labels: LabelCondition) -> LabelCondition:
        """The device's part of `encode`: nothing."""
        return labels

    def _number(self, prompt: str) -> int:
        if prompt == '':
            return self.count
        if prompt in self._numbers:
            return self._numbers[prompt]
        if prompt.isascii() and prompt.isdigit() and int(prompt) < self.count:
            return int(prompt)
        some = ', '.join(self.names[:SHOWN])
        known = f', or a name such as {some}' if some else ''
        raise UserError(
            f'there is no class {prompt!r}: expected a number from 0 to {self.count - 1}{known}'
        )

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}
