"""Does a scan whose layers choose their kernels in place sample what a scan over slices samples?"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import tiny

import star_jax
from star_jax.core.condition import TextCondition
from star_jax.core.settings import Settings
from star_jax.nn.layers import SWITCHED
from star_jax.sampling import program, weight_layout
from star_jax.sampling.sampler import sample
from star_jax.sampling.weight_layout import KERNELS, switch_kernels, with_switched_kernels

MODEL = tiny.STAR.model
B = 2


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch):
    monkeypatch.setattr(weight_layout, 'LARGE', 0)


@functools.cache
def params() -> dict:
    random = {'model': MODEL.abstract(), 'tokenizer': tiny.TOKENIZER.model.abstract()}
    return {name: tiny.random_params(abstract) for name, abstract in random.items()}


@functools.cache
def compiled(apart: bool, buckets=(), dtype='float32'):
    """The program that samples B images with their trace, and its parameters."""
    rng = np.random.default_rng(1)
    rows = TextCondition(
        rng.normal(size=(2 * B, 3, MODEL.text_width)).astype(np.float32),
        np.ones((2 * B, 3), np.int32),
        rng.normal(size=(2 * B, MODEL.text_width)).astype(np.float32),
    )
    settings = Settings(guidance=2.0, top_k=20, top_p=0.9)
    run = functools.partial(
        sample,
        MODEL.build(dtype),
        tiny.TOKENIZER.model.build(),
        keys_B=program.image_keys([3, 5]),
        condition=rows,
        settings=program.step_settings(MODEL, settings),
        method=program.sampling_method(MODEL, settings),
        buckets=buckets,
        trace=True,
    )
    weights = jax.device_put(program.cast(params(), dtype))
    if apart:
        weights = with_switched_kernels(weights)
    assert (KERNELS in weights) == apart
    return jax.jit(run).lower(weights).compile(), weights


@pytest.mark.parametrize('buckets', [(), ((1, 2),)], ids=['each step alone', 'a bucket'])
def test_kernels_in_place_give_the_same_images(buckets):
    ours, sliced = (
        jax.device_get(run(weights)) for run, weights in (compiled(True, buckets), compiled(False))
    )
    np.testing.assert_array_equal(ours.codes, sliced.codes)
    assert len({code for image in ours.codes for code in image}) > 3
    np.testing.assert_allclose(ours.images, sliced.images, atol=1e-5)
    for one, other in zip(ours.trace.cache, sliced.trace.cache, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    for one, other in zip(ours.trace.steps(), sliced.trace.steps(), strict=True):
        np.testing.assert_allclose(one.method.logits, other.method.logits, atol=2e-5)


def test_kernels_in_place_give_the_same_images_in_bfloat16():
    ours, sliced = (
        jax.device_get(run(weights))
        for run, weights in (compiled(kind, dtype='bfloat16') for kind in (True, False))
    )
    first, other = (result.trace.steps()[0].method.logits for result in (ours, sliced))
    np.testing.assert_allclose(first, other, atol=0.05)


@pytest.mark.parametrize('released', [False, True], ids=['corrected', 'released'])
def test_a_pipeline_reads_its_kernels_in_place(released, tmp_path, monkeypatch):
    model = dataclasses.replace(MODEL, released_cross_attention=released)
    folder = tiny.write_model(tmp_path / 'model', model)
    prompts = ['a red circle', 'a blue square']
    pipe = star_jax.load(folder)
    stacked = pipe._params['model']['blocks']['ffn']['fc1']['kernel']
    views = pipe._params[KERNELS]['ffn']['fc1']['kernel']
    assert len(views) == MODEL.depth
    np.testing.assert_array_equal(np.stack(views), stacked)
    monkeypatch.setattr(weight_layout, 'LARGE', 2**26)
    sliced = star_jax.load(folder)
    assert KERNELS not in sliced._params
    np.testing.assert_array_equal(pipe(prompts), sliced(prompts))


def test_a_kernel_of_another_module_is_sliced():
    stacked = {'own': {'kernel': np.arange(6.0).reshape(2, 3)}}
    kernels = {'own': {'kernel': tuple(stacked['own']['kernel'])}}
    layer = switch_kernels(stacked, kernels, 1)['own']
    np.testing.assert_array_equal(layer['kernel'], [3, 4, 5])
    np.testing.assert_array_equal(layer[SWITCHED].kernels[0], [0, 1, 2])


def test_no_kernel_is_copied():
    """A copy of the MLP's first kernel [32, 128] exists with slices alone."""
    copy = re.compile(r'= f32\[(1,)?32,128\]\S* (fusion|dynamic-slice|copy)\(')
    apart, sliced = (copy.findall(compiled(kind)[0].as_text()) for kind in (True, False))
    assert sliced and not apart


def test_kernels_share_the_memory_of_the_stacked_ones():
    kernel = jax.numpy.copy(np.ones((2, 64, 64), np.float32))  # in memory that JAX has aligned
    given = {'model': {'blocks': {'fc1': {'kernel': kernel, 'bias': np.ones((2, 3))}}}}
    given = jax.tree.map(jax.numpy.asarray, given)
    (name, views), *others = with_switched_kernels(given)[KERNELS]['fc1'].items()
    assert name == 'kernel' and not others
    places = [view.unsafe_buffer_pointer() - kernel.unsafe_buffer_pointer() for view in views]
    assert places == [0, 64 * 64 * 4]


def test_only_large_models_on_one_cpu_have_kernels_apart(monkeypatch):
    mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    meshed = jax.device_put(params(), everywhere)
    assert with_switched_kernels(meshed) is meshed
    monkeypatch.setattr(weight_layout, 'LARGE', 2**26)
    alone = jax.device_put(params())
    assert with_switched_kernels(alone) is alone
