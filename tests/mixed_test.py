"""Do batches of several aspect ratios hold every image once, in the shares of the data?"""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image

from star_jax import image_io
from star_jax.core.templates import PUBLISHED, Templates
from star_jax.data import mixed
from star_jax.data.folder import Folder, prepare
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError

TOY = Templates(
    grids=(('1:1', '1x1 2x2 4x4'), ('4:3', '1x1 2x2 3x4'), ('3:4', '1x1 2x2 4x3')),
    resolutions=(('small', 2), ('large', 3)),
)
SIZES, RATIOS = ((32, 32), (24, 32), (32, 24)), (1.0, 0.75, 4 / 3)


def shapes(count: int = 45) -> mixed.MixedSource:
    source = Shapes(count=count, aspects=('1:1', '4:3', '4:3', '5:6')).open(32)
    return mixed.sort(source, SIZES, RATIOS)


def shown(batch) -> list[bytes]:
    return [image.tobytes() for image in batch['image']]


def read(source, count, **options) -> list[tuple]:
    return list(itertools.islice(mixed.batches(source, seed=3, threads=0, **options), count))


def test_images_belong_to_the_nearest_template():
    source = shapes()
    for index in range(len(source)):
        ratio = source.source.ratio(index)
        nearest = int(np.abs(np.subtract(RATIOS, ratio)).argmin())
        assert source.template_of[index] == nearest
        assert source[index]['image'].shape == (*SIZES[nearest], 3)
    assert sum(source.counts) == 45 and min(source.counts) > 3


def test_a_batch_has_one_template_and_every_image_comes_once_per_epoch():
    source, batch, epochs = shapes(), 4, 5
    order = mixed.Order(source, batch, seed=3)
    seen, sequence = collections.Counter(), []
    for step in range(sum(epochs * count // batch for count in source.counts)):
        rows = [order.example(step, row) for row in range(batch)]
        assert {source.template_of[row] for row in rows} == {order.template(step)}
        seen.update(rows)
        sequence.append(order.template(step))
    for template, count in enumerate(source.counts):
        times = [seen[index] for index in source.members(template)]
        assert max(times) - min(times) <= 1  # only the last epoch is not complete
        assert sum(times) == epochs * count // batch * batch  # the share of the data
    assert sequence != sorted(sequence) and sequence[:10] != sequence[10:20]


def test_rare_templates_are_trained_on_although_they_fill_no_batch():
    source = shapes(9)
    order = mixed.Order(source, 16, seed=0)
    counts = collections.Counter(order.template(step) for step in range(90))
    for template, count in enumerate(source.counts):
        assert abs(counts[template] - 10 * count) <= 1


def test_batches_continue_at_any_step():
    source = shapes()
    whole = read(source, 14, batch=4)
    later = read(source, 5, batch=4, step=9)
    for (template, batch), (other, again) in zip(whole[9:], later, strict=True):
        assert template == other and shown(batch) == shown(again)
        assert batch['caption'] == again['caption']


def test_all_processes_read_the_template_of_the_batch():
    source = shapes()
    whole = read(source, 8, batch=4)
    parts = [read(source, 8, batch=4, rows=rows) for rows in ((0, 1), (2, 3))]
    for (template, batch), *halves in zip(whole, *parts, strict=True):
        assert {half[0] for half in halves} == {template}
        assert shown(batch) == [image for half in halves for image in shown(half[1])]


def test_a_folder_and_a_prepared_set_know_the_ratio_of_their_images(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    for name, (width, height), orientation in (
        ('a', (40, 30), 1),
        ('b', (40, 30), 6),  # lies on its side
        ('c', (30, 30), 1),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new('RGB', (width, height), 'red').save(folder / f'{name}.png', exif=exif)
        (folder / f'{name}.txt').write_text(name)
    source = Folder(path=str(folder), split='all').open(16)
    assert [source.ratio(index) for index in range(3)] == [0.75, 4 / 3, 1]
    assert source.at((16, 24))[1]['image'].shape == (16, 24, 3)
    prepare(Folder(path=str(folder), held_out=0), tmp_path / 'set', 12, whole=True)
    stored = Prepared(path=str(tmp_path / 'set')).open(16)
    by_caption = {stored.captions(n)[0]: stored.ratio(n) for n in range(3)}
    assert by_caption == {'a': 0.75, 'b': 4 / 3, 'c': 1}
    assert stored.at((12, 16))[0]['image'].shape == (12, 16, 3)


def test_ratios_that_take_long_to_read_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path))
    monkeypatch.setattr(mixed, 'SLOW', 0)
    first = shapes()
    (stored,) = (tmp_path / 'ratios').iterdir()
    monkeypatch.setattr(mixed.np, 'fromiter', None)  # it reads the ratios
    assert np.array_equal(shapes().template_of, first.template_of)
    stored.write_bytes(b'')
    with pytest.raises(TypeError):
        shapes()


def test_templates_are_found_by_ratio_grids_and_name():
    assert PUBLISHED.nearest(9 / 16) == '0.571' and PUBLISHED.nearest(1.125) == '1.0'
    assert len(PUBLISHED.names) == 15 and PUBLISHED.scales('0.25M') == 10
    assert len({PUBLISHED.schedule(name, 7).sizes for name in PUBLISHED.names}) == 8
    assert TOY.nearest(3 / 4) == '4:3' and TOY.schedule('3:4', 2).grids == ((1, 1), (2, 2))
    assert TOY.schedule('3:4', 2).reference_grid == (4, 3)
    assert TOY.of_grids(((1, 1), (2, 2), (3, 4))) == '4:3'


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: TOY.schedule('2:1', 3), "no template '2:1': choose one of 1:1, 4:3, 3:4"),
        (lambda: TOY.scales('1M'), "no resolution '1M' of this model: choose one of small, large"),
        (lambda: TOY.of_grids(((1, 1), (3, 3))), 'no template begins with the grids'),
        (lambda: Templates().nearest(1), 'no templates'),
        (lambda: image_io.parse_aspect('0:3'), 'give width:height'),
    ],
)
def test_what_there_is_not_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'grids': (('a', '1x1 2'),)}, 'expected the height x width of every scale'),
        ({'grids': (('a', '1x1'), ('b', '1x1 2x2'))}, "scales, but 'a' has 1 and 'b' has 2"),
        ({'grids': (('a', '1x1'), ('a', '2x2'))}, "a name of its own, and 'a' is"),
        ({'grids': (('a', '2x2 1x1'),)}, 'must not shrink, but 1x1 follows 2x2'),
        ({'grids': (('a', '1x1'),), 'resolutions': (('big', 2),)}, 'has 2 scales, but'),
    ],
)
def test_invalid_templates_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Templates(**fields)
