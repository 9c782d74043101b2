"""Does a run on images of several aspect ratios train one program for each list of step sizes?"""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
import tiny
from tiny import random_params

from star_jax.checkpoint import folder
from star_jax.checkpoint.training import Checkpoints
from star_jax.core.schedule import square_grids
from star_jax.core.self_correction import SelfCorrection
from star_jax.core.templates import Templates
from star_jax.data import mixed
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.families.fit import templates_flaw
from star_jax.families.infinity import Infinity
from star_jax.nn.bind import bind
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training import train
from star_jax.training.build import build_program
from star_jax.training.mixed_job import MixedJob
from star_jax.training.program import step_keys

pytestmark = pytest.mark.usefixtures('compiled_here')

TEMPLATES = Templates(
    grids=(('1:1', '1x1 2x2 4x4'), ('4:3', '1x1 2x2 3x4'), ('3:4', '1x1 2x2 4x3')),
    resolutions=(('small', 2), ('large', 3)),
)
MODEL = Infinity(
    depth=2,
    width=16,
    heads=2,
    bits=6,
    grids=square_grids((1, 2, 4)),
    reference=(4, 4),
    templates=TEMPLATES,
    text_width=32,
    text_rows=64,
)
ASPECTS = ('1:1', '4:3', '3:4')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('mixed')
    autoencoder = Autoencoder(
        width=4, multipliers=(1,), blocks=1, groups=2, stem=8, attention=False
    )
    config = BSQ(autoencoder=autoencoder, grids=MODEL.grids, bits=6)
    stored = folder.StoredTokenizer(config=config, params=random_params(config.abstract()))
    folder.write(path / 'tokenizer', stored)
    return dataclasses.replace(
        tiny.STAR,
        model=MODEL,
        tokenizer=str(path / 'tokenizer'),
        data=Shapes(count=48, objects=(1,), phrasings=1, aspects=ASPECTS),
        validation=Shapes(count=12, objects=(1,), split='validation', aspects=ASPECTS),
        correction=SelfCorrection(strength=0.3),
        pace=dataclasses.replace(tiny.STAR.pace, images=0),
    )


@pytest.fixture(scope='module')
def mixed_job(run, tmp_path_factory) -> MixedJob:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        return train.build_job(run)


def steps(job, first: int, state=None, *, count: int):
    """The state and the losses of some steps after `first`."""
    state, losses = state or job.init(), []
    for step, batch in enumerate(itertools.islice(job.batches(first), count), first):
        state, metrics = job.step(step, state, batch)
        losses.append(float(metrics['loss']))
    return state, losses


def test_a_run_on_mixed_templates_continues_exactly(mixed_job, tmp_path, capfd, caplog):
    job = mixed_job
    assert isinstance(job, MixedJob)
    order = [job.source.template_of[job.source.members(n)].size for n in range(3)]
    assert job.source.counts == order and min(order) > 5
    with jax.log_compiles():  # of this thread
        state, losses = steps(job, 0, count=6)
    trained = [jax.tree.map(np.asarray, state.params)]
    templates = [template for template, _ in itertools.islice(job.batches(0), 6)]
    assert {1, 2} <= set(templates)
    assert job.template(1).shared is job.template(2).shared
    reported = capfd.readouterr().err
    assert reported.count('compiled the step of') == 2
    assert 'compiled the step of 17 tokens for the templates 4:3 and 3:4' in reported
    assert 'Compiling jit(encode)' in caplog.text
    assert 'Compiling jit(train)' not in caplog.text
    half, first = steps(job, 0, count=3)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, half)
        restored = checkpoints.restore(job.abstract())
    state, second = steps(job, *restored, count=3)
    trained.append(jax.tree.map(np.asarray, state.params))
    assert first + second == losses
    jax.tree.map(np.testing.assert_array_equal, *trained)
    metrics = job.evaluate(state)
    by_template = [metrics[f'validation/loss/{name}'] for name in TEMPLATES.names]
    counts = job.validation.counts
    assert metrics['validation/loss'] == pytest.approx(np.average(by_template, weights=counts))
    assert 'validation/accuracy/2' in metrics


@pytest.mark.slow
def test_the_first_scales_of_every_template_are_trained(run, tmp_path, monkeypatch):
    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path))
    leading = dataclasses.replace(run, trained_scales=2)
    job = train.build_job(leading)
    state, losses = steps(job, 0, count=4)
    templates = [template for template, _ in itertools.islice(job.batches(0), 4)]
    assert len(set(templates)) > 1 and np.isfinite(losses).all()
    metrics = job.evaluate(state)
    assert {'validation/loss/1', 'validation/loss/4:3'} <= metrics.keys()
    assert 'validation/loss/2' not in metrics
    template, (inputs,) = next(job.batches(0))
    inputs = job.template(template).with_targets(job.frozen.tokenizer, inputs, jax.random.key(0))
    score = job.template(template).shared.score
    assert score(state.params, job.frozen, inputs, jax.random.key(0)).nll_BL.shape == (8, 5)


def test_a_template_trains_as_a_model_of_its_grids_alone(mixed_job):
    job, key = mixed_job, jax.random.key(3)
    batches = {}
    for template, (inputs,) in job.batches(0):
        batches.setdefault(template, inputs)
        if len(batches) == 3:
            break
    shared, params = job.template(1).shared.program, job.init().params
    loss = loss_of(shared)
    ready = [job.template(n).with_targets(job.frozen.tokenizer, batches[n], key) for n in (1, 2)]
    assert signature(ready[0]) == signature(ready[1])
    losses = [float(loss(params, job.frozen, inputs, key)) for inputs in ready]
    assert loss._cache_size() == 1
    tall = build_program(
        dataclasses.replace(job.run, model=MODEL.at(TEMPLATES.schedule('3:4', 3))),
        job.run.mesh.build(),
        job.template(2).tokenizer,
        platform='cpu',
        encode_prompts=job.program.encode_prompts,
    )
    alone = dataclasses.replace(batches[2], tables=None)
    expected = loss_of(tall)(params, job.frozen, alone, key)
    np.testing.assert_allclose(losses[1], expected, rtol=1e-5)
    unrotated = ready[1].replace(tables=ready[0].tables)
    assert float(loss(params, job.frozen, unrotated, key)) != losses[1]


def loss_of(program):
    """Parameters, frozen arrays, a micro-batch and its key -> the loss, jitted."""

    @jax.jit
    def loss(params, frozen, inputs, key):
        return program.loss(params, frozen, *program.prepare(frozen, inputs, key))[0]

    return loss


@pytest.mark.slow
def test_micro_batches_of_an_update_have_one_template(mixed_job):
    optimizer = dataclasses.replace(mixed_job.run.optimizer, accumulate=2)
    job = MixedJob(dataclasses.replace(mixed_job.run, optimizer=optimizer))
    template, parts = batch = next(job.batches(0))
    sides = job.template(template).tokenizer.resolution
    batch_size = job.run.batch
    read = mixed.batches(
        job.source, batch=2 * batch_size, seed=job.run.seed, captions=job.run.captions
    )
    number, images = next(read)
    assert number == template and images['image'].shape[1:3] == sides
    second = job._template_inputs(
        number, {name: rows[batch_size:] for name, rows in images.items()}
    )
    np.testing.assert_array_equal(second.encoded, parts[1].encoded)
    state, plain = job.init(), mixed_job.template(template)
    loss, losses = loss_of(plain.shared.program), []
    for inputs, key in zip(parts, step_keys(jax.random.key(job.run.seed), 0, 2), strict=True):
        inputs = plain.with_targets(job.frozen.tokenizer, inputs, key)
        losses.append(float(loss(state.params, job.frozen, inputs, key)))
    _, metrics = job.step(0, state, batch)
    assert float(metrics['loss']) == pytest.approx(np.mean(losses), rel=1e-4)


def signature(tree) -> list:
    """Shapes, dtypes and shardings, which decide whether a program is compiled anew."""
    return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]


def test_the_summary_counts_templates_and_programs(mixed_job):
    counts = mixed_job.source.counts
    shares = [f'{name} {count / 48:.1%}' for name, count in zip(ASPECTS, counts, strict=True)]
    assert mixed_job.summary()['templates'] == f'3 in 2 programs: {", ".join(shares)}'


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'grids': square_grids((1, 3, 4))}, 'no template begins with the grids of the model'),
        ({'reference': (8, 8)}, r'model.reference is \(8, 8\), but the template .* \(4, 4\)'),
    ],
)
def test_a_model_whose_grids_are_no_template_is_refused(run, fields, message):
    model = dataclasses.replace(MODEL, **fields)
    assert re.search(message, templates_flaw(model)) and not templates_flaw(MODEL)
    with pytest.raises(UserError, match=f'{message}.*: set model.grids and model.reference to'):
        train.build_job(dataclasses.replace(run, model=model))


def test_a_cache_holds_the_images_of_every_template(run, mixed_job, tmp_path):
    cached = dataclasses.replace(run, cache=str(tmp_path / 'cache'), correction=SelfCorrection())
    train.cache(cached)
    assert sorted(path.name for path in (tmp_path / 'cache').glob('[0-9]*')) == [
        '3x4',
        '4x3',
        '4x4',
    ]
    job = MixedJob(cached)
    pairs = zip(job.batches(0), mixed_job.batches(0), strict=False)
    for (template, (inputs,)), (other, (live,)) in itertools.islice(pairs, 3):
        assert template == other
        part = job.template(template)
        codes = part.targets(job.frozen.tokenizer, inputs.encoded, jax.random.key(0)).codes_BL
        expected = bind(part.tokenizer, {}).quantise(live.encoded).bits
        assert np.array_equal(codes, bind(part.tokenizer, {}).tokens(expected))
