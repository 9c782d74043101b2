"""How are images decoded, resized, saved and laid out in grids?

All functions work on uint8 arrays: (h, w, 3) RGB, 0 to 255, NHWC when stacked.
"""

import contextlib
import io
import math
import os
import re
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from star_jax import files
from star_jax.errors import UserError

FORMATS = ('PNG', 'JPEG', 'WEBP', 'AVIF', 'BMP', 'DIB', 'PPM', 'GIF', 'TIFF')
SIXTEEN_BITS = frozenset({'I;16', 'I;16L', 'I;16B', 'I;16N'})
# Others (32-bit integers, floats, LAB) have an unknown range in eight bits.
MODES = frozenset({'1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr'}) | SIXTEEN_BITS
MIN_CELL = 128  # px: a narrower cell of a grid cannot hold a caption
MARGIN = 8  # px
CAPTION_SIZE = 12
LONGEST_ASPECT = 1000  # sides of an image whose ratio a user may ask for
LONGEST_CAPTION = 1000  # characters in a grid; a file of captions may hold millions
TITLE_SIZE = 18
TEXT_COLOUR = (32, 32, 32)
FIRST_TURNED = 5  # orientations of EXIF from here on lie on their side


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size, which is such a pair or the side of a square, in pixels."""
    return (size, size) if isinstance(size, int) else size


def parse_aspect(aspect: str) -> float:
    """Width divided by height of a ratio such as '16:9'; UserError for another text."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)', aspect)
    width, height = map(float, match.groups()) if match else (0.0, 0.0)
    if not (width and height and 1 / LONGEST_ASPECT <= width / height <= LONGEST_ASPECT):
        shown = reprlib.repr(aspect)
        raise UserError(f'{shown} is not an aspect ratio: give width:height, such as 16:9')
    return width / height


def crop(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """The centre of an image, resized by Lanczos; transparency becomes white.

    Args:
        image: (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) uint8.
        size: side of a square, or (height, width), in pixels.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    return fit(Image.fromarray(image), size)


def fit(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """`crop` of a Pillow image of any mode."""
    image, (height, width) = _on_white(image), height_and_width(size)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.array(image)


def cover_and_crop(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """The centre of a Pillow image of any mode (Infinity specification 6).

    It is resized by Lanczos so that one side is that of `size` and the other, cut to whole pixels,
    is at least as long, then cropped.

    Args:
        image: the image; transparency becomes white.
        size: as for `crop`.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    image, (height, width) = _on_white(image), height_and_width(size)
    ratio = image.width / image.height
    if ratio <= width / height:
        sides = width, max(int(width / ratio), height)
    else:
        sides = max(int(ratio * height), width), height
    return _centre(image.resize(sides, Image.Resampling.LANCZOS), height, width)


def halve_and_fit(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """The centre of a Pillow image of any mode (LlamaGen specification 1.8).

    It is halved with a box filter while both sides are at least twice those of `size`, then resized
    by bicubic so that it covers `size`, then cropped.

    Args:
        image: the image; transparency becomes white.
        size: as for `crop`.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    image, (height, width) = _on_white(image), height_and_width(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    sides = round(image.width * scale), round(image.height * scale)
    return _centre(image.resize(sides, Image.Resampling.BICUBIC), height, width)


def upright_sides(data: bytes) -> tuple[int, int]:
    """(height, width) of an image file in pixels, upright; its pixels are not decoded.

    Raises OSError as `decode`.
    """
    with _opened(data) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= FIRST_TURNED
        return image.size if turned else image.size[::-1]


def decode(data: bytes) -> np.ndarray:
    """Decodes an image file of one of FORMATS to (h, w, 3) RGB, upright, on white.

    Raises OSError if Pillow cannot read it, or it has none of MODES.
    """
    with _opened(data) as image:
        return np.array(_on_white(ImageOps.exif_transpose(image)))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """An image file, whose pixels are decoded on use; errors are OSErrors."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode not in MODES:
                raise OSError(f'its pixels are {image.mode}, expected RGB, grey or a palette')
            yield image
    except OSError:
        raise
    except Image.DecompressionBombError as error:
        raise OSError('it has too many pixels to be decoded: make it smaller') from error
    except Exception as error:  # Pillow raises many exception classes for damaged files
        raise OSError(str(error) or type(error).__name__) from error


def encode(image: np.ndarray) -> bytes:
    """Encodes a (h, w, 3) image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='PNG', optimize=True)
    return buffer.getvalue()


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Loads an image file as (h, w, 3) RGB, upright; transparency becomes white.

    Raises UserError if the file is missing or is not an image.
    """
    files.check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns about files that it can read
            return decode(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f'no image at {path}: give the path of an existing file') from None
    except UnidentifiedImageError:
        raise UserError(
            f'{path} is not an image in a known format: give a PNG, JPEG or WebP'
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'the image {path} cannot be read ({reason}): replace it') from None


def save_png(image: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Writes a (h, w, 3) image to a PNG file completely or not at all.

    Raises UserError if the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            temporary.write_bytes(encode(image))
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror}): choose another path') from None
    return path


def compare(
    originals: np.ndarray,
    generated: np.ndarray,
    captions: Sequence[str],
    label: str,
    columns: int = 8,
) -> np.ndarray:
    """A grid with rows of originals, each above the row of the corresponding generated images.

    Args:
        originals: (n, h, w, 3) uint8.
        generated: (n, h, w, 3) uint8.
        captions: one caption per original.
        label: text below every generated image.
        columns: images per row.
    """
    images, texts = [], []
    columns = min(columns, len(originals))
    for first in range(0, len(originals), columns):
        row = slice(first, first + columns)
        count = len(originals[row])
        empty = [np.full_like(originals[0], 255)] * (columns - count)
        no_text = [''] * len(empty)
        images += [*originals[row], *empty, *generated[row], *empty]
        texts += [*captions[row], *no_text, *[label] * count, *no_text]
    return grid(images, texts, columns)


def grid(
    images: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    title: str | None = None,
) -> np.ndarray:
    """Images in rows on one (h, w, 3) image, each above its wrapped caption.

    Args:
        images: (h, w, 3) or (h, w, 4) uint8; small images are enlarged by an integer factor so that
            captions are legible.
        captions: one caption per image, or None; very long ones are cut.
        columns: images per row (None: the grid is about square).
        title: text above the grid, or None.

    Raises:
        UserError: there is no image, or the number of captions differs.
    """
    if len(images) == 0:
        raise UserError('the grid has no image: expected at least one')
    if captions is not None and len(captions) != len(images):
        raise UserError(f'{len(captions)} captions for {len(images)} images: expected one for each')
    enlarged = [_enlarge(_on_white(Image.fromarray(image))) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(enlarged))), len(enlarged))
    width = max(image.width for image in enlarged)
    font = ImageFont.load_default(CAPTION_SIZE)
    texts = [_wrap(caption, font, width) for caption in captions or [''] * len(enlarged)]
    rows = [
        _grid_row(
            enlarged[first : first + columns],
            texts[first : first + columns],
            font=font,
            width=width,
            columns=columns,
        )
        for first in range(0, len(enlarged), columns)
    ]
    if title:
        rows.insert(0, _heading(title, rows[0].width))
    return np.array(_stack(rows))


def _centre(image: Image.Image, height: int, width: int) -> np.ndarray:
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; transparency becomes white."""
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return image if image.mode == 'RGB' else image.convert('RGB')
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(white, image).convert('RGB')


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to eight bits, where Pillow would clip it."""
    if not image.mode.startswith('I'):
        return image
    grey = np.asarray(image)
    reduced = Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8))
    if isinstance(transparent := image.info.get('transparency'), int):
        reduced.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return reduced


def _enlarge(image: Image.Image) -> Image.Image:
    factor = math.ceil(MIN_CELL / max(image.size))
    if factor == 1:
        return image
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Breaks a text into lines of at most `width` px; words too long for a line are broken.

    Only the first `LONGEST_CAPTION` characters of a text are shown.
    """
    if len(text) > LONGEST_CAPTION:
        text = f'{text[:LONGEST_CAPTION]} ...'
    lines = ['']
    for word in text.split():
        longer = f'{lines[-1]} {word}'.strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append('')
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append('')
            lines[-1] += letter
    return '\n'.join(lines)


def _grid_row(
    images: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    font: ImageFont.FreeTypeFont,
    width: int,
    columns: int,
) -> Image.Image:
    height = max(image.height for image in images)
    text_height = max(_text_height(text, font) for text in texts)
    row = Image.new(
        'RGB', (MARGIN + columns * (width + MARGIN), height + text_height + MARGIN), 'white'
    )
    draw = ImageDraw.Draw(row)
    for column, (image, text) in enumerate(zip(images, texts, strict=True)):
        left = MARGIN + column * (width + MARGIN)
        row.paste(image, (left, 0))
        draw.text((left, height + 2), text, fill=TEXT_COLOUR, font=font)
    return row


def _text_height(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Height in px of a wrapped caption, with the gap above it."""
    if not text:
        return 0
    draw = ImageDraw.Draw(Image.new('RGB', (1, 1)))
    return math.ceil(draw.textbbox((0, 2), text, font=font)[3]) + 2


def _heading(title: str, width: int) -> Image.Image:
    font = ImageFont.load_default(TITLE_SIZE)
    text = _wrap(title, font, width - 2 * MARGIN)
    heading = Image.new('RGB', (width, _text_height(text, font) + MARGIN), 'white')
    ImageDraw.Draw(heading).text((MARGIN, 0), text, fill=TEXT_COLOUR, font=font)
    return heading


def _stack(rows: Iterable[Image.Image]) -> Image.Image:
    rows = list(rows)
    sheet = Image.new('RGB', (rows[0].width, MARGIN + sum(row.height for row in rows)), 'white')
    top = MARGIN
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
