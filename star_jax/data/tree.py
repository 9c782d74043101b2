"""Which files does a folder hold, and where are their bytes?

Files in tar archives count as files below the archive: `shard.tar/cat.png`. Linked folders are
read, each folder once. Names that start with a dot are ignored. Every other entry that is left out
is reported as a `Fault`.
"""

import collections
import dataclasses
import functools
import io
import os
import tarfile
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from star_jax.data.image_files import UNREADABLE, UnfitError
from star_jax.errors import UserError

ARCHIVE = '.tar'
# Archives without random access to their files.
PACKED = (
    *('.zip', '.7z', '.rar', '.tgz', '.tbz', '.tbz2', '.txz', '.tzst', '.tar.z', '.gz', '.bz2'),
    *('.xz', '.zst', '.lz4', '.lz', '.lzma', '.br'),
)

NOT_UTF8 = 'not UTF-8'
NOT_A_FILE = 'no file'
LINK = 'link'
NOT_UNPACKED = 'archive'
OUTSIDE = 'outside'
TWICE = 'twice'


class File(Protocol):
    """A `Path`, or a file in another file, whose path `os.fspath` then returns.

    Attributes:
        name: name of the file.
    """

    name: str

    def __fspath__(self) -> str: ...

    def open(self, mode: str = 'rb') -> BinaryIO: ...


@dataclasses.dataclass(frozen=True)
class Fault:
    """A record that cannot be used.

    Attributes:
        kind: kind of fault.
        name: the file or line.
        reason: description of the fault.
    """

    kind: str
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class TarMember:
    """A file in a tar archive, a `File`.

    Attributes:
        archive: path of the archive.
        name: name in the archive.
        offset: position of its first byte.
        size: number of bytes.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return os.fspath(self.archive)

    def open(self, mode: str = 'rb') -> BinaryIO:
        with self.archive.open(mode) as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


@dataclasses.dataclass(frozen=True)
class Tree:
    """The files of a folder and of the folders below it.

    Attributes:
        root: the folder.
        names: paths relative to the folder, with '/', sorted.
        archives: the names of archives.
        members: the names of files in archives.
        faults: the entries that were left out.
    """

    root: Path
    names: tuple[str, ...]
    archives: frozenset[str]
    members: Mapping[str, TarMember]
    faults: tuple[Fault, ...]

    def file(self, name: str) -> File:
        """The `File` of a name, from which its bytes are read."""
        return self.members.get(name) or self.root / name

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises OSError."""
        with self.file(name).open('rb') as file:
            return file.read()

    def find(self, name: str) -> str | None:
        """The name of an existing file, also in another Unicode normal form or case.

        Lists move between systems that store names in different forms, or ignore case. None for no
        such file, or for several.
        """
        if name in self.members or os.path.isfile(self.root / name):
            return name
        for fold, names in self._folded_names.items():
            if found := names.get(fold(name)):
                return found
        return None

    @functools.cached_property
    def _folded_names(self) -> dict[Callable[[str], str], dict[str, str]]:
        """Names by what remains of them, if that is of one name only."""
        folded = {}
        for fold in (normal, _caseless):
            counts = collections.Counter(map(fold, self.names))
            folded[fold] = {fold(name): name for name in self.names if counts[fold(name)] == 1}
        return folded


def read(root: Path) -> Tree:
    """The files of a folder; raises UserError if it cannot be read."""
    names, faults = _walk(root)
    members, archives = {}, [name for name in names if suffix(name) == ARCHIVE]
    for name in archives:
        found, left_out = _tar_members(root, name)
        members |= found
        faults += left_out
    encodable = []
    for name in sorted([*names, *members]):
        if not _is_utf8(name):
            escaped = os.fsencode(name).decode(errors='backslashreplace')
            faults.append(Fault(NOT_UTF8, escaped, 'its name is not UTF-8'))
        elif name.lower().endswith(PACKED):
            faults.append(Fault(NOT_UNPACKED, name, f'unpack it, or pack it as {ARCHIVE}'))
        else:
            encodable.append(name)
    return Tree(root, tuple(encodable), frozenset(archives), members, tuple(faults))


def suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def normal(name: str) -> str:
    """A name in one Unicode normal form: systems differ in the form that they store."""
    return unicodedata.normalize('NFC', name)


def _caseless(name: str) -> str:
    return normal(name).casefold()


def unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f'{path} cannot be read ({error.strerror}): change its permissions')


def _walk(root: Path) -> tuple[list[str], list[Fault]]:
    """The relative paths of all files below `root`, and the other entries as faults.

    Links to folders are followed after all other folders, so that every folder has the name of its
    own place if that is below `root`, too.
    """
    names, faults, visited = [], [], set()
    folders, links = ['.'], collections.deque()
    while folders or links:
        is_link = not folders
        folder = links.popleft() if is_link else folders.pop()
        place = _place(root / folder)
        if place in visited:  # of a link, or below one that leads to a folder around this one
            faults.append(Fault(LINK, folder, 'it leads to a folder that is read already'))
            continue
        visited.add(place)
        for entry in _scan(root / folder):
            name = (PurePosixPath(folder) / entry.name).as_posix()
            kind = _kind(entry)
            if kind == 'folder':
                (links if entry.is_symlink() else folders).append(name)
            elif kind == 'file':
                names.append(name)
            elif entry.is_symlink():
                faults.append(Fault(LINK, name, 'it leads to no file or folder'))
            else:
                faults.append(Fault(NOT_A_FILE, name, 'it is not a regular file'))
    return names, faults


def _place(folder: Path) -> tuple[int, int]:
    """The identity of a folder, which does not depend on the path that leads to it."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _scan(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder, except for hidden ones, in order."""
    try:
        with os.scandir(folder) as entries:
            visible = (entry for entry in entries if not entry.name.startswith('.'))
            return sorted(visible, key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(folder, error) from error


def _kind(entry: os.DirEntry) -> str:
    """'folder', 'file', or '' for anything else."""
    try:
        return 'folder' if entry.is_dir() else 'file' if entry.is_file() else ''
    except OSError:  # a link to itself
        return ''


def _tar_members(root: Path, name: str) -> tuple[dict[str, TarMember], list[Fault]]:
    """The files in an archive by their names in the tree, and the faults of the others."""
    members, faults = {}, []
    try:
        end = os.path.getsize(root / name)
        with tarfile.open(root / name, 'r:') as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                hidden = any(part.startswith('.') and part != '..' for part in parts)
                if member.isdir() or hidden:
                    continue
                path = PurePosixPath(name, *(part for part in parts if part != '/')).as_posix()
                if member.islnk() or member.issym():
                    faults.append(Fault(LINK, path, 'links in archives are not read'))
                    continue
                if not member.isreg():
                    faults.append(Fault(NOT_A_FILE, path, 'it is not a regular file'))
                    continue
                if '..' in parts:
                    faults.append(Fault(OUTSIDE, path, 'its name leads out of the archive'))
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError('unexpected end of data')
                if path in members:
                    faults.append(Fault(TWICE, path, 'of its name the last one is read'))
                members[path] = TarMember(root / name, member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        reason = f'it is cut short, damaged or compressed ({error}): the rest of it is not read'
        faults.append(Fault(UNREADABLE, name, reason))
    return members, faults


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(text: str) -> str:
    """The text; UnfitError for half of a surrogate pair, which JSON can contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnfitError(NOT_UTF8, f'its text has half a character at {error.start}') from error
    return text
