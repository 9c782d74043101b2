"""Does a prepared dataset return what was written, and are faults reported clearly?"""

import dataclasses
import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from image_io_test import adm_crop
from PIL import Image

from star_jax import image_io
from star_jax.data import prepared
from star_jax.data.resizing import HalvedBicubic
from star_jax.errors import UserError


def record(index: int, **extra: str) -> dict:
    image = np.full((8, 8, 3), index, np.uint8)
    return dict(
        key=f'k{index}',
        image=image_io.encode(image),
        captions=(f'image {index}, piñata', f'{index}'),
        label=f'label {index}',
        source='test',
        licence='CC0',
        attribution='someone',
        **extra,
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    splits = {'train': (record(i) for i in range(7)), 'held_out': [record(i) for i in range(7, 9)]}
    return prepared.write(tmp_path_factory.mktemp('sets') / 'tiny', splits)


def test_every_record_is_read_back(folder):
    source = prepared.Prepared(path=str(folder)).open(16)
    examples = sorted((source[i] for i in range(len(source))), key=lambda e: e['label'])
    assert [e['label'] for e in examples] == [f'label {i}' for i in range(7)]
    for index, example in enumerate(examples):
        assert example['captions'] == (f'image {index}, piñata', f'{index}')
        np.testing.assert_array_equal(example['image'], np.full((16, 16, 3), index, np.uint8))


def test_config_chooses_how_images_are_resized(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    image = {'image': image_io.encode(pixels)}
    folder = prepared.write(tmp_path / 'set', {'train': [record(1) | image]})
    lanczos = prepared.Prepared(path=str(folder))
    halved = dataclasses.replace(lanczos, resizing=HalvedBicubic())
    np.testing.assert_array_equal(lanczos.open(8)[0]['image'], image_io.crop(pixels, 8))
    np.testing.assert_array_equal(halved.open(8)[0]['image'], adm_crop(Image.fromarray(pixels), 8))


def test_images_that_are_enlarged_are_reported_once(folder, caplog):
    config = prepared.Prepared(path=str(folder))
    config.open(8)
    assert not caplog.text
    config.open((8, 12))[0]
    (message,) = caplog.messages
    assert '7 of 7 images that were looked at are below 8 x 12 px' in message
    assert '--size 12 or more' in message


def test_splits_are_separate_and_can_be_sliced(folder):
    held_out = prepared.Prepared(path=str(folder), split='held_out').open(8)
    assert {held_out[i]['label'] for i in range(len(held_out))} == {'label 7', 'label 8'}
    assert len(prepared.Prepared(path=str(folder), split='train[:3]').open(8)) == 3


def test_order_depends_on_keys_alone(folder, tmp_path):
    backwards = prepared.write(tmp_path / 'b', {'train': [record(i) for i in reversed(range(7))]})
    order = [
        [source[i]['label'] for i in range(7)]
        for source in (prepared.Prepared(path=str(path)).open(8) for path in (folder, backwards))
    ]
    assert order[0] == order[1]


def test_config_names_the_fields(folder):
    config = prepared.Prepared(path=str(folder), caption='licence', label='')
    example = config.open(8)[0]
    assert example['captions'] == ('CC0',) and example['label'] == ''


def test_extra_fields_are_kept(tmp_path):
    folder = prepared.write(tmp_path / 'x', {'train': [record(1, style='flat')]}, extra=('style',))
    assert prepared.Prepared(path=str(folder), caption='style').open(8)[0]['captions'] == ('flat',)


def test_new_dataset_replaces_only_an_old_dataset(folder, tmp_path):
    target = prepared.write(tmp_path / 'set', {'train': [record(1)]})
    prepared.write(target, {'train': [record(2), record(3)]})
    assert len(prepared.Prepared(path=str(target)).open(8)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ['set']
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').touch()
    with pytest.raises(UserError, match='something else'):
        prepared.write(tmp_path / 'mine', {'train': [record(1)]})
    assert (tmp_path / 'mine' / 'thesis.tex').exists()


def test_interrupted_write_keeps_the_old_dataset(tmp_path):
    target = prepared.write(tmp_path / 'set', {'train': [record(1)]})

    def interrupted():
        yield record(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.write(target, {'train': interrupted()})
    assert prepared.Prepared(path=str(target)).open(8)[0]['label'] == 'label 1'
    with pytest.raises(UserError, match='no record'):
        prepared.write(target, {'train': []})


@pytest.mark.parametrize(
    'fields, sentence',
    [
        (dict(split='test'), "no split 'test': expected one of train, held_out"),
        (dict(image='photo'), "no field 'photo' for image=: expected one of .*captions"),
        (dict(caption='text'), "no field 'text' for caption="),
        (dict(label='class'), "no field 'class' for label="),
        (dict(image='label'), 'expected an image'),
    ],
)
def test_unknown_names_are_refused_with_the_known_names(folder, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        prepared.Prepared(path=str(folder), **fields).open(8)


def test_paths_that_are_no_dataset_are_refused(folder, tmp_path):
    missing = str(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=re.escape(missing)):
        prepared.Prepared(path=missing).open(8)
    with pytest.raises(UserError, match='dataset_info.json'):
        prepared.Prepared(path=str(tmp_path)).open(8)
    with pytest.raises(UserError, match='neither a folder nor a dataset'):
        prepared.Prepared(path='no_such_set_anywhere').open(8)


def test_tfrecord_dataset_is_refused(folder, tmp_path):
    copy = tmp_path / 'tfrecord'
    copy.mkdir()
    for name in ('dataset_info.json', 'features.json'):
        (copy / name).write_text((folder / name).read_text())
    info = json.loads((copy / 'dataset_info.json').read_text())
    (copy / 'dataset_info.json').write_text(json.dumps(info | dict(fileFormat='tfrecord')))
    with pytest.raises(UserError, match='tfrecord, which needs TensorFlow'):
        prepared.Prepared(path=str(copy)).open(8)


def test_dataset_is_found_by_its_tfds_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
    (tmp_path / 'captioned').mkdir()
    (tmp_path / 'captioned' / '1.0.0').symlink_to(folder)
    assert len(prepared.Prepared(path='captioned').open(8)) == 7


@pytest.mark.parametrize('data', [b'no image', b'\x89PNG\r\n\x1a\nand then nothing'])
def test_record_without_an_image_is_named(tmp_path, data):
    path = prepared.write(tmp_path / 'set', {'train': [{**record(0), 'image': data}]})
    source = prepared.Prepared(path=str(path)).open(16)
    with pytest.raises(UserError, match=r"the field 'image' of record 0 of .*set is no image \("):
        source[0]
