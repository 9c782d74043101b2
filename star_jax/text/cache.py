"""How are the features of captions cached, so that each caption is encoded once?

The cache is on disk, under `text/<encoder identity>/`, in segments that never change: one
safetensors file per batch of new captions. A segment is written under a temporary name and then
renamed, so that any number of processes may write at once and a reader finds complete files only.
Padding is not stored.

Features are rounded to float16 and always read back before they are returned: runs with a cold and
with a warm cache get the same numbers. Float16 takes half the space of float32 (11 KB instead of 22
for 14 tokens of MiniLM), and its 11 significant bits are finer than the bfloat16 activations of the
network.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import Progress
from safetensors.numpy import save

from star_jax import files
from star_jax.console import progress_bar
from star_jax.core.condition import TextCondition
from star_jax.errors import UserError
from star_jax.text.encoder import TextEncoder

logger = logging.getLogger(__name__)

ROOT_VARIABLE = 'STAR_JAX_CACHE'
SUFFIX = '.safetensors'
DIGITS = 16  # digits of the digest in the name of a segment
KEY_BYTES = 16  # a million captions collide with probability 1e-27
STORED_DTYPE = np.float16
DTYPES = {'U8': np.uint8, 'I64': np.int64, 'F16': STORED_DTYPE}
# Captions per progress update and per segment: an interrupted run loses at most one segment.
PROGRESS_CAPTIONS = 256
SEGMENT_CAPTIONS = 2048
# A mapped segment holds a file descriptor; the usual limit is 1024 per process.
MAX_OPEN_SEGMENTS = 256


class Segment(NamedTuple):
    """One memory-mapped file of n captions.

    Attributes:
        states: float16 states of the real tokens of all captions.
        pooled: [n, E] float16.
        offsets: [n + 1]; caption i has the rows `offsets[i]:offsets[i + 1]` of the states.
    """

    states: np.ndarray
    pooled: np.ndarray
    offsets: np.ndarray


class FeatureCache:
    """The features of captions by one encoder, on disk.

    Any number of threads may share a cache, and any number of caches a folder. Methods raise
    `UserError` if the folder cannot be written or features exceed float16.

    Args:
        encoder: encodes captions that are not in the cache.
        root: folder of all caches (None: `$STAR_JAX_CACHE`, or ~/.cache/star_jax).
    """

    def __init__(self, encoder: TextEncoder, root: Path | None = None):
        self.encoder = encoder
        self.folder = (root or files.cache_folder()) / 'text' / encoder.identity
        self._rows: dict[bytes, tuple[int, int]] = {}  # caption key -> (segment, row)
        self._segments: list[Path] = []
        self._indexed: set[str] = set()
        self._mapped: OrderedDict[int, Segment] = OrderedDict()
        self._lock = threading.Lock()
        self._index_new_segments()

    def __len__(self) -> int:
        """Number of captions in the cache."""
        return len(self._rows)

    def features(self, captions: Sequence[str]) -> TextCondition:
        """Features as by `TextEncoder.encode`, rounded to float16 (their dtype is float32).

        Missing captions are encoded and stored first.
        """
        with self._lock:
            keys = [_key(caption) for caption in captions]
            if any(key not in self._rows for key in keys):
                self._add(self._missing(captions), Progress(disable=True))
            return self._gather(keys)

    def warm(
        self,
        captions: Sequence[str],
        progress: bool = True,
        other: 'FeatureCache | None' = None,
    ) -> None:
        """Encodes and stores the missing captions; an interrupted call can be repeated.

        Args:
            captions: the captions to store.
            progress: show a progress bar.
            other: a cache of the same encoder, from which captions are copied if present.
        """
        with self._lock:
            missing = self._missing(captions)
            if not missing:
                return
            self._create_folder()  # fails before anything is encoded
            with progress_bar(visible=progress) as bar:
                if other and (present := other.present(missing)):
                    self._add(present, bar, other.features)
                    missing = self._missing(captions)
                if missing:
                    self._add(missing, bar)

    def present(self, captions: Sequence[str]) -> list[str]:
        """The captions that are in the cache."""
        with self._lock:
            missing = set(self._missing(captions))
        return [caption for caption in captions if caption not in missing]

    def _gather(self, keys: list[bytes]) -> TextCondition:
        B, T, E = len(keys), self.encoder.length, self.encoder.width
        states_BTE = np.zeros((B, T, E), np.float32)
        mask_BT = np.zeros((B, T), np.int32)
        pooled_BE = np.zeros((B, E), np.float32)
        for row, key in enumerate(keys):
            number, stored_row = self._rows[key]
            segment = self._segment(number)
            first, last = segment.offsets[stored_row], segment.offsets[stored_row + 1]
            states_BTE[row, : last - first] = segment.states[first:last]
            mask_BT[row, : last - first] = 1
            pooled_BE[row] = segment.pooled[stored_row]
        return TextCondition(states_BTE=states_BTE, mask_BT=mask_BT, pooled_BE=pooled_BE)

    def _add(
        self,
        missing: list[str],
        bar: Progress,
        encode: Callable[[list[str]], TextCondition] | None = None,
    ) -> None:
        encode = encode or self.encoder.encode
        task = bar.add_task('encoding captions', total=len(missing), note='')
        start = time.monotonic()
        done = 0
        for segment in _chunks(missing, SEGMENT_CAPTIONS):
            encoded = []
            for chunk in _chunks(segment, PROGRESS_CAPTIONS):
                encoded.append((chunk, encode(chunk)))
                done += len(chunk)
                rate = f'{done / (time.monotonic() - start):.0f} captions/s'
                bar.update(task, completed=done, note=rate)
            self._write(encoded)
        self._index_new_segments()

    def _missing(self, captions: Sequence[str]) -> list[str]:
        """Distinct captions that are in no segment, of this or another process."""
        self._index_new_segments()
        return [caption for caption in dict.fromkeys(captions) if _key(caption) not in self._rows]

    def _index_new_segments(self) -> None:
        """Indexes new files. If two segments hold a caption, the older one counts."""
        for path in sorted(self.folder.glob(f'*{SUFFIX}')):
            if path.name in self._indexed:
                continue
            self._indexed.add(path.name)
            try:
                keys = _memory_map(path)['keys']
            except (OSError, ValueError, LookupError, TypeError) as error:
                logger.warning('The feature cache skips %s, which is damaged (%s).', path, error)
                continue
            number = len(self._segments)
            self._segments.append(path)
            for row, key in enumerate(keys.view(f'V{KEY_BYTES}').ravel().tolist()):
                self._rows.setdefault(key, (number, row))

    def _segment(self, number: int) -> Segment:
        if number not in self._mapped:
            arrays = _memory_map(self._segments[number])
            self._mapped[number] = Segment(*(arrays[name] for name in Segment._fields))
            if len(self._mapped) > MAX_OPEN_SEGMENTS:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def _write(self, encoded: list[tuple[list[str], TextCondition]]) -> None:
        """Writes one segment completely or not at all, even if the machine stops."""
        lengths = np.concatenate([text.mask_BT.sum(1) for _, text in encoded])
        keys = b''.join(_key(caption) for captions, _ in encoded for caption in captions)
        arrays = {
            'keys': np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES),
            'offsets': np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            'states': _to_stored([text.states_BTE[text.mask_BT > 0] for _, text in encoded]),
            'pooled': _to_stored([text.pooled_BE for _, text in encoded]),
        }
        content = save(arrays)
        # Names sort by age; the digest differs between processes that write at the same time.
        digest = hashlib.sha256(content).hexdigest()[:DIGITS]
        self._create_folder()
        try:
            with files.replacing(
                self.folder / f'{time.time_ns():020d}-{digest}{SUFFIX}'
            ) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise self._unwritable(error) from error

    def _create_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f'The feature cache cannot write in {self.folder} ({error}); set {ROOT_VARIABLE} to a '
            f'folder with free space.'
        )


def segment_paths(root: Path) -> list[Path]:
    """The segments of all encoders below the root of a cache."""
    return sorted((root / 'text').glob(f'*/*-{"?" * DIGITS}{SUFFIX}'))


def _key(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode(), digest_size=KEY_BYTES).digest()


def _chunks(captions: list[str], size: int) -> Iterator[list[str]]:
    for first in range(0, len(captions), size):
        yield captions[first : first + size]


def _to_stored(parts: list[np.ndarray]) -> np.ndarray:
    array = np.concatenate(parts)
    if not np.abs(array).max() <= np.finfo(STORED_DTYPE).max:  # also true for NaN
        raise UserError(
            'The features of the text encoder exceed float16 (or are not finite) and cannot be '
            'cached; run the encoder inside the training program instead.'
        )
    return array.astype(STORED_DTYPE)


def _memory_map(path: Path) -> dict[str, np.ndarray]:
    """The memory-mapped arrays of a safetensors file. Raises ValueError for a damaged file.

    The library copies whole arrays, while this cache reads single rows.
    """
    if not path.is_file():  # reading a pipe may not end
        raise ValueError('it is no file')
    size = path.stat().st_size
    with path.open('rb') as file:
        start = 8 + int.from_bytes(file.read(8), 'little')
        if not 8 < start <= size:
            raise ValueError('its header is cut off')
        header = files.parse_json(file.read(start - 8))
    if not isinstance(header, dict):
        raise ValueError('its header is not a JSON object')
    header.pop('__metadata__', None)
    if start + max(entry['data_offsets'][1] for entry in header.values()) != size:
        raise ValueError('its size differs from the size in its header')
    data = np.memmap(path, np.uint8, mode='r')
    arrays = {}
    for name, entry in header.items():
        first, last = entry['data_offsets']
        array = data[start + first : start + last].view(DTYPES[entry['dtype']])
        arrays[name] = array.reshape(entry['shape'])
    return arrays
