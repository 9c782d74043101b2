"""How do the codes of a set lie on disk, so that each image is encoded once?

A folder holds `key.json`, which says what made the codes, and shards of SHARD examples in order:
`00000-<sha256>.npy`, integers [n, ...] of the smallest type that holds them. A shard's name is its
checksum, so a set is whole if every shard is there and is what its name says. Shards are written
beside their place and renamed, and never changed: who is interrupted goes on after the last one.
"""

import dataclasses
import hashlib
import io
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from star_jax import files
from star_jax.checkpoint import config, weights
from star_jax.data.pipeline import Source
from star_jax.errors import UserError

KEY = 'key.json'
SHARD = 16_384  # examples: a minute of work for one shard, and few files for a large set

Key = Mapping[str, Any]


class Coded(TypedDict):
    """An example whose image is its codes, int32 [L]."""

    codes: np.ndarray
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class CodedSource:
    """A source whose images were encoded earlier; its captions are those of `source`."""

    source: Source
    shards: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Coded:
        number, row = divmod(operator.index(index), len(self.shards[0]))
        return Coded(codes=self.shards[number][row].astype(np.int32), captions=self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    def label(self, index: int) -> str:
        return self.source.label(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def read(folder: Path, key: Key, source: Source) -> CodedSource:
    """The codes of `source` in `folder`, mapped into memory, if they were made by what `key` says.

    Every shard is read once, to compare its checksum.
    Raises UserError where there are none, where they were made by something else, and where they
    are incomplete or damaged.
    """
    again = f'make it with `star-jax data cache CONFIG --cache {folder.parent}`'
    if not (folder / KEY).exists():
        raise UserError(f'{folder} holds no cached codes: {again}')
    changed = config.differences(config.read_json(folder / KEY), key)
    if changed:
        raise UserError(
            f'{folder} was made for another run ({"; ".join(changed)}): {again} again, '
            'or choose another folder'
        )
    shards = []
    for number in range(_shards_of(len(source))):
        path = _shard(folder, number)
        if path is None:
            raise UserError(f'{folder} is not complete, it lacks shard {number}: {again}')
        if not _is_whole(path):
            raise UserError(f'{path} is damaged: {again} again')
        try:
            shards.append(np.load(path, mmap_mode='r', allow_pickle=False))
        except ValueError as error:
            raise UserError(f'{path} holds no codes ({error}): {again}') from error
    return CodedSource(source, tuple(shards))


def write(
    folder: Path, key: Key, count: int, encode: Callable[[int], Iterable[np.ndarray]]
) -> None:
    """Writes the codes of `count` examples; `encode(first)` yields those from number `first` on.

    Whole shards of the same key stay, so that an interrupted call goes on; those of another are
    replaced. Raises UserError where the folder holds something else, or cannot be written.
    """
    try:
        _begin(folder, key)
        done = _whole_shards(folder, count)
        for path in _paths(folder)[done:]:
            path.unlink()
        if done < _shards_of(count):
            for number, codes in enumerate(_gathered(encode(done * SHARD)), done):
                _save(folder, number, codes)
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error}): choose another place') from error


def check_free(folder: Path) -> None:
    """Raises UserError where `folder` holds something else than cached codes."""
    if not (folder / KEY).exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f'{folder} holds something else than cached codes: choose another folder')


def _begin(folder: Path, key: Key) -> None:
    """Makes the folder one of `key`."""
    path = folder / KEY
    check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or config.differences(config.read_json(path), key):
        for shard in _paths(folder):
            shard.unlink()
        config.write_json(path, key)


def _whole_shards(folder: Path, count: int) -> int:
    """How many shards an earlier call has finished."""
    for number in range(_shards_of(count)):
        path = _shard(folder, number)
        if path is None or not _is_whole(path):
            return number
    return _shards_of(count)


def _gathered(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of the blocks, SHARD at a time and what is left."""
    waiting, rows = [], 0
    for block in blocks:
        waiting.append(block)
        rows += len(block)
        while rows >= SHARD:
            joined = np.concatenate(waiting)
            yield joined[:SHARD]
            waiting, rows = [joined[SHARD:]], rows - SHARD
    if rows:
        yield np.concatenate(waiting)


def _save(folder: Path, number: int, codes: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(np.min_scalar_type(codes.max())), allow_pickle=False)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    with files.replacing(folder / f'{number:05d}-{digest}.npy') as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _is_whole(path: Path) -> bool:
    return path.stem.partition('-')[2] == weights.sha256(path)


def _shard(folder: Path, number: int) -> Path | None:
    return next(iter(folder.glob(f'{number:05d}-*.npy')), None)


def _paths(folder: Path) -> list[Path]:
    """Every shard in order."""
    return sorted(folder.glob('*.npy'))


def _shards_of(count: int) -> int:
    return -(-count // SHARD)
