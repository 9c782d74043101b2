"""How do pictures come in, get their size and go out to be looked at?

Pillow work on uint8 arrays: (h, w, 3) RGB, 0 to 255, NHWC when stacked.
"""

import io
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from star_jax.errors import UserError

LEGIBLE = 128  # px: a cell narrower than this cannot hold a caption
MARGIN = 8
CAPTION_SIZE = 12
TITLE_SIZE = 18
INK = (32, 32, 32)


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels, of such a pair or of the side of a square."""
    return (size, size) if isinstance(size, int) else size


def crop(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """The centre of an image at the aspect ratio of `size` (a side, or height and width), RGB.

    `image` is (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) uint8; transparency lies on white.
    """
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    return fit(Image.fromarray(image), size)


def fit(picture: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """The same for an image of any mode, by Lanczos: (height, width, 3) RGB, on white."""
    picture, (height, width) = _on_white(picture), height_and_width(size)
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.array(picture)


def decode(data: bytes) -> np.ndarray:
    """An encoded picture (PNG, JPEG, WebP, ...) as (h, w, 3) RGB, transparency on white.

    Raises OSError where `data` is no picture that Pillow can read.
    """
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(_on_white(ImageOps.exif_transpose(picture)))


def encode(image: np.ndarray) -> bytes:
    """A (h, w, 3) picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='PNG', optimize=True)
    return buffer.getvalue()


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """A picture file as (h, w, 3) RGB, upright, transparency on white.

    Raises UserError where the file is missing or is no picture.
    """
    try:
        return decode(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f'no picture at {path}: give the path of an existing file') from None
    except UnidentifiedImageError:
        raise UserError(
            f'{path} is no picture that can be read: give a PNG, JPEG or WebP'
        ) from None
    except Image.DecompressionBombError:
        raise UserError(f'{path} has too many pixels to be decoded: make it smaller') from None
    except (OSError, SyntaxError) as error:  # Pillow reports torn PNG chunks as SyntaxError
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'the picture {path} cannot be read ({reason}): replace it') from None


def save_png(image: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Writes a (h, w, 3) picture so that the file is either whole or absent.

    Raises UserError where the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
        try:
            with os.fdopen(handle, 'wb') as file:
                file.write(encode(image))
            Path(draft).chmod(0o644)  # mkstemp hides the file from everyone else
            os.replace(draft, path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror}): choose another place') from None
    return path


def compare(
    truths: np.ndarray, drawn: np.ndarray, captions: Sequence[str], word: str, columns: int = 8
) -> np.ndarray:
    """One picture: rows of `truths` with their captions, each over a row of what was drawn.

    Both are (n, h, w, 3) uint8; `word` says below the second row what it is.
    """
    images, texts = [], []
    columns = min(columns, len(truths))
    for first in range(0, len(truths), columns):
        some = slice(first, first + columns)
        missing = columns - len(truths[some])
        empty = [np.full_like(truths[0], 255)] * missing
        images += [*truths[some], *empty, *drawn[some], *empty]
        texts += [*captions[some], *[''] * missing, *[word] * len(drawn[some]), *[''] * missing]
    return grid(images, texts, columns)


def grid(
    images: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    title: str | None = None,
) -> np.ndarray:
    """One (h, w, 3) picture of all of them in rows, each above its wrapped caption.

    `images` are (h, w, 3) or (h, w, 4) uint8; small ones are enlarged by whole pixels so that
    captions are legible. `columns` defaults to as many as make the grid about square.
    Raises UserError where there is no image, or not one caption for each.
    """
    if len(images) == 0:
        raise UserError('there is no image to draw: expected at least one')
    if captions is not None and len(captions) != len(images):
        raise UserError(f'{len(captions)} captions for {len(images)} images: expected one for each')
    pictures = [_enlarge(_on_white(Image.fromarray(image))) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    width = max(picture.width for picture in pictures)
    font = ImageFont.load_default(CAPTION_SIZE)
    texts = [_wrap(caption, font, width) for caption in captions or [''] * len(pictures)]
    rows = [_row(pictures[at : at + columns], texts[at : at + columns], font, width, columns)
            for at in range(0, len(pictures), columns)]  # fmt: skip
    if title:
        rows.insert(0, _heading(title, rows[0].width))
    return np.array(_stack(rows))


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB, what was transparent being white."""
    if picture.mode == 'RGB' and not picture.has_transparency_data:
        return picture
    if not picture.has_transparency_data:
        return _eight_bits(picture).convert('RGB')
    picture = picture.convert('RGBA')
    white = Image.new('RGBA', picture.size, 'white')
    return Image.alpha_composite(white, picture).convert('RGB')


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey instead of scaling it."""
    if not picture.mode.startswith('I'):
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))


def _enlarge(picture: Image.Image) -> Image.Image:
    times = math.ceil(LEGIBLE / max(picture.size))
    if times == 1:
        return picture
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Lines no wider than `width` px; words too long for a line are cut."""
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


def _row(
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    font: ImageFont.FreeTypeFont,
    width: int,
    columns: int,
) -> Image.Image:
    height = max(picture.height for picture in pictures)
    deepest = max(_depth(text, font) for text in texts)
    row = Image.new(
        'RGB', (MARGIN + columns * (width + MARGIN), height + deepest + MARGIN), 'white'
    )
    draw = ImageDraw.Draw(row)
    for column, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left = MARGIN + column * (width + MARGIN)
        row.paste(picture, (left, 0))
        draw.text((left, height + 2), text, fill=INK, font=font)
    return row


def _depth(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Height in px of a wrapped caption below its picture."""
    if not text:
        return 0
    draw = ImageDraw.Draw(Image.new('RGB', (1, 1)))
    return math.ceil(draw.textbbox((0, 2), text, font=font)[3]) + 2


def _heading(title: str, width: int) -> Image.Image:
    font = ImageFont.load_default(TITLE_SIZE)
    text = _wrap(title, font, width - 2 * MARGIN)
    heading = Image.new('RGB', (width, _depth(text, font) + MARGIN), 'white')
    ImageDraw.Draw(heading).text((MARGIN, 0), text, fill=INK, font=font)
    return heading


def _stack(rows: Iterable[Image.Image]) -> Image.Image:
    rows = list(rows)
    sheet = Image.new('RGB', (rows[0].width, MARGIN + sum(row.height for row in rows)), 'white')
    top = MARGIN
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
