"""Are images cropped at the centre, put on white and written completely?"""

import io

import numpy as np
import pytest
from PIL import Image

from star_jax import image_io
from star_jax.errors import UserError


def test_crop_keeps_the_centre():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    np.testing.assert_array_equal(image_io.crop(wide, 4), np.full((4, 4, 3), 200))
    np.testing.assert_array_equal(
        image_io.crop(wide.transpose(1, 0, 2), 4), np.full((4, 4, 3), 200)
    )


def test_crop_keeps_an_image_of_the_target_size():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(image_io.crop(image, 16), image)


def adm_crop(image: Image.Image, side: int) -> np.ndarray:
    """The centre crop of ADM, which LlamaGen uses, step by step."""
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = ((x - side) // 2 for x in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize('sides', [(64, 64), (63, 97), (131, 45), (33, 31), (9, 12), (16, 17)])
def test_halving_and_bicubic_is_the_crop_of_adm(sides):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8))
    found = image_io.halve_and_fit(image, 16)
    np.testing.assert_array_equal(found, adm_crop(image, 16))
    if sides != (16, 17):  # there, both only crop
        assert (found != image_io.fit(image, 16)).any()


def test_halving_and_bicubic_covers_an_oblong_size():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (46, 90, 3), dtype=np.uint8))
    halved = image.resize((45, 23), Image.Resampling.BOX)
    covering = np.array(halved.resize((23, 12), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(image_io.halve_and_fit(image, (12, 20)), covering[:, 1:21])
    assert image_io.halve_and_fit(image.convert('RGBA'), (12, 20)).shape == (12, 20, 3)


def covered(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The resizing and the crop of Infinity (Infinity specification 6), step by step."""
    if image.width / image.height <= width / height:
        sides = width, int(width / (image.width / image.height))
    else:
        sides = int(image.width / image.height * height), height
    pixels = np.array(image.resize(sides, Image.Resampling.LANCZOS))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize('sides', [(73, 54), (54, 73), (31, 57), (9, 12)])
@pytest.mark.parametrize('size', [(16, 16), (12, 21)])
def test_lanczos_covers_a_size_in_whole_pixels(sides, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8))
    found = image_io.cover_and_crop(image, size)
    np.testing.assert_array_equal(found, covered(image, *size))
    assert (found != image_io.fit(image, size)).any()


def test_rounding_never_leaves_a_size_uncovered():
    for width in range(1, 400):
        image = Image.new('RGB', (width, 49))
        assert image_io.cover_and_crop(image, (49, width)).shape == (49, width, 3)


def test_transparency_becomes_white():
    image = np.zeros((8, 8, 4), np.uint8)
    image[:4, :, 3] = 255
    cropped = image_io.crop(image, 8)
    assert (cropped[:4] == 0).all() and (cropped[4:] == 255).all()


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16'])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    grey = Image.new('L', (6, 4), 255)
    if mode == 'I;16':
        original = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    else:
        original = grey.convert('RGB').convert(mode)
    original.save(file, 'TIFF' if mode == 'CMYK' else 'PNG')
    image = image_io.decode(file.getvalue())
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8 and image.min() >= 254


@pytest.mark.parametrize('mode', ['F', 'I', 'LAB'])
def test_modes_of_unknown_range_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / 'a.tif')
    with pytest.raises(UserError, match=f'its pixels are {mode}, expected RGB, grey or a palette'):
        image_io.load_image(tmp_path / 'a.tif')


def test_formats_that_start_programs_are_not_opened(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
    with pytest.raises(UserError, match='not an image in a known format'):
        image_io.load_image(tmp_path / 'a.png')


@pytest.mark.parametrize('shape', [(5, 7), (5, 7, 1)])
def test_grey_arrays_become_rgb(shape):
    assert (image_io.crop(np.full(shape, 9, np.uint8), 3) == 9).all()


def test_saved_image_is_read_back(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    path = image_io.save_png(image, tmp_path / 'new' / 'a.png')
    np.testing.assert_array_equal(image_io.load_image(path), image)
    assert [file.name for file in path.parent.iterdir()] == ['a.png']


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = image_io.save_png(np.zeros((2, 2, 3), np.uint8), tmp_path / 'a.png')
    before = path.read_bytes()

    def fail(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_io, 'encode', fail)
    with pytest.raises(KeyboardInterrupt):
        image_io.save_png(np.ones((2, 2, 3), np.uint8), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match='no image at'):
        image_io.load_image(tmp_path / 'none.png')
    (tmp_path / 'text.png').write_text('hello')
    with pytest.raises(UserError, match='not an image in a known format'):
        image_io.load_image(tmp_path / 'text.png')
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / 'truncated.png').write_bytes(image_io.encode(noise)[:3000])
    with pytest.raises(UserError, match='cannot be read'):
        image_io.load_image(tmp_path / 'truncated.png')
    with pytest.raises(UserError, match='cannot be read'):
        image_io.load_image(tmp_path)


def test_grid_shows_every_image_unblurred():
    images = [np.full((64, 64, 3), 40 * index, np.uint8) for index in range(5)]
    sheet = image_io.grid(images, columns=3)
    for index in range(5):
        pixels = (sheet == 40 * index).all(-1).sum()
        assert pixels == 128 * 128  # 64 px, each enlarged to 2 x 2
    assert sheet.shape[1] == 3 * 128 + 4 * image_io.MARGIN


def test_captions_wrap_inside_their_cell():
    images = np.zeros((2, 128, 128, 3), np.uint8)
    long = ['a small red circle to the left of a large blue square on a white background', 'x' * 90]
    plain, captioned = image_io.grid(images, columns=2), image_io.grid(images, long, columns=2)
    assert captioned.shape[1] == plain.shape[1] and captioned.shape[0] > plain.shape[0] + 30
    ink_left = (captioned[plain.shape[0] :, : 128 + image_io.MARGIN] < 128).any()
    gap = captioned[:, 128 + image_io.MARGIN + 1 : 128 + 2 * image_io.MARGIN - 1]
    assert ink_left and (gap > 128).all()


@pytest.mark.parametrize('text', ['word ' * 10**6, 'x' * 10**6])
def test_endless_captions_are_cut(text):
    height, width, _ = image_io.grid([np.zeros((16, 16, 3), np.uint8)], [text]).shape
    assert height < 4096 and width < 512


def test_title_adds_a_line_on_top():
    images = np.zeros((1, 128, 128, 3), np.uint8)
    assert len(image_io.grid(images, title='original')) > len(image_io.grid(images))


def test_grids_without_images_or_captions_are_refused():
    with pytest.raises(UserError, match='no image'):
        image_io.grid([])
    with pytest.raises(UserError, match='1 captions for 2 images'):
        image_io.grid(np.zeros((2, 4, 4, 3), np.uint8), ['one'])


def test_generated_image_is_below_its_original():
    originals = np.stack([np.full((128, 128, 3), 10 * index, np.uint8) for index in range(3)])
    sheet = image_io.compare(
        originals, originals + 100, ['one', 'two', 'three'], 'generated', columns=2
    )
    for original, generated in zip(originals, originals + 100, strict=True):
        above, below = (
            np.argwhere((sheet == image[0, 0]).all(-1)).mean(0) for image in (original, generated)
        )
        assert below[0] > above[0] and abs(below[1] - above[1]) < 1
