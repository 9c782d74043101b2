"""How is plain JSON converted to dataclasses, strictly, and which errors does that give?

One cattrs converter with a hook for each kind of annotation. Only whole numbers are coerced, to
floats. The classes of a union are distinguished by a tag. `cattrs.strategies` has tagged unions,
too, but they refuse `None` as a member, put the tag last, and raise a bare KeyError for an unknown
or missing tag, where this file names the known ones.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from star_jax.core.argument_types import OMITTED
from star_jax.errors import UserError
from star_jax.families.registry import FAMILIES, TOKENIZERS, name_of
from star_jax.protocols import Family, TokenizerConfig

TAG = 'kind'


def make_converter() -> cattrs.Converter:
    """A converter between dataclasses and JSON trees, whose errors `flaws` formats."""
    converter = cattrs.Converter()
    for kind in (bool, types.NoneType):
        converter.register_structure_hook(kind, _structure_exact)
    converter.register_structure_hook(str, _structure_string)
    converter.register_structure_hook(int, _structure_int)
    converter.register_structure_hook(float, _structure_float)
    converter.register_structure_hook_func(_is(typing.Literal), _structure_literal)
    converter.register_structure_hook_factory(_is(tuple), _structure_tuple)
    converter.register_structure_hook_factory(dataclasses.is_dataclass, _structure_dataclass)
    converter.register_structure_hook_factory(_is(*UNION), _structure_union)
    converter.register_unstructure_hook_factory(_is(*UNION), _unstructure_union)
    converter.register_unstructure_hook_factory(_omitted, _unstructure_omitting)
    for base, registered in ((Family, FAMILIES), (TokenizerConfig, TOKENIZERS)):
        _register_base(converter, base, registered)
    return converter


def _register_base(converter: cattrs.Converter, base: type, registered: dict[str, type]) -> None:
    """Lets a field of type `base` contain any registered class, tagged with its name."""

    def structure(value: object, _: Any) -> Any:
        if not isinstance(value, dict):
            raise _mismatch(base, value)
        return converter.structure(*_untag(value, registered))

    def unstructure(value: Any) -> dict[str, Any]:
        return {TAG: name_of(value), **converter.unstructure(value, unstructure_as=type(value))}

    converter.register_structure_hook_func(lambda kind: kind is base, structure)
    converter.register_unstructure_hook_func(lambda kind: kind is base, unstructure)


def flaws(error: BaseException, path: str = '', kind: Any = None) -> Iterator[str]:
    """One sentence per leaf of a converter's error, with the dotted path of its field first."""
    at = f'{path.removeprefix(".")}: ' if path else ''
    if isinstance(error, cattrs.ClassValidationError | cattrs.IterableValidationError):
        noted, bare = error.group_exceptions()
        for inner, note in noted:
            step = f'.{note.name}' if hasattr(note, 'name') else f'[{note.index!r}]'
            yield from flaws(inner, path + step, note.type)
        for inner in bare:
            yield from flaws(inner, path, error.cl)
    elif isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in dataclasses.fields(error.cl)]
        for name in sorted(error.extra_fields):
            field = f'{path}.{name}'.removeprefix('.')
            yield f'{field}: {error.cl.__name__} has no such field{suggestion(name, known)}'
    elif isinstance(error, KeyError):
        yield f'{at}missing, expected {describe(kind)}'
    elif isinstance(error, ValueError):
        yield f'{at}{error}'
    else:
        yield f'{at}expected {describe(kind)} ({type(error).__name__}: {error})'


def describe(kind: Any) -> str:
    """An annotation in terms of JSON."""
    options = typing.get_args(kind)
    if kind in WORDS:
        return WORDS[kind]
    if _is(*UNION)(kind):
        return ' or '.join(map(describe, options))
    if _is(typing.Literal)(kind):
        return f'one of {", ".join(map(repr, options))}'
    if _is(tuple)(kind) and options[-1:] == (Ellipsis,):
        return f'a list, each item {describe(options[0])}'
    if _is(tuple)(kind):
        return f'a list of {len(options)}: {", ".join(map(describe, options))}'
    return f'a {kind.__name__} object' if dataclasses.is_dataclass(kind) else str(kind)


def show(value: object) -> str:
    """A JSON value, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f'{text[:57]}...'


def suggestion(name: object, known: Iterable[str]) -> str:
    """A question for the known name that resembles an unknown one, '' if none does."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean '{close[0]}'" if close else ''


UNION = (typing.Union, types.UnionType)
WORDS = {
    int: 'a whole number',
    float: 'a number',
    str: 'a string',
    bool: 'true or false',
    types.NoneType: 'null',
    object: 'anything',
}


def _is(*origins: Any) -> Callable[[Any], bool]:
    return lambda kind: typing.get_origin(kind) in origins


def _mismatch(kind: Any, value: object) -> ValueError:
    return ValueError(f'given {show(value)}, expected {describe(kind)}')


def _structure_exact(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise _mismatch(kind, value)
    return value


def _structure_string(value: object, kind: type) -> str:
    text = _structure_exact(value, kind)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON and command lines may contain lone surrogates
        raise ValueError(f'given {ascii(text)}, expected text that UTF-8 can encode') from error
    if '\0' in text:
        raise ValueError(f'given {ascii(text)}, expected text without NUL')
    return text


def _structure_int(value: object, kind: type) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return _structure_exact(value, kind)


def _structure_float(value: object, kind: type) -> float:
    if type(value) not in (int, float):
        raise _mismatch(kind, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f'given {show(value)}, expected a finite number')
    return number


def _structure_literal(value: object, kind: Any) -> Any:
    for option in typing.get_args(kind):
        if type(option) is type(value) and option == value:
            return option
    raise _mismatch(kind, value)


def _structure_tuple(kind: Any, converter: cattrs.Converter) -> Callable[[object, Any], tuple]:
    """A hook that reads a list, of the length that `kind` has unless it is variadic."""
    options = typing.get_args(kind)
    variadic = options[-1:] == (Ellipsis,)

    def structure(value: object, _: Any) -> tuple:
        if not isinstance(value, list) or not (variadic or len(value) == len(options)):
            raise _mismatch(kind, value)
        items, errors = [], []
        for index, item in enumerate(value):
            option = options[0] if variadic else options[index]
            try:
                items.append(converter.structure(item, option))
            except Exception as error:
                error.add_note(cattrs.IterableValidationNote(f'item {index}', index, option))
                errors.append(error)
        if errors:
            raise cattrs.IterableValidationError(f'{len(errors)} wrong items', errors, kind)
        return tuple(items)

    return structure


def _structure_dataclass(cls: type, converter: cattrs.Converter) -> Callable[[object, Any], Any]:
    """A hook that reads an object with the fields of `cls` and no others."""
    fill = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True)

    def structure(value: object, _: Any) -> Any:
        if not isinstance(value, dict):
            raise _mismatch(cls, value)
        return fill(value, cls)

    return structure


def _structure_union(union: Any, converter: cattrs.Converter) -> Callable[[object, Any], Any]:
    """A hook that reads an object by its tag, any other value as the first option that it fits."""
    parts, plain = _split(union)

    def structure(value: object, _: Any) -> Any:
        if parts and isinstance(value, dict):
            return converter.structure(*_untag(value, parts))
        for option in sorted(plain, key=lambda option: type(value) is not option):
            try:
                return converter.structure(value, option)
            except Exception:
                continue
        raise _mismatch(union, value)

    return structure


def _unstructure_union(union: Any, converter: cattrs.Converter) -> Callable[[object], Any]:
    """A hook that tags the object of a dataclass with the name of its class."""
    parts, plain = _split(union)

    def unstructure(value: object) -> Any:
        name = type(value).__name__
        if parts.get(name) is type(value):
            return {TAG: name, **converter.unstructure(value)}
        if dataclasses.is_dataclass(value):
            raise UserError(f'a config holds a {name}, expected {describe(union)}')
        fits = (option for option in plain if type(value) is (typing.get_origin(option) or option))
        return converter.unstructure(value, unstructure_as=next(fits, type(value)))

    return unstructure


def _omitted(kind: Any) -> list[str]:
    """The fields of a dataclass that JSON lacks where they have their defaults."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return [field.name for field in fields if OMITTED.items() <= field.metadata.items()]


def _unstructure_omitting(cls: type, converter: cattrs.Converter) -> Callable[[Any], Any]:
    """A hook that leaves out the `_omitted` fields of `cls` where they have their defaults."""
    fields = {name: override(omit_if_default=True) for name in _omitted(cls)}
    return make_dict_unstructure_fn(cls, converter, **fields)


def _split(union: Any) -> tuple[dict[str, type], list[Any]]:
    """The dataclasses of a union by tag, and its other options."""
    options = typing.get_args(union)
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    parts = {cls.__name__: cls for cls in classes}
    taken = any(field.name == TAG for cls in classes for field in dataclasses.fields(cls))
    if taken or len(parts) < len(classes):
        raise TypeError(f"{union}: its classes must have different names and no field '{TAG}'")
    return parts, [option for option in options if option not in classes]


def _untag(value: dict, parts: dict[str, type]) -> tuple[dict, type]:
    """The fields of a tagged object, and its class."""
    kinds = f'expected one of {", ".join(map(repr, parts))}'
    if TAG not in value:
        raise ValueError(f"no '{TAG}' given, {kinds}")
    tag = value[TAG]
    if not isinstance(tag, str) or tag not in parts:
        raise ValueError(f'unknown {TAG} {show(tag)}{suggestion(tag, parts)}, {kinds}')
    return {name: item for name, item in value.items() if name != TAG}, parts[tag]
