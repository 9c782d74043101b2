"""Which class does a prompt name?"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import numpy as np

from star_jax.core.condition import LabelCondition
from star_jax.core.sizes import check_sizes
from star_jax.errors import UserError

MAX_NAMES = 5  # class names in an error


def check_classes(count: int, names: tuple[str, ...]) -> None:
    """Raises a UserError unless there are classes, and names for all of them or for none."""
    check_sizes(classes=count)
    if names and len(set(names)) != count:
        raise UserError(
            f'names must be {count} different ones, one per class, or none; '
            f'there are {len(set(names))}'
        )
    if '' in names:
        raise UserError("a class cannot be called '', which stands for none")


@dataclasses.dataclass(frozen=True)
class Classes:
    """The `protocols.PromptEncoder` of a class-conditional model.

    A prompt is the name or the number of a class; '' is no class.

    Attributes:
        field: the field of a batch that holds the prompts.
        sha256: empty, because there are no files.
        width: 0, because no text is read.
        count: number of classes.
        names: one name per class, or empty.
    """

    field: ClassVar[Literal['label']] = 'label'
    sha256: ClassVar[str] = ''
    width: ClassVar[int] = 0

    count: int
    names: tuple[str, ...] = ()

    @property
    def params(self) -> dict:
        """Empty: nothing is computed."""
        return {}

    @functools.cached_property
    def identity(self) -> str:
        """Hex digest of everything that affects the class of a prompt."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()

    def reference(self) -> None:
        """None: the config of the model holds the names."""

    def encode(self, prompts: Sequence[str]) -> LabelCondition:
        """The classes of any number of prompts, numpy int32; UserError for an unknown class."""
        return LabelCondition(
            ids_B=np.array([self._class_number(prompt) for prompt in prompts], np.int32)
        )

    def tokenize(self, prompts: Sequence[str]) -> LabelCondition:
        """The host part, which does all the work of `encode`."""
        return self.encode(prompts)

    def abstract_params(self) -> dict:
        """Empty: there are no parameters."""
        return {}

    def abstract_tokens(self, rows: int) -> LabelCondition:
        """Shapes of the labels of `rows` prompts."""
        return jax.eval_shape(lambda: self.encode([''] * rows))

    def apply(self, params: dict, tokens: LabelCondition) -> LabelCondition:
        """The device part: returns its input."""
        return tokens

    def _class_number(self, prompt: str) -> int:
        if prompt == '':
            return self.count
        if prompt in self._numbers:
            return self._numbers[prompt]
        if prompt.isascii() and prompt.isdigit() and int(prompt) < self.count:
            return int(prompt)
        names = ', '.join(self.names[:MAX_NAMES])
        hint = f', or a name such as {names}' if names else ''
        raise UserError(
            f'there is no class {prompt!r}: expected a number from 0 to {self.count - 1}{hint}'
        )

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}
