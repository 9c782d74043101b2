"""Are codes drawn as STAR specification 8 says?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.core.codes import Index
from star_jax.core.filters import Filter
from star_jax.core.pixels import to_uint8
from star_jax.core.schedule import Step
from star_jax.sampling.methods import (
    FilteredSampling,
    SmoothSampling,
    StepFns,
    choose_largest,
    guidance_ramp,
    guide,
    soften,
    softness,
)

B, L, V, C = 3, 40, 12, 2
BOOK = np.random.default_rng(9).normal(size=(V, C)).astype(np.float32)
# Features stand for their own logits here.
TOOLS = StepFns(
    head=lambda x: x,
    embed=lambda codes: jnp.asarray(BOOK)[codes],
    mix=lambda weights: weights @ BOOK,
)
choose = jax.jit(Index.sample)
mix = jax.jit(soften)


@pytest.fixture(scope='module')
def logits_RLV():
    return 2 * np.random.default_rng(0).normal(size=(2 * B, L, V)).astype(np.float32)


@pytest.fixture(scope='module')
def keys_B():
    return jax.random.split(jax.random.key(1), B)


@functools.partial(jax.jit, static_argnums=4)
def drawn(rule, keys_B, logits_RLV, index, like):
    """One step's draw at guidance 1.5."""
    return rule(keys_B, logits_RLV, jnp.float32(1.5), Step(index, like), TOOLS)


def test_guidance_goes_beyond_the_prompted_logits(logits_RLV):
    prompted, unprompted = np.split(logits_RLV, 2)
    expected = (1 + 2.5) * prompted - 2.5 * unprompted
    np.testing.assert_allclose(guide(logits_RLV, B, 2.5), expected, atol=1e-5)
    np.testing.assert_array_equal(guide(logits_RLV, B, 0.0), prompted)
    np.testing.assert_allclose(guide(logits_RLV, B, -1.0), unprompted, atol=1e-5)


def test_prompted_rows_alone_know_no_guidance(logits_RLV):
    np.testing.assert_array_equal(guide(logits_RLV[:B], B, 7.0), logits_RLV[:B])


def test_guidance_rises_linearly_from_nothing():
    np.testing.assert_allclose(guidance_ramp(4.0, 5), [0, 1, 2, 3, 4])
    assert guidance_ramp(4.0, 10).dtype == jnp.float32
    np.testing.assert_allclose(guidance_ramp(4.0, 1), [0])


@pytest.mark.parametrize(
    'keep', [Filter(top_k=2), Filter(top_k=6, top_p=0.8), Filter(top_k=6, top_p=0.5)]
)
def test_noise_belongs_to_the_code(keep, keys_B, logits_RLV):
    """Removing other codes never changes a draw; a removed code is never drawn."""
    logits = logits_RLV[:B]
    free = np.asarray(choose(keys_B, logits))
    masked = np.asarray(jax.jit(keep)(logits))
    codes = np.asarray(choose(keys_B, masked))
    stays = np.isfinite(np.take_along_axis(masked, free[..., None], -1))[..., 0]
    assert 0 < stays.sum() < stays.size
    np.testing.assert_array_equal(codes[stays], free[stays])
    assert np.isfinite(np.take_along_axis(masked, codes[..., None], -1)).all()


def test_a_plain_draw_guides_then_filters_then_chooses(keys_B, logits_RLV):
    keep = Filter(top_k=4, top_p=0.8, temperature=1.3)
    found, guided = drawn(FilteredSampling(keep, Index(V).sample), keys_B, logits_RLV, 0, 0)
    np.testing.assert_allclose(guided, guide(logits_RLV, B, 1.5), atol=1e-5)
    np.testing.assert_array_equal(found.codes_BL, choose(keys_B, jax.jit(keep)(guided)))
    np.testing.assert_array_equal(found.vectors_BLC, BOOK[found.codes_BL])


def test_the_largest_is_what_one_code_leaves(keys_B, logits_RLV):
    greedy, _ = drawn(FilteredSampling(Filter(), choose_largest), keys_B, logits_RLV, 0, 0)
    single, _ = drawn(FilteredSampling(Filter(top_k=1), Index(V).sample), keys_B, logits_RLV, 0, 0)
    np.testing.assert_array_equal(greedy.codes_BL, single.codes_BL)


def test_mixtures_are_softmaxes_of_noisy_logits(logits_RLV):
    logits, ratio, tau = logits_RLV[:B], 4 / 9, 0.15
    gumbel = np.random.default_rng(3).gumbel(size=logits.shape).astype(np.float32)
    scores = ((1 + ratio) * logits.astype(np.float64) + gumbel) / tau
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(mix(logits, gumbel, ratio, tau), weights, atol=2e-4)


def test_mixtures_sharpen_from_scale_to_scale_down_to_a_floor():
    np.testing.assert_allclose(
        [softness(ratio) for ratio in (0, 4 / 9, 1, 2)], [0.27, 0.156, 0.0135, 0.005], rtol=1e-5
    )


@pytest.mark.parametrize('like', [1, 2])
def test_a_smooth_draw_mixes_code_vectors(like, keys_B, logits_RLV):
    """At step 2, in a body of its own or in that of an earlier step."""
    found, guided = drawn(SmoothSampling(steps=4), keys_B, logits_RLV, 2, like)
    np.testing.assert_allclose(guided, guide(logits_RLV, B, 1.5), atol=1e-5)
    gumbel = np.stack([jax.random.gumbel(key, (L, V)) for key in keys_B])
    weights = np.asarray(mix(guided, gumbel, 2 / 3, softness(2 / 3)))
    np.testing.assert_allclose(found.vectors_BLC, weights @ BOOK, atol=1e-5)
    np.testing.assert_array_equal(found.codes_BL, weights.argmax(-1))


def test_pixels_are_truncated():
    images = jnp.array([-1.5, -1.0, 0.0, 2 * 100.9 / 255 - 1, 1.0, 1.5])
    assert to_uint8(images).tolist() == [0, 0, 127, 100, 255, 255]
    assert to_uint8(images).dtype == jnp.uint8
