"""Do codes compute their likelihood, and are they sampled from it?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.core.codes import Bits, Index

V = 5
sample = jax.jit(Index.sample)


@pytest.fixture
def logits_BLV():
    return 3 * np.random.default_rng(0).normal(size=(2, 3, V)).astype(np.float32)


@pytest.fixture
def codes_BL():
    return np.array([[0, 4, 2], [1, 1, 3]], np.int32)


def test_nll_is_minus_the_natural_logarithm_of_the_softmax(logits_BLV, codes_BL):
    weights = np.exp(np.asarray(logits_BLV, np.float64))
    probs = weights / weights.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probs, np.asarray(codes_BL)[..., None], -1)[..., 0])
    np.testing.assert_allclose(Index(V).nll(logits_BLV, codes_BL), expected, rtol=1e-5)


def test_equal_logits_cost_the_logarithm_of_the_number_of_codes(codes_BL):
    nll = Index(V).nll(jnp.zeros((2, 3, V), jnp.bfloat16), codes_BL)
    np.testing.assert_allclose(nll, np.full((2, 3), np.log(V)), rtol=1e-6)
    assert nll.dtype == jnp.float32


def test_hits_are_codes_of_the_largest_logit(codes_BL):
    logits = jnp.asarray(np.eye(V)[[[0, 4, 2], [1, 2, 3]]])
    assert Index(V).hits(logits, codes_BL).tolist() == [[1, 1, 1], [1, 0, 1]]


def test_codes_are_sampled_with_their_probability():
    probs = np.array([0.5, 0.3, 0.2, 0.0])
    with np.errstate(divide='ignore'):
        logits = np.broadcast_to(np.log(probs), (2, 20000, 4)).astype(np.float32)
    codes = sample(jax.random.split(jax.random.key(1), 2), logits)
    assert codes.dtype == jnp.int32
    for row in np.asarray(codes):
        shares = np.bincount(row, minlength=4) / row.size
        np.testing.assert_allclose(shares, probs, atol=0.015)
        assert shares[3] == 0


@pytest.mark.parametrize('shape', [(2, 3, 17), (2, 3, 4, 2)])
def test_codes_are_those_of_jax_categorical(shape):
    logits = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    logits[..., -1] = -np.inf
    keys = jax.random.split(jax.random.key(4), 2)
    expected = jax.vmap(jax.random.categorical)(keys, logits)
    np.testing.assert_array_equal(sample(keys, logits), expected)


def test_top_is_the_first_of_equal_codes_and_a_code_even_without_a_number():
    logits = np.float32([[[0, 2, 2], [-np.inf, -np.inf, -np.inf], [np.nan, 0, 0]]])
    assert Index(3).top(logits)[0, :2].tolist() == [1, 0]
    assert Index(3).top(logits)[0, 2] < 3
    assert Bits(1).top(np.float32([[[[1, 1]], [[0, 1]]]])).tolist() == [[[0], [1]]]


def test_image_is_sampled_with_its_own_key():
    logits = np.zeros((2, 64, V), np.float32)
    keys = jax.random.split(jax.random.key(2), 3)
    first, second = sample(keys[:2], logits), sample(keys[::2], logits)
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1] != second[1]).any()
    np.testing.assert_array_equal(sample(keys[1:2], logits[1:])[0], first[1])


def test_sampling_rule_is_one_static_value():
    """It is a static field of a sampling method: a new object would compile every call again."""
    assert Index(V).sample == Index(V).sample
    assert hash(Index(V).sample) == hash(Index(V).sample)
