"""Where are sampled images written, and which of them exist already?

    00000.png, 00001.png, ...   one per prompt
    samples.jsonl               a line per image, written after it: prompt, seed, settings, model
    grid.png                    the first images above their prompts

An interrupted command continues after the last line.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from star_jax import files, image_io
from star_jax.errors import UserError

RECORD = 'samples.jsonl'
GRID = 'grid.png'
MOST_IN_GRID = 64
FILE = '{:05d}.png'
PATHS = ('source',)  # fields that hold a path or hub id: a moved file makes the same image

Record = Mapping[str, Any]


class SampleFolder:
    """A folder of images, one per record; opened again with the same records, it continues.

    A record holds everything that determines an image. Raises UserError where the folder cannot be
    written, or holds images of other records.
    """

    def __init__(self, folder: Path, records: Sequence[Record]) -> None:
        files.check_folder(folder)
        for name in (RECORD, GRID):
            files.check_file(folder / name)
        self._folder = folder
        named = ({'file': FILE.format(i), **record} for i, record in enumerate(records))
        self._records = [json.loads(json.dumps(record)) for record in named]
        self._recorded = self._read_record()
        self._done = {file for file in self._recorded if (folder / file).exists()}

    def missing(self) -> list[int]:
        """The numbers of the images that do not exist yet."""
        names = enumerate(record['file'] for record in self._records)
        return [index for index, name in names if name not in self._done]

    def add(self, index: int, image: np.ndarray) -> None:
        """Writes image `index`, uint8 (h, w, 3), then its line: a kill loses at most one image."""
        record = self._records[index]
        image_io.save_png(image, self._folder / record['file'])
        if record['file'] not in self._recorded:
            with files.writing(self._folder / RECORD), (self._folder / RECORD).open('a') as file:
                file.write(json.dumps(record) + '\n')
        self._done.add(record['file'])

    def grid(self) -> Path:
        """Writes the first images, all of which must exist, above their prompts; its path."""
        records = self._records[:MOST_IN_GRID]
        images = [image_io.load_image(self._folder / record['file']) for record in records]
        sheet = image_io.grid(np.stack(images), [record['prompt'] for record in records])
        return image_io.save_png(sheet, self._folder / GRID)

    def _read_record(self) -> set[str]:
        """The files that have a line; a torn last line is cut off."""
        path = self._folder / RECORD
        if not path.exists():
            return set()
        files.check_regular(path)
        try:
            complete, _, torn = path.read_text('utf-8').rpartition('\n')
            lines = [json.loads(line) for line in complete.splitlines()]
            recorded = {line['file']: _without_paths(line) for line in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path} is no record of sampled images: give another --out, or remove it'
            ) from error
        expected = {record['file']: _without_paths(record) for record in self._records}
        for file, line in recorded.items():
            if expected.get(file) != line:
                raise UserError(
                    f'{self._folder} holds other images ({file}: {_difference(line, expected)}): '
                    'give another --out, or the same prompts and settings to continue'
                )
        if torn:
            os.truncate(path, len(complete.encode()) + 1 if complete else 0)
        return set(recorded)


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
