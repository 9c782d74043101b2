"""Which images and captions are in the batch of a step?

All batches of a source come from here. The order of the data is a function of one integer, the
step: global batches are formed from one shuffled sequence, and every process reads the rows that
its devices hold. So a run continues at any step, with any number of processes.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict

import grain
import numpy as np

from star_jax.data.caption_choice import ANY_CAPTION, CaptionChoice
from star_jax.data.crops import Crop
from star_jax.errors import UserError

FINGERPRINT_EXAMPLES = 16  # examples that a fingerprint reads


class Example(TypedDict):
    """One captioned image.

    Attributes:
        image: (height, width, 3) uint8 RGB.
        captions: one or more captions, the most detailed first.
        label: name of the class, '' if there is none.
    """

    image: np.ndarray
    captions: tuple[str, ...]
    label: str


class Batch(TypedDict):
    """Several images, each with one caption and one label.

    Attributes:
        image: (batch, height, width, 3) uint8 RGB.
        caption: one caption per image.
        label: one label per image, '' if there is none.
    """

    image: np.ndarray
    caption: list[str]
    label: list[str]


class Source(Protocol):
    """A finite set of examples, read by index from several threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of example `index`, without reading its image."""
        ...

    def label(self, index: int) -> str:
        """The label of example `index`, without reading its image."""
        ...

    def ratio(self, index: int) -> float:
        """Height divided by width of example `index` before it is cropped."""
        ...

    def at(self, size: int | tuple[int, int]) -> 'Source':
        """The same examples with images of another size."""
        ...

    def fingerprint(self) -> str:
        """A text that changes with the contents: caches made from other contents are invalid."""
        ...


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A source with the label as its only caption, for class-conditional models.

    Attributes:
        source: the examples.
    """

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return Example(**(example | {'captions': self._captions(example['label'])}))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(self.label(index))

    def label(self, index: int) -> str:
        return self.source.label(index)

    def ratio(self, index: int) -> float:
        return self.source.ratio(index)

    def at(self, size: int | tuple[int, int]) -> 'Labelled':
        return Labelled(self.source.at(size))

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def _captions(self, label: str) -> tuple[str]:
        if not label:
            raise UserError(
                'the data have no labels: a class-conditional model needs a dataset with labels'
            )
        return (label,)


def batches(
    source: Source,
    *,
    batch: int,
    seed: int,
    step: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 4,
    crop: Crop | None = None,
    captions: CaptionChoice = ANY_CAPTION,
) -> Iterator[Batch]:
    """Endless batches: every epoch has a new order, and every image one random caption.

    Args:
        source: the dataset.
        batch: images per batch, of all processes together.
        seed: seed of order, captions and crops.
        step: number of the first batch.
        rows: the rows of every batch that this process reads (None: all).
        threads: threads that read ahead (0: read in the thread of the caller); `close()` of the
            iterator stops them.
        crop: changes every example, with random numbers of its own (None: it stays).
        captions: chooses among the captions of an image.

    Raises:
        UserError: the source is empty, or an argument is invalid.
    """
    _check_source(source, batch)
    samples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if crop:
        samples = samples.random_map(crop)
    return captioned_batches(
        samples, batch=batch, step=step, rows=rows, threads=threads, captions=captions
    )


def captioned_batches(
    samples: grain.MapDataset,
    *,
    batch: int,
    step: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 4,
    captions: CaptionChoice = ANY_CAPTION,
) -> Iterator[Batch]:
    """Batches of an endless sequence of examples, each with one caption of its own.

    Arguments and errors are those of `batches`.
    """
    rows = _check_rows(rows, batch)
    if step < 0:
        raise UserError(f'the first batch has step {step}: expected 0 or more')
    captioned = samples.random_map(functools.partial(_random_caption, captions))
    process_rows = grain.MapDataset.source(_BatchRows(captioned, batch, rows))
    # An endless sequence has no remainder, but without `drop_remainder` the length that grain
    # computes overflows at size 1.
    collated = process_rows.batch(len(rows), batch_fn=_collate, drop_remainder=True)
    iterator = iter(collated.to_iter_dataset(_read_options(threads)))
    iterator.set_state({'next_index': step})
    return iterator


def sequential(source: Source, batch: int, threads: int = 4, first: int = 0) -> Iterator[Batch]:
    """All examples in order, each with its first caption; the last batch may be shorter.

    Args:
        source: the dataset.
        batch: images per batch.
        threads: threads that read ahead.
        first: number of the first example.

    Raises:
        UserError: the source is empty.
    """
    _check_source(source, batch)
    captioned = grain.MapDataset.source(source)[first:].map(_first_caption)
    collated = captioned.batch(batch, batch_fn=_collate)
    return iter(collated.to_iter_dataset(_read_options(threads)))


def padded_batches(
    source: Source, batch: int, rows: Sequence[int] | None = None, threads: int = 4
) -> Iterator[tuple[Batch, int]]:
    """All examples in order, in batches of one size: the last one repeats the last example.

    Args:
        source: the dataset.
        batch: images per batch, of all processes together.
        rows: the rows of every batch that this process reads (None: all).
        threads: threads that read ahead.

    Yields:
        A batch of these rows, and the number of rows of the global batch that are not repeated.
    """
    _check_source(source, batch)
    rows = _check_rows(rows, batch)
    captioned = grain.MapDataset.source(source).map(_first_caption)
    process_rows = grain.MapDataset.source(_BatchRows(captioned, batch, rows))
    collated = process_rows.batch(len(rows), batch_fn=_collate)
    for number, part in enumerate(collated.to_iter_dataset(_read_options(threads))):
        yield part, min(batch, len(source) - number * batch)


@dataclasses.dataclass(frozen=True)
class _BatchRows:
    """Some rows of every batch, in order; a row after the last example repeats it."""

    samples: grain.MapDataset
    batch: int
    rows: Sequence[int]

    def __len__(self) -> int:
        batches = -(-len(self.samples) // self.batch)
        return min(batches * len(self.rows), sys.maxsize)

    def __getitem__(self, index: int) -> dict:
        number, row = divmod(index, len(self.rows))
        sample = number * self.batch + int(self.rows[row])
        return self.samples[min(sample, len(self.samples) - 1)]


def _check_rows(rows: Sequence[int] | None, batch: int) -> Sequence[int]:
    rows = range(batch) if rows is None else rows
    if not len(rows) or min(rows) < 0 or max(rows) >= batch:
        raise UserError(f'rows {list(rows)} of a batch of {batch}: expected numbers below {batch}')
    return rows


def _check_source(source: Source, batch: int) -> None:
    if len(source) == 0:
        raise UserError('the dataset is empty: expected at least one example, choose another split')
    if batch < 1:
        raise UserError(f'a batch of {batch}: expected at least one image')


def _read_options(threads: int) -> grain.ReadOptions:
    """Few batches ahead: with grain's default of 500, gigabytes of images would be in memory."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _random_caption(
    choice: CaptionChoice, example: Example, rng: np.random.Generator
) -> dict[str, np.ndarray | str]:
    return _with_caption(example, choice.choose(example['captions'], rng))


def _first_caption(example: Example) -> dict[str, np.ndarray | str]:
    return _with_caption(example, example['captions'][0])


def _with_caption(example: Example, caption: str) -> dict[str, np.ndarray | str]:
    """The example with one caption; all other fields stay (codes instead of an image, too)."""
    others = {name: value for name, value in example.items() if name != 'captions'}
    return others | {'caption': caption}


def _collate(samples: Sequence[dict]) -> Batch:
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {
        name: np.stack(column) if isinstance(column[0], np.ndarray) else column
        for name, column in columns.items()
    }


def evenly_spaced(source: Source, count: int) -> Batch:
    """At most `count` examples, evenly spaced in the source, with their first captions."""
    _check_source(source, count)
    return _collate([_first_caption(source[index]) for index in even_indices(source, count)])


def fingerprint(source: Source, *facts: object) -> str:
    """Hex digest of the contents of a source, for its method `fingerprint`.

    It covers the length and a few examples.

    Args:
        source: the source.
        facts: values that identify the rest of the contents; their `repr` is used.

    Raises:
        UserError: the source is empty.
    """
    _check_source(source, FINGERPRINT_EXAMPLES)
    digest = hashlib.sha256(repr((len(source), facts)).encode())
    for index in even_indices(source, FINGERPRINT_EXAMPLES):
        example = source[index]
        digest.update(example['image'].tobytes() + repr(example['captions']).encode())
    return digest.hexdigest()


def caption_fingerprint(source: Source) -> str:
    """The number of examples and a few captions: equal for copies of a dataset at any size."""
    _check_source(source, FINGERPRINT_EXAMPLES)
    indices = even_indices(source, FINGERPRINT_EXAMPLES)
    return repr((len(source), [source.captions(index) for index in indices]))


def even_indices(source: Source, count: int) -> list[int]:
    """Evenly spaced numbers of examples."""
    return [int(n) for n in np.linspace(0, len(source) - 1, min(count, len(source)))]


def pad(batch: Batch, rows: int) -> tuple[Batch, int]:
    """A batch with its last row repeated up to `rows`, and the number of rows before that."""
    real = len(batch['caption'])
    indices = np.minimum(np.arange(rows), real - 1)
    padded = {
        name: column[indices] if isinstance(column, np.ndarray) else [column[n] for n in indices]
        for name, column in batch.items()
    }
    return padded, real
