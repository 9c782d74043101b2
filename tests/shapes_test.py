"""Is the embedded set what its rules say, and are its captions true?"""

import collections
import dataclasses
import hashlib
import itertools
import re

import numpy as np
import pytest

from star_jax.data.captions import Claims, Mention, Related, captions, claims, holds
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
def every(scenes) -> list[Scene]:
    return list(itertools.chain.from_iterable(scenes.values()))


@pytest.fixture
def pair() -> Scene:
    """A small red circle in the left, a large blue square in the bottom right."""
    circle = Thing(shape='circle', colour='red', extent=0.33, x=0.25, y=0.5)
    square = Thing(shape='square', colour='blue', extent=0.45, x=0.72, y=0.7)
    return Scene(things=(circle, square), background='white')


def pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.colour, thing.shape) for thing in scene.things}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_the_same_number_is_the_same_picture_forever():
    shown = [scene(index, split) for split in SPLITS for index in range(40)]
    assert digest(repr(shown).encode()) == '44f14b7ced8177e6'
    assert digest(b''.join(render(each, 64).tobytes() for each in shown)) == '96403fa3271ccadc'
    assert digest('\n'.join(itertools.chain(*map(captions, shown))).encode()) == 'fa758144ad23e986'


@pytest.mark.parametrize('size', [128, 256])
def test_a_larger_picture_shows_the_same_scene(size):
    for index in range(60):
        shown = scene(index)
        small = render(shown, 64)
        shrunk = render(shown, size).reshape(64, size // 64, 64, size // 64, 3).mean((1, 3))
        assert small.dtype == np.uint8 and small.shape == (64, 64, 3)
        assert np.abs(shrunk - small).mean() < 0.4
        assert np.abs(shrunk - small).max() < 64  # a tip of a star inside one pixel


def test_one_to_three_things_none_hidden_none_cut_off(every):
    for shown in every:
        assert 1 <= len(shown.things) <= 3
        for thing in shown.things:
            half = thing.extent / 2
            assert half < min(thing.x, thing.y) and max(thing.x, thing.y) < 1 - half
        for one, other in itertools.combinations(shown.things, 2):
            distance = max(abs(one.x - other.x), abs(one.y - other.y))
            assert distance > (one.extent + other.extent) / 2


def test_small_is_a_third_and_large_is_045(every):
    for thing in itertools.chain.from_iterable(shown.things for shown in every):
        assert abs(thing.extent - {'small': 1 / 3, 'large': 0.45}[thing.size]) < 0.025
    assert all(
        thing.size == 'small' for shown in every if len(shown.things) == 3 for thing in shown.things
    )
    sizes = collections.Counter(
        tuple(thing.size for thing in shown.things) for shown in every if len(shown.things) == 2
    )
    assert len(sizes) == 4 and min(sizes.values()) > 0.15 * sizes.total()


def test_things_differ_from_each_other_and_from_the_background(every):
    for shown in every:
        assert len(pairs(shown)) == len(shown.things)
        assert shown.background not in {thing.colour for thing in shown.things}


def test_no_training_scene_shows_a_held_out_pair(scenes):
    assert len(set(HELD_OUT)) == round(0.15 * len(PAIRS))
    seen = set().union(*map(pairs, scenes['train']))
    assert seen == set(PAIRS) - set(HELD_OUT)
    assert seen == set().union(*map(pairs, scenes['validation']))
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)
    assert all(pairs(shown) & set(HELD_OUT) for shown in scenes['held_out'])
    assert set(HELD_OUT) <= set().union(*map(pairs, scenes['held_out']))


def test_validation_repeats_no_training_scene(scenes):
    assert not set(scenes['train']) & set(scenes['validation'])
    assert len(set(scenes['train'])) == COUNT


def test_everything_there_is_to_say_occurs(scenes):
    shown = scenes['train']
    places = collections.Counter(scene.things[0].place for scene in shown)
    assert len(places) == 9 and min(places.values()) > 0.05 * COUNT
    assert {scene.background for scene in shown} == set(BACKGROUNDS)
    assert {scene.relation for scene in shown} == {None, *RELATIONS}


def test_no_two_colours_are_close():
    for one, other in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) > 100


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
def test_a_relation_needs_distance_along_a_dominant_axis(pair, x, y, expected):
    first, second = (
        dataclasses.replace(thing, x=x, y=y)
        for thing, x, y in zip(pair.things, (x, 0.5), (y, 0.5), strict=True)
    )
    assert relation(first, second) == expected
    assert relation(second, first) == RELATIONS.get(expected)


def test_every_caption_is_read_back_and_true(every):
    for shown in every:
        for caption in captions(shown):
            said = claims(caption)
            assert holds(said, shown), caption
            assert {(each.colour, each.shape) for each in said.things} == pairs(shown)


def test_captions_say_all_kinds_of_things(scenes):
    for shown in scenes['train'][:200]:
        said = [claims(caption) for caption in captions(shown)]
        assert len(set(captions(shown))) == len(said) >= 8
        assert {each.background for each in said} == {None, shown.background}
        for aspect in ('size', 'place'):
            assert {getattr(each.things[0], aspect) is None for each in said} == {True, False}
        fullest = said[0]
        assert fullest.background and all(thing.place for thing in fullest.things)


def test_captions_fit_the_text_encoder(every):
    for caption in itertools.chain.from_iterable(map(captions, every)):
        assert len(re.findall(r'\w+|[^\w\s]', caption)) < 30


def test_the_promised_sentence_is_in_the_language(pair):
    assert SENTENCE in captions(pair)
    assert claims(SENTENCE) == Claims(
        things=(
            Mention(size='small', colour='red', shape='circle'),
            Mention(size='large', colour='blue', shape='square'),
        ),
        relations=(Related(first=0, relation='left of', second=1),),
        background='white',
    )
    assert claims('a red circle') == Claims(things=(Mention(colour='red', shape='circle'),))


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
def test_a_false_caption_does_not_hold(pair, caption):
    assert holds(claims('A red circle left of a blue square at the bottom.'), pair)
    assert not holds(claims(caption), pair)


@pytest.mark.parametrize(
    'caption', ['', 'a zebra', 'a red circle beside a blue square', 'a red circle and a zebra']
)
def test_other_sentences_are_refused(caption):
    with pytest.raises(UserError, match='no caption of the shapes language'):
        claims(caption)


def test_a_source_gives_pictures_captions_and_labels():
    source = Shapes(count=5, split='held_out', objects=(2,), phrasings=0).open(32)
    example = source[4]
    assert len(source) == 5
    assert example['image'].shape == (32, 32, 3)
    assert example['captions'] == captions(source.scene(4))
    assert tuple(example['label'].split()) in HELD_OUT
    assert all(len(source.scene(index).things) == 2 for index in range(5))
    with pytest.raises(IndexError):
        source[5]


def test_a_scene_keeps_some_of_its_phrasings():
    source = Shapes(count=200, phrasings=3).open(32)
    kept = [source.captions(index) for index in range(200)]
    assert kept[7] == source[7]['captions']
    assert all(len(set(few)) == 3 for few in kept)
    assert all(set(few) <= set(captions(source.scene(i))) for i, few in enumerate(kept))
    assert len({captions(source.scene(i)).index(few[0]) for i, few in enumerate(kept)}) > 10
    assert len(Shapes(count=9, phrasings=99).open(32).captions(0)) == len(captions(source.scene(0)))


@pytest.mark.parametrize(
    ('wrong', 'named'),
    [({'count': 0}, 'not 0'), ({'split': 'test'}, "'test'"), ({'objects': (4,)}, '(4,)')],
)
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(UserError, match=re.escape(named)):
        Shapes(**wrong)
    with pytest.raises(UserError, match='16 pixels'):
        Shapes().open(8)
