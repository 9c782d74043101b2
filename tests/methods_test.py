"""Are codes sampled as STAR specification 8 says?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.core.codes import Bits, Index
from star_jax.core.filters import NucleusFilter
from star_jax.core.guidance import StepSettings, guide, linear_ramp
from star_jax.core.pixels import to_uint8
from star_jax.core.schedule import Pyramid, Step
from star_jax.protocols import StepFns
from star_jax.sampling.methods import FilteredSampling, SmoothSampling, soften, softness
from star_jax.sampling.sampler import GivenCodes

B, L, V, C = 3, 40, 12, 2
BOOK = np.random.default_rng(9).normal(size=(V, C)).astype(np.float32)
# The features of these tests are their own logits.
STEP_FNS = StepFns(
    codes=Index(V),
    head=lambda x: x,
    embed=lambda codes: jnp.asarray(BOOK)[codes],
    mix=lambda weights: weights @ BOOK,
    trace=True,
)
choose = jax.jit(Index.sample)
mix = jax.jit(soften)


@pytest.fixture(scope='module')
def logits_RLV():
    return 2 * np.random.default_rng(0).normal(size=(2 * B, L, V)).astype(np.float32)


@pytest.fixture(scope='module')
def keys_B():
    return jax.random.split(jax.random.key(1), B)


@functools.partial(jax.jit, static_argnames=('like', 'step_fns'))
def sample(method, keys_B, logits, index, like, step_fns=STEP_FNS, temperature=1.0):
    """One step at guidance 1.5."""
    settings = StepSettings(guidance=jnp.float32(1.5), temperature=jnp.float32(temperature))
    return method(keys_B, logits, settings, Step(index, like), step_fns)


def test_guidance_extrapolates_from_unprompted_to_prompted_logits(logits_RLV):
    prompted, unprompted = np.split(logits_RLV, 2)
    expected = (1 + 2.5) * prompted - 2.5 * unprompted
    np.testing.assert_allclose(guide(logits_RLV, B, 2.5), expected, atol=1e-5)
    np.testing.assert_array_equal(guide(logits_RLV, B, 0.0), prompted)
    np.testing.assert_allclose(guide(logits_RLV, B, -1.0), unprompted, atol=1e-5)


def test_guidance_leaves_prompted_rows_alone_as_they_are(logits_RLV):
    np.testing.assert_array_equal(guide(logits_RLV[:B], B, 7.0), logits_RLV[:B])


def test_guidance_ramp_rises_linearly_from_zero():
    np.testing.assert_allclose(linear_ramp(4.0, 5), [0, 1, 2, 3, 4])
    assert linear_ramp(4.0, 10).dtype == np.float32
    np.testing.assert_allclose(linear_ramp(4.0, 1), [0])


def test_step_settings_select_the_numbers_of_a_step():
    settings = StepSettings(guidance=linear_ramp(2.0, 3), temperature=np.float32([1, 2, 3]))
    assert settings.guided
    assert not settings.replace(guidance=np.zeros(3, np.float32)).guided
    for step in (1, jnp.int32(1)):
        assert jax.tree.leaves(settings.at(step)) == [1, 2]


@pytest.mark.parametrize(
    'keep', [NucleusFilter(top_k=2), NucleusFilter(6, top_p=0.8), NucleusFilter(6, top_p=0.5)]
)
def test_noise_belongs_to_the_code(keep, keys_B, logits_RLV):
    """Removing other codes never changes a sample; a removed code is never sampled."""
    logits = logits_RLV[:B]
    free = np.asarray(choose(keys_B, logits))
    masked = np.asarray(jax.jit(keep)(logits))
    codes = np.asarray(choose(keys_B, masked))
    stays = np.isfinite(np.take_along_axis(masked, free[..., None], -1))[..., 0]
    assert 0 < stays.sum() < stays.size
    np.testing.assert_array_equal(codes[stays], free[stays])
    assert np.isfinite(np.take_along_axis(masked, codes[..., None], -1)).all()


def test_filtered_sampling_guides_then_filters_then_samples(keys_B, logits_RLV):
    keep = NucleusFilter(top_k=4, top_p=0.8)
    sampled, trace = sample(FilteredSampling(keep), keys_B, logits_RLV, 0, 0, temperature=1.3)
    np.testing.assert_array_equal(trace.logits, logits_RLV)
    np.testing.assert_allclose(trace.guided, guide(logits_RLV, B, 1.5), atol=1e-5)
    filtered = jax.jit(keep)(trace.guided, 1.3)
    np.testing.assert_array_equal(sampled.codes_BL, choose(keys_B, filtered))
    np.testing.assert_array_equal(sampled.vectors_BLC, BOOK[sampled.codes_BL])
    np.testing.assert_allclose(trace.probs, jax.nn.softmax(filtered), atol=1e-6)
    assert ((trace.probs > 0) == np.isfinite(filtered)).all()


def test_greedy_sampling_takes_the_code_that_top_1_leaves(keys_B, logits_RLV):
    greedy, _ = sample(FilteredSampling(NucleusFilter(), greedy=True), keys_B, logits_RLV, 0, 0)
    single, _ = sample(FilteredSampling(NucleusFilter(top_k=1)), keys_B, logits_RLV, 0, 0)
    np.testing.assert_array_equal(greedy.codes_BL, single.codes_BL)


def test_bits_are_filtered_and_sampled_one_by_one(keys_B):
    """Codes are [B, L, K], logits [B, L, K, 2]; a nucleus removes the less likely bit."""
    bits = Bits(5)
    flat = 2 * np.random.default_rng(0).normal(size=(2 * B, L, 10)).astype(np.float32)
    step_fns = StepFns(
        codes=bits, head=bits.parse, embed=lambda codes: 2.0 * codes - 1, mix=None, trace=True
    )
    method = FilteredSampling(NucleusFilter(top_p=0.7))
    sampled, trace = sample(method, keys_B, flat, 0, 0, step_fns)
    assert sampled.codes_BL.shape == (B, L, 5) and trace.logits.shape == (2 * B, L, 5, 2)
    np.testing.assert_array_equal(sampled.vectors_BLC, 2.0 * sampled.codes_BL - 1)
    probs = np.asarray(jax.nn.softmax(trace.guided))
    sure = probs.max(-1) >= 0.7
    assert 0 < sure.mean() < 1
    np.testing.assert_array_equal(trace.probs.max(-1) == 1, sure)
    np.testing.assert_array_equal(sampled.codes_BL[sure], probs.argmax(-1)[sure])
    assert (np.asarray(sampled.codes_BL) != probs.argmax(-1)).any()


@pytest.mark.parametrize('codes', [Index(V), Bits(5)], ids=['index', 'bits'])
def test_given_codes_replace_those_of_given_steps(codes):
    """The steps are known, or traced and padded."""
    schedule = Pyramid.square((1, 2, 3))
    random = np.random.default_rng(0)
    steps = {k: random.integers(0, 2, (B, schedule.sizes[k], *codes.shape)) for k in (0, 2)}
    given = GivenCodes.of_steps(steps, schedule, codes)
    padded = jax.jit(
        lambda index, sampled: given.replace_codes(sampled, schedule, Step(index, 2, padded=True))
    )
    for step, size in enumerate(schedule.sizes):
        sampled = jnp.full((B, 9, *codes.shape), 7, codes.dtype)
        expected = steps.get(step, sampled[:, :size])
        found = given.replace_codes(sampled[:, :size], schedule, Step.at(step))
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(padded(step, sampled)[:, :size], expected)
        assert found.dtype == codes.dtype


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
def test_smooth_sampling_mixes_code_vectors(like, keys_B, logits_RLV):
    """Step 2 has a body of its own, or shares that of an earlier step."""
    sampled, trace = sample(SmoothSampling(steps=4), keys_B, logits_RLV, 2, like)
    np.testing.assert_allclose(trace.guided, guide(logits_RLV, B, 1.5), atol=1e-5)
    gumbel = np.stack([jax.random.gumbel(key, (L, V)) for key in keys_B])
    weights = np.asarray(mix(trace.guided, gumbel, 2 / 3, softness(2 / 3)))
    np.testing.assert_allclose(sampled.vectors_BLC, weights @ BOOK, atol=1e-5)
    np.testing.assert_allclose(trace.probs, weights, atol=1e-5)
    np.testing.assert_array_equal(sampled.codes_BL, weights.argmax(-1))


def test_pixels_are_truncated():
    images = jnp.array([-1.5, -1.0, 0.0, 2 * 100.9 / 255 - 1, 1.0, 1.5])
    assert to_uint8(images).tolist() == [0, 0, 127, 100, 255, 255]
    assert to_uint8(images).dtype == jnp.uint8
