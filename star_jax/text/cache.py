"""Where are the features of captions kept, so that each caption is encoded once?

On disk, under `text/<encoder identity>/`, in segments that are never changed: one safetensors file
per batch of new captions, written beside its place and renamed, so that any number of processes
may write at once and a reader sees whole files only. Only real tokens are stored.

Features are rounded to float16, and what is returned was always read back: a run with a cold
cache and one with a warm cache see the same numbers. Float16 halves the space of float32 (11 KB
against 22 for 14 tokens of MiniLM) and its 11 significant bits are finer than the bfloat16
activations that read them.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save

from star_jax.core.condition import TextCondition
from star_jax.errors import UserError
from star_jax.parallel import startup
from star_jax.text.encoder import TextEncoder

logger = logging.getLogger(__name__)

ROOT_VARIABLE = 'STAR_JAX_CACHE'
SUFFIX = '.safetensors'
KEY_BYTES = 16  # a million captions collide with probability 1e-27
STORED = np.float16
DTYPES = {'U8': np.uint8, 'I64': np.int64, 'F16': STORED}
# Captions per progress step and per segment of `warm`: a kill loses one segment's work.
STEP = 256
SEGMENT = 2048
# Mapped segments hold a file descriptor each; the usual limit is 1024 for the whole process.
OPEN_SEGMENTS = 256


class Segment(NamedTuple):
    """One file, mapped: caption n owns rows `offsets[n]:offsets[n + 1]` of the states."""

    states: np.ndarray
    pooled: np.ndarray
    offsets: np.ndarray


class FeatureCache:
    """The features of one encoder's captions, on disk.

    `root`: by default `$STAR_JAX_CACHE`, or ~/.cache/star_jax. Any number of threads may share one
    cache, any number of caches one folder. Raises `UserError` where it cannot write, or where
    features do not fit float16.
    """

    def __init__(self, encoder: TextEncoder, root: Path | None = None):
        self.encoder = encoder
        self.folder = (root or startup.cache_folder()) / 'text' / encoder.identity
        self._row: dict[bytes, tuple[int, int]] = {}
        self._segments: list[Path] = []
        self._seen: set[str] = set()
        self._mapped: OrderedDict[int, Segment] = OrderedDict()
        self._lock = threading.Lock()
        self._index_new_segments()

    def __len__(self) -> int:
        """How many captions are known."""
        return len(self._row)

    def features(self, captions: Sequence[str]) -> TextCondition:
        """Features as `TextEncoder.encode` gives them, rounded to float16 (dtype float32).

        Captions that are not on disk yet are encoded and stored first.
        """
        with self._lock:
            keys = [_key(caption) for caption in captions]
            if any(key not in self._row for key in keys):
                self._add(self._missing(captions), Progress(disable=True))
            return self._gather(keys)

    def warm(
        self,
        captions: Sequence[str],
        progress: bool = True,
        other: 'FeatureCache | None' = None,
    ) -> None:
        """Encodes and stores what is missing, with a progress bar; may be interrupted.

        What an `other` cache of the same encoder knows is copied from there.
        """
        with self._lock, _bar(visible=progress) as bar:
            if other and (known := other.known(self._missing(captions))):
                self._add(known, bar, other.features)
            if missing := self._missing(captions):
                self._add(missing, bar)

    def known(self, captions: Sequence[str]) -> list[str]:
        """Those of the captions that are on disk."""
        with self._lock:
            missing = set(self._missing(captions))
        return [caption for caption in captions if caption not in missing]

    def _gather(self, keys: list[bytes]) -> TextCondition:
        B, T, E = len(keys), self.encoder.length, self.encoder.width
        states_BTE = np.zeros((B, T, E), np.float32)
        mask_BT = np.zeros((B, T), np.int32)
        pooled_BE = np.zeros((B, E), np.float32)
        for row, key in enumerate(keys):
            number, place = self._row[key]
            segment = self._segment(number)
            first, last = segment.offsets[place], segment.offsets[place + 1]
            states_BTE[row, : last - first] = segment.states[first:last]
            mask_BT[row, : last - first] = 1
            pooled_BE[row] = segment.pooled[place]
        return TextCondition(states_BTE=states_BTE, mask_BT=mask_BT, pooled_BE=pooled_BE)

    def _add(
        self,
        missing: list[str],
        bar: Progress,
        encode: Callable[[list[str]], TextCondition] | None = None,
    ) -> None:
        encode = encode or self.encoder.encode
        task = bar.add_task('encoding captions', total=len(missing), rate='')
        start = time.monotonic()
        done = 0
        for segment in _split(missing, SEGMENT):
            parts = []
            for part in _split(segment, STEP):
                parts.append((part, encode(part)))
                done += len(part)
                rate = f'{done / (time.monotonic() - start):.0f} captions/s'
                bar.update(task, completed=done, rate=rate)
            self._write(parts)
        self._index_new_segments()

    def _missing(self, captions: Sequence[str]) -> list[str]:
        """Distinct captions that no segment holds, those of other processes included."""
        self._index_new_segments()
        return [one for one in dict.fromkeys(captions) if _key(one) not in self._row]

    def _index_new_segments(self) -> None:
        """Learns what files there are. Of two segments with one caption the older counts."""
        for path in sorted(self.folder.glob(f'*{SUFFIX}')):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                keys = _map(path)['keys']
            except (OSError, ValueError, KeyError) as error:
                logger.warning('The feature cache skips %s, which is torn (%s).', path, error)
                continue
            number = len(self._segments)
            self._segments.append(path)
            for place, key in enumerate(keys.view(f'V{KEY_BYTES}').ravel().tolist()):
                self._row.setdefault(key, (number, place))

    def _segment(self, number: int) -> Segment:
        if number not in self._mapped:
            arrays = _map(self._segments[number])
            self._mapped[number] = Segment(*(arrays[name] for name in Segment._fields))
            if len(self._mapped) > OPEN_SEGMENTS:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def _write(self, parts: list[tuple[list[str], TextCondition]]) -> None:
        """One segment, whole or not at all, even if the machine stops in the middle."""
        lengths = np.concatenate([text.mask_BT.sum(1) for _, text in parts])
        keys = b''.join(_key(caption) for captions, _ in parts for caption in captions)
        arrays = {
            'keys': np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES),
            'offsets': np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            'states': _stored([text.states_BTE[text.mask_BT > 0] for _, text in parts]),
            'pooled': _stored([text.pooled_BE for _, text in parts]),
        }
        # Names sort by age; the token keeps processes that write at the same instant apart.
        name = f'{time.time_ns():020d}-{secrets.token_hex(4)}{SUFFIX}'
        partial = self.folder / f'{name}.partial'
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open('wb') as file:
                file.write(save(arrays))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise UserError(
                f'The feature cache cannot write in {self.folder} ({error}); set {ROOT_VARIABLE} '
                f'to a folder with room.'
            ) from error


def _key(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode(), digest_size=KEY_BYTES).digest()


def _split(captions: list[str], size: int) -> Iterator[list[str]]:
    for first in range(0, len(captions), size):
        yield captions[first : first + size]


def _stored(parts: list[np.ndarray]) -> np.ndarray:
    array = np.concatenate(parts)
    if not np.abs(array).max() <= np.finfo(STORED).max:  # also true of nan
        raise UserError(
            'The text encoder gave features that do not fit float16 (or are not finite), so they '
            'cannot be cached; run it inside the training program instead.'
        )
    return array.astype(STORED)


def _map(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file's arrays, mapped into memory. Raises ValueError for a torn file.

    By hand, because the library copies what it reads and this reads single rows.
    """
    size = path.stat().st_size
    with path.open('rb') as file:
        start = 8 + int.from_bytes(file.read(8), 'little')
        if not 8 < start <= size:
            raise ValueError('its header is cut off')
        header = json.loads(file.read(start - 8))
    if not isinstance(header, dict):
        raise ValueError('its header is no JSON object')
    header.pop('__metadata__', None)
    if start + max(entry['data_offsets'][1] for entry in header.values()) != size:
        raise ValueError('its size is not what its header says')
    data = np.memmap(path, np.uint8, mode='r')
    arrays = {}
    for name, entry in header.items():
        first, last = entry['data_offsets']
        array = data[start + first : start + last].view(DTYPES[entry['dtype']])
        arrays[name] = array.reshape(entry['shape'])
    return arrays


def _bar(visible: bool) -> Progress:
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[rate]}'),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not visible)
