"""Does every part of a config refuse values of a wrong type with one sentence?"""

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import star_jax.commands.train
import star_jax.commands.train_tokenizer  # noqa: F401 (all parts of configs are imported)
from star_jax.errors import UserError, UserTypeError
from star_jax.families.infinity import Infinity
from star_jax.losses.adversarial import R1
from star_jax.training.objective import Adversary
from star_jax.training.run import Pace, Run, TokenizerRun


class Foreign:
    """A class that no config knows."""


def subclasses(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def parts(kind: Any, found: set[type]) -> set[type]:
    """The config classes that an annotation allows, with those of their fields."""
    if not inspect.isclass(kind) or typing.get_origin(kind):
        for each in typing.get_args(kind):
            parts(each, found)
    elif kind.__module__.startswith('star_jax.'):
        for each in [kind, *subclasses(kind)]:
            if dataclasses.is_dataclass(each) and each.__module__.startswith('star_jax.'):
                new = each not in found
                found.add(each)
                for field in typing.get_type_hints(each).values() if new else ():
                    parts(field, found)
    return found


PARTS = sorted(parts(Run, set()) | parts(TokenizerRun, set()), key=lambda kind: kind.__name__)


def test_parts_are_found():
    names = {kind.__name__ for kind in PARTS}
    assert {'VQ', 'Infinity', 'NormalisedRotary', 'R1', 'Objective', 'Templates'} <= names


@pytest.mark.parametrize('kind', PARTS)
def test_every_field_refuses_a_wrong_type(kind):
    needed = {field.name: 'x' for field in dataclasses.fields(kind) if not has_default(field)}
    for field in dataclasses.fields(kind):
        with pytest.raises(UserTypeError, match=field.name) as caught:
            kind(**needed | {field.name: Foreign()})
        assert '\n' not in str(caught.value)


def has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or callable(field.default_factory)


@pytest.mark.parametrize('kind', PARTS)
def test_values_that_make_no_sense_raise_no_other_error(kind):
    for field in dataclasses.fields(kind):
        for value in (-1, 0, -1.0, 10**30, (), (0,), ((),), 'x'):
            try:
                kind(**{field.name: value})
            except UserError as error:
                assert '\n' not in str(error)
            except TypeError as error:
                assert 'missing' in str(error)  # a field without a default


@pytest.mark.parametrize(
    ('kind', 'field'),
    [(Pace, 'steps'), (R1, 'every'), (Adversary, 'start'), (Infinity, 'levels_every')],
)
def test_numbers_that_programs_cannot_count_are_refused(kind, field):
    with pytest.raises(UserError, match=f'{field} must .*2147483647|{field} must .*1048576'):
        kind(**{field: 10**30})
