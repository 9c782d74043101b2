"""Is a scale sampled in passes, and its head trained, as STAR specification 9 says?"""

import dataclasses
import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from star_jax.checkpoint import folder, models, weights
from star_jax.checkpoint.training import Checkpoints
from star_jax.core.codes import Index
from star_jax.core.filters import NucleusFilter
from star_jax.core.guidance import StepSettings, guide
from star_jax.core.schedule import Pyramid, Step
from star_jax.core.settings import Settings, StableSettings
from star_jax.core.unmasking import SHARES, budgets
from star_jax.errors import UserError
from star_jax.families.star import Refinement, Star
from star_jax.losses.refinement import PlainLoss, ReleasedLoss, Unmasking
from star_jax.nn.bind import bind
from star_jax.nn.positions import Learned, NormalisedRotary, RawRotary
from star_jax.protocols import StepFns
from star_jax.sampling import program
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.sampler import sample
from star_jax.sampling.stable import (
    VERSIONS,
    RecordedRanking,
    StableSampling,
    plan_of_settings,
    plan_passes,
)
from star_jax.text.encoder import load as load_text
from star_jax.training import train, trainer
from star_jax.training.refinement_job import RefinementJob
from star_jax.training.run import Pace
from star_jax.training.stop_signals import Stop

B, L, V, C = 2, 16, 12, 3
BOOK = np.random.default_rng(9).normal(size=(V, C)).astype(np.float32)
PUBLISHED = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
MODEL = dataclasses.replace(tiny.STAR.model, refinement=Refinement(first=2, blocks=2))
ALL = NucleusFilter()
CAPTIONS = ('a red circle', 'a small blue star')
# Compiling these small programs well takes longer than running them does.


@pytest.mark.parametrize('mode', SHARES)
def test_budgets_sum_to_all_tokens_and_rise(mode):
    for passes, side in itertools.product((8, 15), range(6, 65)):
        of_passes = budgets(side**2, passes, mode)
        assert sum(of_passes) == side**2 and min(of_passes) >= 1
        assert list(of_passes[:-1]) == sorted(of_passes[:-1]) and of_passes[0] == 1


def test_budgets_equal_the_published_ones():
    assert budgets(16**2, 8) == (1, 18, 26, 32, 38, 43, 48, 50)
    assert budgets(64**2, 8) == (1, 288, 413, 513, 601, 683, 761, 836)
    assert budgets(9, 8)[-1] == 0 and budgets(9, 15)[-1] == -5  # where the original crashes


def test_passes_equal_the_published_ones():
    schedule = Pyramid.square(PUBLISHED)
    plans = plan_of_settings(schedule, StableSettings(version='1024'), 9)
    assert plans[:9] == (None,) * 9
    assert [(len(one.budgets), one.base) for one in plans[9:]] == [(8, 5)] * 4 + [(15, 0)]
    plans = plan_of_settings(schedule, StableSettings(version='new', first=10, last=11), 9)
    assert [one and (len(one.budgets), one.base) for one in plans[9:]] == [
        None,
        *[(8, 0)] * 2,
        *[None] * 2,
    ]


def test_plan_of_scales_without_enough_tokens_is_refused():
    schedule = Pyramid.square((1, 2, 3, 4))
    for settings, message in (
        (StableSettings(version='new', first=2), 'scale 2 has 9 tokens, too few for 8 passes'),
        (StableSettings(version='new', first=4), 'scales 4 to 3'),
        (StableSettings(version='new', last=4), 'scales 3 to 4'),
    ):
        with pytest.raises(UserError, match=message):
            plan_of_settings(schedule, settings, 3)
    assert plan_of_settings(schedule, StableSettings(version='new'), 3)[3]
    with pytest.raises(UserError, match='has not'):
        settings = Settings(stable=StableSettings(version='new'))
        program.sampling_method(tiny.STAR.model, settings)
    with pytest.raises(ValueError, match='count scales from 0'):
        StableSettings(first=-1)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'positions': Learned()}, 'rotary'),
        ({'depth': 1}, 'as many layers'),
        ({'refinement': Refinement(first=3, blocks=2)}, 'a scale after the first of 3'),
    ],
)
def test_invalid_head_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, **options)


@pytest.fixture(scope='module')
def keys_B():
    return jax.random.split(jax.random.key(1), B)


@pytest.fixture(scope='module')
def logits_RLV():
    return 2 * np.random.default_rng(0).normal(size=(2 * B, L, V)).astype(np.float32)


def step_fns(refine) -> StepFns:
    return StepFns(
        head=lambda x: x,
        embed=lambda codes: jnp.asarray(BOOK)[codes],
        mix=lambda weights: weights @ BOOK,
        codes=Index(V),
        refine=refine,
        trace=True,
    )


def build_method(version: str, keep: NucleusFilter = ALL, **parts) -> StableSampling:
    plan = plan_passes(Pyramid.square((1, 4)), VERSIONS[version], 'arccos', 1, 1)
    plain = FilteredSampling(keep)
    return StableSampling(plain=plain, in_passes=plain, guidance=2.0, plan=plan, **parts)


def toy_head(vectors_RLC, features_RLD, step):
    """A head whose logits depend on the fixed tokens."""
    return features_RLD[..., ::-1] + vectors_RLC.sum((1, 2), keepdims=True) * np.arange(V) / 8


@functools.partial(jax.jit, static_argnames='refine')
def sample_step(method, keys_B, logits_RLV, refine=toy_head, temperature=1.0):
    settings = StepSettings(guidance=jnp.float32(0.5), temperature=jnp.float32(temperature))
    return method(keys_B, logits_RLV, settings, Step.at(1), step_fns(refine))


CASES = {
    'head': build_method('new'),
    'both': build_method('1024'),
    'once': build_method('1024', once=True),
    'filtered': build_method('1024', NucleusFilter(top_k=3, top_p=0.9)),
}


@pytest.mark.parametrize('name', CASES)
def test_passes_fix_every_token_once(name, keys_B, logits_RLV):
    found, trace = sample_step(CASES[name], keys_B, logits_RLV)
    passes, plan = trace.passes, CASES[name].plan[1]
    fixed_PBL = np.asarray(passes.fixed_BL)
    before_PBL = np.concatenate([np.zeros_like(fixed_PBL[:1]), fixed_PBL[:-1]])
    assert (before_PBL <= fixed_PBL).all() and fixed_PBL[-1].all()
    when_BL = fixed_PBL.argmax(0)
    codes_BL = np.take_along_axis(np.asarray(passes.codes_BL), when_BL[None], 0)[0]
    np.testing.assert_array_equal(found.codes_BL, codes_BL)
    np.testing.assert_array_equal(found.vectors_BLC, BOOK[codes_BL])
    shown = np.where(fixed_PBL[..., None], BOOK[codes_BL], 0)
    np.testing.assert_array_equal(passes.vectors_BLC, shown)
    counts_PB, due_P = fixed_PBL.sum(-1), np.cumsum(plan.budgets)
    if name in ('head', 'once'):
        np.testing.assert_array_equal(counts_PB, np.repeat(due_P[:, None], B, 1))
    else:
        assert (counts_PB >= due_P[:, None]).all()
        assert (counts_PB[2] > due_P[2]).any()


@pytest.mark.parametrize('name', ['head', 'both'])
def test_step_weight_guides_the_base_model_and_full_guidance_the_head(name, keys_B, logits_RLV):
    _, trace = sample_step(CASES[name], keys_B, logits_RLV)
    base_BLV = trace.guided
    np.testing.assert_array_equal(trace.logits, logits_RLV)
    np.testing.assert_allclose(trace.probs, jax.nn.softmax(base_BLV), atol=1e-6)
    np.testing.assert_allclose(base_BLV, guide(logits_RLV, B, 0.5), atol=1e-5)
    logits_PBLV, shown_PBLC = np.asarray(trace.passes.logits_BLV), trace.passes.vectors_BLC
    for index in range(8):
        earlier = shown_PBLC[index - 1] if index else np.zeros_like(shown_PBLC[0])
        of_head = toy_head(np.concatenate([earlier] * 2), logits_RLV, None)
        by_base = index < CASES[name].plan[1].base
        expected = base_BLV if by_base else guide(of_head, B, 2.0)
        np.testing.assert_allclose(logits_PBLV[index], expected, atol=1e-4)


def test_confidence_is_the_probability_after_the_filter(keys_B, logits_RLV):
    method = CASES['filtered']
    passes = sample_step(method, keys_B, logits_RLV, temperature=1.3)[1].passes
    keep = jax.jit(method.in_passes.filter)
    kept = np.asarray(keep(passes.logits_BLV, 1.3), np.float64)
    probs = np.exp(kept - kept.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    sure = np.take_along_axis(probs, np.asarray(passes.codes_BL)[..., None], -1)[..., 0]
    np.testing.assert_allclose(passes.confidence_BL, sure, atol=1e-5)
    assert (sure > 0).all() and sure.max() > 1 / 3


def test_random_tokens_are_fixed_first_and_then_those_of_high_confidence(keys_B, logits_RLV):
    uniform_SPBL = np.random.default_rng(4).uniform(size=(2, 5, B, L)).astype(np.float32)
    method = build_method('new', rank=RecordedRanking(jnp.asarray(uniform_SPBL)))
    passes = sample_step(method, keys_B, logits_RLV)[1].passes
    fixed_PBL, confidence_PBL = np.asarray(passes.fixed_BL), np.asarray(passes.confidence_BL)
    before_BL = np.zeros((B, L), bool)
    for index, budget in enumerate(method.plan[1].budgets):
        order_BL = uniform_SPBL[1, index] if index < 5 else confidence_PBL[index]
        for image in range(B):
            open_ = np.flatnonzero(~before_BL[image])
            best = open_[np.argsort(-order_BL[image, open_], kind='stable')][:budget]
            new = np.flatnonzero(fixed_PBL[index, image] & ~before_BL[image])
            assert set(new) == set(best)
        before_BL = fixed_PBL[index]


def test_codes_are_those_of_a_head_with_full_confidence(keys_B, logits_RLV):
    expected_BL = np.random.default_rng(5).integers(0, V, (B, L))
    certain = 1e3 * np.eye(V, dtype=np.float32)[np.concatenate([expected_BL] * 2)]
    found, _ = sample_step(CASES['head'], keys_B, logits_RLV, lambda *_: jnp.asarray(certain))
    np.testing.assert_array_equal(found.codes_BL, expected_BL)


def test_stable_image_depends_on_its_own_key_only(keys_B, logits_RLV):
    together = sample_step(CASES['both'], keys_B, logits_RLV)[0].codes_BL
    for image in range(B):
        key, rows = keys_B[image : image + 1], logits_RLV[[image, B + image]]
        alone, _ = sample_step(CASES['both'], key, rows)
        np.testing.assert_array_equal(alone.codes_BL[0], together[image])
    other = sample_step(CASES['both'], keys_B[::-1], logits_RLV)[0].codes_BL
    assert (other != together).any()


def text(*captions: str):
    return load_text(tiny.TEXT).encode(list(captions))


def parts_of(star: Star) -> tuple:
    """Network, tokenizer, parameters, and the sampling settings of a model with a head."""
    network, tokenizer = star.build(), tiny.TOKENIZER.model.build()
    params = {'model': tiny.random_params(star.abstract()), 'tokenizer': tiny.tokenizer_params()}
    settings = Settings(guidance=1.5, top_k=20, stable=StableSettings(version='1024'))
    return network, tokenizer, params, settings


def test_stable_image_does_not_depend_on_its_batch():
    network, tokenizer, params, settings = parts_of(MODEL)
    run = jax.jit(
        functools.partial(
            sample,
            network,
            tokenizer,
            settings=program.step_settings(MODEL, settings),
            method=program.sampling_method(MODEL, settings),
        )
    )
    keys_B, texts = program.image_keys([3, 4]), text(*CAPTIONS, '', '')
    together = run(params, keys_B=keys_B, condition=texts)
    for image in range(B):
        rows = jax.tree.map(lambda x, image=image: x[np.array([image, B + image])], texts)
        alone = run(params, keys_B=keys_B[image : image + 1], condition=rows)
        np.testing.assert_array_equal(alone.codes[0], together.codes[image])
        np.testing.assert_allclose(alone.images[0], together.images[image], atol=1e-5)


def test_released_images_are_sampled_in_passes_one_by_one():
    released = dataclasses.replace(MODEL, released_cross_attention=True)
    network, tokenizer, params, settings = parts_of(released)
    inputs = program.inputs(
        released,
        settings,
        keys_B=program.image_keys(range(B)),
        prompted=text(*CAPTIONS),
        empty=text(''),
    )
    images = jax.eval_shape(program.compile_program(network, tokenizer), params, inputs)
    assert images.shape == (B, 16, 16, 3) and images.dtype == np.uint8


def test_head_reads_one_scale_and_its_fixed_tokens():
    """With one block nothing goes from scale to scale through the text's row."""
    star = dataclasses.replace(MODEL, refinement=Refinement(first=1, blocks=1))
    params = tiny.random_params(star.abstract())
    rng = np.random.default_rng(2)
    rows = np.arange(1, 21)
    vectors = rng.normal(size=(1, 20, star.channels)).astype(np.float32)
    features = rng.normal(size=(1, 20, star.width)).astype(np.float32)
    caption = text('a red circle')

    @functools.partial(jax.jit, static_argnums=3)
    def refine(params, vectors, features, rows):
        network = bind(star.build(), params)
        return network.refine(vectors, features, np.asarray(rows), caption)

    both = refine(params, vectors, features, tuple(rows))
    for part in (slice(0, 4), slice(4, 20)):
        alone = refine(params, vectors[:, part], features[:, part], tuple(rows[part]))
        np.testing.assert_allclose(both[:, part], alone, atol=1e-5)
    vectors[:, 6] += 1
    moved = np.abs(refine(params, vectors, features, tuple(rows)) - both).max((0, 2))
    assert (moved[:4] == 0).all() and (moved[4:] > 1e-4).all()


def test_head_losses_equal_their_formulas():
    logits_BLV = np.random.default_rng(3).normal(size=(B, L, V)).astype(np.float32)
    codes_BL = np.random.default_rng(4).integers(0, V, (B, L))
    shown_BL = np.arange(L) < np.array([[L], [4]])

    @jax.jit
    def losses(shown_BL):
        return [loss(logits_BLV, codes_BL, shown_BL, 20) for loss in (ReleasedLoss(), PlainLoss())]

    constant = np.log(1 + V * np.exp(-10))
    everything = np.ones((B, L), bool)
    assert losses(everything) == [pytest.approx(constant * L / 20, rel=1e-3), 0]
    released, mean = losses(shown_BL)
    hidden = logits_BLV[1, 4:]
    picked = np.take_along_axis(hidden, codes_BL[1, 4:, None], -1)[:, 0]
    plain = np.log(np.exp(hidden).sum(-1)) - picked
    assert mean == pytest.approx(plain.mean(), rel=1e-5)
    more = np.log(1 + np.exp(hidden).sum(-1)) - picked
    assert released == pytest.approx((more.sum() + constant * (L + 4)) / B / 20, rel=1e-5)


def test_modes_show_their_share_of_tokens(keys_B):
    shares = {
        mode: float(Unmasking(mode=mode).sample(keys_B[0], (500, 20)).mean()) for mode in SHARES
    }
    means = {'arccos': 2 / np.pi, 'root': 1 / 3, 'linear': 1 / 2, 'square': 2 / 3}
    for mode, mean in (means | {'cosine': 2 / np.pi}).items():
        assert shares[mode] == pytest.approx(mean, abs=0.05)


@pytest.fixture(scope='module')
def job(tmp_path_factory) -> RefinementJob:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        place = tiny.write_model(tmp_path_factory.mktemp('base') / 'model')
        sampling = Settings(guidance=1.0, top_k=8, stable=StableSettings(version='new'))
        changes = {'init': place, 'sampling': sampling, 'pace': Pace(steps=1000)}
        run = dataclasses.replace(tiny.STAR, model=MODEL, **changes)
        made = train.build_job(run)
        assert isinstance(made, RefinementJob)
        made.texts.warm(['a red circle'])
        yield made


def test_training_changes_the_head_alone(job, tmp_path):
    state, batch = job.init(), next(job.batches(0))
    head = weights.flatten(jax.device_get(state.params))
    assert {name.partition('/')[0] for name in head} == set(MODEL.abstract()['refiner'])
    held = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.size > 1]
    assert sum(leaf.size for leaf in held) == 2 * sum(leaf.size for leaf in head.values())
    before = job.evaluate(state)
    losses = []
    for step in range(40):
        state, metrics = job.step(step, state, batch)
        losses.append(float(metrics['loss']))
    assert losses[0] == pytest.approx(np.log(32), rel=0.25)
    assert np.mean(losses[-10:]) < losses[0] - 1
    assert set(before) == {
        f'validation/{name}{at}' for name in ('loss', 'accuracy') for at in ('', '/2')
    }
    changed = weights.flatten(jax.device_get(state.params))
    assert not [name for name in head if np.array_equal(head[name], changed[name])]

    job.export(state, tmp_path / 'model')
    model, base = models.read(tmp_path / 'model'), models.read(job.run.init)
    assert model.config == MODEL and model.sampling == job.run.sampling
    kept, given = weights.flatten(model.params), weights.flatten(base.params)
    assert set(kept) - set(given) == {f'refiner/{name}' for name in head}
    assert all(np.array_equal(kept[name], given[name]) for name in given)
    again = RefinementJob(dataclasses.replace(job.run, init=str(tmp_path / 'model'))).init()
    same = jax.tree.map(lambda x, y: bool((x == y).all()), again.params, state.params)
    assert all(jax.tree.leaves(same))


def test_head_needs_a_trained_model(job):
    with pytest.raises(UserError, match='--init'):
        RefinementJob(dataclasses.replace(job.run, init=''))


@pytest.mark.parametrize(
    ('field', 'options'),
    [
        ('mlp_ratio', {'mlp_ratio': 2}),
        ('logit_norm', {'logit_norm': False}),
        ('positions.theta', {'positions': NormalisedRotary(theta=100)}),
        ('positions', {'positions': RawRotary()}),
        ('released_cross_attention', {'released_cross_attention': True}),
        ('sides', {'sides': (1, 3, 4)}),
    ],
)
def test_head_needs_the_model_that_was_trained(job, field, options):
    with pytest.raises(UserError, match=f'model.{field}: '):
        RefinementJob(dataclasses.replace(job.run, model=dataclasses.replace(MODEL, **options)))


def test_head_needs_the_text_encoder_of_training(job, tmp_path):
    shutil.copytree(tiny.TEXT, tmp_path / 'text')
    config = tmp_path / 'text' / 'config.json'
    config.write_text(config.read_text() + '\n')
    with pytest.raises(UserError, match='was trained with the text encoder'):
        RefinementJob(dataclasses.replace(job.run, text=str(tmp_path / 'text')))


def test_head_continues_on_the_model_that_it_started_from(job, tmp_path):
    place, out = tmp_path / 'base', tmp_path / 'run'
    shutil.copytree(job.run.init, place)
    begun = train.build_job(dataclasses.replace(job.run, init=str(place)))
    stop, console = Stop(), Console(quiet=True)
    stop.requested = True
    assert not trainer.fit(begun, out, console, stop)
    with Checkpoints(out / trainer.CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(1, begun.init(), [])
    assert not trainer.fit(begun, out, console, stop)
    assert trainer.newest(begun, out)

    params = weights.load(place / folder.MODEL)
    params['levels'] = params['levels'] + 1
    weights.save(place / folder.MODEL, params)
    with pytest.raises(UserError, match='has changed since'):
        trainer.fit(train.build_job(begun.run), out, console, stop)
    with pytest.raises(UserError, match='has changed since'):
        train.export(out, tmp_path / 'model')
