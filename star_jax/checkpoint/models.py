"""How is a model loaded and checked, from a folder, a hub id, or 'shipped'?

'shipped' is the small model in this package.
"""

import dataclasses
from pathlib import Path
from typing import TypeVar

from star_jax.checkpoint import folder, weights
from star_jax.core.settings import Settings
from star_jax.families.fit import check_tokenizer

Part = TypeVar('Part', folder.StoredModel, folder.StoredTokenizer)


def read(source: str | Path) -> folder.StoredModel:
    """Reads a model, with parameters in the types of a new one.

    Args:
        source: a folder, a hub id, or 'shipped'.

    Raises:
        UserError: `folder.read` refuses the folder, weights do not fit their config, or the
            tokenizer does not fit the transformer.
    """
    path = folder.find(source)
    model = folder.read(path)
    check_tokenizer(
        model.config,
        model.tokenizer.config,
        where=str(path / folder.CONFIG),
        remedy='export the model again from its run',
    )
    model.tokenizer.config.at(model.config.schedule)
    tokenizer = _with_checked_params(model.tokenizer, path / folder.TOKENIZER)
    model = _with_checked_params(model, path / folder.MODEL)
    return dataclasses.replace(model, tokenizer=tokenizer)


def read_tokenizer(source: str | Path) -> folder.StoredTokenizer:
    """Reads the tokenizer of any model folder; raises as `read`."""
    path = folder.find(source)
    return _with_checked_params(folder.read_tokenizer(path), path / folder.TOKENIZER)


def has_only_tokenizer(source: str | Path) -> bool:
    """Whether a model folder has no transformer."""
    return folder.has_only_tokenizer(folder.find(source))


def read_sampling(source: str | Path) -> Settings:
    """Reads the recommended sampling settings of a model."""
    return folder.read_sampling(folder.find(source))


def digest(source: str | Path) -> str:
    """SHA-256 over the files of a model folder, hexadecimal."""
    return folder.digest(folder.find(source))


def _with_checked_params(part: Part, path: Path) -> Part:
    """The part, whose parameters must have the names and shapes of its config."""
    params = weights.fit(weights.flatten(part.params), part.config.abstract(), str(path))
    return dataclasses.replace(part, params=weights.unflatten(params))
