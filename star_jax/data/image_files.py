"""Can a file be an image of a dataset, and what are its pixels at a given size?

PNG, JPEG, WebP, AVIF, BMP, PPM, and the first frame of GIF and TIFF are read; the first bytes of a
file decide its format. Grey (of 8 or 16 bits), palettes, transparency (on white), CMYK and
black-and-white become RGB; colour profiles are not applied. Other modes (32-bit integers, floats,
LAB) are refused, because their range in eight bits is unknown.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps, features
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from star_jax import image_io
from star_jax.data.resizing import LANCZOS, Resizing

# fmt: off
SUFFIXES = frozenset((
    '.png', '.apng', '.jpg', '.jpeg', '.jpe', '.jfif', '.pjpeg', '.pjp', '.webp', '.avif', '.bmp',
    '.dib', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.pnm',
))
# Image formats that are not read: reported, not ignored.
UNSUPPORTED = frozenset((
    '.heic', '.heif', '.hif', '.avifs', '.jxl', '.jp2', '.j2k', '.jpx', '.svg', '.psd', '.xcf',
    '.tga', '.ico', '.exr', '.hdr', '.dds', '.qoi', '.eps', '.dng', '.cr2', '.cr3', '.nef', '.arw',
    '.orf', '.raf', '.rw2',
))
# fmt: on
FORMATS = 'PNG, JPEG, WebP, AVIF, BMP, PPM, GIF and TIFF'
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
    *((b'P%d' % number, PpmImageFile) for number in range(1, 7)),
)
AVIF_BRANDS = (b'avif', b'avis')  # in the first box of the file, which HEIC has, too
START = 64  # bytes that decide the format
_large_image_lock = threading.Lock()


class UnfitError(Exception):
    """A file or record that cannot be used; the message is the reason.

    Attributes:
        kind: kind of fault.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class ImageSource(Protocol):
    """A `Path` of an image file, or an image in another file, whose path `os.fspath` returns."""

    def __fspath__(self) -> str: ...

    def open(self, mode: str = 'rb') -> BinaryIO: ...


def measure(source: ImageSource) -> tuple[int, int]:
    """(height, width) in pixels of an image file, upright; it is decoded completely.

    Raises UnfitError if the image cannot be used at any size.
    """
    with _decoded(source, 1) as (image, sides):
        turned = (image.height - image.width) * (sides[0] - sides[1]) < 0
        return sides[::-1] if turned else sides


def read(
    source: ImageSource, size: int | tuple[int, int], resizing: Resizing = LANCZOS
) -> np.ndarray:
    """The centre of an image file, upright and resized.

    Args:
        source: the file.
        size: side of a square, or (height, width), in pixels.
        resizing: how it is resized.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        UnfitError: as `measure`.
    """
    with _decoded(source, resizing.decoded_side(size)) as (image, _):
        return resizing.fit(image, size)


@contextlib.contextmanager
def _decoded(source: ImageSource, target: float) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """The image, upright and possibly reduced by its decoder; (height, width) in the file.

    Args:
        source: the file.
        target: longer side in pixels for which the image is decoded.
    """
    # Reading a pipe or a device may not end.
    if os.path.exists(source) and not os.path.isfile(source):
        raise UnfitError(UNREADABLE, 'it is not a regular file')
    try:
        with source.open('rb') as file:
            image = _open(file)
            _check(image)
            sides = image.height, image.width
            _draft(image, target)
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise _too_large(f'its {image.width} x {image.height} pixels')
            with _large_image_lock if pixels > LARGE else contextlib.nullcontext():
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                yield image, sides
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
    start = file.read(START)
    file.seek(0)
    if not start:
        raise UnfitError(UNREADABLE, 'the file is empty')
    for magic, reader in _READERS:
        if start.startswith(magic):
            return reader(file)
    if start[4:8] == b'ftyp' and any(brand in start for brand in AVIF_BRANDS):
        if not features.check('avif'):
            raise UnfitError(UNREADABLE, 'this installation of Pillow reads no AVIF: convert it')
        return AvifImageFile(file)
    raise UnfitError(
        UNREADABLE, 'it is none of PNG, JPEG, WebP, AVIF, BMP, GIF and TIFF: convert it'
    )


def _check(image: Image.Image) -> None:
    """Raises UnfitError if the header shows that the image cannot be used."""
    if image.mode not in image_io.MODES:
        raise UnfitError(
            WRONG_MODE, f'its pixels are {image.mode}, expected RGB, grey or a palette'
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnfitError(
            TOO_LONG,
            f'it has {image.width} x {image.height} pixels, '
            f'expected sides of at most {MAX_ASPECT} : 1',
        )


def _draft(image: Image.Image, target: float) -> None:
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
