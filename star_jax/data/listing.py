"""Which pictures does a folder hold, and what is said of each?

- A list, `metadata.jsonl` or `captions.jsonl`, in the folder or in any below it: one JSON object a
  line, with the path of a picture from the list's own folder (`file_name` or `image`) and what is
  said of it (`text`, `caption` or `captions`; a string or a list of strings). Several lines may
  speak of one picture.
- A picture that no list names has a text file beside it, `cat.txt` for `cat.png`: every line that
  is not empty is one caption.

All text is UTF-8. Files and folders whose names begin with a dot are not looked at, nor are folders
that are symbolic links.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from star_jax.data import photos
from star_jax.data.photos import UnfitError
from star_jax.errors import UserError

LISTS = ('metadata.jsonl', 'captions.jsonl')
NAMES = ('file_name', 'image')
COLUMNS = ('text', 'caption', 'captions')
TEXT = '.txt'

NO_CAPTION = 'no caption'
EMPTY_CAPTION = 'empty caption'
NOT_UTF8 = 'not UTF-8'
NO_IMAGE = 'no image'
BAD_LINE = 'bad line'


@dataclasses.dataclass(frozen=True)
class Fault:
    """A record that cannot be used: what `kind` of fault, the file or line, and the reason."""

    kind: str
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """Captions by the path of their picture, sorted, '/' between folders; and what is wrong."""

    captions: Mapping[str, tuple[str, ...]]
    faults: tuple[Fault, ...]


def read(root: Path, column: str = '') -> Listing:
    """What lies in the folder `root`; no picture is opened.

    `column` names the field of the lists that holds the captions, if it is none of COLUMNS.
    Raises UserError where the folder or a list cannot be read.
    """
    found, faults = _walk(root)
    captions, named = collections.defaultdict(list), set()
    for name in (name for name in found if PurePosixPath(name).name in LISTS):
        for number, line in _lines(root / name):
            try:
                fields = _fields(line)
                about = _about(fields, PurePosixPath(name).parent)
                named.add(about)
                if not os.path.isfile(root / about):
                    raise UnfitError(NO_IMAGE, f'there is no {about}')
                said = _said(fields, column)
                captions[about] += said
            except UnfitError as fault:
                faults.append(Fault(fault.kind, f'{name}, line {number}', str(fault)))
    images = {name for name in found if _suffix(name) in photos.SUFFIXES | photos.FOREIGN}
    texts = {_stem(name): name for name in found if _suffix(name) == TEXT}
    for name in sorted(images - named):
        try:
            captions[name] = _beside(root, texts.get(_stem(name)))
        except UnfitError as fault:
            faults.append(Fault(fault.kind, name, str(fault)))
    for stem in texts.keys() - {_stem(name) for name in images | named}:
        faults.append(Fault(NO_IMAGE, texts[stem], 'no image of that name lies beside it'))
    ordered = {name: tuple(captions[name]) for name in sorted(captions)}
    return Listing(ordered, tuple(sorted(faults, key=lambda fault: fault.name)))


def _walk(root: Path) -> tuple[list[str], list[Fault]]:
    """Every file below `root`, by its path from there."""

    def fail(error: OSError) -> None:
        raise UserError(f'{error.filename} cannot be read ({error.strerror}): allow it') from error

    found, faults = [], []
    for folder, below, names in os.walk(root, onerror=fail):
        below[:] = sorted(name for name in below if not name.startswith('.'))
        for name in (name for name in names if not name.startswith('.')):
            path = (Path(folder) / name).relative_to(root).as_posix()
            try:
                path.encode()
                found.append(path)
            except UnicodeEncodeError:
                shown = os.fsencode(path).decode(errors='backslashreplace')
                faults.append(Fault(NOT_UTF8, shown, 'its name is not UTF-8'))
    return sorted(found), faults


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a list that are not empty, and their numbers; decoded one by one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): allow it') from error
    for number, line in enumerate(data.split(b'\n'), start=1):
        if line.strip():
            yield number, line


def _fields(line: bytes) -> dict[str, Any]:
    text = _decode(line)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnfitError(BAD_LINE, f'it is not JSON ({error})') from error
    if not isinstance(fields, dict):
        raise UnfitError(BAD_LINE, 'it is no JSON object')
    return fields


def _about(fields: dict[str, Any], folder: PurePosixPath) -> str:
    """The path from the root of the picture that a line speaks of."""
    name = next((fields[key] for key in NAMES if key in fields), None)
    if not isinstance(name, str) or not name:
        raise UnfitError(BAD_LINE, f'it names no image, expected a path in {" or ".join(NAMES)}')
    path = PurePosixPath(_sound(name).replace('\\', '/'))
    if path.is_absolute() or '..' in path.parts:
        raise UnfitError(NO_IMAGE, f'{name} does not lie in the folder of its list')
    return str(folder / path)


def _said(fields: dict[str, Any], column: str) -> list[str]:
    """The captions of a line, without empty ones."""
    columns = (column,) if column else COLUMNS
    said = next((fields[key] for key in columns if key in fields), None)
    if said is None:
        raise UnfitError(NO_CAPTION, f'it has no {" or ".join(columns)}')
    captions = said if isinstance(said, list) else [said]
    if not all(isinstance(caption, str) for caption in captions):
        raise UnfitError(BAD_LINE, 'its caption is no text, expected a string or a list of strings')
    return _not_empty([_sound(caption) for caption in captions])


def _beside(root: Path, text: str | None) -> list[str]:
    """The captions in the text file of a picture."""
    if text is None:
        raise UnfitError(NO_CAPTION, f'no list names it and no {TEXT} lies beside it')
    try:
        data = (root / text).read_bytes()
    except OSError as error:
        raise UnfitError(NO_CAPTION, f'{text} cannot be read ({error.strerror})') from error
    return _not_empty(_decode(data).splitlines())


def _not_empty(captions: list[str]) -> list[str]:
    kept = [caption.strip() for caption in captions if caption.strip()]
    if not kept:
        raise UnfitError(EMPTY_CAPTION, 'nothing is said of it')
    return kept


def _decode(data: bytes) -> str:
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UnfitError(NOT_UTF8, f'its text is not UTF-8 at byte {error.start}') from error


def _sound(text: str) -> str:
    """JSON can spell halves of characters, which no text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnfitError(NOT_UTF8, f'its text has half a character at {error.start}') from error
    return text


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(''))
