"""Does the embedded dataset follow its rules, and are its captions true?"""

import collections
import dataclasses
import hashlib
import itertools
import re

import numpy as np
import pytest

from star_jax.data.captions import (
    Claims,
    Mention,
    Related,
    matches,
    parse_caption,
    scene_captions,
)
from star_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    LEAST_DISTANCE,
    PAIRS,
    RELATIONS,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    relation,
    scene,
)
from star_jax.data.shapes import Shapes, render
from star_jax.errors import UserError

COUNT = 2000
SENTENCE = 'a small red circle to the left of a large blue square on a white background'


@pytest.fixture(scope='module')
def scenes() -> dict[str, list[Scene]]:
    return {split: [scene(index, split) for index in range(COUNT)] for split in SPLITS}


@pytest.fixture(scope='module')
def all_scenes(scenes) -> list[Scene]:
    return list(itertools.chain.from_iterable(scenes.values()))


@pytest.fixture
def pair() -> Scene:
    """A small red circle on the left, a large blue square in the bottom right."""
    circle = Thing(shape='circle', colour='red', extent=0.33, x=0.25, y=0.5)
    square = Thing(shape='square', colour='blue', extent=0.45, x=0.72, y=0.7)
    return Scene(things=(circle, square), background='white')


def pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.colour, thing.shape) for thing in scene.things}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_scenes_of_a_number_never_change():
    shown = [scene(index, split) for split in SPLITS for index in range(40)]
    assert digest(repr(shown).encode()) == '44f14b7ced8177e6'
    assert digest(b''.join(render(scene, 64).tobytes() for scene in shown)) == '96403fa3271ccadc'
    assert (
        digest('\n'.join(itertools.chain(*map(scene_captions, shown))).encode())
        == 'fa758144ad23e986'
    )


@pytest.mark.parametrize('size', [128, 256])
def test_larger_image_shows_the_same_scene(size):
    for index in range(60):
        shown = scene(index)
        small = render(shown, 64)
        shrunk = render(shown, size).reshape(64, size // 64, 64, size // 64, 3).mean((1, 3))
        assert small.dtype == np.uint8 and small.shape == (64, 64, 3)
        assert np.abs(shrunk - small).mean() < 0.4
        assert np.abs(shrunk - small).max() < 64  # a tip of a star inside one pixel


@pytest.mark.parametrize(('height', 'width'), [(64, 96), (80, 40)])
def test_positions_are_shares_of_both_sides_and_extents_of_the_shorter(pair, height, width):
    shown = render(pair, (height, width))
    assert shown.shape == (height, width, 3)
    shorter = min(height, width)
    for thing in pair.things:
        rows, columns = np.nonzero((shown == COLOURS[thing.colour]).all(-1))
        assert abs((rows.min() + rows.max() + 1) / 2 - thing.y * height) <= 1
        assert abs((columns.min() + columns.max() + 1) / 2 - thing.x * width) <= 1
        assert abs(np.ptp(columns) + 1 - thing.extent * shorter) <= 2
        assert abs(np.ptp(rows) + 1 - thing.extent * shorter) <= 2


def test_things_are_separate_on_every_canvas(all_scenes):
    for shown in all_scenes[:300]:
        for height, width in ((1, 3), (2, 1)):
            for thing in shown.things:
                half = thing.extent / 2
                assert half < min(thing.x * width, thing.y * height)
                assert half < min((1 - thing.x) * width, (1 - thing.y) * height)
            for first, second in itertools.combinations(shown.things, 2):
                right, down = abs(first.x - second.x) * width, abs(first.y - second.y) * height
                assert max(right, down) > (first.extent + second.extent) / 2


def test_scenes_have_the_aspects_of_the_set():
    source = Shapes(count=600, aspects=('1:1', '4:3', '1:2')).open((48, 64))
    ratios = [source.ratio(index) for index in range(len(source))]
    shares = {ratio: ratios.count(ratio) / 600 for ratio in (1.0, 0.75, 2.0)}
    assert sum(shares.values()) == 1 and min(shares.values()) > 0.28
    square = source.at(32)
    assert square.captions(5) == source.captions(5) and source[5]['image'].shape == (48, 64, 3)
    assert square[5]['image'].shape == (32, 32, 3)


def test_scene_has_one_to_three_separate_things(all_scenes):
    for shown in all_scenes:
        assert 1 <= len(shown.things) <= 3
        for thing in shown.things:
            half = thing.extent / 2
            assert half < min(thing.x, thing.y) and max(thing.x, thing.y) < 1 - half
        for first, second in itertools.combinations(shown.things, 2):
            distance = max(abs(first.x - second.x), abs(first.y - second.y))
            assert distance > (first.extent + second.extent) / 2


def test_small_is_a_third_and_large_is_045_of_the_side(all_scenes):
    for thing in itertools.chain.from_iterable(shown.things for shown in all_scenes):
        assert abs(thing.extent - {'small': 1 / 3, 'large': 0.45}[thing.size]) < 0.025
    assert all(
        thing.size == 'small'
        for shown in all_scenes
        if len(shown.things) == 3
        for thing in shown.things
    )
    sizes = collections.Counter(
        tuple(thing.size for thing in shown.things)
        for shown in all_scenes
        if len(shown.things) == 2
    )
    assert len(sizes) == 4 and min(sizes.values()) > 0.15 * sizes.total()


def test_things_differ_from_each_other_and_the_background(all_scenes):
    for shown in all_scenes:
        assert len(pairs(shown)) == len(shown.things)
        assert shown.background not in {thing.colour for thing in shown.things}


def test_training_scenes_have_no_held_out_pair(scenes):
    assert len(set(HELD_OUT)) == round(0.15 * len(PAIRS))
    trained = set().union(*map(pairs, scenes['train']))
    assert trained == set(PAIRS) - set(HELD_OUT)
    assert trained == set().union(*map(pairs, scenes['validation']))
    assert {colour for colour, _ in trained} == set(COLOURS)
    assert {shape for _, shape in trained} == set(SHAPES)
    assert all(pairs(shown) & set(HELD_OUT) for shown in scenes['held_out'])
    assert set(HELD_OUT) <= set().union(*map(pairs, scenes['held_out']))


def test_validation_has_no_training_scene(scenes):
    assert not set(scenes['train']) & set(scenes['validation'])
    assert len(set(scenes['train'])) == COUNT


def test_all_places_backgrounds_and_relations_occur(scenes):
    shown = scenes['train']
    places = collections.Counter(scene.things[0].place for scene in shown)
    assert len(places) == 9 and min(places.values()) > 0.05 * COUNT
    assert {scene.background for scene in shown} == set(BACKGROUNDS)
    assert {scene.relation for scene in shown} == {None, *RELATIONS}


def test_colours_are_far_apart():
    for first, second in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(first, second)) > 100


@pytest.mark.parametrize(
    ('x', 'y', 'expected'),
    [
        (0.5 - LEAST_DISTANCE, 0.5, 'left of'),
        (0.5 + LEAST_DISTANCE, 0.5, 'right of'),
        (0.5, 0.5 - LEAST_DISTANCE, 'above'),
        (0.5, 0.5 + LEAST_DISTANCE, 'below'),
        (0.51 - LEAST_DISTANCE, 0.5, None),
        (0.25, 0.75, None),
        (0.25, 0.7, 'left of'),
    ],
)
def test_relation_needs_distance_along_a_dominant_axis(pair, x, y, expected):
    first, second = (
        dataclasses.replace(thing, x=x, y=y)
        for thing, x, y in zip(pair.things, (x, 0.5), (y, 0.5), strict=True)
    )
    assert relation(first, second) == expected
    assert relation(second, first) == RELATIONS.get(expected)


def test_every_caption_is_parsed_and_true(all_scenes):
    for shown in all_scenes:
        for caption in scene_captions(shown):
            claims = parse_caption(caption)
            assert matches(claims, shown), caption
            assert {(thing.colour, thing.shape) for thing in claims.things} == pairs(shown)


def test_captions_differ_in_what_they_state(scenes):
    for shown in scenes['train'][:200]:
        captions = scene_captions(shown)
        claims = [parse_caption(caption) for caption in captions]
        assert len(set(captions)) == len(claims) >= 8
        assert {claim.background for claim in claims} == {None, shown.background}
        for attribute in ('size', 'place'):
            stated = {getattr(claim.things[0], attribute) is None for claim in claims}
            assert stated == {True, False}
        most_detailed = claims[0]
        assert most_detailed.background
        assert all(thing.place for thing in most_detailed.things)


def test_captions_fit_the_text_encoder(all_scenes):
    for caption in itertools.chain.from_iterable(map(scene_captions, all_scenes)):
        assert len(re.findall(r'\w+|[^\w\s]', caption)) < 30


def test_documented_sentence_is_in_the_language(pair):
    assert SENTENCE in scene_captions(pair)
    assert parse_caption(SENTENCE) == Claims(
        things=(
            Mention(size='small', colour='red', shape='circle'),
            Mention(size='large', colour='blue', shape='square'),
        ),
        relations=(Related(first=0, relation='left of', second=1),),
        background='white',
    )
    assert parse_caption('a red circle') == Claims(things=(Mention(colour='red', shape='circle'),))


@pytest.mark.parametrize(
    'caption',
    [
        'a red circle',
        'a red circle and a red circle',
        'a red circle and a blue ring',
        'a red circle, a blue square and a gray star',
        'a large red circle and a blue square',
        'a red circle on the right and a blue square',
        'a red circle in the top left and a blue square',
        'a red circle to the right of a blue square',
        'a red circle above a blue square',
        'a red circle and a blue square on a black background',
    ],
)
def test_false_caption_does_not_match(pair, caption):
    assert matches(parse_caption('A red circle left of a blue square at the bottom.'), pair)
    assert not matches(parse_caption(caption), pair)


@pytest.mark.parametrize(
    'caption', ['', 'a zebra', 'a red circle beside a blue square', 'a red circle and a zebra']
)
def test_sentences_outside_of_the_language_are_refused(caption):
    with pytest.raises(UserError, match='not a caption of the shapes language'):
        parse_caption(caption)


def test_source_returns_images_captions_and_labels():
    source = Shapes(count=5, split='held_out', objects=(2,), phrasings=0).open(32)
    example = source[4]
    assert len(source) == 5
    assert example['image'].shape == (32, 32, 3)
    assert example['captions'] == scene_captions(source.scene(4))
    assert tuple(example['label'].split()) in HELD_OUT
    assert all(len(source.scene(index).things) == 2 for index in range(5))
    with pytest.raises(IndexError):
        source[5]


def test_scene_keeps_some_of_its_captions():
    source = Shapes(count=200, phrasings=3).open(32)
    kept = [source.captions(index) for index in range(200)]
    possible = [scene_captions(source.scene(index)) for index in range(200)]
    assert kept[7] == source[7]['captions']
    assert all(len(set(captions)) == 3 for captions in kept)
    pairs = list(zip(kept, possible, strict=True))
    assert all(set(captions) <= set(others) for captions, others in pairs)
    assert len({others.index(captions[0]) for captions, others in pairs}) > 10
    assert len(Shapes(count=9, phrasings=99).open(32).captions(0)) == len(possible[0])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'aspects': ('16x9',)}, "'16x9' is not an aspect ratio: give width:height"),
        ({'aspects': ()}, 'no aspects'),
        ({'count': 0}, 'not 0'),
        ({'split': 'test'}, "'test'"),
        ({'objects': (4,)}, '(4,)'),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Shapes(**options)
    with pytest.raises(UserError, match='16 pixels'):
        Shapes().open(8)
