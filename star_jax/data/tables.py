"""Which images and captions does a Parquet file hold?

A row has an encoded image: bytes, or the struct of bytes and path that Hugging Face datasets write.
A table without images is a list of captions, as in `lists`. Parquet is read by row groups, so that
one image costs the reading of its group; the last few groups are kept.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from star_jax.data import lists
from star_jax.data.image_files import UNREADABLE, UnfitError
from star_jax.data.tree import NOT_UTF8

SUFFIX = '.parquet'
IMAGE_COLUMNS = ('image', 'img', 'jpg', 'jpeg', 'png', 'webp', 'image_bytes', 'bytes')
BYTES = 'bytes'  # field of a struct that holds an image
KEPT_GROUPS = 4

NO_IMAGES = 'no images'


@dataclasses.dataclass(frozen=True)
class Cell:
    """An encoded image in a Parquet file, a `tree.File`.

    Attributes:
        table: path of the Parquet file.
        column: name of the column.
        group: number of the row group.
        row: number of the row in its group.
    """

    table: Path
    column: str
    group: int
    row: int

    @property
    def name(self) -> str:
        return f'{self.table.name}, row {self.row} of group {self.group}'

    def __fspath__(self) -> str:
        return os.fspath(self.table)

    def open(self, mode: str = 'rb') -> BinaryIO:
        changed = self.table.stat().st_mtime_ns
        value = _group(self.table, changed, self.column, self.group)[self.row].as_py()
        data = value.get(BYTES) if isinstance(value, dict) else value
        return io.BytesIO(data or b'')


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a Parquet file.

    Attributes:
        fields: its captions, and all other fields that a record of a list has, or the reason why
            they cannot be read.
        image: its image (None: the fields name a file).
    """

    fields: lists.Record | UnfitError
    image: Cell | None


def read(path: Path, caption_field: str = '') -> Iterator[Row]:
    """The rows of a Parquet file.

    Args:
        path: the file.
        caption_field: a column of captions beside those of `lists`.

    Raises:
        UnfitError: the file is damaged, or its columns hold neither images nor their paths.
    """
    import pyarrow as pa  # takes 0.1 s, and few folders need it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            image = _image_column(schema)
            known = (*lists.CAPTION_FIELDS, *lists.IMAGE_FIELDS, *lists.SPLIT_FIELDS)
            wanted = {caption_field.lower(), *known}
            columns = [name for name in schema.names if name.lower() in wanted and name != image]
            if image is None and not any(name.lower() in lists.IMAGE_FIELDS for name in columns):
                raise UnfitError(
                    NO_IMAGES, f'its columns ({", ".join(schema.names)[:200]}) hold no images'
                )
            for group in range(file.num_row_groups):
                length = file.metadata.row_group(group).num_rows
                records: list[lists.Record | UnfitError] = [{}] * length
                if columns:
                    records = _records(file.read_row_group(group, columns=columns))
                for row, fields in enumerate(records):
                    yield Row(fields, Cell(path, image, group, row) if image else None)
    except (pa.ArrowException, OSError, ValueError) as error:
        message = str(error).partition('\n')[0]
        raise UnfitError(UNREADABLE, f'it is cut short or damaged ({message})') from error


def _records(table: Any) -> list[lists.Record | UnfitError]:
    """The rows of a table; a cell that is not UTF-8 makes only its own row unreadable."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        return [_record(table, row) for row in range(len(table))]


def _record(table: Any, row: int) -> lists.Record | UnfitError:
    try:
        return table.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return UnfitError(NOT_UTF8, 'its text is not UTF-8')


@functools.lru_cache(KEPT_GROUPS)
def _group(path: Path, changed: int, column: str, group: int) -> Any:
    """A column of a row group; `changed` is the time of the file's last change."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _image_column(schema: Any) -> str | None:
    """The column of images, by its name or else the first of its type."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for wanted in IMAGE_COLUMNS for name in found if name.lower() == wanted]
    return next(iter([*named, *found]), None)


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == BYTES and _holds_bytes(field.type) for field in kind)
    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    kinds = ('binary', 'large_binary', 'binary_view', 'fixed_size_binary')
    return any(getattr(types, f'is_{name}')(kind) for name in kinds)
