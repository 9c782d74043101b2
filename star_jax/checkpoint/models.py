"""How is a model loaded and checked, from a folder, a hub id, or the name of a shipped one?

This package has two small models: 'shipped', a STAR, and 'shipped/infinity'.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from star_jax import checksums
from star_jax.checkpoint import folder, stored, weights
from star_jax.core.settings import Settings
from star_jax.families.fit import check_tokenizer
from star_jax.protocols import Family

Part = TypeVar('Part', folder.StoredModel, folder.StoredTokenizer)


def read(source: str | Path, check: bool = True) -> folder.StoredModel:
    """Reads a model, with parameters in the types of a new one; arguments as for `reading`."""
    with reading(source, check) as model:
        return model


@contextlib.contextmanager
def reading(source: str | Path, check: bool = True) -> Iterator[folder.StoredModel]:
    """A model, whose files are checked while the body uses it.

    Args:
        source: a folder, a hub id, or a shipped model (`files.SHIPPED_MODELS`).
        check: compare the files with the SHA-256 that the folder keeps; of a folder that keeps
            none, check that the weights are finite.

    Raises:
        UserError: `folder.read` refuses the folder, weights do not fit their config, or the
            tokenizer does not fit the transformer; at the end of the body, if a file changed since
            the folder was written.
    """
    path = folder.find(source)
    with verifying(path, check):
        model = folder.read(path, load=_unread)
        check_tokenizer(
            model.config,
            model.tokenizer.config,
            where=str(path / folder.CONFIG),
            remedy='export the model again from its run',
        )
        model.tokenizer.config.at(model.config.schedule)
        tokenizer = _with_params(model.tokenizer, path / folder.TOKENIZER, check)
        model = _with_params(model, path / folder.MODEL, check)
        yield dataclasses.replace(model, tokenizer=tokenizer)


def read_tokenizer(source: str | Path, check: bool = True) -> folder.StoredTokenizer:
    """Reads the tokenizer of any model folder; arguments and errors as for `reading`."""
    path = folder.find(source)
    with verifying(path, check, parts=(folder.TOKENIZER,)):
        tokenizer = folder.read_tokenizer(path, load=_unread)
        return _with_params(tokenizer, path / folder.TOKENIZER, check)


@contextlib.contextmanager
def verifying(
    path: Path, check: bool, parts: Sequence[str] = (folder.MODEL, folder.TOKENIZER)
) -> Iterator[None]:
    """Compares weights with the SHA-256 that their folder keeps, while the body uses them.

    Args:
        path: the model folder.
        check: whether to do so at all.
        parts: names of the weights.

    Raises:
        UserError: at the end of the body, if a file changed since the folder was written.
    """
    names = folder.weight_files(path, parts) if check else []
    with checksums.verifying(path, names):
        yield


def has_only_tokenizer(source: str | Path) -> bool:
    """Whether a model folder has no transformer."""
    return folder.has_only_tokenizer(folder.find(source))


def read_sampling(source: str | Path) -> Settings:
    """Reads the recommended sampling settings of a model."""
    return folder.read_sampling(folder.find(source))


def read_config(source: str | Path) -> Family:
    """Reads the sizes and parts of a model, without its weights."""
    return read_without_weights(source).config


def read_without_weights(source: str | Path) -> folder.StoredModel:
    """Reads all of a model but its weights: it has no parameters."""
    return folder.read(folder.find(source), _unread)


def digest(source: str | Path) -> str:
    """SHA-256 over the files of a model folder, hexadecimal."""
    return folder.digest(folder.find(source))


def _unread(path: Path) -> dict[str, Any]:
    """The parameters at `path`, before they are read."""
    return {}


def _with_params(part: Part, path: Path, check: bool) -> Part:
    """The part with its parameters, which must have the names and shapes of its config."""
    params = weights.load(path, like=part.config.abstract())
    if check and checksums.read(path.parent) is None:
        flat = weights.flatten(params)
        if names := [name for name, array in flat.items() if not stored.is_finite(array)]:
            raise folder.not_finite(path, names)
    return dataclasses.replace(part, params=params)
