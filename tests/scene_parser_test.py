"""Does the reader see what a picture of the embedded set shows, and nothing else?"""

import dataclasses
import itertools

import numpy as np
import pytest

from star_jax.data.captions import parse_caption, scene_captions
from star_jax.data.scenes import COLOURS, SHAPES, Scene, Thing, scene
from star_jax.data.shapes import render
from star_jax.errors import UserError
from star_jax.evaluation.alignment import aligned, compare, judge
from star_jax.evaluation.scene_parser import Reading, inspect, read

COUNT = 300  # of 2,000 at each size, read once, all were right

CIRCLE = Thing(shape='circle', colour='red', extent=0.33, x=0.25, y=0.5)
SQUARE = Thing(shape='square', colour='blue', extent=0.45, x=0.72, y=0.7)
PAIR = Scene(things=(CIRCLE, SQUARE), background='white')
SENTENCE = 'a small red circle left of a large blue square on a white background'
PLACED = 'a red circle on the left and a blue square in the bottom right'


@pytest.fixture(scope='module')
def scenes() -> list[Scene]:
    """Of one, two and three things by turns, of both splits that training never sees."""
    kinds = itertools.product(('validation', 'held_out'), (1, 2, 3))
    return [
        scene(index, split, (objects,))
        for index, (split, objects) in zip(range(COUNT), itertools.cycle(kinds), strict=False)
    ]


@pytest.fixture(scope='module')
def readings(scenes) -> list[Reading]:
    return [inspect(render(shown, 64)) for shown in scenes]


def holding(readings: list[Reading], scenes: list[Scene]) -> float:
    """The share of the pictures in which every caption of their scene holds."""
    return np.mean(
        [
            all(compare(seen, parse_caption(caption)).all for caption in scene_captions(shown))
            for seen, shown in zip(readings, scenes, strict=True)
        ]
    )


def degrade(image_hwc: np.ndarray, sigma: float, noise: float, seed: int) -> np.ndarray:
    """A Gaussian blur of `sigma` pixels, then noise."""
    reach = np.arange(-6, 7)
    kernel = np.exp(-(reach**2) / (2 * sigma**2))
    blurred = np.pad(image_hwc.astype(float), ((6, 6), (6, 6), (0, 0)), mode='edge')
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(blurred, len(reach), axis)
        blurred = windows @ (kernel / kernel.sum())
    noisy = blurred + np.random.default_rng(seed).normal(0, noise, blurred.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def paint(mask_hw: np.ndarray, colour: str = 'red', background: str = 'white') -> np.ndarray:
    """A picture of 64 pixels from a mask of 512."""
    large = np.where(mask_hw[:, :, None], COLOURS[colour], COLOURS[background])
    return np.rint(large.reshape(64, 8, 64, 8, 3).mean((1, 3))).astype(np.uint8)


def change(name: str, shown: Scene = PAIR, **fields: object) -> np.ndarray:
    """The pair with something else about one of its things."""
    things = tuple(
        dataclasses.replace(thing, **fields) if thing.shape == name else thing
        for thing in shown.things
    )
    return render(dataclasses.replace(shown, things=things), 64)


def test_every_caption_of_a_true_picture_holds(readings, scenes):
    assert holding(readings, scenes) >= 0.995


def test_every_caption_of_a_larger_picture_holds(scenes):
    assert holding([inspect(render(shown, 128)) for shown in scenes], scenes) >= 0.995


@pytest.mark.parametrize('size', [96, 256])
def test_any_size_from_64_is_read(scenes, size):
    assert holding([inspect(render(shown, size)) for shown in scenes[:24]], scenes[:24]) == 1


def test_things_are_where_they_are_and_as_large_as_they_are(readings, scenes):
    for seen, shown in zip(readings, scenes, strict=True):
        if seen.scene is None:
            continue
        true = {(thing.colour, thing.shape): thing for thing in shown.things}
        for thing in seen.things:
            other = true[thing.colour, thing.shape]
            off = [thing.x - other.x, thing.y - other.y, thing.extent - other.extent]
            assert np.abs(off).max() < 0.5 / 64


def test_captions_of_other_pictures_do_not_hold(readings, scenes):
    # The next of the same split and number of things, which has the most in common.
    others = [*scenes[6:], *scenes[:6]]
    held = [
        compare(seen, parse_caption(caption)).all
        for seen, other in zip(readings, others, strict=True)
        for caption in scene_captions(other)
    ]
    assert np.mean(held) <= 0.01


@pytest.mark.parametrize(('sigma', 'noise'), [(0.7, 8.0), (1.5, 12.0)])
def test_blur_and_noise_are_no_matter(scenes, sigma, noise):
    some = scenes[: COUNT // 2]
    seen = [
        inspect(degrade(render(shown, 64), sigma, noise, seed)) for seed, shown in enumerate(some)
    ]
    assert holding(seen, some) >= 0.95


@pytest.mark.parametrize('shape', SHAPES)
def test_every_colour_of_a_shape_is_read_on_every_other(shape):
    # A blurred edge from one to the other passes up to three more of the ten, in broad bands; of a
    # small ring, 5 pixels wide, more blur would leave no pixel of its colour.
    sigma = 1.2 if shape == 'ring' else 1.5
    for colour, background in itertools.permutations(COLOURS, 2):
        thing = Thing(shape=shape, colour=colour, extent=0.32, x=0.4, y=0.6)
        shown = Scene(things=(thing,), background=background)
        seen = read(degrade(render(shown, 64), sigma, 0.0, 0))
        assert seen is not None and seen.background == background
        assert [(each.colour, each.shape) for each in seen.things] == [(colour, shape)]


@pytest.mark.parametrize(('shape', 'sigma'), [('circle', 2.3), ('ring', 2.0)])
def test_round_things_stay_round_behind_a_strong_blur(shape, sigma):
    """Compared as drawn alone, they are taken for stars and crosses."""
    for extent, x in itertools.product((20, 24, 30), (0.4, 0.507)):
        things = (Thing(shape=shape, colour='red', extent=extent / 64, x=x, y=0.55),)
        shown = render(Scene(things=things, background='white'), 64)
        seen = read(degrade(shown, sigma, 0.0, 0))
        assert seen is not None and [thing.shape for thing in seen.things] == [shape]


def test_a_star_without_tips_is_a_star_and_a_disc_is_none():
    y, x = (np.mgrid[:512, :512] + 0.5) / 512 - 0.5
    tips = np.cos(5 * np.arctan2(y, x) + np.pi / 2)
    for depth, expected in ((0.12, 'star'), (0.0, 'circle')):
        # A small star as a decoder leaves it: notches half filled, tips gone.
        body = np.hypot(x, y) < 0.15 * (1 + depth * tips)
        seen = read(degrade(paint(body), 1.0, 0.0, 0))
        assert [thing.shape for thing in seen.things] == [expected]


@pytest.mark.parametrize('sigma', [0.1, 1.3])
def test_things_of_one_colour_are_told_apart_where_they_nearly_touch(sigma):
    things = tuple(
        Thing(shape='square', colour='red', extent=0.32, x=x, y=0.5) for x in (0.3, 0.646)
    )
    seen = read(degrade(render(Scene(things=things, background='white'), 64), sigma, 0.0, 0))
    assert [thing.shape for thing in seen.things] == ['square', 'square']


def test_noise_and_blanks_show_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert read(noise) is None
    assert not any(dataclasses.astuple(judge(noise, SENTENCE)))
    blank = np.full((64, 64, 3), 255, np.uint8)
    assert read(blank) == Scene(things=(), background='white')
    assert not aligned(blank, SENTENCE)
    assert not aligned(blank, 'a red circle')


@pytest.mark.parametrize(
    'draw',
    [
        lambda x, y: (np.hypot(x, y) < 0.2) & (y < 0),  # half a disc
        lambda x, y: np.hypot(x, 1.6 * y) < 0.2,
        lambda x, y: (np.abs(x) < 0.2) & (np.abs(y) < 0.12),
        lambda x, y: (np.minimum(x, -y) < -0.05) & (np.maximum(np.abs(x), np.abs(y)) < 0.18),  # L
        lambda x, y: (np.abs(y) < 0.18) & (2 * np.abs(x) < 0.18 - y),  # a triangle on its tip
        lambda x, y: (np.hypot(x, y) < 0.2) & (np.hypot(x, y) > 0.1) & (x < np.abs(y)),  # a C
        lambda x, y: np.hypot(x, y) < 0.2 * (0.75 + 0.25 * np.cos(7 * np.arctan2(y, x))),
        lambda x, y: np.hypot(x, y) < 0.08,  # too small for either size
    ],
)
def test_a_blob_is_no_thing(draw):
    y, x = (np.mgrid[:512, :512] + 0.5) / 512 - 0.5
    seen = inspect(paint(draw(x, y)))
    assert seen.things == () and seen.strange == ('red',) and seen.scene is None


def test_what_has_no_name_is_strange():
    brown = np.full((64, 64, 3), 255, np.uint8)
    brown[20:40, 20:40] = 120, 70, 20
    assert inspect(brown).strange == ('',)
    grainy = render(PAIR, 64)
    grainy[4:16, 40:56] = np.random.default_rng(0).integers(0, 256, (12, 16, 3))
    assert inspect(grainy).strange == ('',)
    assert len(inspect(grainy).things) == 2


def test_a_speck_is_overlooked():
    dirty = render(PAIR, 64)
    dirty[4:7, 40:44] = 0
    assert aligned(dirty, SENTENCE)


@pytest.mark.parametrize('sentence', [SENTENCE, PLACED])
def test_what_a_caption_leaves_open_is_not_judged(sentence):
    found = judge(render(PAIR, 64), sentence)
    said = parse_caption(sentence)
    assert found.all and found.count and found.colours and found.shapes and found.pairs
    assert found.sizes is (True if said.things[0].size else None)
    assert found.places is (True if said.things[0].place else None)
    assert found.relations is (True if said.relations else None)
    assert found.background is (True if said.background else None)


@pytest.mark.parametrize(
    ('image', 'sentence', 'wrong'),
    [
        (render(Scene(things=(CIRCLE,), background='white'), 64), SENTENCE, 'count'),
        (change('circle', colour='green'), SENTENCE, 'colours'),
        (change('circle', shape='cross'), SENTENCE, 'shapes'),
        (change('circle', extent=0.45), SENTENCE, 'sizes'),
        (change('circle', x=0.72, y=0.25), SENTENCE, 'relations'),
        (change('circle', y=0.2), PLACED, None),
        (change('circle', y=0.2), PLACED.replace('on the left', 'in the bottom left'), 'places'),
        (render(dataclasses.replace(PAIR, background='yellow'), 64), SENTENCE, 'background'),
        (
            change('circle', colour='blue', shown=Scene(things=PAIR.things, background='pink')),
            'a red circle and a blue square',
            'colours',
        ),
        (render(PAIR, 64), 'a blue circle and a red square', 'pairs'),
        (
            render(
                Scene(
                    things=(*PAIR.things, dataclasses.replace(CIRCLE, shape='star', x=0.7, y=0.2)),
                    background='white',
                ),
                64,
            ),
            SENTENCE,
            'count',
        ),
    ],
)
def test_what_is_wrong_is_named(image, sentence, wrong):
    found = judge(image, sentence)
    assert found.all is aligned(image, sentence) is (wrong is None)
    assert wrong is None or getattr(found, wrong) is False


def test_a_picture_of_another_form_is_refused():
    for image in (
        np.zeros((64, 48, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ):
        with pytest.raises(UserError, match='64 pixels a side'):
            inspect(image)
