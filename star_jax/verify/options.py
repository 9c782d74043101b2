"""Does a case have options that `verify` ignores?

A field that no rule reads could change the computation without anyone noticing, so it is refused.
Each kind of case lists its fields (`star_options`); this file applies such a list.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from star_jax.errors import UserError

Field = tuple[str, ...]  # the keys that lead from the top of a config to a value

DATA = ('io', 'state_dict')  # keys whose content describes arrays
NOTE = 'note'  # part of the key of a remark


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The fields that the config of one kind of case may have.

    A name is a dotted path (`optimizer.betas`) and includes everything below it; `*` stands for
    an index, or for a key that is data, such as a variant's name. Remarks need no entry: fields
    with `note` in their name and strings with a space.

    Attributes:
        read: fields that change the computation and that the rules of the kind read.
        checked: fields that must equal the only value that is implemented.
        descriptive: fields that change nothing: sizes and names of arrays, measurements, and
            options that are inert in what this kind records.
    """

    read: tuple[str, ...]
    checked: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    descriptive: tuple[str, ...] = ()

    def check(self, config: Mapping[str, Any], path: Path) -> None:
        """Checks every field of the config that the file `path` holds.

        Raises:
            UserError: names an unknown field, or one whose value is not implemented.
        """
        for field, value in _fields(config, ()):
            name = '.'.join(field)
            limits = [self.checked[listed] for listed in self.checked if _matches(listed, field)]
            for limit in limits:
                check_value(path, name, value, limit)
            if not limits and not self._is_known(field, value):
                raise UserError(
                    f'{path}: unknown option {name}, which may change the computation: implement '
                    "it, or add it to the options of the case's kind"
                )

    def _is_known(self, field: Field, value: Any) -> bool:
        return (
            any(_matches(name, field) for name in (*self.read, *self.descriptive))
            or any(NOTE in key or key in DATA for key in field)
            or (isinstance(value, str) and ' ' in value)
        )


def check_value(path: Path, name: str, value: Any, implemented: Any) -> None:
    """Raises UserError unless an option has the value that is implemented."""
    if value != implemented:
        raise UserError(f'{path}: {name} is {value!r}, but only {implemented!r} is implemented')


def _fields(value: Any, field: Field) -> Iterator[tuple[Field, Any]]:
    """The fields of a config that hold no further fields, with their values."""
    items = {}
    if isinstance(value, Mapping):
        items = value
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = dict(enumerate(value))
    if not items:
        yield field, value
    for key, item in items.items():
        yield from _fields(item, (*field, str(key)))


def _matches(name: str, field: Field) -> bool:
    """Whether a listed name is that of a field, of one above it, or of one below it."""
    return all(map(fnmatch.fnmatchcase, field, name.split('.')))
