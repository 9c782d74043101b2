"""The optimizer decays, clips, warms up and accumulates as STAR specification 6 says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from star_jax.convert.entries import to_state
from star_jax.convert.star import star_entries
from star_jax.core.condition import TextCondition
from star_jax.families.star import Star
from star_jax.nn.positions import Learned
from star_jax.training.gradients import accumulate
from star_jax.training.optimizer import AdamW, clip_by_norm, decayed, everything, gradient_norm
from star_jax.training.schedules import LearningRate, weight_decay_at
from star_jax.training.state import TrainState

NEVER = ('pos_1LC', 'pos_start', 'lvl_embed', 'ada_gss', 'scale_mul')


def abstract_params(star: Star):
    inputs = jax.ShapeDtypeStruct((1, star.schedule.length - 1, star.channels), jnp.float32)
    text = TextCondition(
        jax.ShapeDtypeStruct((1, 4, star.text_width), jnp.float32),
        jax.ShapeDtypeStruct((1, 4), jnp.int32),
        jax.ShapeDtypeStruct((1, star.text_width), jnp.float32),
    )
    return jax.eval_shape(star.build().init, jax.random.key(0), inputs, text)['params']


@pytest.mark.parametrize('adaln', [False, True])
def test_decayed_parameters_are_the_published_group(adaln):
    star = Star(
        depth=2,
        width=16,
        heads=2,
        sides=(1, 2),
        codes=8,
        channels=4,
        text_width=8,
        shared_adaln=adaln,
        positions=Learned(),
    )
    boxed = abstract_params(star)
    groups = jax.tree.map(np.broadcast_to, decayed(boxed), jax.tree.map(lambda x: x.shape, boxed))
    for name, group in to_state(star_entries(star), meta.unbox(groups)).items():
        dimensions = 1 if name.endswith('bias') else group.ndim
        published = dimensions > 1 and not any(word in name for word in NEVER)
        assert group.all() == published and group.any() == published, name


def test_learning_rate_rises_to_the_peak_and_falls_to_the_end():
    for shape in ('lin0', 'lin', 'lin00', 'cos', 'exp', 'lin0.4'):
        rate = LearningRate(peak=3.0, warmup_steps=5, shape=shape)
        values = np.asarray(rate.at(np.arange(100), 100)) / 3
        np.testing.assert_allclose(values[[0, 5, 99]], [0.005, 1, 0.01], rtol=1e-5)
        assert (np.diff(values[:6]) > 0).all() and (np.diff(values[5:]) <= 1e-7).all()


def test_learning_rate_refuses_an_unknown_shape():
    with pytest.raises(ValueError, match='lin0.5'):
        LearningRate(shape='step')


def test_weight_decay_changes_from_first_to_last():
    values = [float(weight_decay_at(step, 11, 0.05, 0.08)) for step in (0, 5, 10)]
    np.testing.assert_allclose(values, [0.05, 0.065, 0.08], rtol=1e-6)


def test_accumulation_updates_with_mean_gradients_at_the_last_rates():
    params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
    keys = jax.random.split(jax.random.key(0), 4)
    gradients = [jax.tree.map(lambda x, k=k: jax.random.normal(k, x.shape), params) for k in keys]
    config = AdamW(learning_rate=LearningRate(peak=0.1, warmup_steps=2), accumulate=2)
    optimizer = config.build(10)
    state, moved, norms = optimizer.init(params), params, []
    for pair in (gradients[:2], gradients[2:]):
        mean, numbers, _ = accumulate(lambda _, *batch: (*batch, None), pair)
        assert numbers.tolist() == [0, 1]
        updates, state = optimizer.update(mean, state, moved)
        moved = optax.apply_updates(moved, updates)
        norms.append(float(gradient_norm(state)))

    first, second = np.zeros(6), np.zeros(6)
    kernel = np.ones(6)
    for update in (0, 1):
        pair = [gradients[2 * update], gradients[2 * update + 1]]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        norm = float(optax.tree.norm(mean))
        np.testing.assert_allclose(norms[update], norm, rtol=1e-6)
        g = np.asarray(mean['kernel']).ravel() * min(1, 2 / (norm + 1e-6))
        first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g * g
        hat = first / (1 - 0.9 ** (update + 1)), second / (1 - 0.95 ** (update + 1))
        rate = float(config.learning_rate.at(2 * update + 1, 10))
        kernel = kernel - rate * 0.05 * kernel - rate * hat[0] / (np.sqrt(hat[1]) + 1e-8)
    np.testing.assert_allclose(moved['kernel'].ravel(), kernel, rtol=1e-5)


def test_clipping_limits_the_gradient_norm():
    clip = clip_by_norm(2.0)
    long, state = clip.update({'a': jnp.array([30.0, 40.0])}, clip.init(None))
    short, _ = clip.update({'a': jnp.array([0.3, 0.4])}, state)
    np.testing.assert_allclose(long['a'], [1.2, 1.6], rtol=1e-5)
    np.testing.assert_allclose(short['a'], [0.3, 0.4])
    assert float(state.norm_before_clip) == 50


def test_constants_have_no_gradient_and_no_update():
    params = {'fc': {'kernel': jnp.ones((2, 2)), 'constant': jnp.full(2, 3.0)}}
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), params)
    constants = frozenset({'fc/constant'})
    optimizer = AdamW(weight_decay=0.5).build(10, everything, constants)
    state = TrainState.start(params, optimizer, ema=True)
    for _ in range(3):
        state = state.update(gradients, optimizer, 0.9, constants)
        assert gradient_norm(state.opt) == 1.0  # the norm of the kernel alone
    for tree in (state.params, state.ema):
        np.testing.assert_array_equal(tree['fc']['constant'], params['fc']['constant'])
        assert (tree['fc']['kernel'] < 1).all()


@pytest.mark.parametrize(
    ('fields', 'sentence'),
    [
        ({'accumulate': 0}, r'accumulate must lie in \[1, 1024\], not 0'),
        ({'accumulate': 10**9}, r'accumulate must lie in \[1, 1024\], not 1000000000'),
        ({'clip': 0.0}, 'clip must be positive, not 0.0'),
    ],
)
def test_limits_of_an_update_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdamW(**fields)
