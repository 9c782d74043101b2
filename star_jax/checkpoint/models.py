"""Which model does a user mean, and is it whole?

A folder, a hub id, or 'shipped': the small one in this package.
"""

import dataclasses
from pathlib import Path
from typing import TypeVar

from star_jax.checkpoint import folder, weights
from star_jax.core.settings import Settings
from star_jax.errors import UserError

SHIPPED = 'shipped'

Part = TypeVar('Part', folder.Model, folder.Tokenizer)


def read(place: str | Path) -> folder.Model:
    """The model at `place`, its parameters in the types of a fresh one.

    Raises UserErrors as `folder.read` does, and where weights do not fit their config or the
    tokenizer does not fit the transformer.
    """
    where = locate(place)
    model = folder.read(where)
    _check_fit(where, model)
    tokenizer = _fitted(model.tokenizer, where / folder.TOKENIZER)
    return dataclasses.replace(_fitted(model, where / folder.MODEL), tokenizer=tokenizer)


def read_tokenizer(place: str | Path) -> folder.Tokenizer:
    """The tokenizer of whatever model folder lies at `place`; UserErrors as of `read`."""
    where = locate(place)
    return _fitted(folder.read_tokenizer(where), where / folder.TOKENIZER)


def holds_tokenizer_alone(place: str | Path) -> bool:
    """Whether the model folder at `place` has no transformer."""
    return folder.holds_tokenizer_alone(locate(place))


def read_sampling(place: str | Path) -> Settings:
    """The settings that the maker of the model at `place` recommends."""
    return folder.read_sampling(locate(place))


def digest(place: str | Path) -> str:
    """SHA-256 over the files of the model folder at `place`."""
    return folder.digest(locate(place))


def locate(place: str | Path) -> Path:
    if str(place) == SHIPPED:
        return Path(__file__).parents[1] / SHIPPED
    return folder.find(place)


def _check_fit(where: Path, model: folder.Model) -> None:
    """Raises UserError unless the tokenizer makes the codes that the transformer predicts."""
    config, tokenizer = model.config, model.tokenizer.config
    for name in ('codes', 'channels'):
        wanted, given = getattr(config, name), getattr(tokenizer, name)
        if wanted != given:
            raise UserError(
                f'{where / folder.CONFIG}: model.{name} is {wanted}, but tokenizer.{name} is '
                f'{given}; expected the same, export the model again from its run'
            )
    tokenizer.at(config.schedule)


def _fitted(part: Part, where: Path) -> Part:
    """The part with the parameters of its config, name for name and shape for shape."""
    params = weights.fit(weights.flatten(part.params), part.config.abstract(), str(where))
    return dataclasses.replace(part, params=weights.unflatten(params))
