"""How are the encoded images of a dataset stored, so that each image is encoded once?

A folder holds `key.json`, which identifies everything that the arrays depend on, and shards of
SHARD examples in order: `00000-<sha256>.npy`, arrays [n, ...], integers in the smallest type that
holds them. The name of a shard contains its checksum, so that missing and damaged shards are found.
A shard is written to a temporary file, renamed, and never changed: an interrupted call continues
after the last complete shard.
"""

import dataclasses
import hashlib
import io
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from star_jax import files
from star_jax.checkpoint import config, weights
from star_jax.data.pipeline import Source
from star_jax.errors import UserError

KEY = 'key.json'
SHARD = 16_384  # examples: a minute of work for one shard, and few files for a large dataset

Key = Mapping[str, Any]


class ArraySpec(Protocol):
    """Shape and dtype of an array, such as a `jax.ShapeDtypeStruct`."""

    shape: tuple[int, ...]
    dtype: np.dtype


class EncodedExample(TypedDict):
    """An example with its encoded image in place of the image."""

    encoded: np.ndarray
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource:
    """A source whose images were encoded earlier.

    Attributes:
        source: the source of captions and labels.
        shards: arrays [n, ...], mapped into memory.
        dtype: the dtype of encoded images.
    """

    source: Source
    shards: tuple[np.ndarray, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EncodedExample:
        shard, row = divmod(operator.index(index), len(self.shards[0]))
        encoded = self.shards[shard][row].astype(self.dtype)
        return EncodedExample(encoded=encoded, captions=self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    def label(self, index: int) -> str:
        return self.source.label(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def read(folder: Path, key: Key, source: Source, example: ArraySpec) -> EncodedSource:
    """The encoded images of `source` in a folder, mapped into memory.

    Every shard is read once, to compare its checksum.

    Args:
        folder: folder of the encoded images.
        key: identifies everything that the encoded images depend on.
        source: the source of captions and labels.
        example: shape and dtype of one encoded image.

    Raises:
        UserError: the folder has no encoded images, or they have another key, are incomplete or
            damaged, or have another shape.
    """
    remedy = f'make it with `star-jax data cache CONFIG --cache {folder.parent}`'
    if not (folder / KEY).exists():
        raise UserError(f'{folder} holds no encoded images: {remedy}')
    changed = config.differences(config.read_json(folder / KEY), key)
    if changed:
        raise UserError(
            f'{folder} was made for another run ({"; ".join(changed)}): {remedy} again, '
            'or choose another folder'
        )
    shards = []
    for number in range(_num_shards(len(source))):
        path = _shard_path(folder, number)
        if path is None:
            raise UserError(f'{folder} is incomplete, shard {number} is missing: {remedy}')
        if not _is_intact(path):
            raise UserError(f'{path} is damaged: {remedy} again')
        try:
            shards.append(_load(path, example))
        except ValueError as error:
            raise UserError(f'{path} holds no encoded images ({error}): {remedy}') from error
    return EncodedSource(source, tuple(shards), np.dtype(example.dtype))


def write(
    folder: Path, key: Key, count: int, encode: Callable[[int], Iterable[np.ndarray]]
) -> None:
    """Writes the encoded images of a dataset.

    Complete shards with the same key are kept, so that a call continues an interrupted one; shards
    with another key are replaced.

    Args:
        folder: folder of the encoded images.
        key: identifies everything that the encoded images depend on.
        count: number of examples.
        encode: `encode(first)` yields blocks [n, ...] of encoded images from example `first` on.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    try:
        _prepare(folder, key)
        done = _complete_shards(folder, count)
        for path in _shard_paths(folder)[done:]:
            path.unlink()
        if done < _num_shards(count):
            for number, encoded in enumerate(_rechunk(encode(done * SHARD)), done):
                _save(folder, number, encoded)
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error}): choose another folder') from error


def check_free(folder: Path) -> None:
    """Raises UserError if `folder` holds something else than encoded images."""
    if not (folder / KEY).exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f'{folder} holds something else than encoded images: choose another folder')


def _load(path: Path, example: ArraySpec) -> np.ndarray:
    """A shard, mapped into memory; ValueError unless it holds arrays like `example`."""
    shard, dtype = np.load(path, mmap_mode='r', allow_pickle=False), np.dtype(example.dtype)
    if shard.dtype.kind == 'V' and shard.itemsize == dtype.itemsize:
        shard = shard.view(dtype)  # numpy's format has no name for bfloat16
    if shard.shape[1:] != tuple(example.shape) or not np.can_cast(shard.dtype, dtype, 'same_kind'):
        raise ValueError(
            f'{shard.dtype} arrays of shape {shard.shape[1:]}, expected {dtype} of '
            f'{tuple(example.shape)}'
        )
    return shard


def _prepare(folder: Path, key: Key) -> None:
    """Creates the folder and its key; deletes shards with another key."""
    path = folder / KEY
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or config.differences(config.read_json(path), key):
        for shard in _shard_paths(folder):
            shard.unlink()
        config.write_json(path, key)


def _complete_shards(folder: Path, count: int) -> int:
    """Number of complete shards of an earlier call."""
    for number in range(_num_shards(count)):
        path = _shard_path(folder, number)
        if path is None or not _is_intact(path):
            return number
    return _num_shards(count)


def _rechunk(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of the blocks, SHARD at a time, and the remainder."""
    pending, rows = [], 0
    for block in blocks:
        pending.append(block)
        rows += len(block)
        while rows >= SHARD:
            joined = np.concatenate(pending)
            yield joined[:SHARD]
            pending, rows = [joined[SHARD:]], rows - SHARD
    if rows:
        yield np.concatenate(pending)


def _save(folder: Path, number: int, encoded: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, encoded.astype(_stored_dtype(encoded)), allow_pickle=False)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    with files.replacing(folder / f'{number:05d}-{digest}.npy') as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _stored_dtype(array: np.ndarray) -> np.dtype:
    """The smallest type that holds an array of integers; that of any other array."""
    if not np.issubdtype(array.dtype, np.integer):
        return array.dtype
    return np.result_type(*(np.min_scalar_type(value) for value in (array.min(), array.max())))


def _is_intact(path: Path) -> bool:
    return path.stem.partition('-')[2] == weights.sha256(path)


def _shard_path(folder: Path, number: int) -> Path | None:
    return next(iter(folder.glob(f'{number:05d}-*.npy')), None)


def _shard_paths(folder: Path) -> list[Path]:
    """All shards in order."""
    return sorted(folder.glob('*.npy'))


def _num_shards(count: int) -> int:
    return -(-count // SHARD)
