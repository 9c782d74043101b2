"""Which images does a folder hold, and what are their captions?

- A list (`lists`) in the folder or in any folder below it describes images by their paths relative
  to the folder of the list. Several records may describe one image.
- A Parquet file (`tables`) holds images and captions, or is a list.
- An image in no list has its captions beside it: `cat.txt` or `cat.caption` for `cat.png`, in which
  every line that is not empty is one caption, or `cat.json` with the fields of a record.
- A tar archive (`tree`) is read like a folder; so are the shards of a WebDataset.

All text is UTF-8. Files and folders with names that start with a dot are ignored.
"""

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from star_jax import files
from star_jax.data import image_files, lists, splits, tables, tree
from star_jax.data.image_files import UnfitError
from star_jax.data.lists import NO_CAPTION
from star_jax.data.tree import Fault, File, Tree

TEXT_SUFFIX = '.txt'
TEXT_SUFFIXES = (TEXT_SUFFIX, '.caption')
RECORD_SUFFIX = '.json'

# Containers of images that are not read: reported, not ignored.
OTHER_CONTAINERS = (
    *('.arrow', '.feather', '.tfrecord', '.h5', '.hdf5', '.npy', '.npz', '.mdb', '.lmdb', '.beton'),
    *('.mds', '.rec', '.msgpack', '.pkl', '.pickle', '.sqlite', '.db'),
)
# Lists of captions in formats that are not read, if they have the name of a list.
OTHER_LISTS = ('.ndjson', '.jsonlines', '.xlsx', '.xls', '.yaml', '.yml', '.xml')

NO_IMAGE = 'no image'
OTHER_LIST = 'other list'
OTHER_CONTAINER = 'other container'


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        captions: captions by the path of an image relative to the folder, with '/', sorted; a row
            of a Parquet file counts as a file below it.
        files: where the images are, by the same path.
        splits: the split that the records of an image state, by the same path, where they do.
        faults: records that cannot be used.
    """

    captions: Mapping[str, tuple[str, ...]]
    files: Mapping[str, File]
    splits: Mapping[str, str]
    faults: tuple[Fault, ...]


def read(root: Path, caption_field: str = '') -> Listing:
    """Lists the images and captions of a folder; no image is opened.

    Args:
        root: the folder.
        caption_field: field of the lists that holds the captions ('': one of
            `lists.CAPTION_FIELDS`).

    Raises:
        UserError: the folder or a list cannot be read.
    """
    reader = _Reader(tree.read(root), caption_field)
    for name in (fault.name for fault in reader.tree.faults if fault.kind == tree.NOT_A_FILE):
        if lists.is_list(name):
            files.check_regular(root / name)
    for name in reader.tree.names:
        if lists.is_list(name):
            reader.add_list(name)
        elif tree.suffix(name) == tables.SUFFIX:
            reader.add_table(name)
        elif tree.suffix(name) in lists.UNNAMED:
            stems = ' or '.join(lists.STEMS)
            reader.fault(OTHER_LIST, name, f'lists of captions are named {stems}: rename it')
        elif tree.suffix(name) in OTHER_LISTS and lists.has_name_of_list(name):
            reader.fault(OTHER_LIST, name, f'write it as {" or ".join(lists.SUFFIXES)}')
        elif tree.suffix(name) in OTHER_CONTAINERS:
            reader.fault(OTHER_CONTAINER, name, 'write its images as files, Parquet or tar')
    reader.add_images()
    return reader.listing()


class _Reader:
    """Collects the captions and faults of a folder."""

    def __init__(self, found: Tree, caption_field: str) -> None:
        self.tree = found
        self._field = caption_field
        self._captions = collections.defaultdict(list)
        self._splits = collections.defaultdict(list)
        self._cells: dict[str, File] = {}
        self._listed: set[str] = set()
        self._faults = list(found.faults)

    def fault(self, kind: str, name: str, reason: str) -> None:
        self._faults.append(Fault(kind, name, reason))

    def listing(self) -> Listing:
        captions = {name: tuple(self._captions[name]) for name in sorted(self._captions)}
        places = {name: self._cells.get(name) or self.tree.file(name) for name in captions}
        stated = {name: splits.of_records(self._splits[name]) for name in captions}
        return Listing(
            captions,
            places,
            splits={name: split for name, split in stated.items() if split},
            faults=tuple(sorted(self._faults, key=lambda fault: fault.name)),
        )

    def add_list(self, name: str) -> None:
        try:
            data = self.tree.read(name)
        except OSError as error:
            raise tree.unreadable(self.tree.root / name, error) from error
        for where, record in lists.read(name, data):
            self._add_record(name, f'{name}, {where}' if where else name, record)

    def add_table(self, name: str) -> None:
        """Adds the rows of a Parquet file."""
        if name in self.tree.members:
            self.fault(tree.NOT_UNPACKED, name, 'Parquet in an archive is not read: unpack it')
            return
        try:
            for number, row in enumerate(tables.read(self.tree.root / name, self._field)):
                place = f'{name}/{number:08d}'
                if row.image is None or isinstance(row.fields, UnfitError):
                    self._add_record(name, place, row.fields)
                    continue
                try:
                    self._captions[place] = lists.captions(row.fields, self._field)
                    self._splits[place].append(lists.split(row.fields))
                    self._cells[place] = row.image
                except UnfitError as error:
                    self.fault(error.kind, place, str(error))
        except UnfitError as error:
            is_index = _stem(name) + tree.ARCHIVE in self.tree.archives
            if not (error.kind == tables.NO_IMAGES and is_index):  # of the archive beside it
                self.fault(error.kind, name, str(error))

    def _add_record(self, name: str, place: str, record: lists.Record | UnfitError) -> None:
        """Adds a record of the list `name`."""
        try:
            if isinstance(record, UnfitError):
                raise record
            path = _image_path(lists.image_name(record), PurePosixPath(name).parent)
            image = self.tree.find(path)
            self._listed.add(image or path)
            if image is None:
                raise UnfitError(NO_IMAGE, f'there is no {path}')
            self._splits[image].append(lists.split(record))
            captions = lists.captions(record, self._field)
            self._captions[image] += captions
        except UnfitError as error:
            self.fault(error.kind, place, str(error))

    def add_images(self) -> None:
        """Adds the images without captions in lists, with the captions beside them."""
        suffixes = image_files.SUFFIXES | image_files.UNSUPPORTED
        images = {name for name in self.tree.names if tree.suffix(name) in suffixes}
        beside = collections.defaultdict(dict)
        for name in self.tree.names:
            suffix = tree.suffix(name)
            if suffix in (*TEXT_SUFFIXES, RECORD_SUFFIX) and not lists.is_list(name):
                beside[_stem(name)][suffix] = name
        for name in sorted(images - self._captions.keys()):
            names = beside.get(_stem(name), {})
            if name in self._listed and not names:
                continue  # a fault of its list
            try:
                self._captions[name] = self._captions_beside(name, names)
            except UnfitError as error:
                self.fault(error.kind, name, str(error))
        for stem in beside.keys() - {_stem(name) for name in images | self._listed}:
            for suffix, name in beside[stem].items():
                if suffix != RECORD_SUFFIX or name in self.tree.members:
                    self.fault(NO_IMAGE, name, 'there is no image of that name beside it')

    def _captions_beside(self, image: str, names: Mapping[str, str]) -> list[str]:
        """The captions of an image from the files beside it, by their suffixes."""
        fault = UnfitError(NO_CAPTION, f'it is in no list and has no {TEXT_SUFFIX} file beside it')
        for suffix in (*TEXT_SUFFIXES, RECORD_SUFFIX):
            name = names.get(suffix)
            if name is None:
                continue
            try:
                data = self.tree.read(name)
                if suffix == RECORD_SUFFIX:
                    record = lists.parse_object(data)
                    self._splits[image].append(lists.split(record))
                    return lists.captions(record, self._field)
                return lists.text_captions(data)
            except UnfitError as error:
                fault = fault if fault.kind != NO_CAPTION else error
            except OSError as error:
                fault = UnfitError(NO_CAPTION, f'{name} cannot be read ({error.strerror})')
        raise fault


def _image_path(name: str, folder: PurePosixPath) -> str:
    """The path of an image relative to the root, from its path in a list."""
    path = PurePosixPath(name.replace('\\', '/'))
    if path.is_absolute() or '..' in path.parts:
        raise UnfitError(NO_IMAGE, f'{name} is outside of the folder of its list')
    if not path.name:
        raise UnfitError(NO_IMAGE, f'{name} is the folder of its list, expected an image')
    return str(folder / path)


def _stem(name: str) -> str:
    """A path without its suffix, in one Unicode normal form."""
    return tree.normal(str(PurePosixPath(name).with_suffix('')))
