"""What does the config.json of a text encoder ask for?

Fields that are absent have the default of transformers' own configuration. Each reader raises
`UserError` for a value that means nothing.
"""

from collections.abc import Mapping
from typing import Any

from star_jax.core.sizes import LARGEST
from star_jax.errors import UserError


def size(config: Mapping, name: str, default: int) -> int:
    """A field that counts something."""
    value = config.get(name, default)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise UserError(
            f'{name} is {value!r} in the text encoder; expected a whole number in [1, {LARGEST}].'
        )
    return value


def token(config: Mapping, name: str, default: int) -> int:
    """A field that holds a token id; null is the default."""
    value = config.get(name, default)
    value = default if value is None else value
    if type(value) is not int or value < 0:
        raise UserError(f'{name} is {value!r} in the text encoder; expected a token id.')
    return value


def epsilon(config: Mapping, name: str, default: float) -> float:
    """What a norm adds to the variance."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f'{name} is {value!r} in the text encoder; expected one in (0, 1).')
    return value


def choice(config: Mapping, name: str, default: str, options: Mapping[str, Any]) -> Any:
    """One of the options, by its name."""
    value = config.get(name, default)
    if not isinstance(value, str) or value not in options:
        raise UserError(f'{name} is {value!r} in the text encoder; supported: {sorted(options)}.')
    return options[value]


def heads(config: Mapping, width: int, default: int) -> int:
    """The number of attention heads that the width divides into."""
    count = size(config, 'num_attention_heads', default)
    if width % count:
        raise UserError(f'a text encoder of width {width} does not divide into {count} heads.')
    return count
