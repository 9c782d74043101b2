"""Does an argument from a Python caller have the required type?

The command line and config files convert their values; Python callers may pass any object. A numpy
number counts as a number; `True` does not.
"""

import dataclasses
import functools
import numbers
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from star_jax.errors import UserError, UserTypeError

WORDS = {
    int: 'a whole number',
    float: 'a number',
    bool: 'True or False',
    str: 'a text',
    Path: 'a path',
    types.NoneType: 'None',
}
# Metadata of a field that JSON lacks where it has its default: a new field then changes neither the
# digests of studies nor the keys of caches that exist.
OMITTED = types.MappingProxyType({'omitted': True})
NUMBERS = {int: numbers.Integral, float: numbers.Real}


def check_types(config: Any) -> None:
    """Raises a UserTypeError that names each field of a dataclass with a value of a wrong type.

    The annotations give the types; a text that is not in a Literal raises a UserError.
    """
    kinds = _field_types(type(config))
    values = {name: getattr(config, name) for name in kinds}
    wrong = [name for name in kinds if not _fits(values[name], kinds[name])]
    if not wrong:
        return
    texts = [_is_literal(kinds[name]) and isinstance(values[name], str) for name in wrong]
    sentences = (_sentence(name, describe(kinds[name]), values[name]) for name in wrong)
    raise (UserError if all(texts) else UserTypeError)('; '.join(sentences))


def describe(kind: Any) -> str:
    """An annotation in words."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return describe(options[0])
    if origin is typing.Literal:
        return f'one of {", ".join(map(repr, options))}'
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(map(describe, options))
    if origin is tuple and options[-1] is Ellipsis:
        return f'a tuple, each item {describe(options[0])}'
    if origin is tuple:
        return f'a tuple of {", ".join(map(describe, options))}'
    return WORDS.get(kind) or f'a {getattr(kind, "__name__", kind)}'


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


def text(name: str, value: object) -> str:
    """The value; a UserError unless it is a text that UTF-8 can encode."""
    instance(name, value, str, 'a text')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'{name} is {ascii(value[:30])}, expected text that UTF-8 can encode'
        ) from None
    return value


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


@functools.cache
def _field_types(config: type) -> Mapping[str, Any]:
    """The annotation of each field; none if a class of a user's own has unknown ones."""
    try:
        hints = typing.get_type_hints(config)
    except NameError:
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _fits(value: object, kind: Any) -> bool:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _fits(value, options[0])
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if options[-1] is not Ellipsis:
            return len(value) == len(options) and all(map(_fits, value, options))
        return all(_fits(item, options[0]) for item in value)
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
    if kind is bool:  # 0 and 1, too: recorded options and JSON of others hold them
        return isinstance(value, bool | np.bool_ | int) and value in (0, 1)
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal


def _sentence(name: str, expected: str, value: object) -> str:
    return f'{name} must be {expected}, not {show(value)}'


def _mismatch(name: str, expected: str, value: object) -> UserTypeError:
    return UserTypeError(_sentence(name, expected, value))
