"""Which records does a list of captions hold?

A list is named `metadata` or `captions`, in any case, and is one of

- `.jsonl`: one JSON object per line;
- `.json`: an array of objects, or an object from the path of an image to its captions or fields
  (`.jsonl` may hold such an array, too);
- `.csv`, `.tsv`: a line of field names, then one line per record; cells with the separator are in
  double quotes.

A record has the path of an image and its captions, and may name its split. Fields are found in
any case; null and empty values count as missing, so that the next field of the same kind is used.
"""

import codecs
import collections
import csv
import io
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from star_jax import files
from star_jax.data import tree
from star_jax.data.image_files import UnfitError

STEMS = ('metadata', 'captions')
SUFFIXES = ('.jsonl', '.json', '.csv', '.tsv')
UNNAMED = ('.jsonl', '.csv', '.tsv')  # hardly anything else than a list, whatever its name
IMAGE_FIELDS = ('file_name', 'image', 'image_path', 'path', 'filename', 'file')
CAPTION_FIELDS = ('text', 'caption', 'captions', 'txt')
SPLIT_FIELDS = ('split',)
PATH = 'path'  # field of an image that is an object itself
SEPARATORS = (',', '\t', ';')
MAX_CELL = 2**24  # characters
LEAST_ZEROS = 4  # at least one of so many bytes of names in UTF-16 is zero
ZERO = '\0'
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

NO_CAPTION = 'no caption'
EMPTY_CAPTION = 'empty caption'
BAD_LINE = 'bad line'

# Categories of Unicode: control and format characters, separators, marks on other characters.
_INKLESS = frozenset({'Cc', 'Cf', 'Zs', 'Zl', 'Zp', 'Mn', 'Mc', 'Me'})
_BLANK = frozenset('\u115f\u1160\u2800\u3164\uffa0')  # letters and symbols without ink

Record = Mapping[str, Any]


def is_list(name: str) -> bool:
    """Whether a file is read as a list."""
    return has_name_of_list(name) and tree.suffix(name) in SUFFIXES


def has_name_of_list(name: str) -> bool:
    """Whether a file would be read as a list if its suffix were one of SUFFIXES."""
    return PurePosixPath(name.lower()).stem in STEMS


def read(name: str, data: bytes) -> Iterator[tuple[str, Record | UnfitError]]:
    """The records of a list, each with its place in the list, or the reason why it is no record.

    Args:
        name: name of the list; its suffix decides the format.
        data: the bytes of the list.

    Yields:
        The place is '' for a reason that concerns the whole list.
    """
    suffix = tree.suffix(name)
    if data.startswith(UTF_16) and data.count(0) * LEAST_ZEROS > len(data):
        data = data.decode('utf-16', 'replace').encode()
    data = data.removeprefix(codecs.BOM_UTF8)
    if suffix in ('.csv', '.tsv'):
        return _table(data)
    if suffix == '.json' or data.lstrip().startswith(b'['):
        try:
            return _document(parse(data, _object_of))
        except UnfitError as error:
            if suffix == '.json':
                return iter([('', error)])
    return _lines(data)


def image_name(record: Record) -> str:
    """The path of the image of a record; raises UnfitError if it has none."""
    for value in _values(record, IMAGE_FIELDS):
        if isinstance(value, dict):  # as Hugging Face datasets write an image that is a file
            value = value.get(PATH)
        if isinstance(value, str) and value:
            return tree.check_unicode(value)
    raise UnfitError(BAD_LINE, f'it has no {" or ".join(IMAGE_FIELDS)} with a path')


def split(record: Record) -> Any:
    """The split that a record states, or None."""
    return next(_values(record, SPLIT_FIELDS), None)


def captions(record: Record, field: str = '') -> list[str]:
    """The captions of a record that are not empty: a string, or a list of strings.

    Args:
        record: the record.
        field: field of the captions ('': the first of CAPTION_FIELDS that has any).

    Raises:
        UnfitError: it has none, or they are not text.
    """
    names = (field,) if field else CAPTION_FIELDS
    fault = UnfitError(NO_CAPTION, f'it has no {" or ".join(names)}')
    for value in _values(record, names):
        try:
            return _texts(value)
        except UnfitError as error:
            fault = error
    raise fault


def _texts(value: Any) -> list[str]:
    """The captions in a field."""
    found = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
    if not all(isinstance(text, str) for text in found):
        raise UnfitError(
            BAD_LINE, 'its caption is not text, expected a string or a list of strings'
        )
    return _visible(found)


def text_captions(data: bytes) -> list[str]:
    """The lines of a text file that are not empty; raises UnfitError if there is none."""
    return _visible(files.lines(decode(data)))


def _visible(texts: Iterable[str]) -> list[str]:
    """The texts that are not empty; raises UnfitError if there is none, or one is no text."""
    visible = [tree.check_unicode(text.strip()) for text in texts if is_visible(text)]
    if not visible:
        raise UnfitError(EMPTY_CAPTION, 'its captions are empty')
    if any(ZERO in text for text in visible):
        raise UnfitError(tree.NOT_UTF8, 'its text has zero bytes, as UTF-16: save it in UTF-8')
    return visible


def is_visible(text: str) -> bool:
    """Whether a text has a character with ink: not only spaces, marks and control characters."""
    return any(unicodedata.category(char) not in _INKLESS and char not in _BLANK for char in text)


class _Repeating(dict):
    """A JSON object in which a name occurs more than once.

    Attributes:
        pairs: all names and values.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeating(pairs)


def parse(data: bytes, object_of: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON document; raises UnfitError.

    Args:
        data: the document.
        object_of: makes an object of its names and values (None: a dict).
    """
    try:
        return files.parse_json(decode(data), object_pairs_hook=object_of)
    except ValueError as error:
        raise UnfitError(BAD_LINE, f'it is not JSON ({error})') from error


def parse_object(data: bytes) -> Record:
    """The fields of a JSON object; raises UnfitError."""
    return _object(parse(data))


def decode(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark; raises UnfitError."""
    encoding = 'utf-16' if data.startswith(UTF_16) else 'utf-8-sig'
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnfitError(tree.NOT_UTF8, f'its text is not UTF-8 at byte {error.start}') from error


def _values(record: Record, names: tuple[str, ...]) -> Iterator[Any]:
    """The values of those fields that exist and are not null, in the order of `names`."""
    by_name = collections.defaultdict(list)
    for key, value in sorted(record.items(), key=lambda item: item[0] not in names):
        by_name[key.lower()].append(value)
    for name in names:
        yield from (value for value in by_name[name.lower()] if value is not None)


def _lines(data: bytes) -> Iterator[tuple[str, Record | UnfitError]]:
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                yield f'line {number}', parse_object(line)
            except UnfitError as error:
                yield f'line {number}', error


def _document(value: Any) -> Iterator[tuple[str, Record | UnfitError]]:
    """The records of an array, or of an object from paths to captions or fields."""
    if isinstance(value, list):
        numbered = ((f'record {number}', part) for number, part in enumerate(value, start=1))
    elif isinstance(value, dict):
        pairs = value.pairs if isinstance(value, _Repeating) else value.items()
        numbered = ((f'record {name!r}', _keyed(name, part)) for name, part in pairs)
    else:
        numbered = [('', value)]
    for where, part in numbered:
        try:
            yield where, _object(part)
        except UnfitError as error:
            yield where, error


def _keyed(name: str, value: Any) -> Record:
    fields = value if isinstance(value, dict) else {CAPTION_FIELDS[0]: value}
    return {**fields, IMAGE_FIELDS[0]: name}


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        raise UnfitError(BAD_LINE, 'it is not a JSON object')
    return value


def _table(data: bytes) -> Iterator[tuple[str, Record | UnfitError]]:
    """The records of comma-separated values; the first line decides the separator."""
    csv.field_size_limit(MAX_CELL)
    text = data.decode('utf-8', 'surrogateescape')  # a wrong byte damages only its own record
    lines = list(io.StringIO(text, newline=''))
    separator = max(SEPARATORS, key=lines[0].count) if lines else SEPARATORS[0]
    header, first = None, 0
    while first < len(lines):
        cells = {'delimiter': separator, 'skipinitialspace': True, 'strict': True}
        reader = csv.reader(lines[first:], **cells)
        last = first
        try:
            for row in reader:
                where, last = f'line {last + 1}', first + reader.line_num
                if not any(cell.strip() for cell in row):
                    continue
                if header is None:
                    header = [cell.strip() for cell in row]
                else:
                    yield where, _row(header, row)
            return
        except csv.Error as error:  # such as a quote that nothing closes: goes on one line later
            yield f'line {last + 1}', UnfitError(BAD_LINE, f'it has no separate cells ({error})')
            first = last + 1


def _row(header: list[str], row: list[str]) -> Record | UnfitError:
    if len(row) > len(header):
        reason = f'it has {len(row)} cells for {len(header)} fields: put captions in double quotes'
        return UnfitError(BAD_LINE, reason)
    if not all(map(_is_encodable, row)):
        return UnfitError(tree.NOT_UTF8, 'its text is not UTF-8')
    return {name: cell.strip() for name, cell in zip(header, row, strict=False) if cell}


def _is_encodable(text: str) -> bool:
    try:
        tree.check_unicode(text)
    except UnfitError:
        return False
    return True
