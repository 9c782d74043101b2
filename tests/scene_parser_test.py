"""Does the scene parser recognise what an image shows, and nothing else?"""

import dataclasses
import itertools

import numpy as np
import pytest

from star_jax.data.captions import parse_caption, scene_captions
from star_jax.data.scenes import COLOURS, SHAPES, Scene, Thing, scene
from star_jax.data.shapes import render
from star_jax.errors import UserError
from star_jax.evaluation.alignment import check, compare, is_aligned
from star_jax.evaluation.scene_parser import ParsedScene, parse, parse_scene

COUNT = 300  # of 2,000 at each size, parsed once, all were right

CIRCLE = Thing(shape='circle', colour='red', extent=0.33, x=0.25, y=0.5)
SQUARE = Thing(shape='square', colour='blue', extent=0.45, x=0.72, y=0.7)
PAIR = Scene(things=(CIRCLE, SQUARE), background='white')
SENTENCE = 'a small red circle left of a large blue square on a white background'
PLACED = 'a red circle on the left and a blue square in the bottom right'


@pytest.fixture(scope='module')
def scenes() -> list[Scene]:
    """One, two and three things in turn, of both splits that training does not use."""
    kinds = itertools.product(('validation', 'held_out'), (1, 2, 3))
    return [
        scene(index, split, (objects,))
        for index, (split, objects) in zip(range(COUNT), itertools.cycle(kinds), strict=False)
    ]


@pytest.fixture(scope='module')
def parsed_scenes(scenes) -> list[ParsedScene]:
    return [parse(render(true, 64)) for true in scenes]


def aligned_share(parsed_scenes: list[ParsedScene], scenes: list[Scene]) -> float:
    """The share of the images where every caption of the scene holds."""
    return np.mean(
        [
            all(compare(parsed, parse_caption(caption)).all for caption in scene_captions(true))
            for parsed, true in zip(parsed_scenes, scenes, strict=True)
        ]
    )


def degrade(image_hwc: np.ndarray, sigma: float, noise: float, seed: int) -> np.ndarray:
    """A Gaussian blur of `sigma` pixels, then noise."""
    offsets = np.arange(-6, 7)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    blurred = np.pad(image_hwc.astype(float), ((6, 6), (6, 6), (0, 0)), mode='edge')
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(blurred, len(offsets), axis)
        blurred = windows @ (kernel / kernel.sum())
    noisy = blurred + np.random.default_rng(seed).normal(0, noise, blurred.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def render_mask(mask_hw: np.ndarray, colour: str = 'red', background: str = 'white') -> np.ndarray:
    """An image of 64 pixels from a mask of 512."""
    large = np.where(mask_hw[:, :, None], COLOURS[colour], COLOURS[background])
    return np.rint(large.reshape(64, 8, 64, 8, 3).mean((1, 3))).astype(np.uint8)


def change(name: str, original: Scene = PAIR, **fields: object) -> np.ndarray:
    """An image of the scene with other fields of one of its things."""
    things = tuple(
        dataclasses.replace(thing, **fields) if thing.shape == name else thing
        for thing in original.things
    )
    return render(dataclasses.replace(original, things=things), 64)


def test_every_caption_of_a_true_image_holds(parsed_scenes, scenes):
    assert aligned_share(parsed_scenes, scenes) >= 0.995


def test_every_caption_of_a_larger_image_holds(scenes):
    assert aligned_share([parse(render(true, 128)) for true in scenes], scenes) >= 0.995


@pytest.mark.parametrize('size', [96, 256])
def test_any_size_from_64_is_parsed(scenes, size):
    assert aligned_share([parse(render(true, size)) for true in scenes[:24]], scenes[:24]) == 1


@pytest.mark.parametrize('size', [(48, 64), (64, 48), (40, 80), (112, 64), (100, 270)])
def test_every_caption_of_an_image_that_is_not_square_holds(scenes, size):
    assert aligned_share([parse(render(true, size)) for true in scenes[:60]], scenes[:60]) == 1


def test_parsed_positions_and_extents_are_accurate(parsed_scenes, scenes):
    for parsed, true in zip(parsed_scenes, scenes, strict=True):
        if parsed.scene is None:
            continue
        true_things = {(thing.colour, thing.shape): thing for thing in true.things}
        for thing in parsed.things:
            other = true_things[thing.colour, thing.shape]
            errors = [thing.x - other.x, thing.y - other.y, thing.extent - other.extent]
            assert np.abs(errors).max() < 0.5 / 64


def test_captions_of_other_images_do_not_hold(parsed_scenes, scenes):
    # The next of the same split and number of things, which has the most in common.
    others = [*scenes[6:], *scenes[:6]]
    aligned = [
        compare(parsed, parse_caption(caption)).all
        for parsed, other in zip(parsed_scenes, others, strict=True)
        for caption in scene_captions(other)
    ]
    assert np.mean(aligned) <= 0.01


@pytest.mark.parametrize(('sigma', 'noise'), [(0.7, 8.0), (1.5, 12.0)])
def test_captions_hold_behind_blur_and_noise(scenes, sigma, noise):
    scenes = scenes[: COUNT // 2]
    parsed_scenes = [
        parse(degrade(render(true, 64), sigma, noise, seed)) for seed, true in enumerate(scenes)
    ]
    assert aligned_share(parsed_scenes, scenes) >= 0.95


@pytest.mark.parametrize('shape', SHAPES)
def test_every_colour_of_a_shape_is_parsed_on_every_background(shape):
    # A blurred edge from one to the other passes up to three more of the ten, in broad bands; of a
    # small ring, 5 pixels wide, more blur would leave no pixel of its colour.
    sigma = 1.2 if shape == 'ring' else 1.5
    for colour, background in itertools.permutations(COLOURS, 2):
        thing = Thing(shape=shape, colour=colour, extent=0.32, x=0.4, y=0.6)
        true = Scene(things=(thing,), background=background)
        parsed = parse_scene(degrade(render(true, 64), sigma, 0.0, 0))
        assert parsed is not None and parsed.background == background
        assert [(thing.colour, thing.shape) for thing in parsed.things] == [(colour, shape)]


@pytest.mark.parametrize(('shape', 'sigma'), [('circle', 2.3), ('ring', 2.0)])
def test_round_shapes_are_parsed_behind_a_strong_blur(shape, sigma):
    """Compared with unblurred shapes only, they would be parsed as stars and crosses."""
    for extent, x in itertools.product((20, 24, 30), (0.4, 0.507)):
        things = (Thing(shape=shape, colour='red', extent=extent / 64, x=x, y=0.55),)
        image = render(Scene(things=things, background='white'), 64)
        parsed = parse_scene(degrade(image, sigma, 0.0, 0))
        assert parsed is not None and [thing.shape for thing in parsed.things] == [shape]


def test_star_without_tips_is_a_star_and_a_disc_is_not():
    y, x = (np.mgrid[:512, :512] + 0.5) / 512 - 0.5
    tips = np.cos(5 * np.arctan2(y, x) + np.pi / 2)
    for depth, expected in ((0.12, 'star'), (0.0, 'circle')):
        # A small star as a decoder leaves it: notches half filled, tips gone.
        body = np.hypot(x, y) < 0.15 * (1 + depth * tips)
        parsed = parse_scene(degrade(render_mask(body), 1.0, 0.0, 0))
        assert [thing.shape for thing in parsed.things] == [expected]


@pytest.mark.parametrize('sigma', [0.1, 1.3])
def test_things_of_one_colour_that_nearly_touch_are_separated(sigma):
    things = tuple(
        Thing(shape='square', colour='red', extent=0.32, x=x, y=0.5) for x in (0.3, 0.646)
    )
    parsed = parse_scene(
        degrade(render(Scene(things=things, background='white'), 64), sigma, 0.0, 0)
    )
    assert [thing.shape for thing in parsed.things] == ['square', 'square']


def test_noise_is_unrecognised_and_a_blank_image_has_no_things():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert parse_scene(noise) is None
    assert not any(dataclasses.astuple(check(noise, SENTENCE)))
    blank = np.full((64, 64, 3), 255, np.uint8)
    assert parse_scene(blank) == Scene(things=(), background='white')
    assert not is_aligned(blank, SENTENCE)
    assert not is_aligned(blank, 'a red circle')


@pytest.mark.parametrize(
    'mask',
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
def test_other_shapes_are_unrecognised(mask):
    y, x = (np.mgrid[:512, :512] + 0.5) / 512 - 0.5
    parsed = parse(render_mask(mask(x, y)))
    assert parsed.things == () and parsed.unrecognised == ('red',) and parsed.scene is None


def test_other_colours_and_textures_are_unrecognised():
    brown = np.full((64, 64, 3), 255, np.uint8)
    brown[20:40, 20:40] = 120, 70, 20
    assert parse(brown).unrecognised == ('',)
    grainy = render(PAIR, 64)
    grainy[4:16, 40:56] = np.random.default_rng(0).integers(0, 256, (12, 16, 3))
    assert parse(grainy).unrecognised == ('',)
    assert len(parse(grainy).things) == 2


def test_speck_is_ignored():
    dirty = render(PAIR, 64)
    dirty[4:7, 40:44] = 0
    assert is_aligned(dirty, SENTENCE)


@pytest.mark.parametrize('sentence', [SENTENCE, PLACED])
def test_attributes_without_a_claim_are_none(sentence):
    alignment = check(render(PAIR, 64), sentence)
    claims = parse_caption(sentence)
    assert (
        alignment.all
        and alignment.count
        and alignment.colours
        and alignment.shapes
        and alignment.pairs
    )
    assert alignment.sizes is (True if claims.things[0].size else None)
    assert alignment.places is (True if claims.things[0].place else None)
    assert alignment.relations is (True if claims.relations else None)
    assert alignment.background is (True if claims.background else None)


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
            change('circle', colour='blue', original=Scene(things=PAIR.things, background='pink')),
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
def test_wrong_attribute_is_false(image, sentence, wrong):
    alignment = check(image, sentence)
    assert alignment.all is is_aligned(image, sentence) is (wrong is None)
    assert wrong is None or getattr(alignment, wrong) is False


def test_image_of_another_form_is_refused():
    for image in (np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32)):
        with pytest.raises(UserError, match='an image of uint8 RGB'):
            parse(image)
    with pytest.raises(UserError, match='40 pixels a side or more, not 32 x 64'):
        parse(np.zeros((32, 64, 3), np.uint8))
