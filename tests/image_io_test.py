"""Pictures keep their middle, lie on white and are written whole."""

import io

import numpy as np
import pytest
from PIL import Image

from star_jax import image_io
from star_jax.errors import UserError


def test_square_keeps_the_centre():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    np.testing.assert_array_equal(image_io.crop(wide, 4), np.full((4, 4, 3), 200))
    np.testing.assert_array_equal(
        image_io.crop(wide.transpose(1, 0, 2), 4), np.full((4, 4, 3), 200)
    )


def test_square_leaves_a_picture_of_that_size_alone():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(image_io.crop(image, 16), image)


def test_transparency_lies_on_white():
    image = np.zeros((8, 8, 4), np.uint8)
    image[:4, :, 3] = 255
    squared = image_io.crop(image, 8)
    assert (squared[:4] == 0).all() and (squared[4:] == 255).all()


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16'])
def test_every_kind_of_picture_becomes_rgb(mode):
    file = io.BytesIO()
    grey = Image.new('L', (6, 4), 255)
    if mode == 'I;16':
        picture = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    else:
        picture = grey.convert('RGB').convert(mode)
    picture.save(file, 'TIFF' if mode == 'CMYK' else 'PNG')
    image = image_io.decode(file.getvalue())
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8 and image.min() >= 254


@pytest.mark.parametrize('shape', [(5, 7), (5, 7, 1)])
def test_grey_arrays_become_rgb(shape):
    assert (image_io.crop(np.full(shape, 9, np.uint8), 3) == 9).all()


def test_a_saved_picture_is_read_back(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    path = image_io.save_png(image, tmp_path / 'new' / 'a.png')
    np.testing.assert_array_equal(image_io.load_image(path), image)
    assert [file.name for file in path.parent.iterdir()] == ['a.png']


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = image_io.save_png(np.zeros((2, 2, 3), np.uint8), tmp_path / 'a.png')
    before = path.read_bytes()

    def fail(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_io, 'encode', fail)
    with pytest.raises(KeyboardInterrupt):
        image_io.save_png(np.ones((2, 2, 3), np.uint8), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_missing_and_torn_files_are_told(tmp_path):
    with pytest.raises(UserError, match='no picture at'):
        image_io.load_image(tmp_path / 'none.png')
    (tmp_path / 'text.png').write_text('hello')
    with pytest.raises(UserError, match='no picture that can be read'):
        image_io.load_image(tmp_path / 'text.png')
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / 'torn.png').write_bytes(image_io.encode(noise)[:3000])
    with pytest.raises(UserError, match='cannot be read'):
        image_io.load_image(tmp_path / 'torn.png')
    with pytest.raises(UserError, match='cannot be read'):
        image_io.load_image(tmp_path)


def test_a_grid_holds_every_picture_unblurred():
    images = [np.full((64, 64, 3), 40 * index, np.uint8) for index in range(5)]
    sheet = image_io.grid(images, columns=3)
    for index in range(5):
        pixels = (sheet == 40 * index).all(-1).sum()
        assert pixels == 128 * 128  # 64 px, each enlarged to 2 x 2
    assert sheet.shape[1] == 3 * 128 + 4 * image_io.MARGIN


def test_captions_wrap_inside_their_cell():
    images = np.zeros((2, 128, 128, 3), np.uint8)
    long = ['a small red circle to the left of a large blue square on a white background', 'x' * 90]
    bare, captioned = image_io.grid(images, columns=2), image_io.grid(images, long, columns=2)
    assert captioned.shape[1] == bare.shape[1] and captioned.shape[0] > bare.shape[0] + 30
    ink_left = (captioned[bare.shape[0] :, : 128 + image_io.MARGIN] < 128).any()
    gap = captioned[:, 128 + image_io.MARGIN + 1 : 128 + 2 * image_io.MARGIN - 1]
    assert ink_left and (gap > 128).all()


def test_a_title_adds_a_line_on_top():
    images = np.zeros((1, 128, 128, 3), np.uint8)
    assert len(image_io.grid(images, title='truth')) > len(image_io.grid(images))


def test_grids_of_nothing_are_told():
    with pytest.raises(UserError, match='no image'):
        image_io.grid([])
    with pytest.raises(UserError, match='1 captions for 2 images'):
        image_io.grid(np.zeros((2, 4, 4, 3), np.uint8), ['one'])


def test_what_was_drawn_stands_below_its_truth():
    truths = np.stack([np.full((128, 128, 3), 10 * index, np.uint8) for index in range(3)])
    sheet = image_io.compare(truths, truths + 100, ['one', 'two', 'three'], 'drawn', columns=2)
    for truth, drawn in zip(truths, truths + 100, strict=True):
        above, below = (
            np.argwhere((sheet == image[0, 0]).all(-1)).mean(0) for image in (truth, drawn)
        )
        assert below[0] > above[0] and abs(below[1] - above[1]) < 1
