"""How is a config converted between Python, JSON and files?

A config is a frozen keyword-only dataclass of plain data: numbers, strings, booleans, None, tuples
and other such dataclasses. In JSON a dataclass is an object of its fields. If the annotation is a
union (`A | B`, also `A | None`), the object also has its class: `{"kind": "A", ...}`. Reading is
strict and executes no Python.
"""

import dataclasses
import json
import math
import sys
import traceback
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from star_jax import files
from star_jax.checkpoint import structure
from star_jax.errors import UserError

Config = TypeVar('Config')

SHOWN = 8  # number of flaws in one message

_converter = structure.make_converter()


def to_json(config: object) -> dict[str, Any]:
    """The plain JSON tree of a config: dicts, lists, strings, numbers, booleans, None."""
    return json.loads(_dump(_converter.unstructure(config)))


def from_json(cls: type[Config], data: object, where: str = 'config.json') -> Config:
    """Converts a JSON tree to a config.

    Args:
        cls: class of the config, or a union of classes.
        data: the JSON tree.
        where: the source of the data, for messages.

    Raises:
        UserError: a type is wrong, a field is missing or unknown, a kind is unknown, a number is
            not finite, or a `__post_init__` refuses the values. The message has the dotted field,
            the given value and the expected one.
    """
    try:
        return _converter.structure(data, cls)
    except Exception as error:
        flaws = list(structure.flaws(error))
        listed = '; '.join(flaws[:SHOWN])
        more = f'; and {len(flaws) - SHOWN} more' if len(flaws) > SHOWN else ''
        raise UserError(f'{where}: {listed}{more}') from error


def read(path: str | Path, cls: type[Config]) -> Config:
    """Reads a config of class `cls` from a JSON file; raises as `read_json` and `from_json`."""
    return from_json(cls, read_json(path), where=str(path))


def write(path: str | Path, config: object) -> None:
    """Writes a config to a JSON file, atomically.

    Raises:
        UserError: reading would fail, such as for a string in a field of numbers.
    """
    check(config, where=type(config).__name__)
    write_json(path, to_json(config))


def check(config: Config, where: str) -> Config:
    """Checks the types of a config against its annotations, and returns it converted.

    Raises:
        UserError: as `from_json`.
    """
    return from_json(type(config), to_json(config), where)


def read_json(path: str | Path) -> Any:
    """Reads a JSON tree.

    Raises:
        UserError: the file is missing, damaged (with the line) or not a regular file.
    """
    files.check_regular(path, files.MOST_TEXT)
    try:
        text = Path(path).read_text('utf-8-sig')
        return files.parse_json(text, parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UserError(f'{path}: there is no such file') from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error
    except json.JSONDecodeError as error:
        raise UserError(
            f'{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); '
            'the file is damaged or was cut short'
        ) from error
    except ValueError as error:
        raise UserError(f'{path}: not valid JSON ({error})') from error


def write_json(path: str | Path, data: object) -> None:
    """Writes a JSON tree to a file, atomically."""
    with files.replacing(Path(path)) as temporary:
        temporary.write_text(json_text(data), 'utf-8')


def json_text(data: object) -> str:
    """A JSON tree as the text of a file."""
    return _dump(data, indent=2) + '\n'


def differences(a: object, b: object) -> list[str]:
    """The fields in which two configs differ, as `model.depth: 2 -> 4` (`a` first)."""
    return list(_differences(to_json(a), to_json(b), ''))


def load_run(path: str | Path, cls: type[Config] = object, name: str = 'run') -> Config:
    """Loads the config of a run from a Python file (`configs/x.py`) or a `config.json`.

    A Python file is executed, so it needs the same trust as a program.

    Args:
        path: the file.
        cls: class of the config.
        name: the variable of a Python file that holds the config.

    Raises:
        UserError: the file is missing or fails, does not define `name`, or the config does not
            fit `cls` and its annotations.
    """
    path = Path(path)
    if path.suffix == '.json':
        return read(path, cls)
    if path.suffix != '.py':
        raise UserError(f"{path}: expected a .py file that defines '{name}', or a config.json")
    namespace = _execute(path)
    if name not in namespace:
        raise UserError(f"{path}: defines no '{name}'; expected a line '{name} = ...'")
    run = namespace[name]
    # The type decides: objects may claim any other `__class__`.
    if not issubclass(type(run), cls):
        given, expected = type(run).__name__, structure.describe(cls)
        raise UserError(f"{path}: '{name}' is a {given}, expected {expected}")
    if not dataclasses.is_dataclass(type(run)):
        return run
    try:
        return check(run, where=str(path))
    except UserError:
        raise
    except Exception as error:  # a class of the file may hold anything
        raise UserError(
            f"{path}: '{name}' is a {type(run).__name__}, whose fields cannot be checked "
            f'({_words(error)}): expected classes of star_jax with plain values'
        ) from error


def _execute(path: Path) -> dict[str, Any]:
    """The names that a Python file defines."""
    files.check_regular(path, files.MOST_TEXT)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error
    # Dataclasses look their annotations up in the module; the prefix keeps it from hiding others.
    module = types.ModuleType(f'_config_{path.stem}')
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    namespace = vars(module)
    try:
        exec(compile(source, str(path), 'exec'), namespace)
    except SyntaxError as error:
        line = f', line {error.lineno}' if error.lineno else ''
        raise UserError(f'{path}{line}: {error.msg}') from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file may raise any exception, SystemExit included
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = f', line {lines[-1]}' if lines else ''
        raise UserError(f'{path}{line}: {_words(error)}') from error
    return namespace


def _words(error: BaseException) -> str:
    """The message and the class of an error."""
    try:
        return f'{error} ({type(error).__name__})'.lstrip()
    except Exception:  # a class of the file
        return f'({type(error).__name__})'


def _dump(data: object, indent: int | None = None) -> str:
    try:
        return json.dumps(data, indent=indent, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        fields = ', '.join(_not_finite(data, ''))
        raise UserError(
            f'{fields}: JSON has no nan or infinity, expected a finite number'
        ) from error
    except TypeError as error:
        raise UserError(f'a config contains a value that is not plain data ({error})') from error


def _not_finite(value: object, path: str) -> Iterator[str]:
    """The fields that are nan or infinity."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f'{path}.{name}'.removeprefix('.'))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f'{path}[{index}]')
    elif isinstance(value, float) and not math.isfinite(value):
        yield f'{path} is {value}'


def _refuse_constant(constant: str) -> typing.NoReturn:
    raise ValueError(f'{constant} is not a JSON number')


def _differences(a: object, b: object, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict) and _kind(a) == _kind(b):
        for name in a | b:
            field = f'{path}.{name}'.removeprefix('.')
            if name in a and name in b:
                yield from _differences(a[name], b[name], field)
            else:
                yield f'{field}: {_brief(a.get(name))} -> {_brief(b.get(name))}'
    elif _holds_objects(a) and _holds_objects(b) and len(a) == len(b):
        for index, (item_a, item_b) in enumerate(zip(a, b, strict=True)):
            yield from _differences(item_a, item_b, f'{path}[{index}]')
    elif a != b:
        yield f'{path}: {_brief(a)} -> {_brief(b)}'


def _holds_objects(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _kind(value: object) -> str | None:
    return value.get(structure.TAG) if isinstance(value, dict) else None


def _brief(value: object) -> str:
    """A value in a difference; an object is shown as its kind."""
    return _kind(value) or structure.show(value)
