"""Is the order of the data a function of one integer?"""

import itertools

import numpy as np
import pytest

from star_jax import image_io
from star_jax.data import pipeline
from star_jax.data.crops import OneOfTenCrops, RandomCrop, RandomCrops
from star_jax.data.shapes import Shapes
from star_jax.data.show import show
from star_jax.errors import UserError


class Numbers:
    """Example i is a 2 px image of colour i with three captions."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> pipeline.Example:
        return pipeline.Example(
            image=np.full((2, 2, 3), index, np.uint8),
            captions=tuple(f'{index} {word}' for word in 'abc'),
            label=str(index),
        )


def take(count: int, source=None, **options) -> list[pipeline.Batch]:
    options = dict(batch=4, seed=7) | options
    iterator = pipeline.batches(source or Numbers(10), **options)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def captions(batches: list[pipeline.Batch]) -> list[str]:
    return [caption for batch in batches for caption in batch['caption']]


def assert_same(actual: list[pipeline.Batch], expected: list[pipeline.Batch]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a['caption'] == b['caption'] and a['label'] == b['label']
        np.testing.assert_array_equal(a['image'], b['image'])


def test_batch_keeps_images_captions_and_labels_together():
    for batch in take(5):
        assert batch['image'].shape == (4, 2, 2, 3) and batch['image'].dtype == np.uint8
        assert [str(image[0, 0, 0]) for image in batch['image']] == batch['label']
        assert [caption.split()[0] for caption in batch['caption']] == batch['label']


def test_epoch_has_every_example_once_in_a_new_order():
    labels = [label for batch in take(10) for label in batch['label']]
    epochs = [labels[at : at + 10] for at in range(0, 40, 10)]
    every_label = sorted(map(str, range(10)))
    assert all(sorted(epoch) == every_label for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_every_caption_is_chosen():
    counts = {word: 0 for word in 'abc'}
    for caption in captions(take(150)):
        counts[caption.split()[1]] += 1
    assert all(150 < count < 250 for count in counts.values())  # 200 each expected of 600


@pytest.mark.parametrize('step', [1, 2, 5, 23])
@pytest.mark.parametrize('threads', [0, 1, 4])
def test_restart_continues_at_its_step(step, threads):
    assert_same(take(30)[step:], take(30 - step, step=step, threads=threads))


@pytest.mark.parametrize('shares', [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0,), (1, 2, 3)]])
def test_rows_of_a_process_are_rows_of_the_global_batch(shares):
    global_batches = take(6, step=3)
    for rows in shares:
        local_batches = take(6, step=3, rows=rows)
        assert captions(local_batches) == [
            batch['caption'][row] for batch in global_batches for row in rows
        ]
        for part, batch in zip(local_batches, global_batches, strict=True):
            np.testing.assert_array_equal(part['image'], batch['image'][list(rows)])


def test_order_depends_on_the_seed():
    assert captions(take(5)) == captions(take(5))
    assert captions(take(5)) != captions(take(5, seed=8))


def test_batch_may_be_larger_than_the_dataset():
    (batch,) = take(1, source=Numbers(3), batch=8)
    assert len(batch['label']) == 8 and set(batch['label']) == {'0', '1', '2'}


def test_crops_are_random_parts_of_an_image():
    class Large(Numbers):
        def __getitem__(self, index):
            image = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
            return super().__getitem__(index) | {'image': image}

    crops = np.concatenate(
        [batch['image'] for batch in take(40, source=Large(10), crop=RandomCrop((4, 4)))]
    )
    corners = crops[:, 0, 0, 0] // 3
    whole = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
    for crop, corner in zip(crops, corners, strict=True):
        top, left = divmod(int(corner), 6)
        assert (crop == whole[top : top + 4, left : left + 4]).all()
    assert set(corners) == {6 * top + left for top in range(3) for left in range(3)}
    options = dict(source=Large(10), crop=RandomCrop((4, 4)))
    assert_same(take(3, step=2, **options), take(5, **options)[2:])


def test_crops_of_images_of_random_sizes_keep_their_place():
    """A ramp stays one: its slope is that of the size, from 1 to 1.5 times the crop."""
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None], (96, 96))
    image = np.stack([ramp, ramp.T, ramp], axis=-1)
    crop, slopes = RandomCrops(enlarge=1.5, least=1.0).crop((64, 64)), []
    assert crop == RandomCrop((64, 64), 1.0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        found = crop({'image': image}, rng)['image'].astype(int)
        assert found.shape == (64, 64, 3) and np.ptp(found[..., 0], axis=1).max() <= 1
        slopes.append((found[56, 0, 0] - found[8, 0, 0]) / 48)
        assert abs((found[0, 56, 1] - found[0, 8, 1]) / 48 - slopes[-1]) < 0.05
    assert 0.95 < min(slopes) < 1.05 and 1.45 < max(slopes) < 1.55
    assert len({round(slope, 1) for slope in slopes}) >= 5
    with pytest.raises(UserError, match='least must lie in'):
        RandomCrops(enlarge=1.25, least=1.5)


def test_a_crop_fits_where_the_smallest_size_is_rounded():
    """282 x 299 px loaded for 256 x 272: at the least enlargement 299 px become 271.4."""
    crop, image = RandomCrop((256, 272), 1.0), np.zeros((282, 299, 3), np.uint8)
    for seed in range(100):
        found = crop({'image': image}, np.random.default_rng(seed))['image']
        assert found.shape == (256, 272, 3)


def test_ten_crops_are_corners_and_centre_of_an_image_and_of_its_mirror_image():
    """In the order of torchvision's TenCrop, whose centre is right of the middle, or left of it."""
    image = np.arange(7 * 7 * 3).reshape(7, 7, 3)
    crops = [OneOfTenCrops((4, 4)).crop(image, number) for number in range(10)]
    places = [divmod(crop[0, 0, 0] // 3, 7) for crop in crops]
    assert places[:5] == [(0, 0), (0, 3), (3, 0), (3, 3), (2, 2)]
    assert places[5:] == [(0, 6), (0, 3), (3, 6), (3, 3), (2, 4)]
    np.testing.assert_array_equal(crops[5], image[:4, :2:-1])
    rng = np.random.default_rng(0)
    seen = {OneOfTenCrops((4, 4))({'image': image}, rng)['image'].tobytes() for _ in range(100)}
    assert seen == {crop.tobytes() for crop in crops}


def test_sequential_batches_have_every_example_once_in_order():
    batches = list(pipeline.sequential(Numbers(10), batch=4))
    assert captions(batches) == [f'{index} a' for index in range(10)]
    assert [len(batch['image']) for batch in batches] == [4, 4, 2]


@pytest.mark.parametrize('rows', [None, (0, 1), (1, 3)])
def test_padded_batches_repeat_the_last_example(rows):
    batches, real = zip(*pipeline.padded_batches(Numbers(10), 4, rows), strict=True)
    padded = [*range(10), 9, 9]
    expected = [padded[4 * batch + row] for batch in range(3) for row in rows or range(4)]
    assert captions(batches) == [f'{index} a' for index in expected] and real == (4, 4, 2)


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(batch=0), 'at least one image'),
        (dict(source=Numbers(0)), 'empty'),
        (dict(rows=[3, 4]), r'rows \[3, 4\] of a batch of 4'),
        (dict(rows=[]), 'rows'),
        (dict(step=-1), 'step -1'),
    ],
)
def test_invalid_arguments_are_refused(options, sentence):
    source = options.pop('source', Numbers(10))
    with pytest.raises(UserError, match=sentence):
        pipeline.batches(source, **(dict(batch=4, seed=0) | options))
    if not len(source):
        with pytest.raises(UserError, match=sentence):
            pipeline.sequential(source, batch=4)


def test_show_writes_different_examples(tmp_path):
    sheet = image_io.load_image(show(Numbers(200), tmp_path / 'a.png', count=6, columns=3))
    again = image_io.load_image(show(Numbers(200), tmp_path / 'b.png', count=6, columns=3))
    other = image_io.load_image(show(Numbers(200), tmp_path / 'c.png', count=6, columns=3, seed=1))
    np.testing.assert_array_equal(sheet, again)
    assert sheet.shape != other.shape or (sheet != other).any()
    with pytest.raises(UserError, match='empty'):
        show(Numbers(0), tmp_path / 'd.png')


def test_evenly_spaced_examples_cover_the_dataset():
    source = Shapes(count=10).open(16)
    batch = pipeline.evenly_spaced(source, 4)
    expected = [source[index] for index in (0, 3, 6, 9)]
    np.testing.assert_array_equal(batch['image'], [example['image'] for example in expected])
    assert batch['caption'] == [example['captions'][0] for example in expected]
    assert len(pipeline.evenly_spaced(source, 99)['label']) == 10
