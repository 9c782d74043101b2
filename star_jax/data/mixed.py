"""Which aspect ratio does the batch of a step have, where images have several?

Every image belongs to the template nearest to its ratio of height to width, and a batch holds
images of one template. The images of a template, in an order that is new in every epoch, form one
endless sequence, which is cut into batches: no image is left out, and a template has exactly the
share of the images in the batches that it has in the data. The order of everything is a function of
the seed and the step, so a run continues at any step, with any number of processes.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from star_jax import files
from star_jax.console import track
from star_jax.data import pipeline
from star_jax.data.caption_choice import ANY_CAPTION, CaptionChoice
from star_jax.data.pipeline import Batch, Example, Source
from star_jax.parallel import mesh

PROGRESS_FROM = 20_000  # images: the ratios of fewer are read at once
SAMPLED = 64  # ratios that identify all of them, with the fingerprint of a source
SLOW = 30  # seconds

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class MixedSource:
    """A source whose images have the sizes of their templates.

    Attributes:
        source: the examples, with captions and labels.
        sized: the same examples at the size of each template, or its encoded examples alone.
        template_of: [n] the number of the template of every example.
    """

    source: Source
    sized: tuple['Source | Encoded', ...]
    template_of: np.ndarray

    def __len__(self) -> int:
        return len(self.template_of)

    def __getitem__(self, index: int) -> Example:
        return self.sized[self.template_of[index]][int(index)]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(int(index))

    def label(self, index: int) -> str:
        return self.source.label(int(index))

    def fingerprint(self) -> str:
        """Digest of the contents and of the template of every example."""
        templates = hashlib.sha256(self.template_of.tobytes()).hexdigest()
        return f'{self.source.fingerprint()} {templates}'

    @functools.cached_property
    def counts(self) -> list[int]:
        """The number of examples of every template."""
        return np.bincount(self.template_of, minlength=len(self.sized)).tolist()

    def members(self, template: int) -> np.ndarray:
        """The numbers of the examples of a template."""
        return np.flatnonzero(self.template_of == template)

    def of_template(self, template: int) -> 'Subset':
        """The examples of a template alone."""
        return Subset(self.sized[template], self.members(template))


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of a source.

    Attributes:
        source: the source.
        members: their numbers in it.
    """

    source: Source
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.members[index])]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(int(self.members[index]))

    def label(self, index: int) -> str:
        return self.source.label(int(self.members[index]))

    def fingerprint(self) -> str:
        """Digest of the numbers and of a few examples."""
        return pipeline.fingerprint(self, hashlib.sha256(self.members.tobytes()).hexdigest())


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """The encoded examples of a template, by their numbers in the whole source.

    Attributes:
        part: the examples of the template alone, encoded.
        members: their numbers in the whole source.
    """

    part: Source
    members: np.ndarray

    def __getitem__(self, index: int) -> Example:
        return self.part[int(np.searchsorted(self.members, index))]


def sort(source: Source, sizes: Sequence[tuple[int, int]], ratios: Sequence[float]) -> MixedSource:
    """Sorts the examples of a source into templates.

    Args:
        source: the examples.
        sizes: (height, width) in pixels of the images of each template.
        ratios: height divided by width of each template; the first of equally near ones is taken.
    """
    ratio_N, count = _read_ratios(source), len(source)
    ratios_T, template_of = np.asarray(ratios), np.empty(count, np.int32)
    for first in range(0, count, PROGRESS_FROM):
        part = slice(first, first + PROGRESS_FROM)
        template_of[part] = np.abs(ratio_N[part, None] - ratios_T).argmin(1)
    return MixedSource(source, tuple(source.at(size) for size in sizes), template_of)


def _read_ratios(source: Source) -> np.ndarray:
    """[n] height divided by width of every example.

    A large prepared set is read once: what took long is kept in the user's cache folder.
    """
    count, start = len(source), time.monotonic()
    shown = [source.ratio(index) for index in pipeline.even_indices(source, SAMPLED)]
    digest = hashlib.sha256(f'{source.fingerprint()} {count} {shown}'.encode()).hexdigest()
    path = files.cache_folder() / 'ratios' / f'{digest[:24]}.npy'
    with contextlib.suppress(OSError, ValueError, EOFError):
        stored = np.load(path, allow_pickle=False)
        if stored.shape == (count,) and stored.dtype == np.float64:
            return stored
    numbers = grain.MapDataset.source(range(count)).map(source.ratio)
    read = numbers.to_iter_dataset(grain.ReadOptions(num_threads=mesh.cores()))
    visible = count >= PROGRESS_FROM
    ratio_N = np.fromiter(track(read, 'reading aspect ratios', count, visible), np.float64, count)
    if time.monotonic() - start > SLOW:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as temporary, temporary.open('wb') as file:
                np.save(file, ratio_N)
        except OSError as error:
            log.warning('%s cannot be written (%s): ratios are read again next time', path, error)
    return ratio_N


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The template and the examples of every batch.

    Attributes:
        source: the sorted examples.
        batch: images per batch, of all processes together.
        seed: seed of the order.
    """

    source: MixedSource
    batch: int
    seed: int

    def template(self, step: int) -> int:
        """The template of a batch."""
        return self._place(step)[0]

    def example(self, step: int, row: int) -> int:
        """The number of the example in a row of a batch."""
        template, number = self._place(step)
        return int(self._streams[template][number * self.batch + row])

    def _place(self, step: int) -> tuple[int, int]:
        """The template of a batch, and how many batches of it precede."""
        # Epoch e ends with the last full batch of each template that e + 1 epochs fill.
        most = (step + len(self.source.counts) + 1) * self.batch // len(self.source) + 2
        epoch = bisect.bisect_right(range(most), step, key=self._first_of_epoch) - 1
        return self._batches(epoch)[step - self._first_of_epoch(epoch)]

    def _full(self, epochs: int) -> list[int]:
        """How many batches of each template so many epochs fill."""
        return [epochs * count // self.batch for count in self.source.counts]

    def _first_of_epoch(self, epoch: int) -> int:
        """The number of the first batch of an epoch."""
        return sum(self._full(epoch))

    def _batches(self, epoch: int) -> Sequence[tuple[int, int]]:
        """The template and the number within it of every batch of an epoch, in their order."""
        return _shuffled_batches(tuple(self._full(epoch)), tuple(self._full(epoch + 1)), self.seed)

    @functools.cached_property
    def _streams(self) -> list[grain.MapDataset | None]:
        """The endless sequence of the examples of every template, None for those without any."""
        return [
            grain.MapDataset.source(self.source.members(template))
            .seed(self.seed + template)
            .shuffle()
            .repeat()
            if count
            else None
            for template, count in enumerate(self.source.counts)
        ]


@functools.lru_cache(maxsize=4)
def _shuffled_batches(
    firsts: tuple[int, ...], ends: tuple[int, ...], seed: int
) -> Sequence[tuple[int, int]]:
    """(template, number) of the batches from `firsts` to `ends` of each template, shuffled."""
    listed = [
        (template, number)
        for template, (first, end) in enumerate(zip(firsts, ends, strict=True))
        for number in range(first, end)
    ]
    order = np.random.default_rng([seed, sum(firsts)]).permutation(len(listed))
    return [listed[position] for position in order]


def batches(
    source: MixedSource,
    *,
    batch: int,
    seed: int,
    step: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 4,
    captions: CaptionChoice = ANY_CAPTION,
) -> Iterator[tuple[int, Batch]]:
    """Endless pairs of a template and a batch of its images, each with one caption.

    Args:
        source: the sorted examples.
        batch: images per batch, of all processes together.
        seed: seed of order and captions.
        step: number of the first batch.
        rows: the rows of every batch that this process reads (None: all).
        threads: threads that read ahead.
        captions: chooses the caption of an image in a step.

    Raises:
        UserError: the source is empty, or an argument is invalid.
    """
    order = Order(source, batch, seed)
    samples = grain.MapDataset.source(_Samples(order)).seed(seed)
    read = pipeline.captioned_batches(
        samples, batch=batch, step=step, rows=rows, threads=threads, captions=captions
    )
    for number, found in enumerate(read, step):
        yield order.template(number), found


@dataclasses.dataclass(frozen=True, eq=False)
class _Samples:
    """The examples of all batches, one after the other."""

    order: Order

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Example:
        return self.order.source[self.order.example(*divmod(index, self.order.batch))]
