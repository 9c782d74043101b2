"""Which pictures and captions does a step see?

The only way from a source to batches. The order of the data is a function of one integer, the step:
samples are drawn globally, and every process reads the rows of each global batch that its devices
hold. So a run continues where it stopped, on any number of processes.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict

import grain
import numpy as np

from star_jax.errors import UserError

TOUCHED = 16  # examples that a fingerprint looks at


class Example(TypedDict):
    """`image`: (S, S, 3) uint8 RGB. `captions`: one or more, fullest first. `label`: may be ''."""

    image: np.ndarray
    captions: tuple[str, ...]
    label: str


class Batch(TypedDict):
    """`image`: (b, S, S, 3) uint8 RGB, with one caption and one label for each."""

    image: np.ndarray
    caption: list[str]
    label: list[str]


class Source(Protocol):
    """A finite set of examples, read by index from several threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Those of example `index`, without its image."""
        ...

    def label(self, index: int) -> str:
        """That of example `index`, without its image."""
        ...

    def fingerprint(self) -> str:
        """Another text when the set holds something else: what was made of it has then expired."""
        ...


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A source whose only caption is its label, for models that are told a class."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return Example(**(example | {'captions': self._one(example['label'])}))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._one(self.label(index))

    def label(self, index: int) -> str:
        return self.source.label(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def _one(self, label: str) -> tuple[str]:
        if not label:
            raise UserError('the data have no labels: a model of classes needs a set that has them')
        return (label,)


def batches(
    source: Source,
    *,
    batch: int,
    seed: int,
    step: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 4,
    crop: tuple[int, int] | None = None,
) -> Iterator[Batch]:
    """Batches without end from `step` on: each epoch in a new order, one caption drawn per image.

    A random part of `crop` (height, width) pixels of every image is used, each time anew (None: all
    of it).
    `batch` counts the images of all processes; this process gets the `rows` of it with these
    numbers, by default all. `threads` read ahead, 0 reads in the caller's; `close()` of the
    iterator stops them. Raises UserError for an empty source.
    """
    _require(source, batch)
    rows = _check_rows(rows, batch)
    if step < 0:
        raise UserError(f'a run goes on from step {step}: expected 0 or more')
    samples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if crop:
        samples = samples.random_map(functools.partial(_crop, crop))
    captioned = samples.random_map(_draw_caption)
    held = grain.MapDataset.source(_Held(captioned, batch, rows))
    # An endless set has no remainder, but without this grain's length overflows at size 1.
    blocks = held.batch(len(rows), batch_fn=_collate, drop_remainder=True)
    iterator = iter(blocks.to_iter_dataset(_read_options(threads)))
    iterator.set_state({'next_index': step})
    return iterator


def sequential(source: Source, batch: int, threads: int = 4, first: int = 0) -> Iterator[Batch]:
    """Every example from number `first` on, in order, with its first caption.

    The last batch may be short. Raises UserError for an empty source.
    """
    _require(source, batch)
    captioned = grain.MapDataset.source(source)[first:].map(_first_caption)
    blocks = captioned.batch(batch, batch_fn=_collate)
    return iter(blocks.to_iter_dataset(_read_options(threads)))


def padded(
    source: Source, batch: int, rows: Sequence[int] | None = None, threads: int = 4
) -> Iterator[tuple[Batch, int]]:
    """As `sequential`, all batches of one size: the last repeats the last example.

    This process gets the `rows` of each with these numbers, by default all; with each comes how
    many rows of the whole batch are real.
    """
    _require(source, batch)
    rows = _check_rows(rows, batch)
    captioned = grain.MapDataset.source(source).map(_first_caption)
    held = grain.MapDataset.source(_Held(captioned, batch, rows))
    blocks = held.batch(len(rows), batch_fn=_collate)
    for number, block in enumerate(blocks.to_iter_dataset(_read_options(threads))):
        yield block, min(batch, len(source) - number * batch)


@dataclasses.dataclass(frozen=True)
class _Held:
    """The rows with these numbers of all batches of a set, in order; its last example again where
    the last batch has no more."""

    samples: grain.MapDataset
    batch: int
    rows: Sequence[int]

    def __len__(self) -> int:
        batches = -(-len(self.samples) // self.batch)
        return min(batches * len(self.rows), sys.maxsize)

    def __getitem__(self, index: int) -> dict:
        number, place = divmod(index, len(self.rows))
        sample = number * self.batch + int(self.rows[place])
        return self.samples[min(sample, len(self.samples) - 1)]


def _check_rows(rows: Sequence[int] | None, batch: int) -> Sequence[int]:
    rows = range(batch) if rows is None else rows
    if not len(rows) or min(rows) < 0 or max(rows) >= batch:
        raise UserError(f'rows {list(rows)} of a batch of {batch}: expected numbers below {batch}')
    return rows


def _require(source: Source, batch: int) -> None:
    if len(source) == 0:
        raise UserError(
            'the data set is empty: expected at least one example, choose another split'
        )
    if batch < 1:
        raise UserError(f'a batch of {batch}: expected at least one image')


def _read_options(threads: int) -> grain.ReadOptions:
    """Few batches ahead: grain's default of 500 would hold gigabytes of pictures."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _crop(size: tuple[int, int], example: Example, rng: np.random.Generator) -> Example:
    image = example['image']
    height, width = size
    top, left = rng.integers(0, np.array(image.shape[:2]) - size + 1)
    return Example(**(example | {'image': image[top : top + height, left : left + width]}))


def _draw_caption(example: Example, rng: np.random.Generator) -> dict[str, np.ndarray | str]:
    return _with_caption(example, int(rng.integers(len(example['captions']))))


def _first_caption(example: Example) -> dict[str, np.ndarray | str]:
    return _with_caption(example, 0)


def _with_caption(example: Example, which: int) -> dict[str, np.ndarray | str]:
    """The example with one caption; whatever stands for its image stays."""
    kept = {name: value for name, value in example.items() if name != 'captions'}
    return kept | {'caption': example['captions'][which]}


def _collate(samples: Sequence[dict]) -> Batch:
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {
        name: np.stack(column) if isinstance(column[0], np.ndarray) else column
        for name, column in columns.items()
    }


def spread(source: Source, count: int) -> Batch:
    """`count` examples, evenly spread over the source, with their first captions."""
    _require(source, count)
    return _collate([_first_caption(source[place]) for place in _places(source, count)])


def fingerprint(source: Source, *facts: object) -> str:
    """Hex digest of a set's length, of a few of its examples and of plain `facts` about the rest.

    Raises UserError for an empty source.
    """
    _require(source, TOUCHED)
    digest = hashlib.sha256(repr((len(source), facts)).encode())
    for place in _places(source, TOUCHED):
        example = source[place]
        digest.update(example['image'].tobytes() + repr(example['captions']).encode())
    return digest.hexdigest()


def outline(source: Source) -> str:
    """How many examples a set has, and a few of its captions: what its copies have in common."""
    _require(source, TOUCHED)
    return repr((len(source), [source.captions(place) for place in _places(source, TOUCHED)]))


def _places(source: Source, count: int) -> list[int]:
    """Numbers of examples, evenly spread."""
    return [int(n) for n in np.linspace(0, len(source) - 1, min(count, len(source)))]


def pad(batch: Batch, rows: int) -> tuple[Batch, int]:
    """A batch with its last row repeated up to `rows`, and how many rows are real."""
    real = len(batch['caption'])
    places = np.minimum(np.arange(rows), real - 1)
    padded = {
        name: column[places] if isinstance(column, np.ndarray) else [column[n] for n in places]
        for name, column in batch.items()
    }
    return padded, real
