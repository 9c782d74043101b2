"""Has an argument of a Python caller the type that it must have?

The command line and config files convert what they read; Python callers may pass anything. Numbers
of numpy are numbers, too; `True` is none.
"""

import numbers
import reprlib
import typing
from typing import Any

import numpy as np

from star_jax.errors import UserError, UserTypeError


def whole_number(name: str, value: object, hint: str = '') -> int:
    """The value as an int; a UserTypeError unless it is a whole number."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise _mismatch(name, f'a whole number{hint}', value)


def number(name: str, value: object, hint: str = '') -> float:
    """The value as it is; a UserTypeError unless it is a real number."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return value
    raise _mismatch(name, f'a number{hint}', value)


def flag(name: str, value: object) -> bool:
    """The value as a bool; a UserTypeError unless it is one."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise _mismatch(name, 'True or False', value)


def choice(name: str, value: object, options: Any) -> str:
    """The value; a UserError unless it is one of the texts of `options`, a Literal."""
    texts = typing.get_args(options)
    expected = f'one of {", ".join(map(repr, texts))}'
    if not isinstance(value, str):
        raise _mismatch(name, expected, value)
    if value not in texts:
        raise UserError(f'{name} must be {expected}, not {show(value)}')
    return value


def instance(name: str, value: object, kind: Any, hint: str) -> Any:
    """The value; a UserTypeError unless it is an instance of `kind`, for which `hint` has words."""
    if isinstance(value, kind):
        return value
    raise _mismatch(name, hint, value)


def show(value: object) -> str:
    """A value of any type, in one short line."""
    if value is None or isinstance(value, str | bool | int | float):
        return reprlib.repr(value)
    if isinstance(value, type):
        return f'the class {value.__name__}'
    if isinstance(value, np.ndarray):
        return f'a numpy array of shape {value.shape}'
    return f'a {type(value).__name__}'


def _mismatch(name: str, expected: str, value: object) -> UserTypeError:
    return UserTypeError(f'{name} must be {expected}, not {show(value)}')
