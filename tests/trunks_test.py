"""Do the first steps read layers in place, and sample what the scan over layers samples?"""

import functools

import jax
import numpy as np
import pytest
import tiny

from star_jax.core.condition import TextCondition
from star_jax.core.settings import Settings
from star_jax.sampling import program, trunks, weight_layout
from star_jax.sampling.sampler import sample
from star_jax.sampling.weight_layout import LAYERS, with_first_steps

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
def sampled(steps: int, buckets=(), stop=0):
    """B images and their trace, the first `steps` steps with layers that are apart."""
    settings = Settings(guidance=2.0, top_k=20, top_p=0.9)
    rng = np.random.default_rng(1)
    rows = TextCondition(
        rng.normal(size=(2 * B, 3, MODEL.text_width)).astype(np.float32),
        np.ones((2 * B, 3), np.int32),
        rng.normal(size=(2 * B, MODEL.text_width)).astype(np.float32),
    )
    run = functools.partial(
        sample,
        MODEL.build(),
        tiny.TOKENIZER.model.build(),
        keys_B=program.image_keys([3, 5]),
        condition=rows,
        settings=program.step_settings(MODEL, settings),
        method=program.sampling_method(MODEL, settings),
        buckets=buckets,
        stop=stop,
        trace=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_layout, 'MOST_BLOCKS', steps * MODEL.depth)
        weights = jax.device_put(params())
        weights = with_first_steps(weights, MODEL.schedule)
    assert weights[LAYERS].steps == steps if steps else LAYERS not in weights
    return jax.device_get(jax.jit(run)(weights))


@pytest.mark.parametrize(
    ('steps', 'buckets', 'stop'),
    [(2, (), 0), (3, (), 0), (3, ((1, 2),), 0), (2, ((0, 1),), 0), (3, (), 2)],
    ids=['two of three', 'all', 'a bucket from the second on', 'a bucket first', 'stopped'],
)
def test_first_steps_give_the_same_images(steps, buckets, stop):
    ours, scanned = sampled(steps, buckets, stop), sampled(0, (), stop)
    np.testing.assert_array_equal(ours.codes, scanned.codes)
    assert len({code for image in ours.codes for code in image}) > 3
    np.testing.assert_allclose(ours.images, scanned.images, atol=1e-5)
    for one, other in zip(ours.trace.cache, scanned.trace.cache, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    for one, other in zip(ours.trace.steps(), scanned.trace.steps(), strict=True):
        np.testing.assert_allclose(one.method.logits, other.method.logits, atol=2e-5)


def test_layers_of_first_steps_share_the_memory_of_the_stacked_ones():
    stacked = jax.device_put({'kernel': np.ones((2, 64, 64), np.float32), 'bias': np.ones((2, 3))})
    stacked = jax.tree.map(jax.numpy.copy, stacked)  # in memory that JAX has aligned
    given = {'model': {'blocks': stacked}, 'tokenizer': {}}
    layers = with_first_steps(given, MODEL.schedule)[LAYERS]
    for layer, params in enumerate(layers.params):
        place = stacked['kernel'].unsafe_buffer_pointer() + layer * 64 * 64 * 4
        assert params['kernel'].unsafe_buffer_pointer() == place


def test_only_large_models_on_one_cpu_have_first_steps(monkeypatch):
    device = jax.device_put(params())
    monkeypatch.setattr(weight_layout, 'LARGE', 2**26)
    assert with_first_steps(device, MODEL.schedule) is device
    monkeypatch.setattr(weight_layout, 'LARGE', 0)
    mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    meshed = jax.device_put(params(), split)
    assert with_first_steps(meshed, MODEL.schedule) is meshed
    monkeypatch.setattr(weight_layout, 'FEW_ROWS', 0)
    assert with_first_steps(device, MODEL.schedule) is device


def test_steps_of_a_loop_are_none_of_the_first_steps():
    groups = MODEL.schedule.groups(shared=((1, 2),))
    weights = with_first_steps(jax.device_put(params()), MODEL.schedule)
    rows = TextCondition(
        np.ones((2, 3, 32), np.float32), np.ones((2, 3), np.int32), np.ones((2, 32), np.float32)
    )
    chosen = trunks.choose(MODEL.build(), weights, rows, groups, keep_all=False)
    assert isinstance(chosen, trunks.ChangingTrunk) and chosen.steps == 1
