"""Do filters keep the codes that STAR specification 8 and Infinity specification 7 keep?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.core.filters import BitFilter, NucleusFilter, kth_largest

V = 12
keep = jax.jit(lambda rule, logits, temperature=1.0: rule(logits, temperature))


def kept(logits, top_k, top_p):
    """The specification, row by row: the set of codes that may be sampled.

    Where equal logits meet the edge of the nucleus, sorting decides by position; here they all
    stay, so a batch may not change them.
    """
    left = np.ones(len(logits), bool)
    if top_k:
        left &= logits >= np.sort(logits)[-min(top_k, len(logits))]
    if not top_p:
        return left
    order = np.argsort(np.where(left, logits, -np.inf), kind='stable')
    weights = np.where(left, np.exp(logits - logits.max()), 0)[order]
    removed = np.cumsum(weights / weights.sum()) <= 1 - top_p
    removed[-1] = False
    edge = logits[order][~removed].min()
    return left & (logits >= edge)


def mixed_rows(ties):
    logits = 2 * np.random.default_rng(0).normal(size=(64, V))
    return (np.round(logits) if ties else logits).astype(np.float32)


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('top_k', [0, 1, 4, V, V + 5])
@pytest.mark.parametrize('top_p', [None, 0.05, 0.613, 0.97])
def test_filters_keep_what_the_specification_keeps(ties, top_k, top_p):
    logits = mixed_rows(ties)
    expected = np.stack([kept(row.astype(np.float64), top_k, top_p) for row in logits])
    masked = np.asarray(keep(NucleusFilter(top_k=top_k, top_p=top_p), logits))
    np.testing.assert_array_equal(np.isfinite(masked), expected)
    np.testing.assert_array_equal(masked[expected], logits[expected])


def test_filters_keep_the_known_codes_of_a_row():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    stays = [
        (NucleusFilter(), [1, 1, 1, 1]),
        (NucleusFilter(top_k=2), [0, 1, 0, 1]),
        (NucleusFilter(top_p=0.39), [0, 1, 0, 0]),
        (NucleusFilter(top_p=0.41), [0, 1, 0, 1]),
        (NucleusFilter(top_p=0.69), [0, 1, 0, 1]),
        (NucleusFilter(top_p=0.71), [0, 1, 1, 1]),
        # The nucleus is taken inside the top-k: 0.4 is 4/7 of what two codes hold.
        (NucleusFilter(top_k=2, top_p=0.56), [0, 1, 0, 0]),
        (NucleusFilter(top_k=2, top_p=0.58), [0, 1, 0, 1]),
        (NucleusFilter(top_p=0.0), [0, 1, 0, 0]),
    ]
    for rule, expected in stays:
        assert np.isfinite(keep(rule, logits)).astype(int).tolist() == expected, rule


def test_equal_logits_stay_or_go_together():
    logits = jnp.array([1.0, 3.0, 1.0, 1.0, 2.0])
    assert np.isfinite(keep(NucleusFilter(top_k=3), logits)).all()
    assert np.isfinite(keep(NucleusFilter(top_k=2), logits)).tolist() == [0, 1, 0, 0, 1]
    assert np.isfinite(keep(NucleusFilter(top_k=3, top_p=0.99), logits)).all()
    assert np.isfinite(keep(NucleusFilter(top_p=0.1), jnp.zeros(5))).all()


def test_nucleus_of_all_mass_keeps_the_rarest_codes():
    logits = 6 * np.random.default_rng(0).normal(size=(32, 128)).astype(np.float32)
    for top_k in (0, 100):  # what lies above the last of them holds all but 1e-10
        everything = np.isfinite(keep(NucleusFilter(top_k=top_k), logits))
        np.testing.assert_array_equal(
            np.isfinite(keep(NucleusFilter(top_k, 1.0), logits)), everything
        )


def test_top_k_of_all_codes_is_off():
    logits = mixed_rows(ties=False)
    for top_p in (None, 0.6):
        off = keep(NucleusFilter(top_p=top_p), logits)
        np.testing.assert_array_equal(keep(NucleusFilter(top_k=V, top_p=top_p), logits), off)
        np.testing.assert_array_equal(keep(NucleusFilter(top_k=V + 5, top_p=top_p), logits), off)


def test_temperature_divides_before_the_nucleus():
    logits = mixed_rows(ties=False)
    warm = keep(NucleusFilter(top_k=4, top_p=0.8), logits, 2.0)
    np.testing.assert_array_equal(warm, keep(NucleusFilter(top_k=4, top_p=0.8), logits / 2))
    assert (
        np.isfinite(warm).sum() > np.isfinite(keep(NucleusFilter(top_k=4, top_p=0.8), logits)).sum()
    )


def test_row_does_not_depend_on_its_batch():
    logits = mixed_rows(ties=True)
    rule = NucleusFilter(top_k=4, top_p=0.7)
    whole = np.asarray(keep(rule, logits))
    alone = np.concatenate([keep(rule, row[None]) for row in logits[:8]])
    np.testing.assert_array_equal(alone, whole[:8])
    np.testing.assert_array_equal(keep(rule, logits.reshape(4, 16, V)).reshape(-1, V), whole)


def test_numbers_do_not_recompile():
    traces = []

    @jax.jit
    def count(rule, logits, temperature=1.0):
        traces.append(rule.top_k)
        return jnp.isfinite(rule(logits, temperature)).sum()

    logits = mixed_rows(ties=False)
    numbers = ((0.2, 1.0), (0.9, 1.0), (0.9, 0.2))
    counts = [
        int(count(NucleusFilter(top_k=5, top_p=top_p), logits, temperature))
        for top_p, temperature in numbers
    ]
    assert len(set(counts)) == 3
    assert traces == [5]
    count(NucleusFilter(top_k=6, top_p=0.5), logits)
    assert traces == [5, 6]


def test_filtered_logits_are_float32():
    for rule in (NucleusFilter(), NucleusFilter(top_k=2), NucleusFilter(top_p=0.5)):
        logits = jax.ShapeDtypeStruct((1, V), jnp.bfloat16)
        assert jax.eval_shape(rule, logits).dtype == jnp.float32


@pytest.mark.parametrize('top_k', [0, 1, 4])
@pytest.mark.parametrize('top_p', [None, 0.05, 0.613, 0.97])
def test_filter_of_bits_agrees_where_no_logits_are_equal(top_k, top_p):
    logits = mixed_rows(ties=False)
    expected = keep(NucleusFilter(top_k=top_k, top_p=top_p), logits)
    np.testing.assert_array_equal(keep(BitFilter(top_k=top_k, top_p=top_p), logits), expected)


def test_filter_of_bits_ranks_equal_values_by_their_number():
    logits = np.float32([[1, 1], [0, 2], [2, 0]])
    found = np.isfinite(keep(BitFilter(top_p=0.5), logits))
    assert found.tolist() == [[False, True], [False, True], [True, False]]
    assert np.isfinite(keep(BitFilter(top_p=0.51), logits))[0].tolist() == [True, True]


@pytest.mark.parametrize('top_p', [None, 1.0])
def test_filter_of_bits_is_off_without_mass_and_with_all_of_it(top_p):
    logits = np.float32([[-9, 9], [0, 0]])
    np.testing.assert_array_equal(keep(BitFilter(top_k=900, top_p=top_p), logits), logits)


@pytest.mark.parametrize('k', [1, 2, 7, 99, 100])
def test_the_kth_largest_is_found_without_sorting(k):
    random = np.random.default_rng(k)
    x = random.normal(size=(3, 100)).astype(np.float32)
    x[1, :40] = x[1, 40]  # ties
    x[2, ::3] = [0.0, -0.0][k % 2]
    x[0, 5], x[0, 6] = np.inf, -np.inf
    found = jax.jit(kth_largest, static_argnums=1)(x, k)
    np.testing.assert_array_equal(found[:, 0], np.sort(x)[:, -k])
