"""Where do drawn pictures go, and which of them are there already?

    00000.png, 00001.png, ...   one per prompt
    samples.jsonl               a line for each, written after it: prompt, seed, settings, model
    grid.png                    the first of them above their prompts

Whoever is stopped half-way goes on where the record ends.
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
PLACES = ('source',)  # what names a place in a record: the same things may lie elsewhere

Record = Mapping[str, Any]


class SampleFolder:
    """A folder of pictures, one per record; opened again with the same records, it goes on.

    A record says all that made a picture. Raises UserError where the folder cannot be written, or
    holds pictures of other records.
    """

    def __init__(self, folder: Path, records: Sequence[Record]) -> None:
        files.check_folder(folder)
        for name in (RECORD, GRID):
            files.check_file(folder / name)
        self._folder = folder
        named = ({'file': FILE.format(i), **record} for i, record in enumerate(records))
        self._records = [json.loads(json.dumps(record)) for record in named]
        self._recorded = self._known()
        self._done = {file for file in self._recorded if (folder / file).exists()}

    def missing(self) -> list[int]:
        """The numbers of the pictures that are not there yet."""
        names = enumerate(record['file'] for record in self._records)
        return [index for index, name in names if name not in self._done]

    def add(self, index: int, image: np.ndarray) -> None:
        """Writes picture `index`, uint8 (h, w, 3), and then its line: a kill loses one at most."""
        record = self._records[index]
        image_io.save_png(image, self._folder / record['file'])
        if record['file'] not in self._recorded:
            with files.writing(self._folder / RECORD), (self._folder / RECORD).open('a') as file:
                file.write(json.dumps(record) + '\n')
        self._done.add(record['file'])

    def grid(self) -> Path:
        """Writes the first pictures, all of which must be there, above their prompts."""
        shown = self._records[:MOST_IN_GRID]
        images = [image_io.load_image(self._folder / record['file']) for record in shown]
        sheet = image_io.grid(np.stack(images), [record['prompt'] for record in shown])
        return image_io.save_png(sheet, self._folder / GRID)

    def _known(self) -> set[str]:
        """The files that have a line, of which a torn last one is cut off."""
        path = self._folder / RECORD
        if not path.exists():
            return set()
        try:
            whole, _, torn = path.read_text('utf-8').rpartition('\n')
            lines = [json.loads(line) for line in whole.splitlines()]
            known = {line['file']: _without_places(line) for line in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path} is no record of drawn pictures: give another --out, or remove it'
            ) from error
        wanted = {record['file']: _without_places(record) for record in self._records}
        for file, line in known.items():
            if wanted.get(file) != line:
                raise UserError(
                    f'{self._folder} holds other pictures ({file}: {_difference(line, wanted)}): '
                    'give another --out, or the same prompts and settings to go on'
                )
        if torn:
            os.truncate(path, len(whole.encode()) + 1 if whole else 0)
        return set(known)


def _without_places(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_places(one) for name, one in value.items() if name not in PLACES}


def _difference(line: Record, wanted: Mapping[str, Record]) -> str:
    """The first field in which an earlier picture is not the wanted one."""
    was, now, names = line, wanted.get(line['file']), []
    if now is None:
        return 'more than there are prompts now'
    while isinstance(was, Mapping) and isinstance(now, Mapping):
        names.append(
            next(one for one in sorted({*was, *now}) if was.get(one, ...) != now.get(one, ...))
        )
        was, now = was.get(names[-1]), now.get(names[-1])
    return f'its {".".join(names)} was {str(was)[:60]!r} and would be {str(now)[:60]!r}'
