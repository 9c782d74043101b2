"""Which images of a folder can be read, without reading all of them at every start?

An image is known to be readable only after it is decoded. So every image is decoded once, in
threads, and the result is stored in the cache folder. It is valid while the file keeps its size and
modification time.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL

from star_jax import files
from star_jax.console import progress_bar
from star_jax.data import image_files
from star_jax.data.tree import File
from star_jax.parallel import mesh

FORMAT = f'4, Pillow {PIL.__version__}'  # stored results depend on Pillow's version
CHUNK = 256  # images queued at once: after ctrl-c only running threads must finish
SAVED_EVERY = 60  # seconds
PROGRESS_FROM = 200  # images: fewer are read so fast that a progress bar is not needed

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageCheck:
    """The result of decoding an image file.

    Attributes:
        size: size of the file in bytes.
        modified: modification time of the file in ns.
        shorter_side: shorter side of the image, in pixels.
        ratio: height divided by width.
        kind: kind of its fault, '' for a usable image.
        reason: description of its fault, '' for a usable image.
    """

    size: int
    modified: int
    shorter_side: int = 0
    ratio: float = 1.0
    kind: str = ''
    reason: str = ''


def check_images(root: Path, images: Mapping[str, File]) -> dict[str, ImageCheck]:
    """Checks the images of the folder `root` by their names; shows a progress bar for many images.

    Results are stored even if the call is interrupted, and those until a minute ago if the process
    is killed.
    """
    path = files.cache_folder() / 'folders' / f'{_digest(os.path.realpath(root))}.json'
    checks = _load(path)
    stamps = {name: file_stamp(image) for name, image in images.items()}
    unchecked = [name for name in images if not _is_valid(checks.get(name), stamps[name])]
    pool, saved = ThreadPoolExecutor(mesh.cores()), time.monotonic()
    try:
        with progress_bar(visible=len(unchecked) >= PROGRESS_FROM) as bar:
            task = bar.add_task(f'reading the images of {root}', total=len(unchecked), note='')
            for first in range(0, len(unchecked), CHUNK):
                chunk = unchecked[first : first + CHUNK]
                results = pool.map(lambda name: _check(images[name], stamps[name]), chunk)
                for name, check in zip(chunk, results, strict=True):
                    checks[name] = check
                    bar.advance(task)
                if time.monotonic() - saved > SAVED_EVERY:
                    _save(path, checks)
                    saved = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        if unchecked:
            _save(path, checks)
    return {name: checks[name] for name in images}


def file_stamp(file: File) -> tuple[int, int] | None:
    """Size in bytes and modification time in ns of a file; None if there is no file.

    For a file inside another file these are the values of the container.
    """
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _is_valid(check: ImageCheck | None, stamp: tuple[int, int] | None) -> bool:
    return check is not None and (check.size, check.modified) == stamp


def _check(file: File, stamp: tuple[int, int] | None) -> ImageCheck:
    size, modified = stamp or (0, 0)
    try:
        height, width = image_files.measure(file)
        return ImageCheck(size, modified, min(height, width), height / width)
    except image_files.UnfitError as error:
        return ImageCheck(size, modified, kind=error.kind, reason=str(error))


def _load(path: Path) -> dict[str, ImageCheck]:
    """Stored results; empty if the file is missing, damaged or of another format."""
    try:
        stored = files.parse_json(path.read_text('utf-8'))
        if stored['format'] != FORMAT:
            return {}
        return {name: ImageCheck(*fields) for name, fields in stored['checks'].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _save(path: Path, checks: Mapping[str, ImageCheck]) -> None:
    fields = {name: dataclasses.astuple(check) for name, check in checks.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            temporary.write_text(json.dumps({'format': FORMAT, 'checks': fields}), 'utf-8')
    except OSError as error:
        log.warning('%s cannot be written (%s): all images are read again next time', path, error)


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:24]
