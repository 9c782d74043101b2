"""Do weights and model folders come back as they were, and is a damaged one named?"""

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
    """One array of every type that models use, scalars and an empty one among them."""
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
        one, other = np.asarray(a[name]), np.asarray(b[name])
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.tobytes() == other.tobytes(), name


def test_flatten_names_leaves_by_path_and_unflatten_undoes_it():
    nested = {'a': {'b': 1, 'c': {'d': 2}}, 'e': 3}
    assert weights.flatten(nested) == {'a/b': 1, 'a/c/d': 2, 'e': 3}
    assert weights.unflatten(weights.flatten(nested)) == nested
    with pytest.raises(ValueError, match="without '/'"):
        weights.flatten({'a/b': 1})


@pytest.mark.parametrize('shard_bytes, count', [(10**9, 1), (110, 2), (1, 6)])
def test_weights_come_back_bit_for_bit(tmp_path, shard_bytes, count):
    path = tmp_path / 'model.safetensors'
    weights.save(path, tree(), metadata={'step': '3'}, shard_bytes=shard_bytes)
    assert len(list(tmp_path.glob('*.safetensors'))) == count
    assert path.exists() == (count == 1)
    assert_same(weights.load(path), tree())
    assert_same(weights.load(path, like=tree()), tree())
    assert weights.read_metadata(path) == {'step': '3'}


def test_shards_are_listed_as_hugging_face_does(tmp_path):
    weights.save(tmp_path / 'model.safetensors', tree(), shard_bytes=110)
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == 96 + 10 + 8 + 4 + 4
    assert index['weight_map']['layers/kernel'] == 'model-00001-of-00002.safetensors'
    assert set(index['weight_map']) == set(weights.flatten(tree()))


def test_one_file_replaces_shards_and_shards_one_file(tmp_path):
    path = tmp_path / 'model.safetensors'
    for shard_bytes, step in ((10**9, 1), (110, 2), (10**9, 3)):
        weights.save(path, tree() | {'step': np.int32(step)}, shard_bytes=shard_bytes)
        assert weights.load(path)['step'] == step


def test_arrays_in_any_memory_order_and_on_any_mesh_are_saved_by_value(tmp_path):
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.NamedSharding(mesh, jax.P('a', 'b'))
    given = {'turned': np.asfortranarray(values), 'cut': values[:, ::2]}
    weights.save(tmp_path / 'x.safetensors', given | {'split': jax.device_put(values, where)})
    loaded = weights.load(tmp_path / 'x.safetensors')
    assert_same(loaded, {'cut': values[:, ::2], 'split': values, 'turned': values})


def test_a_failed_save_leaves_the_earlier_file(tmp_path):
    path = tmp_path / 'model.safetensors'
    weights.save(path, tree())
    with pytest.raises(Exception, match='object'):
        weights.save(path, {'x': np.array([object()])})
    assert_same(weights.load(path), tree())
    assert list(tmp_path.iterdir()) == [path]


def test_floats_take_the_type_that_is_expected(tmp_path):
    path = tmp_path / 'model.safetensors'
    weights.save(path, {'x': jnp.arange(3, dtype=jnp.bfloat16)})
    like = {'x': jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert_same(weights.load(path, like), {'x': np.arange(3, dtype=np.float32)})


def test_other_arrays_than_expected_are_named(tmp_path):
    path = tmp_path / 'model.safetensors'
    weights.save(path, {'a': np.zeros((2, 3)), 'b': np.zeros(2), 'n': np.zeros(2, np.int32)})
    like = {'a': np.zeros((3, 2)), 'c': {'d': np.zeros(2)}, 'n': np.zeros(2, np.float32)}
    with pytest.raises(UserError) as caught:
        weights.load(path, like)
    for said in (
        '1 missing (c/d)',
        '1 unknown (b)',
        'a is float64[2, 3], expected float64[3, 2]',
        'n is int32[2], expected float32[2]',
    ):
        assert said in str(caught.value)
    with pytest.raises(UserError, match=r'20 missing \(x0, x1, x10, .*x15 and 12 more\)'):
        weights.load(path, {f'x{n}': np.zeros(2) for n in range(20)})


@pytest.mark.parametrize('size', [0, 5, 100, -1])
def test_a_file_cut_short_is_named(tmp_path, size):
    path = tmp_path / 'model.safetensors'
    weights.save(path, tree())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match='model.safetensors: the file is damaged or was cut short'):
        weights.load(path)


def test_missing_files_and_wrong_indices_are_named(tmp_path):
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
    index.write_text('{}')
    with pytest.raises(UserError, match="'weight_map'"):
        weights.load(path)


def test_sha256_is_that_of_the_bytes(tmp_path):
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


def read(place) -> folder.StoredModel:
    return folder.read(place)


def test_a_model_comes_back_from_its_folder(tmp_path):
    place = tmp_path / 'runs' / 'model'
    folder.write(place, MODEL)
    model = read(place)
    assert (model.config, model.text) == (MODEL.config, MODEL.text)
    assert model.sampling == MODEL.sampling == folder.read_sampling(place)
    assert model.tokenizer.config == ALONE.config
    assert_same(model.params, MODEL.params)
    assert_same(model.tokenizer.params, ALONE.params)
    assert sorted(entry.name for entry in place.iterdir()) == [
        'config.json',
        'model.safetensors',
        'tokenizer.safetensors',
    ]
    assert json.loads((place / 'config.json').read_text()) == {
        'family': 'toy',
        'model': {'depth': 3, 'sides': [1, 2]},
        'tokenizer': {'kind': 'Quantizer', 'codes': 16},
        'text': {'source': 'some/encoder', 'sha256': '0' * 64},
        'sampling': {
            'guidance': 1.5,
            'top_k': 7,
            'top_p': 0.8,
            'temperature': 1.0,
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
    assert [entry.name for entry in place.parent.iterdir()] == ['model']


def test_a_model_may_have_no_text(tmp_path):
    folder.write(tmp_path / 'model', dataclasses.replace(MODEL, text=None))
    assert read(tmp_path / 'model').text is None


@pytest.mark.parametrize('content', [MODEL, ALONE])
def test_every_folder_holds_a_tokenizer(tmp_path, content):
    folder.write(tmp_path / 'model', content)
    tokenizer = folder.read_tokenizer(tmp_path / 'model')
    assert tokenizer.config == ALONE.config
    assert_same(tokenizer.params, ALONE.params)


def test_a_tokenizer_is_readable_beside_a_model_of_an_unknown_family(tmp_path):
    folder.write(tmp_path / 'model', MODEL)
    data = json.loads((tmp_path / 'model' / 'config.json').read_text())
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(data | {'family': 'new'}))
    folder.read_tokenizer(tmp_path / 'model')
    with pytest.raises(UserError, match='family "new" is unknown, expected one of \'toy\''):
        read(tmp_path / 'model')


def test_a_tokenizer_alone_is_no_model(tmp_path):
    folder.write(tmp_path / 'model', ALONE)
    assert not (tmp_path / 'model' / 'model.safetensors').exists()
    with pytest.raises(UserError, match='holds only a tokenizer'):
        read(tmp_path / 'model')


def test_a_model_folder_is_replaced_and_what_others_put_there_stays(tmp_path):
    place = tmp_path / 'model'
    folder.write(place, MODEL)
    (place / 'README.md').write_text('mine')
    folder.write(place, ALONE)
    assert sorted(entry.name for entry in place.iterdir()) == [
        'README.md',
        'config.json',
        'tokenizer.safetensors',
    ]
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize('name, text', [('notes.txt', 'mine'), ('config.json', '{"batch": 3}')])
def test_a_folder_of_something_else_is_not_overwritten(tmp_path, name, text):
    place = tmp_path / 'run'
    place.mkdir()
    (place / name).write_text(text)
    with pytest.raises(UserError, match='not overwritten'):
        folder.write(place, MODEL)
    assert [entry.name for entry in place.iterdir()] == [name]
    assert (place / name).read_text() == text


def test_a_failed_write_leaves_the_earlier_folder(tmp_path):
    place = tmp_path / 'model'
    folder.write(place, MODEL)
    with pytest.raises(UserError, match='nan or infinity'):
        folder.write(place, dataclasses.replace(MODEL, config=Toy(depth=float('nan'))))
    assert read(place).config == MODEL.config
    assert list(tmp_path.iterdir()) == [place]


def rewrite(place, **fields) -> None:
    data = json.loads((place / 'config.json').read_text())
    (place / 'config.json').write_text(json.dumps(data | fields))


@pytest.mark.parametrize(
    'fields, said',
    [
        ({'model': {'dept': 3}}, "config.json, model: dept: .* did you mean 'depth'"),
        ({'tokenizer': {'codes': 3}}, "tokenizer: kind null is unknown, .* 'Quantizer'"),
        ({'tokenizer': None}, 'tokenizer: kind null is unknown'),
        ({'family': ['toy']}, 'family .* is unknown'),
        ({'text': {'source': 3}}, 'config.json, text: .*sha256: missing'),
        ({'more': 1}, 'expected the fields family, model, sampling, text, tokenizer'),
    ],
)
def test_a_wrong_config_is_named(tmp_path, fields, said):
    folder.write(tmp_path / 'model', MODEL)
    rewrite(tmp_path / 'model', **fields)
    with pytest.raises(UserError, match=said):
        read(tmp_path / 'model')


def test_folders_that_hold_no_model_are_named(tmp_path):
    with pytest.raises(UserError, match='there is no such folder'):
        read(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='has no config.json'):
        read(tmp_path)
    folder.write(tmp_path / 'model', MODEL)
    (tmp_path / 'model' / 'model.safetensors').unlink()
    with pytest.raises(UserError, match='model.safetensors: there is no such file'):
        read(tmp_path / 'model')


def test_a_place_is_a_folder_or_a_hub_id(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        if name == 'owner/missing':
            raise OSError('no such repository\nsecond line')
        return str(tmp_path)

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here' / 'model').mkdir(parents=True)
    assert folder.find('here/model').resolve() == tmp_path / 'here' / 'model'
    assert folder.find('owner/model-2.0') == tmp_path
    assert asked == ['owner/model-2.0']
    with pytest.raises(UserError, match=r'from the hub \(no such repository\)'):
        folder.find('owner/missing')
    for place in ('nowhere', './owner/model', '/owner/model', 'a/b/c', '../model'):
        with pytest.raises(UserError, match='no such folder'):
            folder.find(place)
    assert asked == ['owner/model-2.0', 'owner/missing']
