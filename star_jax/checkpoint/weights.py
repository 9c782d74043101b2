"""How does a tree of arrays reach safetensors files and come back?

Arrays are named by their path in the tree, joined by '/': `layers/attention/kernel`. A tree larger
than one shard is spread over several files beside an index, in the layout of Hugging Face
(`model-00001-of-00003.safetensors`, `model.safetensors.index.json`).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from star_jax.checkpoint import config, stored
from star_jax.errors import UserError

SHARD_BYTES = 5 * 10**9
SHOWN = 8  # names in one message


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested dicts by sorted '/'-joined name; boxes are opened."""
    return dict(_leaves(meta.unbox(tree), ''))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts whose leaves have these '/'-joined names.

    Raises ValueError where a name is both a leaf and a branch.
    """
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split('/')
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or last in inner:
            raise ValueError(f'{name} is beside an array whose name is its beginning: no tree')
        inner[last] = leaf
    return tree


def save(
    path: str | Path,
    tree: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a tree of arrays to `path` (`*.safetensors`), in shards if larger than `shard_bytes`.

    Every file is replaced atomically. A sharded tree is not readable until its index, the last file
    written, is there: write it to a fresh folder, as `folder.write` does. Arrays must be
    addressable by this process, or `stored.StreamedArray`.
    """
    path = Path(path)
    shards = _shards(flatten(tree), shard_bytes)
    if len(shards) == 1:
        stored.write(path, shards[0], metadata)
        _index_path(path).unlink(missing_ok=True)
        return
    _index_path(path).unlink(missing_ok=True)
    names = [
        f'{path.stem}-{n:05}-of-{len(shards):05}.safetensors' for n in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        stored.write(path.with_name(name), shard, metadata)
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    size = sum(leaf.nbytes for shard in shards for leaf in shard.values())
    index = {'metadata': {'total_size': size}, 'weight_map': where}
    config.write_json(_index_path(path), index)
    path.unlink(missing_ok=True)


def load(path: str | Path, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The tree of numpy arrays saved at `path`.

    `like`, a tree of arrays or abstract arrays, is what the file must hold, name for name and shape
    for shape; float arrays are then cast to its types. Raises UserError for a missing, damaged or
    different file.
    """
    flat = {name: leaf for file in paths(Path(path)) for name, leaf in _read_file(file)}
    if like is not None:
        flat = fit(flat, like, where=str(path))
    try:
        return unflatten(flat)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error


def fit(flat: Mapping[str, Any], like: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arrays of `flat` in the order and the float types of the tree `like`.

    Raises UserError naming what is missing, unknown, or of another shape or kind of type.
    """
    wanted = flatten(like)
    if flaws := mismatches(flat, wanted, fits):
        raise UserError(
            f'{where}: the arrays are not those of this config: {flaws}; weights and config do not '
            'belong together'
        )
    return {name: flat[name].astype(leaf.dtype, copy=False) for name, leaf in wanted.items()}


def mismatches(
    given: Mapping[str, Any], wanted: Mapping[str, Any], fits: Callable[[Any, Any], bool]
) -> str:
    """How the arrays of two flat trees differ, in words, or nothing; `fits` compares a pair."""
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    wrong = [
        f'{name} is {_form(given[name])}, expected {_form(leaf)}'
        for name, leaf in wanted.items()
        if name in given and not fits(given[name], leaf)
    ]
    flaws = {'missing': missing, 'unknown': unknown, 'of another form': wrong}
    return '; '.join(
        f'{len(names)} {flaw} ({_listed(names)})' for flaw, names in flaws.items() if names
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata written beside the arrays at `path`."""
    first = paths(Path(path))[0]
    with stored.open_file(first) as file:
        return file.metadata() or {}


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal, read as a stream."""
    try:
        with Path(path).open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not isinstance(key, str) or '/' in key:
            raise ValueError(f"{path}{key!r}: a name in a tree is a string without '/'")
        if isinstance(value, Mapping):
            yield from _leaves(value, f'{path}{key}/')
        else:
            yield f'{path}{key}', value


def _shards(flat: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """The arrays in runs of at most `limit` bytes, or of one array."""
    shards, size = [{}], 0
    for name, leaf in flat.items():
        if shards[-1] and size + leaf.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = leaf
        size += leaf.nbytes
    return shards


def _index_path(path: Path) -> Path:
    return path.with_name(f'{path.name}.index.json')


def paths(path: Path) -> list[Path]:
    """The files that hold the arrays of `path`: those of its index, or itself."""
    index = _index_path(path)
    if not index.exists():
        return [path]
    data = config.read_json(index)
    names = data.get('weight_map') if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: expected an index with a 'weight_map'")
    if any(not isinstance(name, str) or Path(name).name != name for name in names.values()):
        raise UserError(f'{index}: expected names of files in the same folder')
    return [path.with_name(name) for name in dict.fromkeys(names.values())]


def _read_file(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with stored.open_file(path) as file:
        for name in file.offset_keys():
            try:
                yield name, file.get_tensor(name)
            except AttributeError as error:
                kind = file.get_slice(name).get_dtype()
                raise UserError(f'{path}: {name} is of type {kind}, which is not read') from error


def fits(given: Any, wanted: Any) -> bool:
    """Whether an array has the shape of another, and the type but for the width of floats."""
    floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (given, wanted))
    return given.shape == wanted.shape and (floats or given.dtype == wanted.dtype)


def _form(leaf: Any) -> str:
    return f'{leaf.dtype}{list(leaf.shape)}'


def _listed(names: list[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return f'{", ".join(names[:SHOWN])}{more}'
