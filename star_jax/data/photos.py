"""Can a file be a picture of a set, and what does it show at a given size?

PNG, JPEG, WebP, BMP, and the first frame of GIF and TIFF, told by their first bytes; nothing else
is tried. Grey, palettes, transparency (on white), CMYK and black-and-white become RGB; colour
profiles are not applied. Other kinds of pixels (16-bit grey, floats, LAB) do not say how they look
in eight bits, and are refused.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from star_jax import image_io
from star_jax.image_io import height_and_width

SUFFIXES = frozenset({'.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff'})
# Pictures that somebody may take for readable: told as such rather than overlooked.
FOREIGN = frozenset({'.heic', '.heif', '.avif', '.jxl', '.jp2', '.svg', '.psd', '.dng', '.cr2'})
MODES = frozenset({'1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr'})
MOST_ASPECT = 3  # of the longer side to the shorter
MOST_PIXELS = 178_956_970  # decoded at once: beyond, Pillow too takes a file for a bomb
BIG = 2**24  # pixels: several of that size at once could fill the memory
DRAFT = 4  # a JPEG comes out of its decoder at 1/2, 1/4, 1/8 while so many times the wanted size

UNREADABLE = 'unreadable image'
WRONG_MODE = 'wrong mode'
TOO_LONG = 'aspect ratio'
TOO_LARGE = 'too large'

_READERS = (
    (b'\x89PNG\r\n\x1a\n', PngImageFile),
    (b'\xff\xd8\xff', JpegImageFile),
    (b'RIFF', WebPImageFile),
    (b'BM', BmpImageFile),
    (b'GIF8', GifImageFile),
    (b'II*\0', TiffImageFile),
    (b'MM\0*', TiffImageFile),
)
_one_big = threading.Lock()


class UnfitError(Exception):
    """What no set can use: the `kind` of its fault, and as text the reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def shorter_side(path: Path) -> int:
    """In pixels, of the picture in a file, all of which is decoded.

    Raises UnfitError where it cannot be used at any size.
    """
    with _decoded(path, 1) as (_, shorter):
        return shorter


def read(path: Path, size: int | tuple[int, int]) -> np.ndarray:
    """The centre of the upright image in a file, by Lanczos: (height, width, 3) uint8 RGB.

    `size` is a side, or height and width, in pixels.

    Raises UnfitError as `shorter_side` does.
    """
    with _decoded(path, max(height_and_width(size))) as (picture, _):
        return image_io.fit(picture, size)


@contextlib.contextmanager
def _decoded(path: Path, wanted: int) -> Iterator[tuple[Image.Image, int]]:
    """The picture, perhaps smaller than its file has it, and the shorter side in the file."""
    try:
        with path.open('rb') as file:
            picture = _open(file)
            _check(picture)
            shorter = min(picture.size)
            _draft(picture, wanted)
            pixels = picture.width * picture.height
            if pixels > MOST_PIXELS:
                raise _too_large(f'its {picture.width} x {picture.height} pixels')
            with _one_big if pixels > BIG else contextlib.nullcontext():
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                yield picture, shorter
    except UnfitError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large('its pixels') from error
    except Exception as error:  # Pillow raises nearly anything over a damaged file
        said = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        reason = f'it is cut short or damaged ({said})'
        raise UnfitError(UNREADABLE, reason) from error


def _open(file: BinaryIO) -> Image.Image:
    """The header. Not by Image.open, which refuses large JPEGs before they can be reduced."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise UnfitError(UNREADABLE, 'the file is empty')
    for magic, reader in _READERS:
        if head.startswith(magic):
            return reader(file)
    raise UnfitError(UNREADABLE, 'it is none of PNG, JPEG, WebP, BMP, GIF and TIFF: convert it')


def _check(picture: Image.Image) -> None:
    """What the header alone tells against a picture."""
    if picture.mode not in MODES:
        raise UnfitError(
            WRONG_MODE, f'its pixels are {picture.mode}, expected RGB, grey or a palette'
        )
    if max(picture.size) > MOST_ASPECT * min(picture.size):
        raise UnfitError(
            TOO_LONG,
            f'it has {picture.width} x {picture.height} pixels, '
            f'expected sides of at most {MOST_ASPECT} : 1',
        )


def _draft(picture: Image.Image, wanted: int) -> None:
    """Lets the decoder of a JPEG reduce what is much larger than wanted."""
    if not isinstance(picture, JpegImageFile):
        return
    shorter, pixels = min(picture.size), picture.width * picture.height
    times = next((times for times in (8, 4, 2) if shorter // times >= DRAFT * wanted), 1)
    while pixels / times**2 > MOST_PIXELS and times < 8:
        times *= 2
    if times > 1:
        picture.draft(None, (picture.width // times, picture.height // times))


def _too_large(what: str) -> UnfitError:
    most = f'expected at most {MOST_PIXELS / 1e6:.0f} million: make it smaller'
    return UnfitError(TOO_LARGE, f'{what} are too many to decode, {most}')
