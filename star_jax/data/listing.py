"""Which images does a folder hold, and what are their captions?

- A list, `metadata.jsonl` or `captions.jsonl`, in the folder or in any folder below it: one JSON
  object per line, with the path of an image relative to the folder of the list (`file_name` or
  `image`) and its captions (`text`, `caption` or `captions`; a string or a list of strings).
  Several lines may describe one image.
- An image in no list has a text file of the same name, `cat.txt` for `cat.png`: every line that is
  not empty is one caption.

All text is UTF-8. Files and folders with names that start with a dot are ignored, and so are
folders that are symbolic links.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from star_jax import files
from star_jax.data import image_files
from star_jax.data.image_files import UnfitError
from star_jax.errors import UserError

LIST_NAMES = ('metadata.jsonl', 'captions.jsonl')
IMAGE_FIELDS = ('file_name', 'image')
CAPTION_FIELDS = ('text', 'caption', 'captions')
TEXT_SUFFIX = '.txt'

NO_CAPTION = 'no caption'
EMPTY_CAPTION = 'empty caption'
NOT_UTF8 = 'not UTF-8'
NO_IMAGE = 'no image'
BAD_LINE = 'bad line'


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
class Listing:
    """The images of a folder.

    Attributes:
        captions: captions by the path of an image relative to the folder, with '/', sorted.
        faults: records that cannot be used.
    """

    captions: Mapping[str, tuple[str, ...]]
    faults: tuple[Fault, ...]


def read(root: Path, caption_field: str = '') -> Listing:
    """Lists the images and captions of a folder; no image is opened.

    Args:
        root: the folder.
        caption_field: field of the lists that holds the captions ('': one of CAPTION_FIELDS).

    Raises:
        UserError: the folder or a list cannot be read.
    """
    names, faults = _walk(root)
    captions, listed = collections.defaultdict(list), set()
    for name in (name for name in names if PurePosixPath(name).name in LIST_NAMES):
        for number, line in _lines(root / name):
            try:
                fields = _parse_line(line)
                image = _image_path(fields, PurePosixPath(name).parent)
                listed.add(image)
                if not os.path.isfile(root / image):
                    raise UnfitError(NO_IMAGE, f'there is no {image}')
                line_captions = _line_captions(fields, caption_field)
                captions[image] += line_captions
            except UnfitError as error:
                faults.append(Fault(error.kind, f'{name}, line {number}', str(error)))
    suffixes = image_files.SUFFIXES | image_files.UNSUPPORTED
    images = {name for name in names if _suffix(name) in suffixes}
    texts = {_stem(name): name for name in names if _suffix(name) == TEXT_SUFFIX}
    for name in sorted(images - listed):
        try:
            captions[name] = _text_file_captions(root, texts.get(_stem(name)))
        except UnfitError as error:
            faults.append(Fault(error.kind, name, str(error)))
    for stem in texts.keys() - {_stem(name) for name in images | listed}:
        faults.append(Fault(NO_IMAGE, texts[stem], 'there is no image of that name beside it'))
    ordered = {name: tuple(captions[name]) for name in sorted(captions)}
    return Listing(ordered, tuple(sorted(faults, key=lambda fault: fault.name)))


def _walk(root: Path) -> tuple[list[str], list[Fault]]:
    """The relative paths of all files below `root`, and those that are not UTF-8."""

    def fail(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error

    paths, faults = [], []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
        for name in (name for name in names if not name.startswith('.')):
            path = (Path(folder) / name).relative_to(root).as_posix()
            try:
                path.encode()
                paths.append(path)
            except UnicodeEncodeError:
                escaped = os.fsencode(path).decode(errors='backslashreplace')
                faults.append(Fault(NOT_UTF8, escaped, 'its name is not UTF-8'))
    return sorted(paths), faults


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f'{path} cannot be read ({error.strerror}): change its permissions')


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbers and bytes of the lines of a list that are not empty."""
    files.check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    for number, line in enumerate(data.split(b'\n'), start=1):
        if line.strip():
            yield number, line


def _parse_line(line: bytes) -> dict[str, Any]:
    text = _decode(line)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnfitError(BAD_LINE, f'it is not JSON ({error})') from error
    if not isinstance(fields, dict):
        raise UnfitError(BAD_LINE, 'it is not a JSON object')
    return fields


def _image_path(fields: dict[str, Any], folder: PurePosixPath) -> str:
    """The path of the image of a line, relative to the root."""
    name = next((fields[key] for key in IMAGE_FIELDS if key in fields), None)
    if not isinstance(name, str) or not name:
        raise UnfitError(BAD_LINE, f'it has no {" or ".join(IMAGE_FIELDS)} with a path')
    path = PurePosixPath(_check_unicode(name).replace('\\', '/'))
    if path.is_absolute() or '..' in path.parts:
        raise UnfitError(NO_IMAGE, f'{name} is outside of the folder of its list')
    return str(folder / path)


def _line_captions(fields: dict[str, Any], caption_field: str) -> list[str]:
    """The captions of a line that are not empty."""
    keys = (caption_field,) if caption_field else CAPTION_FIELDS
    value = next((fields[key] for key in keys if key in fields), None)
    if value is None:
        raise UnfitError(NO_CAPTION, f'it has no {" or ".join(keys)}')
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise UnfitError(
            BAD_LINE, 'its caption is not text, expected a string or a list of strings'
        )
    return _not_empty([_check_unicode(caption) for caption in captions])


def _text_file_captions(root: Path, name: str | None) -> list[str]:
    """The captions in the text file of an image."""
    if name is None:
        raise UnfitError(NO_CAPTION, f'it is in no list and has no {TEXT_SUFFIX} file beside it')
    if (root / name).exists() and not (root / name).is_file():
        raise UnfitError(NO_CAPTION, f'{name} is no regular file')
    try:
        data = (root / name).read_bytes()
    except OSError as error:
        raise UnfitError(NO_CAPTION, f'{name} cannot be read ({error.strerror})') from error
    return _not_empty(_decode(data).splitlines())


def _not_empty(captions: list[str]) -> list[str]:
    stripped = [caption.strip() for caption in captions if caption.strip()]
    if not stripped:
        raise UnfitError(EMPTY_CAPTION, 'its captions are empty')
    return stripped


def _decode(data: bytes) -> str:
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UnfitError(NOT_UTF8, f'its text is not UTF-8 at byte {error.start}') from error


def _check_unicode(text: str) -> str:
    """The text; UnfitError for half of a surrogate pair, which JSON can contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnfitError(NOT_UTF8, f'its text has half a character at {error.start}') from error
    return text


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(''))
