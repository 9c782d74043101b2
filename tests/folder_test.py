"""Does a folder of images become a dataset, with its faults skipped and reported?"""

import dataclasses
import io
import itertools
import json
import logging
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from image_io_test import adm_crop
from PIL import Image, ImageOps

from star_jax import cli, image_io
from star_jax.checkpoint import config, models
from star_jax.data import folder, image_checks, image_files, listing, lists, pipeline, splits, tree
from star_jax.data.folder import Folder
from star_jax.data.prepared import Prepared
from star_jax.data.resizing import HalvedBicubic
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.files import SHIPPED
from star_jax.training import train
from star_jax.training.run import resolve

CONFIGS = Path(__file__).parents[1] / 'configs'


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of its own for each test."""
    cache = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('STAR_JAX_CACHE', str(cache))
    return cache


def smooth_image(width: int = 24, height: int = 18, seed: int = 0) -> Image.Image:
    """A smooth image, which JPEG hardly changes."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def add(root: Path, name: str, caption: str | None = None, **size: int) -> Path:
    """Writes a new image with its caption beside it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth_image(seed=len(list(root.rglob('*'))), **size).save(path)
    if caption is not None:
        path.with_suffix('.txt').write_text(caption, 'utf-8')
    return path


def add_list(root: Path, name: str, *lines: dict | str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text('\n'.join(texts) + '\n', 'utf-8')


def fill(root: Path, count: int = 20) -> Path:
    """Writes `count` images with one caption each."""
    for index in range(count):
        add(root, f'{index:02d}.png', f'image {index}')
    return root


def captions(root: Path, **fields) -> dict[str, tuple[str, ...]]:
    """The captions of an opened folder by image."""
    source = Folder(path=str(root), split='all', **fields).open(16)
    return {entry.name: source.captions(index) for index, entry in enumerate(source.entries)}


# Layouts.


def test_captions_are_read_from_text_files(tmp_path):
    add(tmp_path, 'cat.png', 'a cat')
    add(tmp_path, 'more/dog.JPG', '\ufeffa dog\n\n  a dog, running \n')
    add(tmp_path, 'more/dog.v2.webp', 'another piñata')
    assert captions(tmp_path) == {
        'cat.png': ('a cat',),
        'more/dog.JPG': ('a dog', 'a dog, running'),
        'more/dog.v2.webp': ('another piñata',),
    }


@pytest.mark.parametrize('name', ['metadata.jsonl', 'captions.jsonl', 'Metadata.JSONL'])
def test_captions_are_read_from_a_list(tmp_path, name):
    for image in ('a.png', 'sub/b.png', 'sub/c.png', 'd.png'):
        add(tmp_path, image)
    add_list(
        tmp_path,
        name,
        {'file_name': 'a.png', 'text': 'an a', 'licence': 'mine'},
        {'file_name': './sub/b.png', 'caption': 'a b'},
        '',
        {'image': 'sub\\c.png', 'captions': ['a c', ' ', 'see']},
        {'image': 'd.png', 'caption': 'a d'},
        {'image': 'd.png', 'caption': 'dee'},
    )
    assert captions(tmp_path) == {
        'a.png': ('an a',),
        'd.png': ('a d', 'dee'),
        'sub/b.png': ('a b',),
        'sub/c.png': ('a c', 'see'),
    }


def test_list_is_relative_to_its_folder_and_precedes_text_files(tmp_path):
    add(tmp_path, 'train/x/a.png', 'ignored')
    add(tmp_path, 'train/b.png', 'text file')
    add_list(tmp_path, 'train/metadata.jsonl', {'file_name': 'x/a.png', 'text': 'listed'})
    assert captions(tmp_path) == {'train/b.png': ('text file',), 'train/x/a.png': ('listed',)}


def test_config_can_name_the_caption_field(tmp_path):
    add(tmp_path, 'a.png')
    add_list(tmp_path, 'metadata.jsonl', {'file_name': 'a.png', 'text': 'no', 'prompt': 'yes'})
    assert captions(tmp_path, caption='prompt') == {'a.png': ('yes',)}


def test_hidden_files_are_ignored(tmp_path):
    add(tmp_path, 'a.png', 'a')
    add(tmp_path, '._a.png', 'what another system leaves')
    add(tmp_path, '.trash/b.png', 'b')
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert len(source) == 1 and not source.faults


# Faults.


def damage(root: Path) -> Path:
    path = add(root, 'bad.png', 'cut short', width=90, height=90)
    path.write_bytes(path.read_bytes()[:-300])
    return path


def save(root: Path, image: Image.Image, name: str = 'bad.png') -> Path:
    (root / 'bad.txt').write_text('a caption')
    image.save(root / name)
    return root / name


def write(root: Path, data: bytes, name: str = 'bad.png') -> Path:
    (root / 'bad.txt').write_text('a caption')
    (root / name).write_bytes(data)
    return root / name


def enormous() -> bytes:
    """A PNG with a header of 20,000 x 20,000 pixels."""
    file = io.BytesIO()
    Image.new('RGB', (8, 8)).save(file, 'PNG')
    data = bytearray(file.getvalue())
    data[16:24] = (20_000).to_bytes(4, 'big') * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    return bytes(data)


FAULTS = {
    'cut short': (damage, image_files.UNREADABLE, 'cut short or damaged'),
    'empty file': (lambda root: write(root, b''), image_files.UNREADABLE, 'the file is empty'),
    'no image': (lambda root: write(root, b'hello'), image_files.UNREADABLE, 'none of PNG, JPEG'),
    'header alone': (
        lambda root: write(root, b'\xff\xd8\xff\xe0'),
        image_files.UNREADABLE,
        'damaged',
    ),
    'heic': (
        lambda root: write(root, b'\0\0\0 ftypheic', 'bad.heic'),
        image_files.UNREADABLE,
        'conv',
    ),
    '32 bits': (
        lambda root: save(root, Image.new('I', (20, 20)), 'bad.tif'),
        image_files.WRONG_MODE,
        'are I,',
    ),
    'floats': (
        lambda root: save(root, Image.new('F', (20, 20)), 'bad.tif'),
        image_files.WRONG_MODE,
        'are F',
    ),
    'lab': (
        lambda root: save(root, Image.new('LAB', (9, 9)), 'bad.tif'),
        image_files.WRONG_MODE,
        'LAB',
    ),
    'long': (lambda root: add(root, 'bad.png', 'x', width=61, height=20), 'aspect ratio', '61 x 2'),
    'high': (lambda root: add(root, 'bad.jpg', 'x', width=20, height=61), 'aspect ratio', '3 : 1'),
    'small': (lambda root: add(root, 'bad.png', 'x', width=5, height=3), 'too small', 'is 3 px, e'),
    'one pixel': (lambda root: add(root, 'bad.png', 'x', width=1, height=1), 'too small', '4 for'),
    'enormous': (
        lambda root: write(root, enormous()),
        image_files.TOO_LARGE,
        '20000 x 20000 pixels',
    ),
    'no caption': (lambda root: add(root, 'bad.png'), lists.NO_CAPTION, 'no .txt file beside'),
    'empty caption': (
        lambda root: add(root, 'bad.png', ' \n\t'),
        lists.EMPTY_CAPTION,
        'are empty',
    ),
    'latin-1': (
        lambda root: [add(root, 'bad.png'), (root / 'bad.txt').write_bytes(b'pi\xf1ata')],
        tree.NOT_UTF8,
        'byte 2',
    ),
    'text alone': (
        lambda root: (root / 'bad.txt').write_text('a'),
        listing.NO_IMAGE,
        'no image of that name',
    ),
}
LINES = {
    'gone': ('{"file_name": "gone.png", "text": "x"}', listing.NO_IMAGE, 'no gone.png'),
    'outside': ('{"file_name": "../x.png", "text": "x"}', listing.NO_IMAGE, 'is outside of'),
    'absolute': ('{"file_name": "/etc/passwd", "text": "x"}', listing.NO_IMAGE, 'is outside of'),
    'nul': ('{"file_name": "a\\u0000.png", "text": "x"}', listing.NO_IMAGE, 'there is no'),
    'long name': (json.dumps({'image': 'x' * 999, 'text': 'x'}), listing.NO_IMAGE, 'there is no'),
    'blank': ('{"file_name": "ok.png", "text": "  "}', lists.EMPTY_CAPTION, 'are empty'),
    'wordless': ('{"file_name": "ok.png", "label": 3}', lists.NO_CAPTION, 'no text or caption'),
    'number': ('{"file_name": "ok.png", "text": 3}', lists.BAD_LINE, 'its caption is not text'),
    'numbers': ('{"file_name": "ok.png", "text": ["a", 3]}', lists.BAD_LINE, 'is not text'),
    'nameless': ('{"text": "x"}', lists.BAD_LINE, 'no file_name or image'),
    'no JSON': ('{"file_name": "ok.png", "text": "x"', lists.BAD_LINE, 'not JSON'),
    'no object': ('["ok.png", "x"]', lists.BAD_LINE, 'not a JSON object'),
    'deep': ('[' * 100_000, lists.BAD_LINE, 'not JSON'),
    'surrogate': ('{"file_name": "ok.png", "text": "\\ud800"}', tree.NOT_UTF8, 'half a char'),
}


@pytest.mark.parametrize(('make', 'kind', 'reason'), FAULTS.values(), ids=FAULTS)
def test_bad_image_or_caption_is_logged_counted_and_skipped(tmp_path, caplog, make, kind, reason):
    add(tmp_path, 'good.png', 'good')
    make(tmp_path)
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert [entry.name for entry in source.entries] == ['good.png']
    (fault,) = source.faults
    assert fault.kind == kind and fault.name.startswith('bad.') and reason in fault.reason
    assert fault.name in caplog.text and reason in caplog.text
    assert f'skipped 1 of 2 records: {kind} 1' in caplog.text


@pytest.mark.parametrize(('line', 'kind', 'reason'), LINES.values(), ids=LINES)
def test_bad_line_is_reported_with_its_number(tmp_path, line, kind, reason):
    add(tmp_path, 'good.png', 'good')
    add(tmp_path, 'ok.png')
    fine = {'file_name': 'ok.png', 'text': 'fine'}
    add_list(tmp_path, 'metadata.jsonl', fine, line)
    source = Folder(path=str(tmp_path), split='all').open(16)
    (fault,) = source.faults
    assert (fault.kind, fault.name) == (kind, 'metadata.jsonl, line 2') and reason in fault.reason
    assert {entry.name: entry.captions for entry in source.entries} == {
        'good.png': ('good',),
        'ok.png': ('fine',),
    }


def test_line_that_is_not_utf8_affects_no_other_line(tmp_path):
    add(tmp_path, 'a.png')
    lines = b'{"image": "a.png", "text": "pi\xf1ata"}\n{"image": "a.png", "text": "a"}'
    (tmp_path / 'captions.jsonl').write_bytes(lines)
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert source.faults[0].kind == tree.NOT_UTF8 and source.captions(0) == ('a',)


def test_name_that_is_not_utf8_is_reported(tmp_path, caplog):
    add(tmp_path, 'a.png', 'a')
    shutil.copy(tmp_path / 'a.png', bytes(tmp_path) + b'/pi\xf1ata.png')
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert [(f.kind, f.name) for f in source.faults] == [(tree.NOT_UTF8, 'pi\\xf1ata.png')]


def test_log_names_the_first_faults_of_a_kind_and_counts_all(tmp_path, caplog):
    add(tmp_path, 'good.png', 'good')
    for index in range(9):
        add(tmp_path, f'bad{index}.png')
    Folder(path=str(tmp_path), split='all').open(16)
    assert caplog.text.count('no .txt file beside') == folder.MAX_LOGGED
    assert 'skipped 9 of 10 records: no caption 9' in caplog.text


def test_folder_without_usable_images_is_refused_with_reasons(tmp_path):
    damage(tmp_path)
    add(tmp_path, 'b.png')
    add(tmp_path, 'c.png')
    with pytest.raises(UserError, match='no caption 2, unreadable image 1; the first is b.png'):
        Folder(path=str(tmp_path)).open(16)


def test_paths_that_are_no_folder_of_images_are_refused(tmp_path):
    with pytest.raises(UserError, match='no folder of images was given.*--data.path'):
        Folder().open(16)
    with pytest.raises(UserError, match='nowhere is not a folder'):
        Folder(path=str(tmp_path / 'nowhere')).open(16)
    with pytest.raises(UserError, match='holds no image.*metadata.jsonl'):
        Folder(path=str(tmp_path)).open(16)
    message = "split 'held_out': choose one of train, validation, test, all"
    with pytest.raises(UserError, match=message):
        Folder(split='held_out')
    with pytest.raises(UserError, match='share'):
        Folder(held_out=1.0)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_a_list_become_faults(tmp_path_factory, data):
    root = tmp_path_factory.mktemp('any')
    for prefix in (b'', b'{"image": "a.png", "text": "', b'{"image": "'):
        (root / 'captions.jsonl').write_bytes(prefix + data)
        assert all(fault.reason for fault in listing.read(root).faults)


@given(st.sampled_from(('PNG', 'JPEG', 'WEBP', 'GIF', 'TIFF', 'BMP')), st.data())
@settings(max_examples=120, deadline=None)
def test_any_damage_to_an_image_becomes_a_fault(tmp_path_factory, kind, data):
    file = io.BytesIO()
    smooth_image().save(file, kind)
    contents = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp('any') / 'x'
    path.write_bytes(contents[: data.draw(st.integers(0, len(contents)))])
    try:
        assert min(image_files.measure(path)) > 0
    except image_files.UnfitError as error:
        assert error.kind and str(error)


# Sizes.


def opened(path: Path, size: int) -> np.ndarray:
    path.with_suffix('.txt').write_text('a caption')
    return Folder(path=str(path.parent), split='all').open(size)[0]['image']


@pytest.mark.parametrize('size', [8, 16, 33, 64])
@pytest.mark.parametrize('sides', [(40, 40), (60, 24), (25, 71), (16, 17), (64, 64)])
def test_crop_is_the_centre_resized_by_lanczos(tmp_path, size, sides):
    path = tmp_path / 'a.png'
    image = smooth_image(*sides)
    image.save(path)
    expected = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(opened(path, size), np.asarray(expected))


@pytest.mark.parametrize(
    ('mode', 'suffix'),
    [
        ('1', 'png'), ('L', 'jpg'), ('LA', 'png'), ('P', 'gif'), ('P', 'png'), ('RGB', 'webp'),
        ('RGB', 'bmp'), ('RGBA', 'webp'), ('CMYK', 'jpg'), ('CMYK', 'tif'), ('YCbCr', 'tif'),
    ],
)  # fmt: skip
def test_modes_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f'a.{suffix}'
    smooth_image().convert('RGB').convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode or (mode, suffix) == ('RGBA', 'webp')
        expected = ImageOps.fit(image.convert('RGB'), (16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(opened(path, 16), np.asarray(expected))


def test_transparency_becomes_white(tmp_path):
    image = smooth_image(16, 16).convert('RGBA')
    image.putalpha(Image.new('L', (16, 8)).resize((16, 16)))
    image.save(tmp_path / 'a.png')
    assert (opened(tmp_path / 'a.png', 16) == 255).all()


def test_images_are_turned_upright(tmp_path):
    rotated, exif = smooth_image(40, 30), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    rotated.save(tmp_path / 'a.png', exif=exif)
    upright = rotated.transpose(Image.Transpose.ROTATE_270)
    expected = ImageOps.fit(upright, (16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(opened(tmp_path / 'a.png', 16), np.asarray(expected))


def test_large_jpeg_is_reduced_by_its_decoder_with_small_error(tmp_path):
    image = smooth_image(1600, 1200)
    image.save(tmp_path / 'a.jpg', quality=95)
    expected = ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS)
    reduced = opened(tmp_path / 'a.jpg', 32).astype(int)
    assert np.abs(reduced - np.asarray(expected)).max() <= 4


@pytest.mark.parametrize('name', ['a.png', 'a.jpg'])
def test_halving_is_not_left_to_the_decoder_of_a_jpeg(tmp_path, name):
    path = add(tmp_path, name, 'a caption', width=300, height=200)
    source = Folder(path=str(tmp_path), split='all', resizing=HalvedBicubic()).open(8)
    with Image.open(path) as image:
        np.testing.assert_array_equal(source[0]['image'], adm_crop(image, 8))


def test_jpeg_of_twenty_thousand_pixels_is_read(tmp_path):
    Image.new('L', (20_000, 9_000), 90).save(tmp_path / 'a.jpg')
    assert image_files.MAX_PIXELS < 20_000 * 9_000
    np.testing.assert_allclose(opened(tmp_path / 'a.jpg', 1_200), 90, atol=1)  # decoded at 1/2


def test_enlarged_images_are_counted(tmp_path, caplog):
    add(tmp_path, 'a.png', 'a', width=9, height=4)
    add(tmp_path, 'b.png', 'b', width=16, height=16)
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert source.enlarged == 1 and source[0]['image'].shape == (16, 16, 3)
    assert '1 of 2 images are below 16 px and are enlarged' in caplog.text


# Splits.


def names(root: Path, split: str, held_out: float = 0.1) -> set[str]:
    source = Folder(path=str(root), split=split, held_out=held_out).open(8)
    return {entry.name for entry in source.entries}


def test_splits_are_separate_and_complete(tmp_path):
    fill(tmp_path)
    train, validation = names(tmp_path, 'train', 0.3), names(tmp_path, 'validation', 0.3)
    assert train and validation and not train & validation
    assert train | validation == names(tmp_path, 'all', 0.3)


def test_name_keeps_its_split_when_others_are_added():
    few = [f'{index}.png' for index in range(50)]
    many = [f'{index}.png' for index in range(5_000)]
    assert splits.held_out(few, 0.2) == splits.held_out(many, 0.2) & set(few)
    assert 0.18 < len(splits.held_out(many, 0.2)) / 5_000 < 0.22


@pytest.mark.parametrize('count', [2, 3, 5])
@pytest.mark.parametrize('share', [0.01, 0.99])
def test_images_are_never_all_in_one_split(count, share):
    chosen = splits.held_out([f'{index}' for index in range(count)], share)
    assert 0 < len(chosen) < count


def test_empty_split_is_refused(tmp_path):
    fill(tmp_path, 1)
    assert names(tmp_path, 'train') == names(tmp_path, 'all') == {'00.png'}
    with pytest.raises(UserError, match="use split='all'"):
        names(tmp_path, 'validation')
    fill(tmp_path, 5)
    with pytest.raises(UserError, match='held_out 0'):
        names(tmp_path, 'validation', 0.0)


def test_each_fault_is_logged_by_one_split(tmp_path, caplog):
    fill(tmp_path, 10)
    for index in range(10):
        add(tmp_path, f'bad{index}.png')
    for split in ('train', 'validation'):
        Folder(path=str(tmp_path), split=split, held_out=0.4).open(8)
    logged = [line for line in caplog.messages if 'no .txt file beside' in line]
    assert len(logged) == len(set(logged)) == 10


# Stored checks.


def test_reopening_decodes_changed_images_only(tmp_path, monkeypatch):
    fill(tmp_path, 6)
    damage(tmp_path)
    first = Folder(path=str(tmp_path), split='all').open(8)
    decoded = []

    def measure(path: Path) -> tuple[int, int]:
        decoded.append(path.name)
        return 99, 99

    monkeypatch.setattr(image_files, 'measure', measure)
    again = Folder(path=str(tmp_path), split='all').open(8)
    assert not decoded and (again.entries, again.faults) == (first.entries, first.faults)
    add(tmp_path, '03.png', width=30, height=30)
    assert len(Folder(path=str(tmp_path), split='all').open(8)) == 6 and decoded == ['03.png']


@pytest.mark.parametrize(
    'content', ['', '{"format": ', '[]', '{"format": "0", "checks": 3}', '[' * 10**5]
)
def test_damaged_stored_checks_are_ignored(tmp_path, cache, content):
    fill(tmp_path, 3)
    Folder(path=str(tmp_path), split='all').open(8)
    (stored,) = (cache / 'folders').iterdir()
    stored.write_text(content)
    assert len(Folder(path=str(tmp_path), split='all').open(8)) == 3


def test_unwritable_cache_is_a_warning(tmp_path, cache, caplog):
    fill(tmp_path, 3)
    (cache / 'folders').write_text('not a folder')
    assert len(Folder(path=str(tmp_path), split='all').open(8)) == 3
    assert 'read again' in caplog.text


def test_interrupted_reading_keeps_finished_checks(tmp_path, monkeypatch):
    fill(tmp_path, 6)
    monkeypatch.setattr(image_checks, 'CHUNK', 2)
    monkeypatch.setattr(image_checks.mesh, 'cores', lambda: 1)
    original, decoded = image_files.measure, []

    def measure(path: Path) -> tuple[int, int]:
        decoded.append(path.name)
        if len(decoded) == 4:
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(image_files, 'measure', measure)
    with pytest.raises(KeyboardInterrupt):
        Folder(path=str(tmp_path), split='all').open(8)
    decoded.clear()
    decoded += ['x'] * 4
    assert len(Folder(path=str(tmp_path), split='all').open(8)) == 6
    assert decoded[4:] == ['03.png', '04.png', '05.png']


def test_killed_reading_keeps_checks(tmp_path, cache, monkeypatch):
    fill(tmp_path, 5)
    monkeypatch.setattr(image_checks, 'CHUNK', 2)
    monkeypatch.setattr(image_checks, 'SAVED_EVERY', -1)
    saved, save = [], image_checks._save
    monkeypatch.setattr(image_checks, '_save', lambda *a: saved.append(len(a[1])) or save(*a))
    Folder(path=str(tmp_path), split='all').open(8)
    assert saved == [2, 4, 5, 5]


def test_image_that_vanishes_or_changes_is_refused(tmp_path):
    fill(tmp_path, 2)
    source = Folder(path=str(tmp_path), split='all').open(8)
    (tmp_path / '00.png').unlink()
    add(tmp_path, '01.png', width=31, height=31)
    for index in range(2):
        with pytest.raises(UserError, match=f'0{index}.png has vanished or changed'):
            source[index]


# A dataset like any other.


def test_batches_hold_each_image_with_its_caption(tmp_path):
    fill(tmp_path, 5)
    source = Folder(path=str(tmp_path), split='all').open(8)
    expected = {source.captions(index)[0]: source[index]['image'] for index in range(5)}
    batches = pipeline.batches(source, batch=5, seed=0, threads=4)
    for batch in itertools.islice(batches, 3):
        assert set(batch['caption']) == set(expected)
        for caption, image in zip(batch['caption'], batch['image'], strict=True):
            np.testing.assert_array_equal(image, expected[caption])
    batches.close()


def test_prepared_dataset_equals_the_folder(tmp_path):
    fill(tmp_path / 'mine', 12)
    damage(tmp_path / 'mine')
    summary = folder.prepare(
        Folder(path=str(tmp_path / 'mine'), held_out=0.3), tmp_path / 'set', 16
    )
    assert summary.skipped == 1 and sum(summary.images.values()) == 12
    for split in ('train', 'validation'):
        dataset = Prepared(path=str(tmp_path / 'set'), split=split).open(16)
        images = Folder(path=str(tmp_path / 'mine'), split=split, held_out=0.3).open(16)
        assert len(dataset) == len(images) == summary.images[split]
        expected = {images.captions(index): images[index]['image'] for index in range(len(images))}
        for index in range(len(dataset)):
            image = dataset[index]['image']
            np.testing.assert_array_equal(image, expected.pop(dataset.captions(index)))


def star_jax(capsys, *words: object) -> tuple[int, str]:
    status = cli.main([str(word) for word in words])
    return status, ''.join(capsys.readouterr())


def test_commands_prepare_and_show(tmp_path, capsys):
    fill(tmp_path / 'mine')
    prepare = ('data', 'prepare', 'folder', tmp_path / 'mine')
    status, output = star_jax(capsys, *prepare, tmp_path / 'set', '--size', 16)
    assert status == 0 and 'train ' in output and '0 records skipped' in output
    sheets = []
    for name, split in (('mine', ''), ('set', ''), ('mine', 'validation')):
        out = tmp_path / f'{name}{split}.png'
        options = ('--split', split) if split else ()
        show = ('data', 'show', tmp_path / name, '--size', 16, '--out', out, *options)
        assert star_jax(capsys, *show)[0] == 0
        sheets.append(image_io.load_image(out))
    assert sheets[2].size < sheets[1].size <= sheets[0].size
    status, output = star_jax(capsys, *prepare, tmp_path / 'mine')
    assert status == 2 and 'something else' in output
    status, output = star_jax(capsys, 'data', 'prepare', 'folder', tmp_path / 'set', tmp_path / 'x')
    assert status == 2 and 'holds a prepared dataset' in output
    status, output = star_jax(capsys, *prepare, '/proc/nowhere/set', '--size', 16)
    assert status == 2 and 'cannot be written' in output


def test_dataset_is_not_written_if_images_vanish_meanwhile(tmp_path, monkeypatch):
    fill(tmp_path / 'mine', 3)
    monkeypatch.setattr(image_checks, 'file_stamp', lambda path: (len(path.name), next(counter)))
    counter = itertools.count()
    with pytest.raises(UserError, match='has vanished or changed'):
        folder.prepare(Folder(path=str(tmp_path / 'mine')), tmp_path / 'set', 16)
    assert [path.name for path in tmp_path.iterdir()] == ['mine']


def test_folder_can_be_trained_on(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    fill(tmp_path / 'mine', 12)
    run = dataclasses.replace(
        tiny.STAR,
        tokenizer=tiny.write_tokenizer(tmp_path / 'tokenizer'),
        data=Folder(path=str(tmp_path / 'mine'), held_out=0.3),
        validation=Folder(split='validation'),
    )
    job = train.build_job(run)
    batches = job.batches(0)
    _, scalars = job.step(0, job.init(), next(batches))
    batches.close()
    assert np.isfinite(float(scalars['loss']))


def test_validation_without_a_path_uses_the_training_folder(tmp_path):
    run = config.load_run(CONFIGS / 'own_images.py')
    run = dataclasses.replace(run, data=Folder(path='mine', held_out=0.4, caption='prompt'))
    resolved = resolve(run)
    assert resolved.validation == dataclasses.replace(run.data, split='validation')
    config.write(tmp_path / 'config.json', resolved)
    assert resolve(config.read(tmp_path / 'config.json', type(run))) == resolved


@pytest.mark.parametrize(
    ('data', 'validation', 'expected'),
    [
        (Folder(path='a'), Folder(caption='text'), "validation.caption is 'text'.* caption is ''"),
        (Folder(path='a'), Folder(held_out=0.3), 'validation.held_out is 0.3'),
        (
            Folder(path='a'),
            Folder(resizing=HalvedBicubic()),
            'validation.resizing is HalvedBicubic',
        ),
        (Prepared(path='a', label=''), Prepared(path='', image='b'), "validation.image is 'b'"),
        (Folder(path='a'), Prepared(path=''), 'validation is a Prepared .* data is a Folder'),
        (Shapes(), Folder(), 'validation is a Folder .* data is a Shapes'),
    ],
)
def test_validation_without_a_path_names_no_other_set(data, validation, expected):
    run = dataclasses.replace(tiny.STAR, data=data, validation=validation)
    with pytest.raises(UserError, match=expected):
        resolve(run)
    same = dataclasses.replace(data, split='validation')
    resolve(dataclasses.replace(run, validation=same))
    if not isinstance(data, Shapes):
        resolve(dataclasses.replace(run, validation=dataclasses.replace(same, path='')))


def test_tokenizer_without_a_path_is_that_of_init_or_the_shipped_one():
    assert resolve(tiny.STAR) == dataclasses.replace(tiny.STAR, tokenizer=SHIPPED)
    fine_tuned = dataclasses.replace(tiny.STAR, init='runs/mine/model')
    assert resolve(fine_tuned).tokenizer == 'runs/mine/model'
    other = dataclasses.replace(fine_tuned, tokenizer='another')
    assert resolve(other) == other


def test_own_images_config_starts_from_the_shipped_model():
    run = config.load_run(CONFIGS / 'own_images.py')
    shipped = models.read(run.init)
    assert run.model == shipped.config and resolve(run).tokenizer == run.init
    assert isinstance(run.data, Folder) and isinstance(resolve(run).validation, Folder)
