"""Where are sampled images written, and which of them exist already?

    000000.png, 000001.png, ...   one per record
    samples.jsonl                 a line per image, written after it: prompt, seed, settings, model
    grid.png                      the first images above their prompts

An interrupted command continues after the last line. Several processes divide a folder into shares;
each has its own file of lines, such as samples-0-of-2.jsonl, and reads those of the others.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from star_jax import files, image_io
from star_jax.errors import UserError

RECORD = 'samples.jsonl'
RECORDS = 'samples*.jsonl'
GRID = 'grid.png'
MOST_IN_GRID = 64
MOST_IMAGES = 1_000_000  # in a folder: names have six digits
FILE = '{:06d}.png'
PATHS = ('source',)  # fields that hold a path or hub id: a moved file makes the same image
WHOLE = (0, 1)

Record = Mapping[str, Any]


class SampleFolder:
    """A folder of images, one per record; opened again with the same records, it continues.

    It is used in a `with` block, at whose start another process that makes this share, and images
    of other records, are refused. A record holds everything that determines an image. Process
    I of N makes every N-th image, beginning with the I-th.

    Args:
        folder: the folder.
        records: the records of all images, of every process.
        share: I and N.

    Raises:
        UserError: the folder cannot be written, or holds images of something else.
    """

    def __init__(
        self, folder: Path, records: Sequence[Record], share: tuple[int, int] = WHOLE
    ) -> None:
        files.check_folder(folder)
        self._number, self._processes = share
        name = RECORD if share == WHOLE else RECORD.replace('.', '-{}-of-{}.'.format(*share))
        for path in (folder / name, folder / GRID):
            files.check_file(path)
        if (folder / name).exists():
            files.check_regular(folder / name)
        self._folder, self._own = folder, folder / name
        self._check_free(len(records))
        named = ({'file': FILE.format(i), **record} for i, record in enumerate(records))
        self._records = [json.loads(json.dumps(record)) for record in named]
        self._recorded, self._done = set(), set()

    def __enter__(self) -> Self:
        self._file = self._lock()
        try:
            self._read_records()
        except UserError:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _check_free(self, count: int) -> None:
        """Raises UserError if images would replace some that no earlier command has made."""
        if not self._folder.is_dir() or any(self._folder.glob(RECORDS)):
            return
        own = {FILE.format(index) for index in range(count)} | {GRID}
        if found := sorted(own & {path.name for path in self._folder.iterdir()}):
            raise UserError(
                f'{self._folder} holds {found[0]}, which no {RECORD} there describes, and is not '
                'overwritten: give another --out, or remove it'
            )

    def missing(self) -> list[int]:
        """The numbers of the images of this share that do not exist yet."""
        own = range(self._number, len(self._records), self._processes)
        return [index for index in own if self._records[index]['file'] not in self._done]

    def left(self) -> int:
        """How many images of all shares do not exist yet."""
        self._read_records()
        return len(self._records) - len(self._done)

    def add(self, index: int, image: np.ndarray) -> None:
        """Writes image `index`, uint8 (h, w, 3), then its line: a kill loses at most one image."""
        record = self._records[index]
        image_io.save_png(image, self._folder / record['file'])
        if record['file'] not in self._recorded:
            with files.writing(self._own):
                self._file.write(json.dumps(record) + '\n')
                self._file.flush()
            self._recorded.add(record['file'])
        self._done.add(record['file'])

    def grid(self) -> Path:
        """Writes the first images, all of which must exist, above their prompts; its path."""
        records = self._records[:MOST_IN_GRID]
        images = [image_io.load_image(self._folder / record['file']) for record in records]
        sheet = image_io.grid(images, [record['prompt'] for record in records])
        return image_io.save_png(sheet, self._folder / GRID)

    def _lock(self) -> TextIO:
        """The open file of this share's lines, locked where the file system has locks."""
        with files.writing(self._own):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._own.open('a', encoding='utf-8')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(
                f'another process writes {self._own}: wait for it, or divide the images among '
                'processes with --share I N'
            ) from error
        except OSError:
            pass
        return file

    def _read_records(self) -> None:
        """Reads which images have a line; a torn last line of this share is cut off."""
        expected = {record['file']: _without_paths(record) for record in self._records}
        for path in sorted(self._folder.glob(RECORDS)):
            recorded = self._read_record(path)
            for file, line in recorded.items():
                if expected.get(file) != line:
                    raise UserError(
                        f'{self._folder} holds other images ({file}: '
                        f'{_difference(line, expected)}): give another --out, or the same '
                        'prompts and settings to continue'
                    )
            self._recorded |= recorded.keys()
        self._done = {file for file in self._recorded if (self._folder / file).exists()}

    def _read_record(self, path: Path) -> dict[str, Any]:
        """The lines of a file by the names of their images."""
        files.check_regular(path)
        try:
            complete, _, torn = path.read_text('utf-8').rpartition('\n')
            lines = [files.parse_json(line) for line in complete.splitlines()]
            recorded = {line['file']: _without_paths(line) for line in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path} is no record of sampled images: give another --out, or remove it'
            ) from error
        if torn and path == self._own:
            os.truncate(path, len(complete.encode()) + 1 if complete else 0)
        return recorded


def _without_paths(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_paths(field) for name, field in value.items() if name not in PATHS}


def _difference(line: Record, expected: Mapping[str, Record]) -> str:
    """The first field in which the record of an existing image differs from the expected one."""
    old, new, names = line, expected.get(line['file']), []
    if new is None:
        return 'more than there are prompts now'
    while isinstance(old, Mapping) and isinstance(new, Mapping):
        names.append(
            next(name for name in sorted({*old, *new}) if old.get(name, ...) != new.get(name, ...))
        )
        old, new = old.get(names[-1]), new.get(names[-1])
    return f'its {".".join(names)} was {str(old)[:60]!r} and would be {str(new)[:60]!r}'
