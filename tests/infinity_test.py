"""Does the Infinity transformer obey the laws of all families, with any text and ratio?"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.core import meta
from tiny import random_params

from star_jax.checkpoint import folder
from star_jax.convert.entries import to_params, to_state
from star_jax.convert.infinity import infinity_entries
from star_jax.core import condition, pixels
from star_jax.core.codes import Bits, Targets
from star_jax.core.condition import TextCondition
from star_jax.core.filters import BitFilter
from star_jax.core.guidance import StepSettings, layer_mixing, mix_rows
from star_jax.core.self_correction import SelfCorrection
from star_jax.core.settings import Settings
from star_jax.core.templates import Templates
from star_jax.errors import UserError
from star_jax.families.infinity import Infinity
from star_jax.families.star import Star
from star_jax.losses import tokens
from star_jax.nn.bind import bind
from star_jax.sampling import loading, program
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.pipeline import Pipeline
from star_jax.sampling.sampler import sample
from star_jax.text.encoder import load as load_text
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training.transformer_job import TransformerJob

WIDTH, BITS = 16, 6
SQUARE = ((1, 1), (2, 2), (4, 4))
TALL = ((1, 1), (2, 2), (4, 3))
WIDE = ((1, 1), (1, 2), (2, 4))
TINY = Infinity(
    depth=2,
    width=WIDTH,
    heads=2,
    bits=BITS,
    grids=SQUARE,
    reference=(8, 8),
    text_width=8,
    text_rows=6,
)
# Parameters by size (Infinity specification 8), in thousand millions.
PUBLISHED = {
    '125M': (Infinity(), 0.125),
    '361M': (Infinity(depth=16, width=1152, heads=12), 0.362),
    '940M': (Infinity(depth=24, width=1536, heads=16), 0.941),
    '2.2B': (Infinity(depth=32, width=2080, heads=20), 2.257),
    '4.7B': (Infinity(depth=40, width=2688, heads=24), 4.716),
    '8.8B': (Infinity(depth=48, width=3360, heads=28), 8.767),
    '2B': (Infinity(depth=32, width=2048, heads=16), 2.205),
    '8B': (Infinity(depth=40, width=3584, heads=28, bits=56), 8.376),
    '20B': (Infinity(depth=58, width=4608, heads=36), 19.95),
}


@functools.cache
def params_of(model: Infinity) -> dict:
    return random_params(model.abstract())


def text_of(*lengths: int, padded: int = 5) -> TextCondition:
    """Captions of these lengths, which depend on nothing but their place."""
    states = np.random.default_rng(1).normal(size=(len(lengths), padded, TINY.text_width))
    mask = np.arange(padded) < np.asarray(lengths)[:, None]
    states = np.float32(states) * mask[..., None]
    return TextCondition(states, np.int32(mask), np.float32(states[:, 0]))


def tokenizer_of(grids) -> BSQ:
    autoencoder = Autoencoder(width=8, multipliers=(1,), blocks=1, groups=4, attention=False)
    return BSQ(autoencoder=autoencoder, grids=grids, bits=BITS)


@functools.cache
def sampling_of(model: Infinity):
    """The sampling program with its trace, of (params, keys_B, condition, settings)."""
    tokenizer = tokenizer_of(model.grids)
    run = functools.partial(
        sample,
        model.build(),
        tokenizer.build(),
        method=FilteredSampling(BitFilter(top_p=0.9)),
        trace=True,
    )

    def call(params, keys_B, rows, settings):
        both = {'model': params, 'tokenizer': random_params(tokenizer.abstract())}
        return run(both, keys_B=keys_B, condition=rows, settings=settings)

    return jax.jit(call)


@functools.cache
def forward_of(model: Infinity):
    return jax.jit(lambda params, *args: bind(model.build(), params)(*args))


def settings_of(model: Infinity, weight: float) -> StepSettings:
    steps = model.schedule.steps
    return StepSettings(np.full(steps, weight, np.float32), np.ones(steps, np.float32))


def inputs_of(model: Infinity, batch: int = 2) -> np.ndarray:
    shape = model.abstract_inputs(batch).shape
    return np.float32(np.random.default_rng(2).normal(size=shape))


@pytest.mark.parametrize('grids', [SQUARE, TALL, WIDE])
def test_sampling_computes_the_logits_of_training(grids):
    model = dataclasses.replace(TINY, grids=grids, reference=grids[-1])
    params, text = params_of(model), text_of(5, 2)
    keys_B = program.image_keys([0, 1])
    sampled = sampling_of(model)(params, keys_B, text, settings_of(model, 0))
    inputs = bind(tokenizer_of(grids).build(), {}).inputs(sampled.codes)
    expected = forward_of(model)(params, inputs, text).reshape(2, -1, BITS, 2)
    steps = [step.method.logits for step in sampled.trace.steps()]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, atol=2e-5)


def test_an_image_alone_is_the_image_in_a_batch_of_longer_prompts():
    params, text = params_of(TINY), text_of(3, 5)
    network = bind(TINY.build(), params)
    batch = condition.stack(text, network.unprompted(text, text))
    alone = jax.tree.map(lambda x: x[:1], text)
    alone = alone.replace(states_BTE=alone.states_BTE[:, :3], mask_BT=alone.mask_BT[:, :3])
    alone = condition.stack(alone, network.unprompted(alone, alone))
    run, settings = sampling_of(TINY), settings_of(TINY, 2)
    in_batch = run(params, program.image_keys([7, 8]), batch, settings)
    single = run(params, program.image_keys([7]), alone, settings)
    assert np.array_equal(in_batch.codes[:1], single.codes)
    np.testing.assert_allclose(in_batch.images[:1], single.images, atol=1e-5)


def test_sampling_stops_after_any_scale():
    tokenizer = tokenizer_of(SQUARE)
    both = {'model': params_of(TINY), 'tokenizer': random_params(tokenizer.abstract())}
    settings, method = settings_of(TINY, 0), FilteredSampling(BitFilter())
    run = jax.jit(
        functools.partial(sample, TINY.build(), tokenizer.build()), static_argnames='stop'
    )

    def codes(stop):
        keys_B = program.image_keys([0, 1])
        rows = text_of(3, 5)
        return run(
            both, keys_B=keys_B, condition=rows, settings=settings, method=method, stop=stop
        ).codes

    assert np.array_equal(codes(2), codes(0)[:, :5])


def test_hidden_tokens_of_a_text_do_not_matter():
    params, text = params_of(TINY), text_of(3, 5)
    hidden = text.mask_BT[..., None] == 0
    other = text.replace(states_BTE=np.where(hidden, 9, text.states_BTE))
    order = [4, 0, 3, 1, 2]  # hidden tokens between the visible ones
    moved = text.replace(states_BTE=other.states_BTE[:, order], mask_BT=text.mask_BT[:, order])
    forward, inputs = forward_of(TINY), inputs_of(TINY)
    expected = forward(params, inputs, text)
    np.testing.assert_allclose(forward(params, inputs, other), expected, atol=1e-5)
    np.testing.assert_allclose(forward(params, inputs, moved), expected, atol=1e-5)


def test_packed_text_is_unpacked_to_its_captions():
    text = text_of(3, 5)
    packed = text.states_BTE[text.mask_BT > 0]
    unpacked = condition.unpack(packed, [3, 5])
    assert np.array_equal(unpacked.states_BTE, text.states_BTE)
    assert np.array_equal(unpacked.mask_BT, text.mask_BT)


def test_rows_without_a_prompt_are_learned_and_as_many_as_the_prompt_has():
    params, text = params_of(TINY), text_of(3, 5)
    dropped = bind(TINY.build(), params).unprompted(text, text)
    rows = params['starter']['rows'][:5]
    assert np.array_equal(dropped.states_BTE, np.stack([rows, rows]))
    assert dropped.mask_BT.sum(1).tolist() == [3, 5]

    def loss(params):
        network = bind(TINY.build(), params)
        return network.start(network.unprompted(text, text)).sum()

    gradient = jax.grad(loss)(params)['starter']['rows']
    assert np.abs(gradient[:5]).min(axis=1).all() and not np.any(gradient[5:])


def test_a_prompt_is_read_up_to_the_learned_rows():
    model = dataclasses.replace(TINY, text_width=32, text_rows=9)
    encoder = model.prompt_encoder(functools.partial(load_text, tiny.TEXT))
    text = encoder.encode(['a large blue star above a small red circle on a white background', ''])
    assert text.mask_BT.sum(1).tolist() == [9, 2]


def test_padding_that_all_texts_have_is_left_out():
    def widths(*lengths: int, padded: int) -> tuple[int, ...]:
        text = condition.trimmed(text_of(*lengths, padded=padded))
        assert text.mask_BT.sum(1).tolist() == list(lengths)
        return text.states_BTE.shape[1], text.mask_BT.shape[1]

    assert widths(3, 5, padded=512) == widths(128, padded=512) == (128, 128)
    assert widths(3, 129, padded=512) == (256, 256)
    assert widths(512, padded=512) == (512, 512) and widths(5, padded=120) == (120, 120)


def test_a_prompt_longer_than_the_learned_rows_is_refused():
    text = text_of(7, padded=7)
    with pytest.raises(UserError, match='at most 6 tokens of a prompt, not 7'):
        bind(TINY.build(), params_of(TINY)).unprompted(text, text)


def test_padding_the_rows_to_a_multiple_changes_nothing():
    padded = dataclasses.replace(TINY, row_multiple=16)
    params, inputs, text = params_of(TINY), inputs_of(TINY), text_of(3, 5)
    features = jax.eval_shape(
        lambda params: bind(padded.build(), params).features(inputs, text), params
    )
    assert TINY.schedule.length == 21 and features.shape[1] == 32
    expected = forward_of(TINY)(params, inputs, text)
    np.testing.assert_allclose(forward_of(padded)(params, inputs, text), expected, atol=1e-5)


def test_guidance_after_a_layer_makes_both_halves_equal():
    mixing = layer_mixing(np.float32([0, 2]), 3, (-2,))
    x = jnp.arange(8.0).reshape(2, 2, 2)
    assert np.array_equal(mix_rows(x, mixing[0, 1]), x)  # a step without guidance
    assert np.array_equal(mix_rows(x, mixing[1, 0]), x)  # a layer without guidance
    guided = x[0] + 2 * (x[0] - x[1])
    assert np.array_equal(mix_rows(x, mixing[1, 1]), jnp.stack([guided, guided]))


def test_settings_give_guidance_and_temperature_of_every_step():
    settings = Settings(guidance=3, temperature_per_step=(0.5, 1, 2), guidance_layers=(0, -1))
    steps = program.step_settings(TINY, settings)
    assert steps.guidance.tolist() == [2, 2, 2] and steps.temperature.tolist() == [0.5, 1, 2]
    assert steps.mixing.shape == (3, 2, 2, 2) and np.array_equal(steps.mixing[:, 0, 0, 0], [1] * 3)
    inside = program.step_settings(TINY, dataclasses.replace(settings, guidance_layers=(-1,)))
    assert inside.guided and not inside.guidance.any()
    off = program.step_settings(TINY, dataclasses.replace(settings, guidance=1))
    assert not off.guided
    listed = program.step_settings(TINY, Settings(guidance_per_step=(0.5, 2, 4)))
    assert listed.guidance.tolist() == [-0.5, 1, 3]
    star = program.step_settings(Star(sides=(1, 2, 3)), Settings(guidance_per_step=(4, 4, 8)))
    assert star.guidance.tolist() == [0, 2, 8]


@pytest.mark.parametrize(('stop', 'weights'), [(0, [0, 2, 4]), (2, [0, 2, 0]), (1, [0, 0, 0])])
def test_steps_that_are_not_sampled_need_no_guidance(stop, weights):
    steps = program.step_settings(Star(sides=(1, 2, 3)), Settings(guidance=4, stop=stop))
    assert steps.guidance.tolist() == weights and steps.guided == any(weights)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (Settings(guidance_per_step=(1, 2)), 'guidance_per_step has 2 numbers'),
        (Settings(temperature_per_step=(1, 2)), 'temperature_per_step has 2 numbers'),
        (Settings(stop=4), 'stop is 4, but the model samples in 3 steps'),
        (Settings(guidance_layers=(-3,)), 'guidance_layers holds -3, but the model has 2 layers'),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        program.step_settings(TINY, settings)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'grids': ((2, 2), (4, 4))}, 'first of grids must be 1 x 1'),
        (
            {'templates': Templates(grids=(('2:1', '2x4 4x8'),))},
            'first of the template 2:1 must be 1 x 1',
        ),
        ({'grids': ((1, 1),) * 16}, '16 scales, expected at most 15'),
        ({'text_width': 640, 'width': 16}, 'does not divide into the 5 heads'),
        ({'head_layers': 3}, 'head_layers must be 1 or 2'),
        ({'swiglu': True}, 'hidden must lie in'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_a_rotary_grid_is_the_reference_whatever_the_resolution():
    long = Infinity(grids=((1, 1), (2, 2), (4, 4), (8, 8)), reference=(8, 8))
    short = Infinity(grids=((1, 1), (2, 2), (4, 4)), reference=(8, 8))
    whole = long.positions.rotation(long.schedule, 96)
    assert np.array_equal(short.positions.rotation(short.schedule, 96), whole[:21])


def test_the_loss_of_a_token_is_the_mean_or_the_sum_of_its_bits():
    codes = np.random.default_rng(3).integers(0, 2, (2, TINY.schedule.length, BITS), np.int8)
    targets = Targets(inputs_of(TINY), codes)

    @functools.partial(jax.jit, static_argnames=('of_bits',))
    def losses(params, of_bits):
        network = TINY.build()
        return tokens.token_losses(
            network, Bits(BITS), params, targets, text_of(3, 5), smoothing=0.1, of_bits=of_bits
        )

    mean, total = (losses(params_of(TINY), of_bits) for of_bits in ('mean', 'sum'))
    np.testing.assert_allclose(total.trained_BL, BITS * mean.trained_BL, rtol=1e-6)
    np.testing.assert_allclose(total.nll_BL, mean.nll_BL)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(name):
    model, billions = PUBLISHED[name]
    leaves = jax.tree.leaves(meta.unbox(model.abstract()))
    assert sum(math.prod(leaf.shape) for leaf in leaves) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(
    'fields',
    [
        {},
        {'rms_norm': True, 'input_norm': True, 'cross_scale': 0.5, 'head_layers': 2},
        {'shared_adaln': False, 'modulated_head': False, 'qk_norm': False},
        {'modulated_head': False, 'head_layers': 2, 'mlp_ratio': 48.0, 'swiglu': True},
    ],
)
def test_the_conversion_table_names_every_parameter_once(fields):
    model = dataclasses.replace(TINY, depth=4, **fields)
    params, entries = params_of(model), infinity_entries(model, chunks=2)
    state = to_state(entries, params)
    back = to_params(entries, state)
    assert not back.missing and not back.unknown
    assert jax.tree.structure(back.params) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, back.params, params))
    assert 'block_chunks.1.module.1.sa.q_bias' in state


def test_fresh_gates_scales_and_heads_are_small():
    key, shape = jax.random.key(0), (WIDTH, 6 * WIDTH)
    wide = dataclasses.replace(TINY, shared_adaln=False).build()
    modulation = wide.block.modulation(parent=None)
    kernel = modulation.kernel_init(key, shape).reshape(WIDTH, 6, WIDTH)
    stds = np.asarray(kernel.std(axis=(0, 2))) / (3 * WIDTH) ** -0.5
    np.testing.assert_allclose(stds, [5e-6] * 2 + [1e-3] * 4, rtol=0.2)
    offset = TINY.build().block.modulation(parent=None).kernel_init(key, (6, WIDTH))
    stds = np.asarray(offset.std(axis=1)) / WIDTH**-0.5
    np.testing.assert_allclose(stds, [5e-6] * 2 + [1e-3] * 4, rtol=0.6)
    rows = Infinity().build().starter.unprompted_init(key, (64, 2048))
    assert np.abs(rows).max() <= 2.001 / 2048**0.5
    np.testing.assert_allclose(rows.std(), 0.955 / 2048**0.5, rtol=0.02)


@pytest.fixture
def job(tmp_path, monkeypatch) -> TransformerJob:
    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path / 'cache'))
    autoencoder = Autoencoder(
        width=4, multipliers=(1,), blocks=1, groups=2, stem=4, attention=False
    )
    config = BSQ(autoencoder=autoencoder, grids=SQUARE, bits=BITS)
    stored = folder.StoredTokenizer(config=config, params=random_params(config.abstract()))
    folder.write(tmp_path / 'tokenizer', stored)
    run = dataclasses.replace(
        tiny.STAR,
        model=dataclasses.replace(TINY, text_width=32, text_rows=64),
        tokenizer=str(tmp_path / 'tokenizer'),
        correction=SelfCorrection(strength=0.3),
        balance=0.5,
        caption_drop=1.0,
        bit_loss='sum',
        sampling=Settings(guidance=3, guidance_layers=(0, -1), negative='a blue star'),
    )
    return TransformerJob(run)


def test_a_run_counts_its_parameters_and_work(job):
    count = sum(leaf.size for leaf in jax.tree.leaves(meta.unbox(job.run.model.abstract())))
    assert f'{count:,}' in str(job.summary())


@pytest.mark.slow
def test_a_run_trains_on_flipped_bits_and_samples_from_captions(job):
    state = job.init()
    before = np.asarray(state.params['starter']['rows'])
    state, metrics = job.step(0, state, next(job.batches(0)))
    assert np.isfinite(metrics['loss'])
    assert not np.array_equal(state.params['starter']['rows'], before)
    job.compile_grid()
    assert job.sample_grid(state).dtype == np.uint8


@pytest.fixture(scope='module')
def pipe() -> Pipeline:
    config = tokenizer_of(SQUARE)
    stored = folder.StoredModel(
        config=dataclasses.replace(TINY, text_width=32, text_rows=64),
        params=random_params(dataclasses.replace(TINY, text_width=32, text_rows=64).abstract()),
        tokenizer=folder.StoredTokenizer(config=config, params=random_params(config.abstract())),
        text=folder.TextEncoderReference(**load_text(tiny.TEXT).reference()),
    )
    return loading.prepare(stored, 'tiny')


def test_first_scales_of_images_are_kept(pipe):
    prompts, settings = ['a red circle', 'two blue stars on a white background'], {'guidance': 3.0}
    plain = pipe(prompts, **settings)
    given = list(plain[::-1])
    np.testing.assert_array_equal(pipe(prompts, image=given, keep=0, **settings), plain)
    kept = pipe(prompts, image=given, keep=2, **settings)
    alone = pipe(prompts[1:], seed=1, image=given[1], keep=2, **settings)
    np.testing.assert_array_equal(alone[0], kept[1])
    assert (kept != plain).any() and (kept != plain[::-1]).any()
    whole = pipe(prompts, image=given, keep=len(SQUARE), **settings)
    bound = bind(pipe.tokenizer, pipe._params['tokenizer'])
    rebuilt = np.asarray(pipe.tokenizer.to_uint8(bound(pixels.to_signed(np.stack(given)))))
    assert np.abs(whole.astype(int) - rebuilt).max() <= 1


def test_a_negative_prompt_has_a_length_of_its_own(pipe):
    settings = {'guidance': 3.0, 'negative': 'a small blue star above two large green rings'}
    prompts = ['a red circle', 'two crosses on a white background']
    together = pipe(prompts, **settings)
    np.testing.assert_array_equal(pipe(prompts[1:], seed=1, **settings)[0], together[1])
    assert (pipe(prompts, guidance=3.0) != together).any()
