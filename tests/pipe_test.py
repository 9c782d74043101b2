"""Does what a user holds draw the same images in every way of asking?"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import star_jax
from star_jax.core.settings import StableSettings
from star_jax.errors import UserError
from star_jax.parallel.mesh import MeshShape
from star_jax.sampling.pipeline import Pipeline, batches

PROMPTS = ['a red circle', 'a small blue star', 'a green ring', 'two crosses', 'a cat']


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp('pipe') / 'model')


@pytest.fixture(scope='module')
def pipe(place) -> Pipeline:
    return star_jax.load(place)


@pytest.fixture(scope='module')
def images(pipe) -> np.ndarray:
    return pipe(PROMPTS, seed=7, guidance=2.0, top_k=8, top_p=0.8)


def test_images_are_bytes_and_differ(images):
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert all((images[0] != image).any() for image in images[1:])


def test_an_image_is_the_same_in_smaller_batches_and_alone(pipe, images):
    again = pipe(PROMPTS, seed=7, batch=2, guidance=2.0, top_k=8, top_p=0.8)  # of 2, 2 and 1
    np.testing.assert_array_equal(again, images)


def test_an_image_is_the_same_on_a_mesh_that_splits_the_parameters(place, images):
    pipe = star_jax.load(
        place, mesh=MeshShape(data=1, fsdp=2, tensor=2, sequence=2).build_on_first()
    )
    again = pipe(PROMPTS, seed=7, guidance=2.0, top_k=8, top_p=0.8)
    np.testing.assert_array_equal(again, images)
    kernel = pipe._params['model']['blocks']['ffn']['fc1']['kernel']
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == tuple(n // 2 for n in kernel.shape[1:])


def test_no_guidance_is_guidance_of_nothing(pipe):
    """Prompted rows alone draw what they draw beside unprompted ones of no weight."""
    alone = pipe(PROMPTS[:2], guidance=0.0, top_k=8)
    beside = pipe(PROMPTS[:2], guidance=1e-12, top_k=8)
    np.testing.assert_array_equal(alone, beside)


def test_settings_left_out_are_those_of_the_maker(pipe):
    assert pipe.resolve() == pipe.recommended
    assert pipe.resolve(top_k=3) == dataclasses.replace(pipe.recommended, top_k=3)
    assert pipe.resolve(stable=True).stable == StableSettings(version='1024')
    assert pipe.resolve(stable=False).stable == StableSettings()


def test_released_and_corrected_differ_where_there_is_guidance(place, pipe):
    released = star_jax.load(place, cross_attention='released')
    prompts, settings = PROMPTS[:2], {'guidance': 3.0, 'top_k': 8}
    assert (released(prompts, **settings) != pipe(prompts, **settings)).any()
    plain = settings | {'guidance': 0.0}
    np.testing.assert_array_equal(released(prompts, **plain), pipe(prompts, **plain))
    assert not star_jax.load(place, cross_attention='corrected').network.mixes_rows


def test_few_programs_are_compiled():
    assert batches(37, 16, 1) == [16, 16, 8]
    assert batches(3, 16, 1) == [4]
    assert batches(16, 16, 4) == [16]
    assert batches(1, 2, 4) == [4]
    assert batches(21, 6, 4) == [8, 8, 8]
    assert batches(0, 4, 1) == []


@pytest.mark.parametrize(
    ('prompts', 'settings', 'sentence'),
    [
        ([], {}, 'there is no prompt'),
        ('a red fox', {}, 'as a list, not as one text'),
        (['a'], {'batch': 0}, 'batch must be at least 1, not 0'),
        (['a', 'b'], {'seed': 2**32 - 1}, 'seeds of 2 images must lie in'),
        (['a'], {'topk': 3}, "no setting 'topk' of sampling: choose of guidance, top_k"),
        (['a'], {'top_p': 2.0}, 'top_p must lie in'),
        (['a'], {'stable': True}, 'refinement head'),
    ],
)
def test_mistakes_are_told(pipe, prompts, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        pipe(prompts, **settings)


def test_a_mesh_that_does_not_divide_the_model_is_refused(place):
    with pytest.raises(UserError, match='of the model does not divide over the mesh'):
        star_jax.load(place, mesh=MeshShape(data=1, tensor=4).build_on_first())  # two heads


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(UserError, match=f'there are {jax.device_count()}'):
        MeshShape(data=64).build_on_first()
