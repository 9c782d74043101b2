"""Do a tokenizer and a discriminator train in alternation as published?"""

import dataclasses
import functools
import logging
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from star_jax.checkpoint.training import Checkpoints
from star_jax.core import pixels
from star_jax.core.codes import Bits, Index
from star_jax.core.flops import count_flops
from star_jax.core.schedule import square_grids
from star_jax.errors import UserError
from star_jax.losses import adversarial
from star_jax.losses.adversarial import R1, LeCam, PenaltyInputs
from star_jax.losses.augmentation import Augmentation
from star_jax.losses.tokenizer import EntropyOfBits, EntropyOfCodes
from star_jax.nn import discriminators
from star_jax.nn.bind import bind
from star_jax.nn.discriminators import PatchGAN, Statistics, StyleGAN
from star_jax.parallel.mesh import MeshShape
from star_jax.tokenizers import perceptual
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training import summary
from star_jax.training.adversary import Competition
from star_jax.training.objective import Adversary, Objective
from star_jax.training.program import step_keys
from star_jax.training.tokenizer_job import TokenizerJob

NARROW = PatchGAN(width=4, layers=1)
ADVERSARY = Adversary(discriminator=NARROW, start=0, adaptive=True)
SMALL = dataclasses.replace(tiny.TOKENIZER.model.autoencoder, attention=False)
MODELS = {
    'VQ': tiny.TOKENIZER.model,
    'RasterVQ': RasterVQ(autoencoder=SMALL, grid=(4, 4), codes=32, channels=4),
    'BSQ': BSQ(autoencoder=SMALL, grids=square_grids((1, 2, 4)), bits=4),
}


def job_of(name='VQ', objective=None, **fields) -> TokenizerJob:
    objective = objective or Objective(adversary=ADVERSARY)
    model = MODELS[name]
    return TokenizerJob(
        dataclasses.replace(
            tiny.TOKENIZER, model=model, objective=objective, **({'plain_steps': 0} | fields)
        )
    )


def train(job, steps, state=None, first=0):
    """The state after some steps, and the metrics of each."""
    state, metrics = job.init() if state is None else state, []
    for step, images in zip(range(first, steps), job.batches(first), strict=False):
        state, found = job.step(step, state, images)
        metrics.append({name: float(value) for name, value in found.items()})
    return state, metrics


def copied(state):
    """A state that a step may have: it gives its own away."""
    return jax.tree.map(jnp.copy, state)


@flax.struct.dataclass
class SquaredDistance:
    """Stands for LPIPS: the mean squared error of every pair, times a factor."""

    factor: jax.Array

    def __call__(self, images: jax.Array, decoded: jax.Array) -> jax.Array:
        return self.factor * jnp.square(images - decoded).mean((1, 2, 3))


def equal(one, other) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


@pytest.fixture(scope='module')
def job():
    return job_of()


@pytest.fixture(scope='module')
def begun(job):
    return job.init()


@pytest.fixture(scope='module')
def trained(job, begun):
    return train(job, 3, copied(begun))


def test_losses_are_those_of_the_formulas():
    real, fake = jnp.array([2.0, -0.5]), jnp.array([0.25, -3.0])
    hinge, swapped = adversarial.OF_GENERATOR['hinge'], 'non_saturating_released'
    assert hinge(fake) == 1.375
    constant = math.log1p(math.exp(-1))
    np.testing.assert_allclose(adversarial.OF_GENERATOR[swapped](fake), 2.375 + constant, 1e-6)
    of = adversarial.OF_DISCRIMINATOR
    np.testing.assert_allclose(of['hinge'](real, fake), 0.5 * (0.75 + 0.625), rtol=1e-6)
    expected = 0.5 * (1 - 0.75 + constant + math.log(2))
    np.testing.assert_allclose(of[swapped](real, fake), expected, rtol=1e-6)
    assert of['non_saturating'](real, fake) == of['vanilla'](real, fake)
    assert (jax.grad(of[swapped], 1)(real, fake) == 0).all()
    assert (jax.grad(of['vanilla'], 1)(real, fake) > 0).all()
    assert adversarial.accuracy(real, fake) == 0.5


def test_adaptive_weight_is_a_clamped_ratio_of_lengths():
    weight = adversarial.adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]), 1e4)
    np.testing.assert_allclose(weight, 5 / 2.0001, rtol=1e-6)
    assert adversarial.adaptive_weight(jnp.ones(4), jnp.zeros(4), 10.0) == 10


def penalty_inputs(**fields) -> PenaltyInputs:
    return PenaltyInputs(**(dict.fromkeys(PenaltyInputs._fields) | fields))


def test_lecam_follows_logits_and_punishes_those_beyond_the_other_kind():
    lecam, means_2 = LeCam(weight=2.0, decay=0.9), jnp.array([1.0, -1.0])
    batch = penalty_inputs(real=jnp.array([2.0, -3.0]), fake=jnp.array([3.0, 0.0]), means_2=means_2)
    assert lecam.penalty(batch) == 2 * (9 / 2 + 1 / 2)
    batch = batch._replace(real=jnp.array([3.0]), fake=jnp.array([0.0]))
    updated = lecam.update(batch)
    np.testing.assert_allclose(updated, [1.2, -0.9], rtol=1e-6)


def test_r1_is_half_the_squared_gradient_every_few_steps():
    batch = penalty_inputs(
        logits_of=lambda x: 0.5 * x.sum((1, 2, 3)), images=jnp.ones((2, 2, 2, 3))
    )
    penalty = jax.jit(lambda step: R1(weight=4.0, every=3).penalty(batch._replace(step=step)))
    assert penalty(3) == 4 * 3 * 0.5 * 12 * 0.25
    assert penalty(4) == 0


@pytest.mark.parametrize('penalty, averages', [(None, None), (R1(), None), (LeCam(), (2,))])
def test_a_penalty_carries_its_averages_through_an_update(penalty, averages):
    """Traced alone: the shapes of the state stay as they were."""
    adversary = dataclasses.replace(ADVERSARY, penalty=penalty)
    competition = Competition.build(
        adversary, resolution=(16, 16), steps=4, images=2, dtype='float32'
    )
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    key = jax.random.key(0)
    params, _ = discriminators.abstract(adversary.discriminator, (16, 16), 2)
    state = jax.eval_shape(lambda params: competition.start(params, (16, 16)), nn.unbox(params))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    after, metrics = jax.eval_shape(competition.update, state, images, images, step, key)
    assert jax.tree.map(jnp.shape, after.means_2) == averages
    assert jax.tree.structure(after) == jax.tree.structure(state) and len(metrics) == 3


def test_augmentation_keeps_images_where_it_is_off_and_is_differentiable():
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)
    off = Augmentation(brightness=0, saturation=0, contrast=0, translation=0, cutout=0)
    np.testing.assert_allclose(off(jax.random.key(0), images), images, atol=1e-6)
    hidden = dataclasses.replace(off, cutout=0.5)(jax.random.key(0), images)
    assert 0 < (hidden == 0).all(-1).mean() <= 0.25
    moved = dataclasses.replace(off, translation=0.25)(jax.random.key(2), images)
    assert not np.array_equal(moved, images)
    gradient = jax.grad(lambda x: Augmentation()(jax.random.key(0), x).sum())(images)
    assert np.isfinite(gradient).all() and (gradient != 0).any()


def test_statistics_normalise_when_given_and_run_after_the_batches():
    network = NARROW.build((16, 16))
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    params = network.init(jax.random.key(1), images)
    logits, batch = network.apply(params, images)
    assert logits.shape == (3, 6, 6, 1)
    again, _ = network.apply(params, images, batch)
    np.testing.assert_allclose(again, logits, atol=1e-2)  # biased and unbiased variance
    zeros = {'norm_1': Statistics(jnp.zeros(8), jnp.ones(8))}
    running = discriminators.follow(zeros, batch)['norm_1']
    np.testing.assert_allclose(running.mean_C, 0.1 * batch['norm_1'].mean_C, rtol=1e-6)
    expected = 0.9 + 0.1 * batch['norm_1'].variance_C
    np.testing.assert_allclose(running.variance_C, expected, rtol=1e-6)


def test_style_discriminator_has_one_logit_per_image():
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    network = StyleGAN().build((32, 32))
    (logits, statistics), _ = jax.eval_shape(network.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, 1) and not statistics


def test_blur_keeps_constants_and_averages_neighbours():
    x = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(16)
    middle = discriminators.blur(x)[0, :, :, 0]
    np.testing.assert_allclose(middle, [[4, 4, 4]] * 3)  # mirrored: the edges see the middle twice
    np.testing.assert_allclose(discriminators.blur(jnp.ones((1, 4, 4, 2))), 1)


@pytest.mark.parametrize('name', MODELS)
def test_all_tokenizers_train_against_a_discriminator(name, begun, trained):
    entropy = EntropyOfBits() if name == 'BSQ' else EntropyOfCodes()
    if name != 'VQ':
        dropout = 0.5 if name == 'BSQ' else 0.0
        objective = Objective(adversary=ADVERSARY, entropy=entropy, scale_dropout=dropout)
        job = job_of(name, objective)
        begun = job.init()
        trained = train(job, 2, copied(begun))
    state, metrics = trained
    assert all(np.isfinite(list(each.values())).all() for each in metrics)
    assert {'adversary/accuracy', 'adversary/adaptive', 'adversary/generator'} <= metrics[0].keys()
    assert 0 <= metrics[0]['adversary/accuracy'] <= 1
    assert not equal(state.adversary.params, begun.adversary.params)


def test_optional_parts_train_in_bfloat16_with_float32_statistics():
    adversary = dataclasses.replace(ADVERSARY, penalty=LeCam(), augmentation=Augmentation())
    state, metrics = train(job_of(objective=Objective(adversary=adversary), dtype='bfloat16'), 2)
    assert all(np.isfinite(list(each.values())).all() for each in metrics)
    assert all(each['adversary/gradient_discriminator'] > 0 for each in metrics)
    kept = state.params, state.adversary.params, state.adversary.statistics, state.adversary.means_2
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(kept)} == {'float32'}


@pytest.mark.slow
def test_a_style_discriminator_learns_under_r1():
    adversary = dataclasses.replace(ADVERSARY, discriminator=StyleGAN(), penalty=R1(every=2))
    competition = Competition.build(
        adversary, resolution=(8, 8), steps=4, images=2, dtype='float32'
    )
    images = jax.random.uniform(jax.random.key(0), (2, 2, 8, 8, 3), minval=-1)
    params = jax.jit(competition.network.init)(jax.random.key(1), images[0])['params']
    state = competition.start(nn.unbox(params), (8, 8))
    after, metrics = jax.jit(competition.update)(state, *images, 0, jax.random.key(2))
    assert np.isfinite(list(metrics.values())).all()
    assert metrics['adversary/gradient_discriminator'] > 0
    assert not equal(after.params, state.params)


def test_before_its_start_the_discriminator_changes_nothing(monkeypatch):
    """Beside a perceptual loss, whose gradient counts in both programs."""
    monkeypatch.setattr(perceptual, 'load', lambda: SquaredDistance(jnp.float32(3)))
    late, objective = dataclasses.replace(ADVERSARY, start=3), Objective(perceptual=0.5)
    state, metrics = train(job_of(objective=dataclasses.replace(objective, adversary=late)), 3)
    alone, plain = train(job_of(objective=objective), 2)
    for name in ('loss', 'perceptual'):
        found, expected = ([each[name] for each in some] for some in (metrics[:2], plain))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(plain[0]['perceptual'], 1.5 * plain[0]['l2'], rtol=1e-5)
    assert [each['adversary/discriminator'] > 0 for each in metrics] == [False, False, True]
    assert alone.adversary is None
    (*_, last), parts = metrics, ('l1', 'l2', 'edges', 'perceptual', 'quantiser')
    deceived = late.weight * last['adversary/adaptive'] * last['adversary/generator']
    expected = sum(last[name] for name in parts) + deceived
    np.testing.assert_allclose(last['loss'], expected, rtol=1e-5)


def test_a_step_without_an_adversary_computes_the_objective_alone():
    """As many products as the gradient of its losses; traced only."""
    program, objective = job_of(objective=Objective()).program, Objective()
    params = nn.unbox(MODELS['VQ'].abstract())
    state = jax.eval_shape(program.start, params)
    images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8)
    inputs = state, (images,), None, step_keys(jax.random.key(0), 0, 1)
    step = functools.partial(program.train, True)

    def loss(params, images):
        tokenizer, signed = bind(program.tokenizer, params), pixels.to_signed(images)
        f_BHWC = tokenizer.features(signed)
        codes = tokenizer.quantise(f_BHWC)
        decoded = tokenizer.decode_unclamped(codes.straight_through(f_BHWC))
        parts = objective.reconstruction(signed, decoded)
        return sum(parts.values()) + objective.quantisation(f_BHWC, codes)

    after, metrics = jax.eval_shape(step, *inputs)
    assert after.adversary is None
    assert metrics.keys() == {'psnr', 'used', 'loss', 'l1', 'l2', 'edges', 'quantiser'}
    assert count_flops(step, *inputs) == count_flops(jax.value_and_grad(loss), params, images)


def test_saved_state_continues_bit_for_bit(job, begun, trained, tmp_path):
    half, _ = train(job, 2, copied(begun))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, half, [])
        checkpoints.wait()
        _, restored = checkpoints.restore(job.abstract())
    continued, _ = train(job, 3, restored, first=2)
    assert equal(continued, trained[0])


@pytest.mark.parametrize('sizes', [(1, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_losses_do_not_depend_on_the_mesh(trained, sizes, monkeypatch):
    """One device, two meshes of eight, and the eight replicas of the other tests."""
    devices, build = jax.devices()[: math.prod(sizes)], MeshShape.build
    monkeypatch.setattr(MeshShape, 'build', lambda self: build(self, devices))
    mesh = MeshShape(**dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True)))
    state, metrics = train(job_of(mesh=mesh), 1)
    assert len(state.step.sharding.device_set) == len(devices)
    assert metrics[0] == pytest.approx(trained[1][0], rel=2e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_two_devices_train_every_tokenizer_and_its_discriminator_as_one_does(name, monkeypatch):
    build = MeshShape.build
    monkeypatch.setattr(MeshShape, 'build', lambda self: build(self, jax.devices()[: self.data]))
    (_, one), (state, two) = (train(job_of(name, mesh=MeshShape(data=n)), 1) for n in (1, 2))
    assert len(state.step.sharding.device_set) == 2
    assert two[0] == pytest.approx(one[0], rel=2e-4, abs=1e-5)


def test_evaluation_reports_the_discriminator_and_dead_codes(job, trained):
    scores = job.evaluate(trained[0])
    assert 0 <= scores['validation/discriminator_accuracy'] <= 1
    for place in ('', '/0', '/1', '/2'):
        used = scores[f'validation/used{place}']
        assert scores[f'validation/dead{place}'] == pytest.approx(1 - used)


def test_only_the_decoder_is_tuned_and_codes_stay(job, trained, tmp_path):
    job.export(trained[0], tmp_path / 'tokenizer')
    tuned = job_of(init=str(tmp_path / 'tokenizer'), only='decoder', plain_steps=2, ema=0.5)
    begun = tuned.init()
    (images,) = next(tuned.batches(0))
    before, params = tuned.tokenizer, jax.device_get(begun.params)
    state, metrics = train(tuned, 2, begun)
    encode = jax.jit(lambda p, x: before.apply({'params': p}, x / 127.5 - 1.0, method='encode'))
    for trained_params in (state.params, state.ema):
        np.testing.assert_array_equal(encode(params, images), encode(trained_params, images))
        for part in ('encoder', 'quant_conv', 'quantiser'):
            assert equal(params[part], trained_params[part])
    assert not equal(params['decoder'], state.params['decoder'])
    assert all(np.isfinite(each['loss']) for each in metrics)
    other = dataclasses.replace(tiny.TOKENIZER.model, phi_ratio=0.25)  # with the same shapes
    with pytest.raises(UserError, match=r'another tokenizer .*model.phi_ratio: 0.5 -> 0.25'):
        TokenizerJob(dataclasses.replace(tuned.run, model=other)).init()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'only': 'decoder'}, 'init'),
        ({'objective': Objective(entropy=EntropyOfBits())}, 'EntropyOfCodes'),
        (
            {'objective': Objective(scale_dropout=0.5), 'model': MODELS['RasterVQ']},
            'this tokenizer has one scale',
        ),
        ({'objective': Objective(adversary=Adversary())}, 'at least 24 px'),
        (
            {
                'objective': Objective(adversary=Adversary(discriminator=StyleGAN())),
                'model': dataclasses.replace(MODELS['VQ'], grids=((1, 1), (3, 3))),
            },
            'square images',
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields, message):
    with pytest.raises((ValueError, UserError), match=message):
        dataclasses.replace(tiny.TOKENIZER, **fields)


@pytest.mark.parametrize(
    ('kind', 'fields', 'message'),
    [
        (Objective, {'edges': -1.0}, 'edges must not be negative, not -1.0'),
        (Adversary, {'largest': -2.0}, 'largest must not be negative, not -2.0'),
        (R1, {'weight': float('nan')}, 'weight must not be negative, not nan'),
        (LeCam, {'decay': 1.0}, r'decay must lie in \[0, 1\), not 1.0'),
        (EntropyOfCodes, {'temperature': 0.0}, 'temperature must be positive, not 0.0'),
        (EntropyOfBits, {'diversity': -1.0}, 'diversity must not be negative, not -1.0'),
        (Augmentation, {'cutout': 2.0}, r'cutout must lie in \[0, 1\], not 2.0'),
    ],
)
def test_errors_name_the_wrong_number_alone(kind, fields, message):
    with pytest.raises(UserError, match=f'^{message}$'):
        kind(**fields)


def test_warnings_name_stuck_bits_and_a_winning_discriminator(caplog):
    usage = np.array([[50, 50, 0, 100], [60, 40, 30, 70]])
    with caplog.at_level(logging.WARNING):
        summary.warn_of_collapse(usage, Bits(2), summary.ENTROPY)
        assert '1 of 2 bits' in caplog.text and 'scale 0' in caplog.text
        assert 'scale 1' not in caplog.text and 'all scales' not in caplog.text
        summary.warn_of_winner(0.9)
        assert 'wins' not in caplog.text
        summary.warn_of_winner(0.99)
        assert 'wins' in caplog.text
        caplog.clear()
        first = np.zeros((2, 4096))
        first[0, 7], first[1, :2000] = 512, 1
        summary.warn_of_collapse(first, Index(4096), summary.RESTART)
    assert 'scale 0' in caplog.text and 'scale 1' not in caplog.text  # 1 x 1 uses a single code
    assert 'images use 1 of 512 possible codes (expected: at least 6)' in caplog.text


def test_a_few_stray_codes_do_not_hide_a_collapse(caplog):
    usage = np.zeros((2, 4096))
    usage[0, :14], usage[0, 0], usage[1] = 1, 500, 1
    with caplog.at_level(logging.WARNING):
        summary.warn_of_collapse(usage, Index(4096), summary.RESTART)
    (message,) = caplog.messages
    assert 'collapse at scale 0: validation images use 14 of 513 possible codes' in message
    assert 'perplexity of 1.2 (expected: at least 5.1)' in message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        # The only scale is warned of once.
        summary.warn_of_collapse(usage[:1], Index(4096), summary.RESTART)
        summary.warn_of_collapse(np.array([[999, 1, 500, 500]]), Bits(2), summary.ENTROPY)
    assert [message.partition(':')[0] for message in caplog.messages] == ['codebook collapse'] * 2
    assert '1 of 2 bits have the same value in more than 99 %' in caplog.text


def test_a_warning_of_collapse_names_the_images_and_advice_for_their_codes(caplog):
    usage = np.zeros((1, 4096))
    usage[0, 0] = 4096
    with caplog.at_level(logging.WARNING):
        summary.warn_of_collapse(usage, Index(4096), summary.ENTROPY, 'small images')
    assert 'collapse: small images use 1 of 4096' in caplog.text  # bits as one index
    assert 'EntropyOfBits' in caplog.text and 'restart_until' not in caplog.text
