"""How is a tree of arrays saved to safetensors files and loaded?

Arrays are named by their '/'-joined path in the tree: `layers/attention/kernel`. A tree larger
than one shard is split over several files with an index, in the layout of Hugging Face
(`model-00001-of-00003.safetensors`, `model.safetensors.index.json`).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from star_jax import files
from star_jax.checkpoint import config, stored
from star_jax.errors import UserError

SHARD_BYTES = 5 * 10**9
SHOWN = 8  # names in one message


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested dicts, unboxed, by '/'-joined name."""
    return dict(_leaves(meta.unbox(tree), ''))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts whose leaves have these '/'-joined names.

    Raises:
        ValueError: a name is both a leaf and a branch.
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
            raise ValueError(f'{name} is below the name of another array: the names form no tree')
        inner[last] = leaf
    return tree


def save(
    path: str | Path,
    tree: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    not_finite: list[str] | None = None,
) -> dict[str, str]:
    """Writes a tree of arrays to safetensors files.

    Every file is replaced atomically. A sharded tree becomes readable when its index, the last
    file, is written: write it to a new folder, as `folder.write` does.

    Args:
        path: the file (`*.safetensors`), and the prefix of shards.
        tree: arrays that this process can address, or `stored.StreamedArray`s.
        metadata: strings to store beside the arrays.
        shard_bytes: a larger tree is split into shards of at most this size.
        not_finite: to this list, names of arrays with NaN or infinite values are appended.

    Returns:
        The SHA-256 of every written file by name.
    """
    path = Path(path)
    shards = _shards(flatten(tree), shard_bytes)
    if len(shards) == 1:
        digest = stored.write(path, shards[0], metadata, not_finite)
        index_path(path).unlink(missing_ok=True)
        return {path.name: digest}
    digests = _write_shards(path, shards, metadata, not_finite)
    path.unlink(missing_ok=True)
    return digests


def save_shards(path: Path, flat: Mapping[str, Any], shard_bytes: int) -> None:
    """Writes arrays as `save`, but always as shards with an index, even a single one.

    Args:
        path: prefix of the shards and of the index (`*.safetensors`).
        flat: arrays, or `stored.StreamedArray`s, by name.
        shard_bytes: size of a shard, at most (a larger array is a shard).
    """
    written = _write_shards(path, _shards(flat, shard_bytes), None, None)
    for earlier in path.parent.glob(f'{path.stem}-*-of-*.safetensors'):
        if earlier.name not in written:
            earlier.unlink()


def load(path: str | Path, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads the tree of numpy arrays saved at `path`.

    Args:
        path: the file, sharded or not.
        like: arrays or abstract arrays with the expected names and shapes; float arrays are cast
            to their types.

    Raises:
        UserError: the file is missing or damaged, or differs from `like`.
    """
    where, tensors = str(path), stored.StoredTensors(paths(Path(path)))
    specs = tensors.specs()
    try:
        unflatten(specs)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    if like is not None:
        check(specs, like, where)  # before any array is in memory
    flat = {name: tensors.read(name) for name in specs}
    return unflatten(flat if like is None else fit(flat, like, where))


def fit(flat: Mapping[str, Any], like: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arrays of `flat` in the order and the float types of the tree `like`.

    Raises:
        UserError: names the arrays that are missing, unknown, or of another shape or type.
    """
    check(flat, like, where)
    expected = flatten(like)
    return {name: flat[name].astype(leaf.dtype, copy=False) for name, leaf in expected.items()}


def check(flat: Mapping[str, Any], like: Mapping[str, Any], where: str) -> None:
    """Checks the names, shapes and types of arrays; raises as `fit`."""
    if flaws := mismatches(flat, flatten(like), fits):
        raise UserError(
            f'{where}: the arrays are not those of this config: {flaws}; weights and config do not '
            'belong together'
        )


def mismatches(
    flat: Mapping[str, Any], expected: Mapping[str, Any], fits: Callable[[Any, Any], bool]
) -> str:
    """The differences of two flat trees as text, '' if there are none.

    Args:
        flat: arrays by name.
        expected: the expected arrays by name.
        fits: whether an array is compatible with the expected one.
    """
    missing = [name for name in expected if name not in flat]
    unknown = [name for name in flat if name not in expected]
    wrong = [
        f'{name} is {_describe(flat[name])}, expected {_describe(leaf)}'
        for name, leaf in expected.items()
        if name in flat and not fits(flat[name], leaf)
    ]
    flaws = {'missing': missing, 'unknown': unknown, 'of another shape or type': wrong}
    return '; '.join(
        f'{len(names)} {flaw} ({listed(names)})' for flaw, names in flaws.items() if names
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata beside the arrays at `path`."""
    first = paths(Path(path))[0]
    with stored.open_file(first) as file:
        return file.metadata() or {}


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal; UserError if it cannot be read or may have no end."""
    files.check_regular(path)
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


def _write_shards(
    path: Path,
    shards: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, str] | None,
    not_finite: list[str] | None,
) -> dict[str, str]:
    """Writes shards and, after them, their index. Returns the SHA-256 of every file by name."""
    index_path(path).unlink(missing_ok=True)
    names = [
        f'{path.stem}-{n:05}-of-{len(shards):05}.safetensors' for n in range(1, len(shards) + 1)
    ]
    digests = {
        name: stored.write(path.with_name(name), shard, metadata, not_finite)
        for name, shard in zip(names, shards, strict=True)
    }
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    size = sum(leaf.nbytes for shard in shards for leaf in shard.values())
    index = {'metadata': {'total_size': size}, 'weight_map': weight_map}
    config.write_json(index_path(path), index)
    return digests | {index_path(path).name: sha256(index_path(path))}


def _shards(flat: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """The arrays in groups of at most `limit` bytes, or of a single larger array."""
    shards, size = [{}], 0
    for name, leaf in flat.items():
        if shards[-1] and size + leaf.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = leaf
        size += leaf.nbytes
    return shards


def index_path(path: Path) -> Path:
    """The index of the shards of `path`."""
    return path.with_name(f'{path.name}.index.json')


def paths(path: Path) -> list[Path]:
    """The files with the arrays of `path`: those of its index, or `path` itself.

    Raises UserError for a damaged index.
    """
    index = index_path(path)
    if not index.exists():
        return [path]
    data = config.read_json(index)
    names = data.get('weight_map') if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: expected an index with a 'weight_map'")
    if not all(map(files.is_file_name, names.values())):
        raise UserError(f'{index}: expected names of files in the same folder')
    return [path.with_name(name) for name in dict.fromkeys(names.values())]


def fits(array: Any, expected: Any) -> bool:
    """Whether two arrays have the same shape and type, apart from the width of floats."""
    floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (array, expected))
    return array.shape == expected.shape and (floats or array.dtype == expected.dtype)


def _describe(leaf: Any) -> str:
    return f'{leaf.dtype}{list(leaf.shape)}'


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return f'{", ".join(names[:SHOWN])}{more}'
