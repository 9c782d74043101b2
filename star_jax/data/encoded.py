"""How are the encoded images of a dataset stored, so that each image is encoded once?

A folder holds `key.json`, which identifies everything that the arrays depend on, and shards of
SHARD examples in order: `00000-<sha256>.npy`, arrays [n, ...], integers in the smallest type that
holds them. After the array follow the digests of its blocks of BLOCK examples.

The digests are computed once, when a shard is written. Opening compares the sizes of all files and
the digests of a few blocks, `check` those of all files. A shard is mapped into memory when its
first example is read, and only the pages of the examples that are read are loaded. A shard is
written to a temporary file, renamed, and never changed: an interrupted call continues after the
last complete shard.
"""

import collections
import dataclasses
import hashlib
import io
import mmap
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from star_jax import files
from star_jax.checkpoint import config, weights
from star_jax.console import progress_bar
from star_jax.data.pipeline import Source
from star_jax.errors import UserError
from star_jax.parallel import mesh

KEY = 'key.json'
SHARD = 16_384  # examples: a minute of work for one shard, and few files for a large dataset
BLOCK = 64  # examples
SAMPLED = 64  # blocks whose digests are compared at opening
DIGEST = 16  # bytes
MAX_MAPPED = 256  # shards: each holds a file descriptor, and the usual limit is 1024 per process

Key = Mapping[str, Any]


class ArraySpec(Protocol):
    """Shape and dtype of an array, such as a `jax.ShapeDtypeStruct`.

    Attributes:
        shape: the shape.
        dtype: the dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


class EncodedExample(TypedDict):
    """An example with its encoded image in place of the image.

    Attributes:
        encoded: codes or features of the image.
        captions: one or more captions.
    """

    encoded: np.ndarray
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource:
    """A source whose images were encoded earlier.

    Attributes:
        source: the source of captions and labels.
        shards: arrays [n, ...].
        dtype: the dtype of encoded images.
    """

    source: Source
    shards: Sequence[np.ndarray]
    dtype: np.dtype

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EncodedExample:
        shard, row = divmod(operator.index(index), SHARD)
        encoded = self.shards[shard][row].astype(self.dtype)
        return EncodedExample(encoded=encoded, captions=self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    def label(self, index: int) -> str:
        return self.source.label(index)

    def ratio(self, index: int) -> float:
        return self.source.ratio(index)

    def at(self, size: int | tuple[int, int]) -> 'EncodedSource':
        raise UserError('encoded images have one size: open their source at another one')

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class _MappedShards(Sequence[np.ndarray]):
    """Shards, each of which is mapped into memory when it is used. Threads may share it."""

    def __init__(self, shards: Sequence['_Shard']) -> None:
        self._shards = shards
        self._mapped: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> np.ndarray:
        with self._lock:
            if number not in self._mapped:
                self._mapped[number] = self._shards[number].map()
                if len(self._mapped) > MAX_MAPPED:
                    self._mapped.popitem(last=False)
            self._mapped.move_to_end(number)
            return self._mapped[number]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file of encoded images, from its header.

    Attributes:
        path: the file.
        shape: [n, ...].
        dtype: type of the arrays.
        start: position of the array in the file.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @staticmethod
    def open(path: Path) -> '_Shard':
        """Reads the header; raises ValueError if the file holds no such arrays."""
        files.check_regular(path)
        with path.open('rb') as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f'version {version} of the format of numpy')
            shape, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject or in_fortran_order or not shape:
                raise ValueError(f'an array of {dtype} with shape {shape}')
            return _Shard(path, shape, dtype, file.tell())

    @property
    def end(self) -> int:
        """Position after the array, where its digests begin."""
        return self.start + self.dtype.itemsize * int(np.prod(self.shape))

    @property
    def num_blocks(self) -> int:
        return -(-self.shape[0] // BLOCK)

    def like(self, example: ArraySpec) -> '_Shard':
        """The shard with the type of `example`; ValueError unless it holds such arrays."""
        stored, wanted = self.dtype, np.dtype(example.dtype)
        if stored.kind == 'V' and stored.itemsize == wanted.itemsize:
            stored = wanted  # numpy's format has no name for bfloat16
        shape = tuple(example.shape)
        if self.shape[1:] != shape or not np.can_cast(stored, wanted, 'same_kind'):
            raise ValueError(
                f'{stored} arrays of shape {self.shape[1:]}, expected {wanted} of {shape}'
            )
        return dataclasses.replace(self, dtype=stored)

    def has_size(self, count: int) -> bool:
        """Whether it holds `count` examples, and the file has the length that its header gives."""
        size = self.end + DIGEST * self.num_blocks
        return self.shape[0] == count and os.path.getsize(self.path) == size

    def is_block_intact(self, block: int) -> bool:
        width = (self.end - self.start) // self.shape[0]
        first, last = block * BLOCK, min((block + 1) * BLOCK, self.shape[0])
        with self.path.open('rb') as file:
            file.seek(self.start + first * width)
            digest = _digest(file.read((last - first) * width))
            file.seek(self.end + block * DIGEST)
            return file.read(DIGEST) == digest

    def map(self) -> np.ndarray:
        with self.path.open('rb') as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # read no neighbours of an example
        count = int(np.prod(self.shape))
        return np.frombuffer(mapped, self.dtype, count, self.start).reshape(self.shape)


def read(folder: Path, key: Key, source: Source, example: ArraySpec) -> EncodedSource:
    """The encoded images of `source` in a folder.

    The sizes of all shards and the digests of a few blocks are compared.

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
    paths, shards = _shard_paths(folder), []
    for number, rows in enumerate(_sizes(len(source))):
        if number not in paths:
            raise UserError(f'{folder} is incomplete, shard {number} is missing: {remedy}')
        path = paths[number]
        try:
            shards.append(_Shard.open(path).like(example))
        except ValueError as error:
            raise UserError(f'{path} holds no encoded images ({error}): {remedy}') from error
        if not shards[-1].has_size(rows):
            raise UserError(f'{path} is damaged: {remedy} again')
    if damaged := _damaged_in_sample(shards):
        raise UserError(f'{min(damaged)} is damaged: {remedy} again')
    return EncodedSource(source, _MappedShards(shards), np.dtype(example.dtype))


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
        sizes = _sizes(count)
        complete, shards = _complete_shards(folder, sizes), iter(())
        for number in range(len(sizes)):
            if number in complete:
                continue
            if number == 0 or number - 1 in complete:  # the first of several
                shards = _rechunk(encode(number * SHARD))
            _save(folder, number, next(shards))
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error}): choose another folder') from error


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of `check`.

    Attributes:
        intact: number of intact files.
        size: size of all files, in bytes.
        damaged: the other files.
    """

    intact: int
    size: int
    damaged: tuple[Path, ...]


def check(paths: Sequence[Path]) -> CheckResult:
    """Compares files with the digests in their names: NAME-DIGEST.SUFFIX."""
    with progress_bar() as bar, ThreadPoolExecutor(mesh.cores()) as pool:
        task, damaged = bar.add_task('reading', total=len(paths), note=''), []
        for path, intact in zip(paths, pool.map(_is_intact, paths), strict=True):
            bar.advance(task)
            if not intact:
                damaged.append(path)
    size = sum(path.stat().st_size for path in paths)
    return CheckResult(len(paths) - len(damaged), size, tuple(damaged))


def shard_paths(folder: Path) -> list[Path]:
    """The shards in a folder of encoded images, in order."""
    return [path for _, path in sorted(_shard_paths(folder).items())]


def check_free(folder: Path) -> None:
    """Raises UserError if `folder` holds something else than encoded images."""
    if not (folder / KEY).exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f'{folder} holds something else than encoded images: choose another folder')


def _prepare(folder: Path, key: Key) -> None:
    """Creates the folder and its key; deletes shards with another key."""
    path = folder / KEY
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or config.differences(config.read_json(path), key):
        for shard in shard_paths(folder):
            shard.unlink()
        config.write_json(path, key)


def _complete_shards(folder: Path, sizes: Sequence[int]) -> set[int]:
    """The complete shards of earlier calls; removes all others."""
    complete = {}
    for number, path in _shard_paths(folder).items():
        try:
            shard = _Shard.open(path)
        except ValueError:
            continue
        if number < len(sizes) and shard.has_size(sizes[number]):
            complete[number] = shard
    damaged = _damaged_in_sample(list(complete.values()))
    kept = {number: shard.path for number, shard in complete.items() if shard.path not in damaged}
    for path in set(folder.glob('*.npy')) - set(kept.values()):
        path.unlink()
    return set(kept)


def _damaged_in_sample(shards: Sequence[_Shard]) -> set[Path]:
    """Shards of which one of at most SAMPLED blocks, evenly spaced, is damaged."""
    blocks = [(shard, block) for shard in shards for block in range(shard.num_blocks)]
    chosen = np.linspace(0, len(blocks) - 1, min(SAMPLED, len(blocks))).astype(int)
    sample = [blocks[number] for number in chosen]
    return {shard.path for shard, block in sample if not shard.is_block_intact(block)}


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
    stored = np.ascontiguousarray(encoded.astype(_stored_dtype(encoded), copy=False))
    header = io.BytesIO()
    fields = np.lib.format.header_data_from_array_1_0(stored)
    np.lib.format.write_array_header_1_0(header, fields)
    data = stored.reshape(-1).view(np.uint8)
    blocks = (stored[first : first + BLOCK] for first in range(0, len(stored), BLOCK))
    parts = (header.getvalue(), data, b''.join(_digest(block.tobytes()) for block in blocks))
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    with (
        files.replacing(folder / f'{number:05d}-{whole.hexdigest()}.npy') as temporary,
        temporary.open('wb') as file,
    ):
        for part in parts:
            file.write(part)


def _stored_dtype(array: np.ndarray) -> np.dtype:
    """The smallest type that holds an array of integers; that of any other array."""
    if not np.issubdtype(array.dtype, np.integer):
        return array.dtype
    return np.result_type(*(np.min_scalar_type(value) for value in (array.min(), array.max())))


def _is_intact(path: Path) -> bool:
    digest = path.stem.partition('-')[2]
    return bool(digest) and path.is_file() and weights.sha256(path).startswith(digest)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST]


def _shard_paths(folder: Path) -> dict[int, Path]:
    """The shards by their numbers."""
    numbers = ((path.stem.partition('-')[0], path) for path in sorted(folder.glob('*-*.npy')))
    return {int(number): path for number, path in numbers if number.isdecimal()}


def _sizes(count: int) -> list[int]:
    """The number of examples of each shard."""
    return [min(SHARD, count - first) for first in range(0, count, SHARD)]
