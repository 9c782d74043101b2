"""Does LlamaGen obey the laws of all families, by class and by text of any length?"""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest
import tiny
from convert_test import PARTS, Names, assert_same, save
from flax.core import meta
from safetensors.numpy import load_file

import star_jax
from star_jax import cli
from star_jax.checkpoint import folder, models, weights
from star_jax.checkpoint.stored import TensorSpec
from star_jax.convert import infer
from star_jax.convert.entries import to_params, to_state
from star_jax.convert.infer import ModelOptions
from star_jax.convert.llamagen import BUFFERS, llamagen_entries
from star_jax.convert.raster_vq import raster_vq_entries
from star_jax.convert.table import ConversionTable
from star_jax.convert.writers import FLAT
from star_jax.core import condition, pixels, resize
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.filters import SortedFilter
from star_jax.core.guidance import StepSettings
from star_jax.core.settings import Settings
from star_jax.data.scenes import TRAINED
from star_jax.errors import UserError
from star_jax.families.llamagen import SIZES, LlamaGen, LlamaGenText
from star_jax.nn import layers
from star_jax.nn.bind import bind
from star_jax.sampling import program, trunks, weight_layout
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.program import image_keys
from star_jax.sampling.sampler import sample
from star_jax.text.encoder import load as load_text
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.training import train, warm_start
from star_jax.training.optimizer import decayed
from star_jax.training.state import TrainState
from star_jax.verify.cases import Case
from star_jax.verify.llamagen import RasterFilters, recorded_filter
from star_jax.verify.llamagen_generate import CodesAlone

CLASSES = LlamaGen(depth=2, width=16, heads=4, hidden=24, grid=(3, 4), codes=11, classes=5)
SHARED = dataclasses.replace(CLASSES, kv_heads=2)
TEXT = LlamaGenText(
    depth=2, width=16, heads=4, hidden=24, grid=(3, 3), codes=11, text_width=6, text_rows=120
)
PIXELS = Autoencoder(
    width=8, multipliers=(1, 1), blocks=1, groups=4, latent=8, fused_attention=False
)
CODES = RasterVQ(autoencoder=PIXELS, grid=(4, 4), codes=11)
SQUARE = dataclasses.replace(CLASSES, grid=(4, 4))
SAMPLED = dataclasses.replace(SQUARE, names=('a', 'b', 'c', 'd', 'e'))
# Parameters of each size, by class and by text (LlamaGen specification 2.1).
PUBLISHED = {
    'B': (110_888_448, 112_282_368),
    'L': (342_910_976, 345_031_680),
    'XL': (774_699_520, 777_678_080),
    'XXL': (1_410_972_672, 1_414_940_160),
    '3B': (3_096_659_200, 3_110_249_600),
    'XXXL': (3_893_027_840, 3_902_261_760),
    '1B': (1_199_616_000, 1_205_954_560),
    '7B': (6_614_589_440, 6_635_655_168),
}


@functools.cache
def params_of(model) -> dict:
    return tiny.random_params(model.abstract())


def text_of(*lengths: int, padded: int) -> TextCondition:
    states = np.random.default_rng(1).normal(size=(len(lengths), padded, TEXT.text_width))
    mask = np.arange(padded) < np.asarray(lengths)[:, None]
    return TextCondition(
        np.float32(states * mask[..., None]), np.int32(mask), np.float32(states[:, 0])
    )


CONDITIONS = {
    'class': (CLASSES, LabelCondition(np.int32([1, 4]))),
    'shared heads': (SHARED, LabelCondition(np.int32([1, 4]))),
    '3 tokens': (TEXT, text_of(3, 2, padded=5)),
    '120 tokens': (TEXT, text_of(120, 7, padded=120)),
    'too many tokens': (TEXT, text_of(130, 121, padded=136)),
}


def empty_of(model, rows):
    if isinstance(model, LlamaGen):
        return LabelCondition(np.int32([model.classes]))
    return jax.tree.map(lambda x: x[:1], rows)


@functools.cache
def sampled(name: str, rows: int = 2, platform: str = ''):
    """Traced samples with guidance, and the logits of teacher forcing of the same tokens.

    Parameters are arranged as for a `platform` ('': as training has them, under a scan).
    """
    model, prompted = CONDITIONS[name]
    prompted = jax.tree.map(lambda x: x[:rows], prompted)
    network, tokenizer = model.build(), CodesAlone(model.schedule, model.vocabulary)
    settings = StepSettings(model.guidance_weights(3.0), model.temperatures(1.0))
    method = FilteredSampling(model.filter(Settings(top_k=7, top_p=0.9)))

    @jax.jit
    def run(params):
        bound = bind(network, params)
        both = condition.stack(prompted, bound.unprompted(prompted, empty_of(model, prompted)))
        parts = {'model': params, 'tokenizer': {}}
        if platform:
            parts = weight_layout.arrange(parts, model.schedule, platform)
        result = sample(
            network,
            tokenizer,
            parts,
            keys_B=image_keys(range(rows)),
            condition=both,
            settings=settings,
            method=method,
            trace=True,
        )
        inputs = jax.numpy.tile(result.codes[:, :-1], (2, 1))
        return result, bind(network, params)(inputs, both)

    return run(params_of(model))


@pytest.mark.parametrize('name', CONDITIONS)
def test_sampling_computes_the_teacher_forced_logits(name):
    result, forced = sampled(name)
    logits = [step.method.logits for step in result.trace.steps()]
    rows = CONDITIONS[name][0].schedule.sampled_rows
    np.testing.assert_allclose(np.concatenate(logits, axis=1), forced[:, rows], atol=2e-5)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('name', ['class', '3 tokens', 'shared heads'])
def test_layers_with_arrays_of_their_own_compute_the_same(name, platform, monkeypatch):
    monkeypatch.setattr(trunks, 'PIECE_ROWS', 4)
    (result, _), (expected, _) = sampled(name, platform=platform), sampled(name)
    np.testing.assert_array_equal(result.codes, expected.codes)
    for one, other in zip(result.trace.steps(), expected.trace.steps(), strict=True):
        np.testing.assert_allclose(one.method.logits, other.method.logits, atol=2e-6)
    for one, other in zip(result.trace.cache, expected.trace.cache, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize('name', ['class', '3 tokens'])
def test_an_image_alone_is_the_image_in_a_batch(name):
    np.testing.assert_array_equal(sampled(name)[0].codes[:1], sampled(name, rows=1)[0].codes)


def test_padding_of_a_prefix_changes_nothing():
    """Any padding before the same tokens at the end of the prefix gives the same images."""
    network = bind(TEXT.build(), params_of(TEXT))
    short, long = text_of(3, 2, padded=3), text_of(3, 2, padded=3)
    moved = jax.tree.map(lambda x: x, long)
    pad = ((0, 0), (4, 0), (0, 0))
    moved = moved.replace(
        states_BTE=np.pad(moved.states_BTE, pad), mask_BT=np.pad(moved.mask_BT, pad[:2])
    )
    codes = np.random.default_rng(0).integers(0, 11, (2, 8)).astype(np.int32)
    rows = TEXT.schedule.sampled_rows
    first, second = network(codes, short)[:, rows], network(codes, moved)[:, rows]
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_unprompted_text_has_the_mask_of_the_prompt_and_constant_rows():
    network, text = bind(TEXT.build(), params_of(TEXT)), text_of(3, 2, padded=5)
    unprompted = network.unprompted(text, text)
    np.testing.assert_array_equal(unprompted.mask_BT, text.mask_BT)
    states = bind(TEXT.starter, params_of(TEXT)['starter']).states(unprompted)
    empty = params_of(TEXT)['starter']['empty']
    np.testing.assert_array_equal(states[0, -3:], empty[-3:])
    np.testing.assert_array_equal(states[1, -2:], empty[-2:])
    assert TEXT.constants == {'starter/empty'}


def test_guidance_is_off_at_one_and_below():
    assert not CLASSES.guidance_weights(1.0).any() and not CLASSES.guidance_weights(0.5).any()
    assert (CLASSES.guidance_weights(4.0) == 3).all()
    assert CLASSES.temperatures(0.0)[0] == np.float32(1e-5)
    assert CLASSES.filter(Settings(top_k=3, top_p=1.0)) == SortedFilter(top_k=3)


def test_the_first_steps_alone_are_guided():
    steps = program.step_settings(CLASSES, Settings(guidance=4.0, guided_steps=6))
    assert steps.guidance.tolist() == [3.0] * 6 + [0.0] * 6  # a published cfg_interval of 4


def test_equal_codes_beyond_top_k_are_counted_in_order():
    logits = np.log(np.float32([[0.3, 0.1, 0.2, 0.2, 0.2]]))

    def kept(**fields):
        return np.flatnonzero(np.isfinite(SortedFilter(**fields)(logits))).tolist()

    assert kept(top_k=2) == [0, 2, 3, 4]
    assert kept(top_k=2, top_p=0.1) == [0]
    assert kept(top_k=2, top_p=0.5) == [0, 2]  # 0.3 / 0.9 and then 0.2 / 0.9
    assert kept(top_k=2, top_p=0.6) == [0, 2, 3]
    assert kept(top_k=2, top_p=0.9) == [0, 2, 3, 4]
    assert kept(top_p=0.45) == [0, 2] and kept(top_p=0.95) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(('top_p', 'left'), [(0.0, 1), (0.5, 2), (1.0, 3)])
def test_a_recorded_top_p_of_0_leaves_one_code(top_p, left):
    keep = recorded_filter({'top_k': 3, 'top_p': top_p})
    logits = np.log(np.float32([[0.1, 0.2, 0.4, 0.3]]))
    assert np.isfinite(keep(logits)).sum() == left


@pytest.mark.parametrize('scale', [0.0, 0.5, 1.0, 4.0])
def test_recorded_mixed_logits_are_the_formula_at_any_scale(scale, tmp_path):
    cond, uncond = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    config, arrays = {'cfg_scales': [scale]}, {'cond_logits': cond, 'uncond_logits': uncond}
    mixed = RasterFilters(Case(tmp_path, config, arrays)).guided(str(scale))
    np.testing.assert_allclose(mixed, uncond + scale * (cond - uncond), atol=1e-6)


@pytest.mark.parametrize('size', SIZES)
def test_published_sizes_have_the_published_parameters(size):
    for cls, expected in zip((LlamaGen, LlamaGenText), PUBLISHED[size], strict=True):
        model = cls.published(size)
        table = ConversionTable.from_config(model, [])
        count = sum(math.prod(leaf.shape) for leaf in table.abstract.values())
        constants = sum(table.abstract[name].size for name in model.constants)
        assert count - constants == expected
        assert len(table.shapes) == 7 * model.depth + (4 if cls is LlamaGen else 6)
        assert table.shapes['layers.0.attention.wqkv.weight'] == (3 * model.width, model.width)
        specs = {n: TensorSpec(s, np.dtype(np.float32)) for n, s in table.shapes.items()}
        specs['layers.0.attention.kv_cache.k_cache'] = specs['freqs_cis'] = specs['norm.weight']
        assert infer.transformer(specs, ModelOptions()) == model
        table.check(Names(specs, {}), size)
        assert len(table.ignored_names(specs)) == 2


@pytest.mark.parametrize('model', [CLASSES, SHARED, TEXT], ids=['class', 'shared heads', 'text'])
def test_state_dicts_are_converted_there_and_back(model):
    state = to_state(llamagen_entries(model), params_of(model))
    found = to_params(llamagen_entries(model), state | {'freqs_cis': np.zeros(3)}, BUFFERS)
    assert not found.missing and not found.unknown
    jax.tree.map(np.testing.assert_array_equal, found.params, meta.unbox(params_of(model)))
    specs = {name: TensorSpec(x.shape, x.dtype) for name, x in state.items()}
    options = ModelOptions(heads=4, sides=(3,))
    inferred = infer.transformer(specs, options)
    assert dataclasses.replace(inferred, grid=model.grid) == model


def test_wrong_sizes_of_a_file_are_named():
    shapes = {n: s.shape for n, s in to_state(llamagen_entries(SHARED), params_of(SHARED)).items()}
    specs = {n: TensorSpec(shape, np.dtype(np.float32)) for n, shape in shapes.items()}
    with pytest.raises(UserError, match='2 layers of 16 channels.* give them with --heads'):
        infer.transformer(specs, ModelOptions())
    with pytest.raises(UserError, match='give the heads with --heads'):
        infer.transformer(specs, ModelOptions(heads=3))
    with pytest.raises(UserError, match='one scale, not the 2'):
        infer.transformer(specs, ModelOptions(heads=4, sides=(1, 2)))
    with pytest.raises(UserError, match='images of 1024 px'):
        infer.transformer(specs, ModelOptions(heads=4, size=1024))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'kv_heads': 3}, 'kv_heads must be 0 or divide'),
        ({'grid': (0, 4)}, 'grid must lie in'),
        ({'norm_epsilon': 0.0}, 'norm_epsilon must lie in'),
        ({'names': ('a', 'b')}, 'names must be 5 different ones'),
        ({'heads': 3}, 'does not divide into 3 heads'),
    ],
)
def test_wrong_sizes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CLASSES, **fields)


def test_a_model_folder_samples_classes_alone_and_together(tmp_path):
    tokenizer = folder.StoredTokenizer(config=CODES, params=tiny.random_params(CODES.abstract()))
    content = folder.StoredModel(
        config=SAMPLED, params=params_of(SAMPLED), tokenizer=tokenizer, text=None
    )
    folder.write(tmp_path / 'model', content)
    pipe = star_jax.load(tmp_path / 'model')
    options = {'guidance': 2.0, 'top_k': 5, 'top_p': 0.0, 'guided_steps': 6}
    images = pipe(['b', '0', 'e'], **options)
    assert images.shape == (3, 8, 8, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(pipe(['0'], seed=1, **options)[0], images[1])
    kept = pipe(['b', '0', 'e'], image=list(images[::-1]), keep=2, **options)
    again = pipe(['0'], seed=1, image=images[1], keep=2, **options)
    np.testing.assert_array_equal(again[0], kept[1])
    with pytest.raises(UserError, match='keep is 5, but .* has 4 rows of tokens: choose 0 to 4'):
        pipe(['b'], image=images[0], keep=5, **options)
    whole = pipe(['b', '0', 'e'], image=list(images[::-1]), keep=4, **options)
    bound = bind(pipe.tokenizer, pipe._params['tokenizer'])
    rebuilt = np.asarray(pipe.tokenizer.to_uint8(bound(pixels.to_signed(images[::-1]))))
    assert np.abs(whole.astype(int) - rebuilt).max() <= 1
    np.testing.assert_array_equal(pipe(['b', '0', 'e'], **options), images)
    small = star_jax.load(tmp_path / 'model', size=star_jax.ImageSize(resize=6))
    codes = np.stack([pipe._encode(pipe._params['tokenizer'], x[None]) for x in images])
    canvas = bound.embed(codes).reshape(3, 4, 4, -1)
    expected = pixels.to_nearest_uint8(resize.bicubic(bound.decode_unclamped(canvas), 6, 6))
    found = small(['b', '0', 'e'], image=list(images), keep=4, **options)
    assert small.size == (6, 6) and np.abs(found.astype(int) - expected).max() <= 1
    assert f'{sum(x.size for x in jax.tree.leaves(params_of(SAMPLED))):,}' in repr(pipe)


def test_a_model_folder_samples_from_cleaned_prompts(tmp_path):
    pytest.importorskip('ftfy')
    model = dataclasses.replace(TEXT, grid=(2, 2), text_width=32, text_rows=12)
    codes = dataclasses.replace(CODES, grid=(2, 2))
    content = folder.StoredModel(
        config=model,
        params=params_of(model),
        tokenizer=folder.StoredTokenizer(config=codes, params=tiny.random_params(codes.abstract())),
        text=folder.TextEncoderReference(**load_text(tiny.TEXT).reference()),
    )
    folder.write(tmp_path / 'model', content)
    pipe = star_jax.load(tmp_path / 'model')
    options = {'guidance': 2.0, 'top_k': 0, 'top_p': 0.0}
    assert pipe.encoder.length == model.text_rows
    images = pipe(['a RED   circle', 'a red circle'], seed=[3, 3], **options)
    assert images.shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(images[0], images[1])


@pytest.mark.parametrize('model', [SQUARE, TEXT], ids=['class', 'text'])
def test_published_files_are_converted_back_bit_for_bit(tmp_path, model):
    """By class: the file of a trainer, with a buffer; by text: the bare dict of FSDP."""
    state = to_state(llamagen_entries(model), params_of(model))
    state['freqs_cis'] = np.zeros((3, 2, 2), np.float32)
    wrapped = {f'model.{name}': x for name, x in state.items()} if model is SQUARE else state
    vae = to_state(raster_vq_entries(CODES), tiny.random_params(CODES.abstract()))
    vae['quantize.codebook_used'] = np.zeros(65536, np.float32)
    file = save(tmp_path / 'gpt.safetensors', wrapped)
    beside = save(tmp_path / 'vq.safetensors', vae)
    words = ['--tokenizer', beside, '--heads', '4', '--groups', '4']
    words += ['--sides', str(model.grid[0]), '--out', str(tmp_path / 'folder')]
    assert cli.main(['convert', file, *words]) == 0
    assert cli.main(['convert', str(tmp_path / 'folder'), '--out', str(tmp_path / 'back')]) == 0
    back = {name: load_file(tmp_path / 'back' / f'{name}.{FLAT}') for name in PARTS}
    assert_same(back['tokenizer'], vae)
    assert_same(back['transformer'], state)
    found = models.read(tmp_path / 'folder')
    assert found.config == model
    assert found.tokenizer.config == dataclasses.replace(CODES, grid=model.grid)


def test_embeddings_and_matrices_decay_and_norms_and_constants_do_not():
    """Weight decay of tensors with two axes or more (LlamaGen specification 4.1)."""
    for model in (CLASSES, SHARED, TEXT):
        decays = weights.flatten(decayed(params_of(model)))
        for entry in llamagen_entries(model):
            axes = len(entry.torch_shape(_shape(model, entry)))
            expected = axes > 1 and entry.param_name not in model.constants
            assert decays[entry.param_name] == expected, entry.param_name


def _shape(model, entry):
    shape = weights.flatten(params_of(model))[entry.param_name].shape
    return shape if entry.row is None else shape[1:]


def test_a_longer_raster_starts_with_the_model_of_a_shorter_one():
    longer = dataclasses.replace(TEXT, grid=(6, 6))
    state = TrainState.start(params_of(longer), optax.sgd(0.1), ema=False)
    fitted = warm_start.fit(params_of(TEXT), state, 'the model of stage 1')
    jax.tree.map(np.testing.assert_array_equal, fitted, params_of(TEXT))


def test_dropout_is_of_the_key_and_of_training_alone():
    model = dataclasses.replace(CLASSES, row_dropout=0.5, dropout=0.0)
    codes, labels = np.zeros((64, 11), np.int32), LabelCondition(np.zeros(64, np.int32))

    @jax.jit
    def features(params, key):
        keys_B = jax.random.split(key, 64)
        return bind(model.build(), params).features(codes, labels, noise_B=keys_B)

    one, same, other = (features(params_of(model), jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    plain = bind(model.build(), params_of(model)).features(codes, labels)
    assert np.abs(plain - plain[:1]).max() < 1e-5  # equal images
    assert np.abs(one - one[:1]).max() > 0.01
    keys_B, ones = jax.random.split(jax.random.key(0), 1000), np.ones((1000, 100), np.float32)
    dropped = layers.dropout(keys_B, ones, 0.1)
    np.testing.assert_array_equal(layers.dropout(keys_B[9:12], ones[:3], 0.1), dropped[9:12])
    assert np.unique(dropped).tolist() == [0.0, np.float32(1 / 0.9)]
    assert abs(float(dropped.mean()) - 1) < 5e-3


def test_stochastic_depth_replaces_dropout_in_blocks():
    deep = dataclasses.replace(CLASSES, drop_path=0.1)
    assert CLASSES.build().block.dropout == 0.1 and deep.build().block.dropout == 0.0
    assert deep.build().drops and deep.build().row_dropout == 0.1


@pytest.mark.slow
def test_a_run_trains_and_samples(tmp_path):
    grid = (8, 8)  # 16 px, the least side of shapes
    codes = dataclasses.replace(CODES, grid=grid)
    tokenizer = folder.StoredTokenizer(config=codes, params=tiny.random_params(codes.abstract()))
    folder.write(tmp_path / 'tokenizer', tokenizer)
    run = dataclasses.replace(
        tiny.STAR,
        model=dataclasses.replace(
            CLASSES,
            grid=grid,
            classes=len(TRAINED),
            names=tuple(' '.join(pair) for pair in TRAINED),
        ),
        tokenizer=str(tmp_path / 'tokenizer'),
    )
    assert train.main(run, tmp_path / 'run')
    pipe = star_jax.load(tmp_path / 'run' / 'model')
    assert pipe([' '.join(TRAINED[0])], guidance=2.0).shape == (1, 16, 16, 3)
