"""Can a file be an image of a dataset, and what are its pixels at a given size?

PNG, JPEG, WebP, BMP, and the first frame of GIF and TIFF are read; the first bytes of a file decide
its format. Grey, palettes, transparency (on white), CMYK and black-and-white become RGB; colour
profiles are not applied. Other modes (16-bit grey, floats, LAB) are refused, because their range in
eight bits is unknown.
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
# Image formats that are not read: reported, not ignored.
UNSUPPORTED = frozenset({'.heic', '.heif', '.avif', '.jxl', '.jp2', '.svg', '.psd', '.dng', '.cr2'})
MODES = frozenset({'1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr'})
MAX_ASPECT = 3  # longer side divided by the shorter
MAX_PIXELS = 178_956_970  # when decoded: Pillow, too, refuses larger images as decompression bombs
LARGE = 2**24  # pixels: larger images are decoded one at a time, to limit the memory
DRAFT = 4  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that is still so many times the target side

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
_large_image_lock = threading.Lock()


class UnfitError(Exception):
    """A file or record that cannot be used; the message is the reason.

    Attributes:
        kind: kind of fault.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def shorter_side(path: Path) -> int:
    """The shorter side in pixels of an image file, which is decoded completely.

    Raises UnfitError if the image cannot be used at any size.
    """
    with _decoded(path, 1) as (_, shorter):
        return shorter


def read(path: Path, size: int | tuple[int, int]) -> np.ndarray:
    """The centre of an image file, upright and resized by Lanczos.

    Args:
        path: the file.
        size: side of a square, or (height, width), in pixels.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        UnfitError: as `shorter_side`.
    """
    with _decoded(path, max(height_and_width(size))) as (image, _):
        return image_io.fit(image, size)


@contextlib.contextmanager
def _decoded(path: Path, target: int) -> Iterator[tuple[Image.Image, int]]:
    """The image, possibly reduced by its decoder, and its shorter side before that.

    Args:
        path: the file.
        target: longer side in pixels for which the image is decoded.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device may not end
        raise UnfitError(UNREADABLE, 'it is no regular file')
    try:
        with path.open('rb') as file:
            image = _open(file)
            _check(image)
            shorter = min(image.size)
            _draft(image, target)
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise _too_large(f'its {image.width} x {image.height} pixels')
            with _large_image_lock if pixels > LARGE else contextlib.nullcontext():
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                yield image, shorter
    except UnfitError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large('its pixels') from error
    except Exception as error:  # Pillow raises many exception classes for damaged files
        message = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        reason = f'it is cut short or damaged ({message})'
        raise UnfitError(UNREADABLE, reason) from error


def _open(file: BinaryIO) -> Image.Image:
    """Reads the header. Image.open refuses large JPEGs before they can be reduced."""
    start = file.read(16)
    file.seek(0)
    if not start:
        raise UnfitError(UNREADABLE, 'the file is empty')
    for magic, reader in _READERS:
        if start.startswith(magic):
            return reader(file)
    raise UnfitError(UNREADABLE, 'it is none of PNG, JPEG, WebP, BMP, GIF and TIFF: convert it')


def _check(image: Image.Image) -> None:
    """Raises UnfitError if the header shows that the image cannot be used."""
    if image.mode not in MODES:
        raise UnfitError(
            WRONG_MODE, f'its pixels are {image.mode}, expected RGB, grey or a palette'
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnfitError(
            TOO_LONG,
            f'it has {image.width} x {image.height} pixels, '
            f'expected sides of at most {MAX_ASPECT} : 1',
        )


def _draft(image: Image.Image, target: int) -> None:
    """Makes the decoder of a JPEG reduce an image that is much larger than the target."""
    if not isinstance(image, JpegImageFile):
        return
    shorter, pixels = min(image.size), image.width * image.height
    factor = next((factor for factor in (8, 4, 2) if shorter // factor >= DRAFT * target), 1)
    while pixels / factor**2 > MAX_PIXELS and factor < 8:
        factor *= 2
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))


def _too_large(pixels: str) -> UnfitError:
    limit = f'expected at most {MAX_PIXELS / 1e6:.0f} million: make it smaller'
    return UnfitError(TOO_LARGE, f'{pixels} are too many to decode, {limit}')
