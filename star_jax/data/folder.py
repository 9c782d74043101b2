"""How does a folder of somebody's own images become a set?

`listing` says which pictures lie there and what is said of them, `verdicts` which of them can be
read, `splits` which are kept from training. What cannot be used is named in the log with its reason
and left out. Pictures are read where they lie; `prepare` writes them into a prepared set instead.
"""

import collections
import dataclasses
import functools
import logging
import operator
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import grain
import numpy as np
from rich.console import Console
from rich.progress import track

from star_jax import image_io
from star_jax.data import listing, photos, pipeline, prepared, splits, verdicts
from star_jax.data.listing import Fault
from star_jax.data.pipeline import Example
from star_jax.errors import UserError
from star_jax.image_io import height_and_width
from star_jax.parallel import mesh

SPLITS = ('train', 'validation', 'all')
MOST_ENLARGED = 4  # times: a shorter side below the wanted one's quarter shows too little
TOO_SMALL = 'too small'
NAMED = 5  # faults of each kind that the log names; it counts them all

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of images with captions, and the folders below it, as `listing` describes.

    Attributes:
        path: folder of the images.
        split: 'train', 'validation', or 'all'.
        held_out: approximate share of the images in the split 'validation'; the path of an image
            decides its split, so that adding images moves no others.
        caption: field of the list of captions ('': the first of text, caption and captions).
    """

    path: str = ''
    split: str = 'train'
    held_out: float = 0.1
    caption: str = ''

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(
                f'a folder of images has no split {self.split!r}: choose one of {", ".join(SPLITS)}'
            )
        if not 0 <= self.held_out < 1:
            raise UserError(f'held_out is a share in [0, 1), not {self.held_out}')

    def open(self, size: int | tuple[int, int]) -> 'Source':
        """Its images as crops of `size`: a side, or height and width, in pixels.

        The first time every image is decoded, to know which can be used. Faults of this split are
        in the log. Raises UserError where there is no such folder, or nothing in it can be used.
        """
        root = _root(self.path)
        listed = listing.read(root, self.caption)
        if not listed.captions and not listed.faults:
            raise UserError(
                f'{self.path} holds no image: expected PNG, JPEG or WebP files with captions in '
                f'{" or ".join(listing.LISTS)}, or in a {listing.TEXT} file beside each'
            )
        entries, faults = _judged(root, listed, max(height_and_width(size)))
        if not entries:
            raise UserError(
                f'{self.path} holds no image that can be used, skipped: {_counts(faults)}; '
                f'the first is {faults[0].name}: {faults[0].reason}'
            )
        source = Source(root=root, size=size, entries=entries, faults=faults)
        source = source if self.split == 'all' else self._part(source)
        _report(self.path, source)
        return source

    def _part(self, source: 'Source') -> 'Source':
        """What of all images is in this split."""
        kept_back = splits.held_out([entry.name for entry in source.entries], self.held_out)
        if self.split == 'validation' and not kept_back:
            raise UserError(
                f"{self.path} has no split 'validation' with {len(source)} usable image(s) and "
                f"held_out {self.held_out}: use split='all', or add images"
            )
        wanted = self.split == 'validation'
        return dataclasses.replace(
            source,
            entries=tuple(e for e in source.entries if (e.name in kept_back) == wanted),
            faults=tuple(
                fault
                for fault in source.faults
                if (splits.fraction(fault.name) < self.held_out) == wanted
            ),
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image that can be used: its path, what is said of it, its file when it was judged."""

    name: str
    captions: tuple[str, ...]
    stamp: tuple[int, int]
    shorter: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Random access to the images; `faults` are the records that were left out."""

    root: Path
    size: int | tuple[int, int]
    entries: tuple[Entry, ...]
    faults: tuple[Fault, ...]

    @property
    def enlarged(self) -> int:
        """How many images have a shorter side below the wanted one."""
        return sum(entry.shorter < max(height_and_width(self.size)) for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        entry = self.entries[operator.index(index)]
        return Example(image=self._image(entry), captions=entry.captions, label='')

    def captions(self, index: int) -> tuple[str, ...]:
        return self.entries[operator.index(index)].captions

    def label(self, index: int) -> str:
        """A folder of images says no classes."""
        return ''

    def fingerprint(self) -> str:
        """Of the names, sizes and times of change of the images, and of all captions."""
        return pipeline.fingerprint(self, *self.entries)

    def _image(self, entry: Entry) -> np.ndarray:
        path = self.root / entry.name
        if verdicts.stamp(path) != entry.stamp:
            raise UserError(
                f'{path} has vanished or changed since the set was opened: '
                'put it back, or begin again without it'
            )
        try:
            return photos.read(path, self.size)
        except photos.UnfitError as fault:
            raise UserError(
                f'{path} could be read when the set was opened, and now {fault}'
            ) from fault


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What was prepared: images of each split, records left out, and its cost."""

    images: Mapping[str, int]
    skipped: int
    seconds: float
    megabytes: float


def prepare(folder: Folder, out: Path, size: int) -> Summary:
    """Writes the images of a folder as (size, size) PNGs into a prepared set in the folder `out`.

    Its splits are `train` and `validation`, the latter only if any image is held out;
    `folder.split` does not matter. Raises UserError as `Folder.open` and `prepared.write` do.
    """
    start = time.monotonic()
    prepared.check_free(Path(out))  # before all images are read
    source = dataclasses.replace(folder, split='all').open(size)
    kept_back = splits.held_out([entry.name for entry in source.entries], folder.held_out)
    indices = collections.defaultdict(list)
    for index, entry in enumerate(source.entries):
        indices['validation' if entry.name in kept_back else 'train'].append(index)
    prepared.write(
        out,
        {split: _records(source, places, split) for split, places in sorted(indices.items())},
        name='folder',
        description=f'The images of a folder, {size} px, prepared by star_jax.data.folder.',
    )
    return Summary(
        images={split: len(places) for split, places in sorted(indices.items())},
        skipped=len(source.faults),
        seconds=time.monotonic() - start,
        megabytes=sum(file.stat().st_size for file in Path(out).iterdir()) / 1e6,
    )


def _records(source: Source, places: Sequence[int], split: str) -> Iterator[prepared.Record]:
    """In order, encoded by threads that are a few records ahead."""
    threads = mesh.cores()
    records = grain.MapDataset.source(places).map(functools.partial(_record, source))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return track(
        records.to_iter_dataset(options),
        f'writing {split}',
        total=len(places),
        console=Console(stderr=True),
        disable=len(places) < verdicts.SHOWN_FROM,
    )


def _record(source: Source, index: int) -> prepared.Record:
    name, example = source.entries[index].name, source[index]
    return prepared.Record(
        key=name,
        image=image_io.encode(example['image']),
        captions=example['captions'],
        label='',
        source=f'{source.root.name}/{name}',
        licence='',
        attribution='',
    )


def _root(path: str) -> Path:
    root = Path(os.path.expanduser(path))
    if not path:
        raise UserError(
            'no folder of images was given: name it with path= in a config, or --data.path FOLDER'
        )
    if not os.path.isdir(root):
        raise UserError(f'{path} is no folder: expected one with images and their captions')
    if prepared.is_prepared(root):
        raise UserError(f"{path} holds a prepared set: in a config write Prepared(path='{path}')")
    return root


def _judged(
    root: Path, listed: listing.Listing, size: int
) -> tuple[tuple[Entry, ...], tuple[Fault, ...]]:
    """What can be used at this size, sorted by name, and every fault."""
    entries, faults = [], list(listed.faults)
    for name, verdict in verdicts.judge(root, list(listed.captions)).items():
        if verdict.kind:
            faults.append(Fault(verdict.kind, name, verdict.reason))
        elif verdict.shorter * MOST_ENLARGED < size:
            least = -(-size // MOST_ENLARGED)
            reason = f'its shorter side is {verdict.shorter} px, expected {least} for {size} px'
            faults.append(Fault(TOO_SMALL, name, reason))
        else:
            stamp = (verdict.length, verdict.changed)
            entries.append(Entry(name, listed.captions[name], stamp, verdict.shorter))
    return tuple(entries), tuple(faults)


def _counts(faults: Iterable[Fault]) -> str:
    kinds = collections.Counter(fault.kind for fault in faults)
    return ', '.join(f'{kind} {count:,}' for kind, count in kinds.most_common())


def _report(path: str, source: Source) -> None:
    """Tells what was left out and why: the first of each kind by name, all by number."""
    told = collections.Counter()
    for fault in source.faults:
        told[fault.kind] += 1
        if told[fault.kind] <= NAMED:
            log.warning('%s: skipped %s (%s): %s', path, fault.name, fault.kind, fault.reason)
    if source.faults:
        given = len(source.faults) + len(source)
        counts = _counts(source.faults)
        log.warning('%s: skipped %d of %d records: %s', path, len(source.faults), given, counts)
    if source.enlarged:
        sizes = f'{max(height_and_width(source.size))} px and are enlarged'
        log.warning('%s: %d of %d images are below %s', path, source.enlarged, len(source), sizes)
