"""Does a pipeline give the same images in every batch and on every mesh?"""

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

# In another batch the decoder rounds differently, by about 1e-4 of a level of gray. No pixel of the
# images of this seed is within 1e-3 of a boundary between levels: bytes are equal on any machine.
SEED = 339
PROMPTS = ['a red circle', 'a small blue star', 'a green ring', 'two crosses', 'a cat']


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp('pipe') / 'model')


@pytest.fixture(scope='module')
def pipe(folder) -> Pipeline:
    return star_jax.load(folder)


@pytest.fixture(scope='module')
def images(pipe) -> np.ndarray:
    return pipe(PROMPTS, seed=SEED, guidance=2.0, top_k=8, top_p=0.8)


def test_images_are_bytes_and_differ(images):
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert all((images[0] != image).any() for image in images[1:])


def test_image_does_not_depend_on_the_batch(pipe, images):
    again = pipe(PROMPTS, seed=SEED, batch=2, guidance=2.0, top_k=8, top_p=0.8)  # of 2, 2 and 1
    np.testing.assert_array_equal(again, images)


@pytest.mark.usefixtures('compiled_here')
def test_image_does_not_depend_on_a_mesh_that_shards_parameters(folder, images):
    pipe = star_jax.load(
        folder, mesh=MeshShape(data=1, fsdp=2, tensor=2, sequence=2).build_on_first()
    )
    again = pipe(PROMPTS, seed=SEED, guidance=2.0, top_k=8, top_p=0.8)
    np.testing.assert_array_equal(again, images)
    kernel = pipe._params['model']['blocks']['ffn']['fc1']['kernel']
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == tuple(n // 2 for n in kernel.shape[1:])


def test_guidance_off_equals_guidance_of_almost_zero(pipe):
    """Prompted rows alone give the images that they give beside unprompted ones of no weight."""
    alone = pipe(PROMPTS[:2], guidance=0.0, top_k=8)
    beside = pipe(PROMPTS[:2], guidance=1e-12, top_k=8)
    np.testing.assert_array_equal(alone, beside)


def test_settings_left_out_are_the_recommended_ones(pipe):
    assert pipe.resolve() == pipe.recommended
    assert pipe.resolve(top_k=3) == dataclasses.replace(pipe.recommended, top_k=3)
    assert pipe.resolve(stable=True).stable == StableSettings(version='1024')
    assert pipe.resolve(stable=False).stable == StableSettings()


def test_released_and_corrected_images_differ_under_guidance(folder, pipe):
    released = star_jax.load(folder, cross_attention='released')
    prompts, settings = PROMPTS[:2], {'guidance': 3.0, 'top_k': 8}
    assert (released(prompts, **settings) != pipe(prompts, **settings)).any()
    plain = settings | {'guidance': 0.0}
    np.testing.assert_array_equal(released(prompts, **plain), pipe(prompts, **plain))
    assert not star_jax.load(folder, cross_attention='corrected').network.mixes_rows


def test_batches_need_few_programs():
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
def test_mistake_raises_a_sentence(pipe, prompts, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        pipe(prompts, **settings)


def test_mesh_that_does_not_divide_the_model_is_refused(folder):
    with pytest.raises(UserError, match='of the model does not divide over the mesh'):
        star_jax.load(folder, mesh=MeshShape(data=1, tensor=4).build_on_first())  # two heads


def test_mesh_of_too_many_devices_is_refused():
    with pytest.raises(UserError, match=f'there are {jax.device_count()}'):
        MeshShape(data=64).build_on_first()
