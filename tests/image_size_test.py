"""Which template and resolution are sampled for a given size?"""

import dataclasses

import pytest
import tiny

import star_jax
from star_jax.checkpoint.folder import StoredModel, StoredTokenizer
from star_jax.core.schedule import square_grids
from star_jax.core.templates import PUBLISHED, Templates
from star_jax.errors import UserError
from star_jax.families.infinity import Infinity
from star_jax.families.star import Star
from star_jax.families.var import Var
from star_jax.nn.positions import Learned
from star_jax.sampling.image_size import ImageSize, choose

TOY = Templates(grids=(('1:1', '1x1 2x2 4x4'), ('4:3', '1x1 2x2 3x4'), ('3:4', '1x1 2x2 4x3')))
WIDE = ((1, 1), (2, 2), (3, 4))


def stored(config) -> StoredModel:
    tokenizer = StoredTokenizer(config=config.default_tokenizer(), params={})
    return StoredModel(config=config, params={}, tokenizer=tokenizer, text=None)


INFINITY = stored(Infinity(grids=PUBLISHED.by_name['1.0']))  # trained at 1M


@pytest.mark.parametrize(
    ('size', 'template', 'pixels'),
    [
        ({'aspect': '16:9'}, '0.571', (768, 1344)),
        ({'aspect': '9:16'}, '1.75', (1344, 768)),
        ({'aspect': '16:9', 'resolution': '0.06M'}, '0.571', (192, 336)),
        ({'resolution': '0.25M'}, '1.0', (512, 512)),
        ({'height': 720, 'width': 1280}, '0.571', (768, 1344)),
        ({'height': 240, 'width': 360}, '0.666', (224, 336)),
        ({'height': 1080, 'width': 360}, '3.0', (864, 288)),
        ({'height': 10_000, 'width': 9_000}, '1.0', (1024, 1024)),
    ],
)
def test_the_nearest_template_and_resolution_are_chosen(size, template, pixels):
    model, name = choose(INFINITY, ImageSize(**size))
    schedule = model.config.schedule
    assert name == template and model.tokenizer.config.at(schedule).resolution == pixels
    assert schedule.reference_grid == PUBLISHED.by_name[template][-1]


def test_no_size_is_that_of_the_model():
    assert choose(INFINITY, ImageSize()) == (INFINITY, '')
    assert choose(INFINITY, ImageSize(resize=256)) == (INFINITY, '')


def test_star_samples_any_template_of_its_own():
    star = stored(Star(sides=(1, 2, 4), templates=TOY))
    model, name = choose(star, ImageSize(aspect='4:3'))
    assert name == '4:3' and model.config.schedule.grids == WIDE
    assert star.config.schedule.grids == square_grids((1, 2, 4))
    wide = dataclasses.replace(star, config=model.config)
    assert choose(wide, ImageSize(aspect='1:1'))[0].config.schedule.sizes == (1, 4, 16)


@pytest.mark.parametrize(
    ('model', 'size', 'message'),
    [
        (
            stored(Star()),
            {'aspect': '4:3'},
            'no templates of other aspect ratios, and it samples',
        ),
        (INFINITY, {'resolution': '4M'}, "no resolution '4M' of this model: choose one of 0.06M"),
        (
            stored(Infinity()),
            {'aspect': '4:3', 'resolution': '1M'},
            'the resolution 1M has 13 scales, but the model was trained on 7: choose 0.06M or less',
        ),
        (
            stored(Var(sides=(1, 2, 4), templates=TOY, positions=Learned())),
            {'aspect': '4:3'},
            'Learned positions belong to the tokens of one size',
        ),
        (
            stored(Star(sides=(1, 2, 4), templates=TOY, keep_tokens=20)),
            {'aspect': '4:3'},
            'no images of 3x4 tokens: keep_tokens must be 0 or lie in',
        ),
        (
            stored(Infinity(grids=((1, 1), (3, 3)))),
            {'resolution': '0.06M'},
            'no template begins with the grids of the model, 1x1 3x3, and it samples 48 x 48 px',
        ),
        (
            stored(Infinity(grids=square_grids((1, 2, 3, 5)))),
            {'aspect': '4:3'},
            'no template begins with .*: leave aspect, height, width and resolution out',
        ),
        (
            stored(Infinity(reference=(16, 16))),
            {'height': 256, 'width': 256},
            r'model.reference is \(16, 16\), but the template .* ends with \(64, 64\)',
        ),
    ],
)
def test_what_a_model_cannot_sample_is_refused(model, size, message):
    with pytest.raises(UserError, match=message):
        choose(model, ImageSize(**size))


@pytest.mark.parametrize(
    ('size', 'message'),
    [
        ({'aspect': '16x9'}, 'give width:height, such as 16:9'),
        ({'height': 64}, 'height and width are given together'),
        ({'aspect': '4:3', 'height': 6, 'width': 8}, 'leave out aspect, or height and width'),
        ({'resize': -1}, 'resize must lie in'),
    ],
)
def test_invalid_sizes_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        ImageSize(**size)


def test_images_have_the_size_of_the_template(tmp_path):
    templates = Templates(grids=(('1:1', '1x1 2x2 4x4'), ('2:1', '1x1 1x2 2x4')))
    model = dataclasses.replace(tiny.STAR.model, templates=templates)
    source = tiny.write_model(tmp_path / 'model', model)
    pipe = star_jax.load(source, size=star_jax.ImageSize(height=30, width=70))
    assert pipe.template == '2:1' and '8 x 16 px' in repr(pipe)
    assert pipe(['a red circle'], guidance=0.0).shape == (1, 8, 16, 3)
    with pytest.raises(UserError, match='resize is for square images, not for 8 x 16 px'):
        star_jax.load(source, size=star_jax.ImageSize(aspect='2:1', resize=8))
