"""Families from outside of the package train, save, load, plan and sample like those within."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_families
from flax import linen as nn
from PIL import Image

import star_jax
from star_jax.checkpoint import folder, models, weights
from star_jax.core.codes import Sampled
from star_jax.core.guidance import StepSettings
from star_jax.core.schedule import Step
from star_jax.data.folder import Folder
from star_jax.errors import UserError
from star_jax.families import registry
from star_jax.nn.bind import bind
from star_jax.plan import planning, topologies
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.program import image_keys
from star_jax.sampling.sampler import sample
from star_jax.training import train
from star_jax.training.run import Run

CONFIGS = toy_families.register()
NAMES = list(CONFIGS)


@functools.cache
def parts(name: str):
    """Network, tokenizer, and random parameters of both."""
    config = CONFIGS[name]
    tokenizer = tokenizer_config(name)
    params = {
        'model': tiny.random_params(config.abstract()),
        'tokenizer': tiny.random_params(tokenizer.abstract()),
    }
    return config.build(), tokenizer.build(), jax.tree.map(jnp.asarray, params)


def tokenizer_config(name: str):
    if name == 'wide_star':
        return tiny.TOKENIZER.model.at(CONFIGS[name].schedule)
    return CONFIGS[name].default_tokenizer()


def conditions(name: str, rows: int):
    """Prompts of different lengths, and the empty prompt."""
    random = np.random.default_rng(0)
    shapes = CONFIGS[name].abstract_condition(3, 6)
    text = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
    mask = np.arange(6) < np.array([[2], [3], [4]])
    text = text.replace(mask_BT=mask.astype(np.int32), states_BTE=text.states_BTE * mask[..., None])
    empty = jax.tree.map(lambda x: np.zeros_like(x[:1]), text)
    empty = empty.replace(mask_BT=np.ones((1, 6), np.int32))
    return jax.tree.map(lambda x: x[:rows], text), empty


@functools.cache
def sampled(name: str, rows: int = 3, guidance: float = 2.0):
    """Images sampled with guidance, traced."""
    network, tokenizer, params = parts(name)
    text, empty = conditions(name, rows)

    @jax.jit
    def run(params, text, empty):
        unprompted = bind(network, params['model']).unprompted(text, empty)
        condition = jax.tree.map(lambda *x: jnp.concatenate(x), text, unprompted)
        settings = StepSettings(
            guidance=CONFIGS[name].guidance_weights(guidance),
            temperature=CONFIGS[name].temperatures(1.0),
        )
        result = sample(
            network,
            tokenizer,
            params,
            keys_B=image_keys(range(rows)),
            condition=condition,
            settings=settings,
            method=FilteredSampling(CONFIGS[name].filter(star_jax.core.settings.Settings())),
            trace=True,
        )
        targets = bind(tokenizer, params['tokenizer']).inputs(result.codes)
        inputs = jnp.concatenate([targets, targets])
        return result, bind(network, params['model'])(inputs, condition)

    return run(params, text, empty)


@pytest.mark.parametrize('name', NAMES)
def test_sampling_computes_the_teacher_forced_logits(name):
    network, tokenizer, _ = parts(name)
    result, forced = sampled(name)
    logits = [step.method.logits for step in result.trace.steps()]
    expected = tokenizer.codes.parse(forced)[:, network.schedule.sampled_rows]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=2e-5)


@pytest.mark.parametrize('name', NAMES)
def test_an_image_does_not_depend_on_its_batch(name):
    together, alone = sampled(name)[0], sampled(name, rows=1)[0]
    np.testing.assert_array_equal(together.codes[:1], alone.codes)


@pytest.mark.parametrize('name', NAMES)
def test_inputs_of_training_fold_the_steps_of_sampling(name):
    _, tokenizer, params = parts(name)
    codes = sampled(name)[0].codes
    tokenizer = bind(tokenizer, params['tokenizer'])
    canvas, inputs = tokenizer.blank(len(codes)), []
    for step in range(tokenizer.schedule.steps):
        first, end = tokenizer.schedule.offsets[step : step + 2]
        step_codes = codes[:, first:end]
        chosen = Sampled(step_codes, tokenizer.embed(step_codes))
        canvas, following = tokenizer.advance(canvas, chosen, Step.at(step))
        inputs.append(following)
    np.testing.assert_allclose(
        np.concatenate(inputs[:-1], axis=1), tokenizer.inputs(codes), atol=1e-6
    )
    assert inputs[-1] is None


def test_labels_describe_what_flipped_bits_left():
    """Labels of later scales correct flipped bits; without flips the inputs follow from labels."""
    _, tokenizer, params = parts('bit_scales')
    features = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)

    def targets(flips):
        config = dataclasses.replace(tokenizer.config, flips=flips)
        bound = bind(config.build(), params['tokenizer'])
        found = bound.training_targets(features, jax.random.key(0))
        return found, bound.inputs(found.codes_BL)

    exact, from_labels = targets(0.0)
    np.testing.assert_allclose(exact.inputs_BLC, from_labels, atol=1e-6)
    flipped, from_labels = targets(0.5)
    assert np.abs(flipped.inputs_BLC - from_labels).max() > 0.1
    np.testing.assert_array_equal(flipped.codes_BL[:, 0], exact.codes_BL[:, 0])


def test_padding_of_a_prefix_changes_nothing():
    """Hidden rows of the prefix: no image depends on their content."""
    network, _, params = parts('prefix_raster')
    text, _ = conditions('prefix_raster', 3)
    dirty = text.replace(states_BTE=text.states_BTE + 9 * (1 - text.mask_BT[..., None]))
    inputs = np.random.default_rng(2).normal(size=(3, 11, 1)).astype(np.float32)
    clean, dirty = (bind(network, params['model'])(inputs, one) for one in (text, dirty))
    visible = network.schedule.sampled_rows
    np.testing.assert_array_equal(clean[:, visible], dirty[:, visible])


def test_temperatures_differ_from_step_to_step():
    result, _ = sampled('wide_star')
    first = result.trace.steps()[0].method
    guided = np.asarray(first.guided, np.float64) / 2.0  # the temperature of the first scale
    kept = np.asarray(first.probs) > 0
    probs = np.exp(guided - guided.max(-1, keepdims=True)) * kept
    probs /= probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(first.probs, probs, atol=1e-5)


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """A folder of captioned images that are not square."""
    path = tmp_path_factory.mktemp('images')
    random = np.random.default_rng(0)
    for index in range(12):
        image = random.integers(0, 256, (24, 40, 3), np.uint8)
        Image.fromarray(image).save(path / f'{index:02d}.png')
        (path / f'{index:02d}.txt').write_text(f'image number {index}')
    return path


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    """Runs of a few steps, by name."""

    @functools.cache
    def run(name: str) -> tuple[Run, Path]:
        out = tmp_path_factory.mktemp(name)
        tokenizer = folder.StoredTokenizer(
            config=tokenizer_config(name), params=parts(name)[2]['tokenizer']
        )
        folder.write(out / 'tokenizer', tokenizer)
        config = dataclasses.replace(
            tiny.STAR,
            model=CONFIGS[name],
            tokenizer=str(out / 'tokenizer'),
            data=Folder(path=str(images), held_out=0.25),
            validation=Folder(split='validation', held_out=0.25),
            batch=8,
            ema=0.9,
        )
        assert train.main(config, out / 'run')
        return config, out / 'run'

    return run


@pytest.mark.parametrize(
    'name',
    ['bit_scales', *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != 'bit_scales')],
)
def test_a_family_from_outside_trains_saves_loads_and_samples(name, trained):
    run, out = trained(name)
    metrics = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    assert all(np.isfinite(line['loss']) for line in metrics if 'loss' in line)
    assert json.loads((out / 'model' / 'config.json').read_text())['family'] == name
    assert models.read(out / 'model').config == run.model
    pipe = star_jax.load(out / 'model')
    options = {'guidance': 2.0, 'top_k': 0, 'top_p': 0.0}
    made = pipe(['image number 1', 'image number 2'], **options)
    assert made.shape == (2, *tokenizer_config(name).resolution, 3) and made.dtype == np.uint8
    np.testing.assert_array_equal(pipe(['image number 1'], **options)[0], made[0])


def test_a_learned_unconditional_embedding_is_trained(trained):
    _, out = trained('bit_scales')
    after = weights.flatten(models.read(out / 'model').params)['starter/unprompted']
    job = train.build_job(trained('bit_scales')[0])
    first = weights.flatten(nn.unbox(job.init().params))['starter/unprompted']
    assert np.abs(after - first).max() > 1e-4


def test_constants_are_saved_and_never_change(trained):
    run, out = trained('prefix_raster')
    job = train.build_job(run)
    state = job.init()
    first = weights.flatten(state.params)['starter/empty']
    after = weights.flatten(models.read(out / 'model').params)['starter/empty']
    np.testing.assert_array_equal(after, first)
    sizes = [leaf.size for leaf in jax.tree.leaves(run.model.abstract())]
    count = sum(sizes) - first.size
    assert job.summary()['parameters'].replace(',', '').startswith(str(count))


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=pytest.mark.slow) if n == 'wide_star' else n for n in NAMES]
)
def test_a_family_from_outside_is_planned(name, trained):
    run, _ = trained(name)
    plan = planning.plan(run, topologies.parse_topology('1xA100-80G'), config=name, search=False)
    assert plan.flops > 0 and plan.memory.total > 0
    plan = planning.plan(
        run, topologies.parse_topology('1xA100-80G'), config=name, samples=True, search=False
    )
    assert plan.flops > 0


def test_an_unregistered_family_is_refused_in_a_sentence(trained, monkeypatch):
    _, out = trained('bit_scales')
    monkeypatch.delitem(registry.FAMILIES, 'bit_scales')
    with pytest.raises(UserError, match='family "bit_scales" is unknown'):
        star_jax.load(out / 'model')


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="the name 'bit_scales' is taken"):
        registry.register_family('bit_scales', toy_families.PrefixRaster)
