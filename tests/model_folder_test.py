"""Are weights and model folders read as they were written, and are damaged ones reported?"""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.checkpoint import folder, weights
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.families import registry
from star_jax.protocols import Family, TokenizerConfig


def tree() -> dict:
    """One array of every type that models use, including scalars and an empty one."""
    return {
        'layers': {
            'kernel': jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4) / 7,
            'scale': jnp.linspace(-1, 1, 5).astype(jnp.bfloat16),
        },
        'codebook': {'counts': np.array([1, 2**31 - 1], np.int32), 'seed': np.uint32(2**32 - 1)},
        'step': jnp.int32(3),
        'none': np.zeros((0, 4), np.float32),
    }


def assert_same(a: dict, b: dict) -> None:
    """Equal names, types, shapes and bits."""
    a, b = weights.flatten(a), weights.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        array_a, array_b = np.asarray(a[name]), np.asarray(b[name])
        assert (array_a.dtype, array_a.shape) == (array_b.dtype, array_b.shape), name
        assert array_a.tobytes() == array_b.tobytes(), name


def test_unflatten_inverts_flatten():
    nested = {'a': {'b': 1, 'c': {'d': 2}}, 'e': 3}
    assert weights.flatten(nested) == {'a/b': 1, 'a/c/d': 2, 'e': 3}
    assert weights.unflatten(weights.flatten(nested)) == nested
    with pytest.raises(ValueError, match="without '/'"):
        weights.flatten({'a/b': 1})


@pytest.mark.parametrize('shard_bytes, count', [(10**9, 1), (110, 2), (1, 6)])
def test_weights_are_loaded_bit_for_bit(tmp_path, shard_bytes, count):
    path = tmp_path / 'model.safetensors'
    weights.save(path, tree(), metadata={'step': '3'}, shard_bytes=shard_bytes)
    assert len(list(tmp_path.glob('*.safetensors'))) == count
    assert path.exists() == (count == 1)
    assert_same(weights.load(path), tree())
    assert_same(weights.load(path, like=tree()), tree())
    assert weights.read_metadata(path) == {'step': '3'}


def test_shard_index_has_the_hugging_face_layout(tmp_path):
    weights.save(tmp_path / 'model.safetensors', tree(), shard_bytes=110)
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == 96 + 10 + 8 + 4 + 4
    assert index['weight_map']['layers/kernel'] == 'model-00001-of-00002.safetensors'
    assert set(index['weight_map']) == set(weights.flatten(tree()))


def test_save_replaces_shards_by_one_file_and_back(tmp_path):
    path = tmp_path / 'model.safetensors'
    for shard_bytes, step in ((10**9, 1), (110, 2), (10**9, 3)):
        weights.save(path, tree() | {'step': np.int32(step)}, shard_bytes=shard_bytes)
        assert weights.load(path)['step'] == step


def test_save_accepts_any_memory_order_and_sharding(tmp_path):
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P('a', 'b'))
    arrays = {'turned': np.asfortranarray(values), 'cut': values[:, ::2]}
    weights.save(tmp_path / 'x.safetensors', arrays | {'split': jax.device_put(values, sharding)})
    loaded = weights.load(tmp_path / 'x.safetensors')
    assert_same(loaded, {'cut': values[:, ::2], 'split': values, 'turned': values})


def test_failed_save_keeps_the_earlier_file(tmp_path):
    path = tmp_path / 'model.safetensors'
    weights.save(path, tree())
    with pytest.raises(Exception, match='object'):
        weights.save(path, {'x': np.array([object()])})
    assert_same(weights.load(path), tree())
    assert list(tmp_path.iterdir()) == [path]


def test_load_casts_floats_to_the_expected_type(tmp_path):
    path = tmp_path / 'model.safetensors'
    weights.save(path, {'x': jnp.arange(3, dtype=jnp.bfloat16)})
    like = {'x': jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert_same(weights.load(path, like), {'x': np.arange(3, dtype=np.float32)})


def test_load_names_unexpected_arrays(tmp_path):
    path = tmp_path / 'model.safetensors'
    weights.save(path, {'a': np.zeros((2, 3)), 'b': np.zeros(2), 'n': np.zeros(2, np.int32)})
    like = {'a': np.zeros((3, 2)), 'c': {'d': np.zeros(2)}, 'n': np.zeros(2, np.float32)}
    with pytest.raises(UserError) as caught:
        weights.load(path, like)
    for message in (
        '1 missing (c/d)',
        '1 unknown (b)',
        'a is float64[2, 3], expected float64[3, 2]',
        'n is int32[2], expected float32[2]',
    ):
        assert message in str(caught.value)
    with pytest.raises(UserError, match=r'20 missing \(x0, x1, x10, .*x15 and 12 more\)'):
        weights.load(path, {f'x{n}': np.zeros(2) for n in range(20)})


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_load_names_a_truncated_file(tmp_path, size):
    path = tmp_path / 'model.safetensors'
    weights.save(path, tree())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match='model.safetensors: the file is damaged or was cut short'):
        weights.load(path)


def test_load_names_missing_files_and_wrong_indices(tmp_path):
    path = tmp_path / 'model.safetensors'
    with pytest.raises(UserError, match='model.safetensors: there is no such file'):
        weights.load(path)
    weights.save(path, tree(), shard_bytes=110)
    (tmp_path / 'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(UserError, match='model-00002-of-00002.safetensors: there is no such file'):
        weights.load(path)
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text('{"weight_map": {"x": "../../secret.safetensors"}}')
    with pytest.raises(UserError, match='files in the same folder'):
        weights.load(path)
    for name in ('', '.', '..', 'a\0b', 'a/b', 'x' * 300, 3):
        index.write_text(json.dumps({'weight_map': {'x': name}}))
        with pytest.raises(UserError, match='files in the same folder'):
            weights.load(path)
    index.write_text('{}')
    with pytest.raises(UserError, match="'weight_map'"):
        weights.load(path)


def test_sha256_is_computed_from_the_bytes(tmp_path):
    path = tmp_path / 'x'
    path.write_bytes(b'star' * 100_000)
    assert weights.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match='cannot be read'):
        weights.sha256(tmp_path / 'y')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Family):
    depth: int = 2
    sides: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer(TokenizerConfig):
    codes: int = 8


ALONE = folder.StoredTokenizer(config=Quantizer(codes=16), params={'codebook': np.ones((16, 2))})
MODEL = folder.StoredModel(
    config=Toy(depth=3),
    params=tree(),
    tokenizer=ALONE,
    text=folder.TextEncoderReference(source='some/encoder', sha256='0' * 64),
    sampling=Settings(guidance=1.5, top_k=7),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(folder, 'FAMILIES', {'toy': Toy})
    monkeypatch.setattr(folder, 'TOKENIZERS', {'Quantizer': Quantizer})
    monkeypatch.setitem(registry.FAMILIES, 'toy', Toy)
    monkeypatch.setitem(registry.TOKENIZERS, 'Quantizer', Quantizer)


def read(path) -> folder.StoredModel:
    return folder.read(path)


def test_model_is_read_as_it_was_written(tmp_path):
    path = tmp_path / 'runs' / 'model'
    folder.write(path, MODEL)
    model = read(path)
    assert (model.config, model.text) == (MODEL.config, MODEL.text)
    assert model.sampling == MODEL.sampling == folder.read_sampling(path)
    assert model.tokenizer.config == ALONE.config
    assert_same(model.params, MODEL.params)
    assert_same(model.tokenizer.params, ALONE.params)
    assert sorted(entry.name for entry in path.iterdir()) == [
        'SHA256SUMS',
        'config.json',
        'model.safetensors',
        'tokenizer.safetensors',
    ]
    assert json.loads((path / 'config.json').read_text()) == {
        'family': 'toy',
        'model': {'depth': 3, 'sides': [1, 2]},
        'tokenizer': {'kind': 'Quantizer', 'codes': 16},
        'text': {'source': 'some/encoder', 'sha256': '0' * 64},
        'sampling': {
            'guidance': 1.5,
            'top_k': 7,
            'top_p': 0.8,
            'temperature': 1.0,
            'guidance_layers': [0],
            'guidance_per_step': [],
            'guided_steps': 0,
            'temperature_per_step': [],
            'negative': '',
            'stop': 0,
            'smooth': False,
            'stable': {
                'version': 'off',
                'mode': 'arccos',
                'first': 0,
                'last': 0,
                'once': False,
            },
        },
    }
    assert [entry.name for entry in path.parent.iterdir()] == ['model']


def test_model_without_text_encoder_is_read(tmp_path):
    folder.write(tmp_path / 'model', dataclasses.replace(MODEL, text=None))
    assert read(tmp_path / 'model').text is None


@pytest.mark.parametrize('content', [MODEL, ALONE])
def test_tokenizer_is_read_from_every_folder(tmp_path, content):
    folder.write(tmp_path / 'model', content)
    tokenizer = folder.read_tokenizer(tmp_path / 'model')
    assert tokenizer.config == ALONE.config
    assert_same(tokenizer.params, ALONE.params)


def test_tokenizer_is_read_beside_a_model_of_an_unknown_family(tmp_path):
    folder.write(tmp_path / 'model', MODEL)
    data = json.loads((tmp_path / 'model' / 'config.json').read_text())
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(data | {'family': 'new'}))
    folder.read_tokenizer(tmp_path / 'model')
    with pytest.raises(UserError, match='family "new" is unknown, expected one of \'toy\''):
        read(tmp_path / 'model')


def test_folder_with_only_a_tokenizer_is_no_model(tmp_path):
    folder.write(tmp_path / 'model', ALONE)
    assert not (tmp_path / 'model' / 'model.safetensors').exists()
    with pytest.raises(UserError, match='holds only a tokenizer'):
        read(tmp_path / 'model')


def test_write_replaces_a_model_folder_and_keeps_other_files(tmp_path):
    path = tmp_path / 'model'
    folder.write(path, MODEL)
    (path / 'README.md').write_text('mine')
    folder.write(path, ALONE)
    assert sorted(entry.name for entry in path.iterdir()) == [
        'README.md',
        'SHA256SUMS',
        'config.json',
        'tokenizer.safetensors',
    ]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('name, text', [('notes.txt', 'mine'), ('config.json', '{"batch": 3}')])
def test_write_refuses_to_overwrite_another_folder(tmp_path, name, text):
    path = tmp_path / 'run'
    path.mkdir()
    (path / name).write_text(text)
    with pytest.raises(UserError, match='not overwritten'):
        folder.write(path, MODEL)
    assert [entry.name for entry in path.iterdir()] == [name]
    assert (path / name).read_text() == text


def test_failed_write_keeps_the_earlier_folder(tmp_path):
    path = tmp_path / 'model'
    folder.write(path, MODEL)
    with pytest.raises(UserError, match='nan or infinity'):
        folder.write(path, dataclasses.replace(MODEL, config=Toy(depth=float('nan'))))
    assert read(path).config == MODEL.config
    assert list(tmp_path.iterdir()) == [path]


def rewrite(path, **fields) -> None:
    data = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps(data | fields))


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'model': {'dept': 3}}, "config.json, model: dept: .* did you mean 'depth'"),
        ({'tokenizer': {'codes': 3}}, "tokenizer: kind null is unknown, .* 'Quantizer'"),
        ({'tokenizer': None}, 'tokenizer: kind null is unknown'),
        ({'family': ['toy']}, 'family .* is unknown'),
        ({'text': {'source': 3}}, 'config.json, text: .*sha256: missing'),
        ({'more': 1}, 'expected the fields family, model, sampling, text, tokenizer'),
    ],
)
def test_read_names_an_invalid_config_field(tmp_path, fields, message):
    folder.write(tmp_path / 'model', MODEL)
    rewrite(tmp_path / 'model', **fields)
    with pytest.raises(UserError, match=message):
        read(tmp_path / 'model')


def test_read_names_folders_without_a_model(tmp_path):
    with pytest.raises(UserError, match='there is no such folder'):
        read(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='has no config.json'):
        read(tmp_path)
    folder.write(tmp_path / 'model', MODEL)
    (tmp_path / 'model' / 'model.safetensors').unlink()
    with pytest.raises(UserError, match='model.safetensors: there is no such file'):
        read(tmp_path / 'model')


def test_find_accepts_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    requests = []

    def download(name, allow_patterns):
        requests.append(name)
        if name == 'owner/missing':
            raise OSError('no such repository\nsecond line')
        return str(tmp_path)

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here' / 'model').mkdir(parents=True)
    assert folder.find('here/model').resolve() == tmp_path / 'here' / 'model'
    assert folder.find('owner/model-2.0') == tmp_path
    assert requests == ['owner/model-2.0']
    with pytest.raises(UserError, match=r'from the hub \(no such repository\)'):
        folder.find('owner/missing')
    for path in ('nowhere', './owner/model', '/owner/model', 'a/b/c', '../model'):
        with pytest.raises(UserError, match='no such folder'):
            folder.find(path)
    assert requests == ['owner/model-2.0', 'owner/missing']
