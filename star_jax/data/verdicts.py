"""Which pictures of a folder can be read, without reading all of them at every start?

Only decoding tells. So each is decoded once, in threads, and the verdict is remembered in the
cache folder for as long as the file keeps its size and its time of change.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from star_jax import files
from star_jax.data import photos
from star_jax.parallel import mesh

FORM = f'1, Pillow {PIL.__version__}'  # of what is remembered; another Pillow reads other files
PART = 256  # pictures given to the threads at once: ctrl-c waits for those in work alone
SHOWN_FROM = 200  # pictures: fewer take no time that asks for a bar

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`length` in bytes and `changed` (ns) tell the file; `shorter` side in px.

    `kind` and `reason` of its fault are '' for a picture that can be read.
    """

    length: int
    changed: int
    shorter: int = 0
    kind: str = ''
    reason: str = ''


def judge(root: Path, names: Sequence[str]) -> dict[str, Verdict]:
    """The verdict on each of the files `names` in the folder `root`; shows a bar if it takes long.

    Interrupted, it has remembered what is done.
    """
    place = files.cache_folder() / 'folders' / f'{_digest(str(root.resolve()))}.json'
    known = _recall(place)
    stamps = {name: stamp(root / name) for name in names}
    missing = [name for name in names if _unknown(known.get(name), stamps[name])]
    pool = ThreadPoolExecutor(mesh.cores())
    try:
        with _bar(len(missing)) as bar:
            task = bar.add_task(f'reading the images of {root}', total=len(missing))
            for first in range(0, len(missing), PART):
                part = missing[first : first + PART]
                found = pool.map(lambda name: _look(root / name, stamps[name]), part)
                for name, verdict in zip(part, found, strict=True):
                    known[name] = verdict
                    bar.advance(task)
    finally:
        pool.shutdown(cancel_futures=True)
        if missing:
            _remember(place, known)
    return {name: known[name] for name in names}


def stamp(path: Path) -> tuple[int, int] | None:
    """Length in bytes and time of change (ns) of a file; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _unknown(verdict: Verdict | None, found: tuple[int, int] | None) -> bool:
    return verdict is None or (verdict.length, verdict.changed) != found


def _look(path: Path, found: tuple[int, int] | None) -> Verdict:
    found = found or (0, 0)
    try:
        return Verdict(*found, shorter=photos.shorter_side(path))
    except photos.UnfitError as fault:
        return Verdict(*found, kind=fault.kind, reason=str(fault))


def _recall(place: Path) -> dict[str, Verdict]:
    """What an earlier start found; nothing where that is missing, of another form or torn."""
    try:
        kept = json.loads(place.read_text('utf-8'))
        if kept['form'] != FORM:
            return {}
        return {name: Verdict(*fields) for name, fields in kept['verdicts'].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _remember(place: Path, verdicts: Mapping[str, Verdict]) -> None:
    kept = {name: dataclasses.astuple(verdict) for name, verdict in verdicts.items()}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(place) as temporary:
            temporary.write_text(json.dumps({'form': FORM, 'verdicts': kept}), 'utf-8')
    except OSError as error:
        log.warning('%s cannot be written (%s): all images are read again next time', place, error)


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:24]


def _bar(count: int) -> Progress:
    columns = (
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=count < SHOWN_FROM)
