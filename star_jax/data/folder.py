"""How does a folder of a user's images become a dataset?

`listing` finds the images and their captions, `image_checks` finds which can be read, and `splits`
chooses those that are held out. Images that cannot be used are left out and logged with the reason.
Images are read from the folder; `prepare` writes them into a prepared dataset instead.
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

from star_jax import image_io
from star_jax.console import track
from star_jax.core.argument_types import OMITTED, check_types
from star_jax.data import image_checks, image_files, listing, pipeline, prepared, splits
from star_jax.data.pipeline import Example
from star_jax.data.resizing import LANCZOS, Resizing
from star_jax.data.tree import Fault, File
from star_jax.errors import UserError
from star_jax.image_io import height_and_width
from star_jax.parallel import mesh

ALL = 'all'
SPLITS = (*splits.SPLITS, ALL)
MAX_ENLARGEMENT = 4  # factor: smaller images show too little when enlarged to the target size
TOO_SMALL = 'too small'
MAX_LOGGED = 5  # faults of each kind that are logged one by one; all are counted

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of images with captions, and the folders below it, as `listing` describes.

    The folders train, val and test in it (or other common names of them, in any case) are its
    splits, and so are the values of a field `split` of records; images of neither are for training.
    Without val, the split 'validation' is the test images. A folder without any of them has the
    splits 'train' and 'validation'.

    Attributes:
        path: folder of the images.
        split: 'train', 'validation', 'test', or 'all', which is all but the test images.
        held_out: approximate share of the images in the split 'validation' if no folder or record
            names a split; the path of an image decides, so that adding images moves no others.
        caption: field of the list of captions ('': the first of text, caption and captions).
        resizing: how images are resized: by Lanczos (the exact centre, or to whole pixels that
            cover it as Infinity), or halved and then by bicubic (LlamaGen); another kind is chosen
            in a config file.
    """

    path: str = ''
    split: str = 'train'
    held_out: float = 0.1
    caption: str = ''
    resizing: Resizing = dataclasses.field(default=LANCZOS, metadata=OMITTED)

    def __post_init__(self) -> None:
        check_types(self)
        if self.split not in SPLITS:
            raise UserError(
                f'a folder of images has no split {self.split!r}: choose one of {", ".join(SPLITS)}'
            )
        if not 0 <= self.held_out < 1:
            raise UserError(f'held_out is a share in [0, 1), not {self.held_out}')

    def open(self, size: int | tuple[int, int]) -> 'FolderSource':
        """The images of the split, cropped to a size.

        On the first call every image is decoded to find which can be used. Faults of this split are
        logged.

        Args:
            size: side of a square, or (height, width), in pixels.

        Raises:
            UserError: the folder does not exist, or holds no usable image.
        """
        source = self.open_all(size)
        assigned = source.assign(self.held_out)
        counts, split = assigned.counts(source.names), self.split
        if split == splits.VALIDATION and split not in counts and splits.TEST in counts:
            log.warning(
                '%s has no validation images: its test images are the split validation',
                self.path,
            )
            split = splits.TEST
        kept = {splits.TRAIN, splits.VALIDATION} if split == ALL else {split}
        found = dataclasses.replace(
            source,
            entries=tuple(e for e in source.entries if assigned.split(e.name) in kept),
            faults=tuple(f for f in source.faults if assigned.fault_split(f.name) in kept),
        )
        if not found.entries:
            raise self._no_split(counts, assigned.by_user)
        _log_faults(self.path, found)
        return found

    def open_all(self, size: int | tuple[int, int]) -> 'FolderSource':
        """The images of all splits, those for tests, too; arguments and errors as for `open`."""
        root = _root(self.path)
        contents = listing.read(root, self.caption)
        if not contents.captions and not contents.faults:
            raise UserError(
                f'{self.path} holds no image: expected PNG, JPEG or WebP files with captions in '
                f'metadata.jsonl or another list, or in a {listing.TEXT_SUFFIX} file beside each'
            )
        entries, faults = _check_entries(root, contents, max(height_and_width(size)))
        if not entries:
            raise UserError(
                f'{self.path} holds no usable image, skipped: {_counts(faults)}; '
                f'the first is {faults[0].name}: {faults[0].reason}'
            )
        files = {entry.name: contents.files[entry.name] for entry in entries}
        return FolderSource(
            root=root,
            size=size,
            entries=entries,
            files=files,
            splits=contents.splits,
            faults=faults,
            resizing=self.resizing,
        )

    def has_test_images(self) -> bool:
        """Whether there is a split 'test'; raises UserError as `open`."""
        contents = listing.read(_root(self.path), self.caption)
        assigned = splits.assign(tuple(contents.captions), (), contents.splits, share=0)
        return splits.TEST in assigned.counts(contents.captions)

    def _no_split(self, counts: Mapping[str, int], by_user: bool) -> UserError:
        """The error for a split without images."""
        if by_user:
            add = '' if self.split == ALL else f'add a folder {self.split}, or '
            if self.split == splits.VALIDATION:
                add += (
                    'give the folder of the training images as path, which is divided if its '
                    'records name no split, or '
                )
            return UserError(
                f'{self.path} has no usable images of the split {self.split!r}, only '
                f'{counts_text(counts)}: {add}name another split'
            )
        return UserError(
            f'{self.path} has no split {self.split!r} with {sum(counts.values())} usable image(s) '
            f"and held_out {self.held_out}: use split='all', or add images"
        )


@dataclasses.dataclass(frozen=True)
class FolderEntry:
    """A usable image.

    Attributes:
        name: path relative to the folder.
        captions: one or more captions.
        stamp: `file_stamp` of the file when it was checked.
        shorter_side: shorter side of the image, in pixels.
        ratio: height divided by width.
    """

    name: str
    captions: tuple[str, ...]
    stamp: tuple[int, int]
    shorter_side: int
    ratio: float = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FolderSource:
    """Random access to the images of a folder, a `pipeline.Source`.

    Attributes:
        root: the folder.
        size: side of a square, or (height, width), in pixels.
        entries: the usable images.
        files: where they are, by their names.
        splits: the splits that records state, by the names of the images.
        faults: the records that were left out.
        resizing: how images are resized.
    """

    root: Path
    size: int | tuple[int, int]
    entries: tuple[FolderEntry, ...]
    files: Mapping[str, File]
    splits: Mapping[str, str]
    faults: tuple[Fault, ...]
    resizing: Resizing

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    def assign(self, held_out: float) -> splits.Assignment:
        """The splits of its images, of which a share is held out if no folder decides."""
        faults = [fault.name for fault in self.faults]
        return splits.assign(self.names, faults, self.splits, held_out)

    @property
    def enlarged(self) -> int:
        """Number of images that are enlarged to the target size."""
        return sum(entry.shorter_side < max(height_and_width(self.size)) for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        entry = self.entries[operator.index(index)]
        return Example(image=self._image(entry), captions=entry.captions, label='')

    def captions(self, index: int) -> tuple[str, ...]:
        return self.entries[operator.index(index)].captions

    def label(self, index: int) -> str:
        """Empty: a folder of images has no labels."""
        return ''

    def ratio(self, index: int) -> float:
        return self.entries[operator.index(index)].ratio

    def at(self, size: int | tuple[int, int]) -> 'FolderSource':
        return dataclasses.replace(self, size=size)

    def fingerprint(self) -> str:
        """Digest of the names, sizes and modification times of the images, and of all captions."""
        return pipeline.fingerprint(self, *self.entries)

    def _image(self, entry: FolderEntry) -> np.ndarray:
        path, file = self.root / entry.name, self.files[entry.name]
        if image_checks.file_stamp(file) != entry.stamp:
            raise UserError(
                f'{path} has vanished or changed since the dataset was opened: '
                'restore it, or start again without it'
            )
        try:
            return image_files.read(file, self.size, self.resizing)
        except image_files.UnfitError as error:
            raise UserError(
                f'{path} could be read when the dataset was opened, but now {error}: restore it'
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSummary:
    """The result of `prepare`.

    Attributes:
        images: images per split.
        skipped: records that were left out.
        seconds: duration.
        megabytes: size on disk.
    """

    images: Mapping[str, int]
    skipped: int
    seconds: float
    megabytes: float


def prepare(folder: Folder, out: Path, size: int, whole: bool = False) -> FolderSummary:
    """Writes the images of a folder as PNGs into a prepared dataset.

    Its splits are those of the folder that have images.

    Args:
        folder: the images; `folder.split` is ignored.
        out: folder of the prepared dataset.
        size: side of the images in pixels.
        whole: keep the ratio of every image; its shorter side has `size`, and nothing is cropped.

    Raises:
        UserError: as `Folder.open` and `prepared.write`.
    """
    start = time.monotonic()
    prepared.check_free(Path(out))  # before all images are read
    source = folder.open_all(size)
    _log_faults(folder.path, source)
    assigned = source.assign(folder.held_out)
    indices = collections.defaultdict(list)
    for index, entry in enumerate(source.entries):
        indices[assigned.split(entry.name)].append(index)
    splits_of = sorted(indices.items())
    prepared.write(
        out,
        {split: _records(source, numbers, split, whole) for split, numbers in splits_of},
        name='folder',
        description=f'The images of a folder, {size} px, prepared by star_jax.data.folder.',
    )
    return FolderSummary(
        images=assigned.counts(source.names),
        skipped=len(source.faults),
        seconds=time.monotonic() - start,
        megabytes=sum(file.stat().st_size for file in Path(out).iterdir()) / 1e6,
    )


def _records(
    source: FolderSource, numbers: Sequence[int], split: str, whole: bool
) -> Iterator[prepared.Record]:
    """The records in order, encoded by threads a few records ahead."""
    threads = mesh.cores()
    records = grain.MapDataset.source(numbers).map(functools.partial(_record, source, whole))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return track(
        records.to_iter_dataset(options),
        f'writing {split}',
        total=len(numbers),
        visible=len(numbers) >= image_checks.PROGRESS_FROM,
    )


def _record(source: FolderSource, whole: bool, index: int) -> prepared.Record:
    if whole:
        source = source.at(_whole_size(source.size, source.ratio(index)))
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


def _whole_size(shorter: int, ratio: float) -> tuple[int, int]:
    """(height, width) of an image with this shorter side and ratio of height to width."""
    return round(shorter * max(ratio, 1)), round(shorter * max(1 / ratio, 1))


def _root(path: str) -> Path:
    root = Path(os.path.expanduser(path))
    if not path:
        raise UserError(
            'no folder of images was given: set path= in a config, or --data.path FOLDER'
        )
    if not os.path.isdir(root):
        raise UserError(f'{path} is not a folder: expected a folder with images and their captions')
    if prepared.is_prepared(root):
        raise UserError(
            f"{path} holds a prepared dataset: in a config write Prepared(path='{path}')"
        )
    return root


def _check_entries(
    root: Path, contents: listing.Listing, size: int
) -> tuple[tuple[FolderEntry, ...], tuple[Fault, ...]]:
    """The images that can be used at this size, sorted by name, and all faults."""
    entries, faults = [], list(contents.faults)
    for name, check in image_checks.check_images(root, contents.files).items():
        if check.kind:
            faults.append(Fault(check.kind, name, check.reason))
        elif check.shorter_side * MAX_ENLARGEMENT < size:
            least = -(-size // MAX_ENLARGEMENT)
            reason = f'its shorter side is {check.shorter_side} px, expected {least} for {size} px'
            faults.append(Fault(TOO_SMALL, name, reason))
        else:
            stamp = (check.size, check.modified)
            sides = check.shorter_side, check.ratio
            entries.append(FolderEntry(name, contents.captions[name], stamp, *sides))
    return tuple(entries), tuple(faults)


def counts_text(counts: Mapping[str, int]) -> str:
    """Images per split: 'train 30, validation 10'."""
    return ', '.join(f'{split} {count:,}' for split, count in counts.items())


def _counts(faults: Iterable[Fault]) -> str:
    kinds = collections.Counter(fault.kind for fault in faults)
    return ', '.join(f'{kind} {count:,}' for kind, count in kinds.most_common())


def _log_faults(path: str, source: FolderSource) -> None:
    """Logs the first faults of each kind by name, and the number of all."""
    counts = collections.Counter()
    for fault in source.faults:
        counts[fault.kind] += 1
        if counts[fault.kind] <= MAX_LOGGED:
            log.warning('%s: skipped %s (%s): %s', path, fault.name, fault.kind, fault.reason)
    if source.faults:
        skipped, kinds = len(source.faults), _counts(source.faults)
        total = skipped + len(source)
        log.warning('%s: skipped %d of %d records: %s', path, skipped, total, kinds)
    if source.enlarged:
        sizes = f'{max(height_and_width(source.size))} px and are enlarged'
        log.warning('%s: %d of %d images are below %s', path, source.enlarged, len(source), sizes)
