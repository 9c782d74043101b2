"""Do the text encoders of CLIP and T5 equal those of transformers, on any devices?"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import traverse_util
from flax.core import meta
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from star_jax.errors import UserError
from star_jax.parallel.mesh import MeshShape
from star_jax.text.cache import FeatureCache
from star_jax.text.encoder import load
from star_jax.text.encoder_folder import LazyTensors
from star_jax.text.t5 import distance_buckets
from star_jax.text.tokens import Tokens
from star_jax.text.tower import MaskedMean, PaddedMean, StateOfHighestId, StateOfToken

GOLDEN = Path(__file__).parent / 'golden'
FOLDERS = ('tiny_clip', 'tiny_t5')
LENGTHS = {'tiny_clip': None, 'tiny_t5': 48}


def recorded(name: str) -> tuple[list[str], dict[str, np.ndarray]]:
    path = GOLDEN / name / 'outputs.safetensors'
    with safetensors.safe_open(path, 'numpy') as file:
        captions = json.loads(file.metadata()['captions'])
    return captions, load_file(path)


def assert_close(actual: jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def assert_same_params(encoder, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, encoder.params, expected.params)


@pytest.fixture(scope='module')
def towers() -> dict:
    return {name: load(str(GOLDEN / name), length=LENGTHS[name]) for name in FOLDERS}


@pytest.fixture
def t5_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / 'tiny_t5', tmp_path / 't5'))


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / 'tiny_clip', tmp_path / 'clip'))


# Recorded outputs of transformers


@pytest.mark.parametrize('name', FOLDERS)
def test_features_equal_recorded_features(towers, name):
    tower, (captions, expected) = towers[name], recorded(name)
    tokens = tower.tokenize(captions)
    np.testing.assert_array_equal(tokens.mask_BT, expected['mask'])
    np.testing.assert_array_equal(
        tokens.ids_BT * tokens.mask_BT, expected['ids'] * expected['mask']
    )
    jitted = jax.jit(tower.apply)(tower.params, tokens)
    for text in (jitted, tower.encode(captions)):
        assert_close(text.states_BTE, expected['states'])
        assert_close(text.pooled_BE, expected['pooled'])
        np.testing.assert_array_equal(text.mask_BT, expected['mask'])


@pytest.mark.parametrize(('name', 'tokens'), [('tiny_clip', 2), ('tiny_t5', 1)])
def test_empty_prompt_has_special_tokens(towers, name, tokens):
    assert towers[name].encode(['']).mask_BT.sum() == tokens


def test_default_length_is_that_of_the_architecture(towers):
    assert (
        towers['tiny_clip'].length == 24
    )  # the size of its position table, like the 77 of Stable Diffusion
    assert load(str(GOLDEN / 'tiny_t5')).length == 120
    with pytest.raises(UserError, match='8 to 24'):
        load(str(GOLDEN / 'tiny_clip'), length=25)


def test_distance_buckets():
    """Raffel et al. 2020: 32 buckets, the last from distance 91 (128 by its formula) on."""
    row_TT = distance_buckets(200, 32, 128)
    first = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    for row, distance in enumerate(first):
        assert row_TT[150, 150 - distance] == row
        if distance:
            assert row_TT[0, distance] == 16 + row
            assert row_TT[150, 151 - distance] == row - 1


# Pooled vectors


def test_pools():
    states_BTE = np.arange(2 * 4 * 1, dtype=np.float32).reshape(2, 4, 1)
    tokens = Tokens(
        ids_BT=np.array([[1, 7, 9, 7], [1, 5, 9, 9]], np.int32),
        mask_BT=np.array([[1, 1, 0, 0], [1, 1, 1, 0]], np.int32),
    )
    for pool, expected in (
        (MaskedMean(), [0.5, 5.0]),
        (PaddedMean(), [1.5, 5.5]),
        (StateOfToken(9), [0.0, 6.0]),
        (StateOfToken(7), [1.0, 4.0]),
        (StateOfHighestId(), [1.0, 6.0]),
    ):
        np.testing.assert_array_equal(pool(states_BTE, tokens)[:, 0], expected)


def test_end_of_text_follows_the_config(towers, clip_folder):
    """Old configs have a wrong end id, so transformers takes the highest; new configs have it."""
    assert towers['tiny_clip'].pool == StateOfHighestId()
    path = clip_folder / 'text_encoder' / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {'eos_token_id': 68}))
    assert load(str(clip_folder)).pool == StateOfToken(68)


def test_mean_over_padding_needs_the_full_length_and_another_pool_does_not(towers, tmp_path):
    captions, expected = recorded('tiny_t5')
    masked = load(str(GOLDEN / 'tiny_t5'), length=48, pool=MaskedMean())
    text = masked.encode(captions)
    assert_close(text.states_BTE, expected['states'])
    means = expected['states'].sum(1) / expected['mask'].sum(1, keepdims=True)
    assert_close(text.pooled_BE, means)
    assert np.abs(means - expected['pooled']).max() > 0.1
    assert masked.identity != towers['tiny_t5'].identity
    cached = FeatureCache(towers['tiny_t5'], tmp_path).features(captions)
    np.testing.assert_allclose(cached.pooled_BE, expected['pooled'], atol=2e-3)


# Folders


def test_encoder_loads_from_its_folder_or_the_whole_model(towers, clip_folder):
    whole = towers['tiny_clip']
    inner = load(str(clip_folder / 'text_encoder'))
    assert inner.sha256 == whole.sha256
    for path in (clip_folder / 'tokenizer').iterdir():
        shutil.move(path, clip_folder / 'text_encoder')
    alone = load(str(shutil.move(clip_folder / 'text_encoder', clip_folder / 'tower')))
    assert alone.sha256 == whole.sha256
    assert alone.token_ids(['a red circle']) == whole.token_ids(['a red circle'])


def test_whole_clip_loads_as_its_text_tower(towers, clip_folder):
    folder = clip_folder / 'text_encoder'
    weights = {}
    for path in folder.glob('*.safetensors'):
        weights |= load_file(path)
        path.unlink()
    named = {f'text_model.{name}': array for name, array in weights.items()}
    others = (
        'vision_model.encoder.layers.0.mlp.fc1.weight',
        'text_projection.weight',
        'logit_scale',
    )
    save_file(named | {name: np.ones(3) for name in others}, folder / 'model.safetensors')
    text = json.loads((folder / 'config.json').read_text())
    for entry in ('text_config', 'text_config_dict'):
        config = {'model_type': 'clip', 'hidden_size': 5, 'text_config': {}, entry: text}
        (folder / 'config.json').write_text(json.dumps(config))
        whole = load(str(clip_folder))
        assert whole.pool == towers['tiny_clip'].pool
        assert_same_params(whole, towers['tiny_clip'])


def test_t5_encoder_alone_equals_that_of_the_whole_t5(towers, t5_folder):
    weights = load_file(t5_folder / 'model.safetensors')
    alone = {name: array for name, array in weights.items() if name.startswith('encoder.')}
    save_file(
        alone | {'encoder.embed_tokens.weight': weights['shared.weight']},
        t5_folder / 'model.safetensors',
    )
    assert_same_params(load(str(t5_folder), length=48), towers['tiny_t5'])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'feed_forward_proj': 'gated-swish'}, 'gated-swish'),
        ({'feed_forward_proj': 'relu'}, r'no tensor .*DenseReluDense\.wi\.weight'),
        ({'num_heads': 4}, 'do not belong together'),
        ({'relative_attention_num_buckets': 2}, 'relative_attention_num_buckets'),
        ({'pad_token_id': 10**5}, 'pad_token_id is 100000'),
    ],
)
def test_unsupported_config_is_refused_with_the_reason(t5_folder, changes, message):
    path = t5_folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load(str(t5_folder))


def test_sentencepiece_model_error_names_the_missing_package(t5_folder, monkeypatch):
    (t5_folder / 'tokenizer.json').unlink()
    (t5_folder / 'spiece.model').write_bytes(b'')
    monkeypatch.setattr('star_jax.text.tokens.find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install sentencepiece'):
        load(str(t5_folder))


def test_sentencepiece_tokens_equal_those_of_sentencepiece(t5_folder):
    sentencepiece = pytest.importorskip('sentencepiece')
    (t5_folder / 'tokenizer.json').unlink()
    captions, _ = recorded('tiny_t5')
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions[1:] * 20),
        model_prefix=str(t5_folder / 'spiece'),
        **{'vocab_size': 40, 'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1},
        hard_vocab_limit=False,
        minloglevel=2,
    )
    config = {'tokenizer_class': 'T5Tokenizer', 'extra_ids': 0}
    (t5_folder / 'tokenizer_config.json').write_text(json.dumps(config))
    spiece = sentencepiece.SentencePieceProcessor(str(t5_folder / 'spiece.model'))
    expected = [[*spiece.encode(caption)[:47], 1] for caption in captions[:3]]
    assert load(str(t5_folder), length=48).token_ids(captions[:3]) == expected


# Devices


@pytest.mark.parametrize('name', ('tiny_bert', *FOLDERS))
def test_every_parameter_is_read_once_on_first_use(monkeypatch, name):
    accessed = []
    read = LazyTensors.__getitem__
    monkeypatch.setattr(
        LazyTensors, '__getitem__', lambda self, key: accessed.append(key) or read(self, key)
    )
    tower = load(str(GOLDEN / name))
    assert not accessed
    flat = traverse_util.flatten_dict(meta.unbox(tower.abstract_params()), sep='/')
    filled = dict.fromkeys(flat, 0)
    for mapping in tower.weights.mappings:
        filled[mapping.param] += np.prod(mapping.part_shape(flat[mapping.param].shape))
    assert filled == {name: leaf.size for name, leaf in flat.items()}
    assert jax.tree.map(jnp.shape, tower.params) == jax.tree.map(
        jnp.shape, meta.unbox(tower.abstract_params())
    )
    assert sorted(accessed) == sorted(mapping.tensor for mapping in tower.weights.mappings)
    assert not any('decoder' in name or 'pooler' in name for name in accessed)


@pytest.mark.parametrize(
    ('name', 'axes'),
    [('tiny_clip', {'fsdp': 2, 'tensor': 4}), ('tiny_t5', {'fsdp': 2, 'tensor': 1})],
)
def test_encoder_is_sharded_over_a_mesh(name, axes):
    if jax.device_count() < 8:
        pytest.skip('needs 8 devices')
    mesh, (captions, expected) = MeshShape(**axes).build(), recorded(name)
    tower = load(str(GOLDEN / name), length=LENGTHS[name], mesh=mesh)
    flat = traverse_util.flatten_dict(tower.params, sep='/')
    qkv = next(leaf for path, leaf in flat.items() if path.endswith('qkv/kernel'))
    assert qkv.sharding.spec == PartitionSpec(None, 'fsdp', None, 'tensor', None)
    for path, leaf in flat.items():
        num_shards = np.prod([axes[axis] for axis in leaf.sharding.spec if axis])
        assert leaf.addressable_shards[0].data.size * num_shards == leaf.size, path
    assert len([path for path, leaf in flat.items() if any(leaf.sharding.spec)]) >= len(flat) - 1
    text = tower.encode(captions)
    assert_close(text.states_BTE, expected['states'])
    assert_close(text.pooled_BE, expected['pooled'])


def test_mesh_that_does_not_divide_an_encoder_is_refused():
    if jax.device_count() < 8:
        pytest.skip('needs 8 devices')
    tower = load(str(GOLDEN / 'tiny_t5'), mesh=MeshShape(tensor=8).build())
    with pytest.raises(UserError, match='does not divide over the mesh'):
        _ = tower.params


def test_bfloat16_is_close_and_has_another_identity(towers):
    name = 'tiny_t5'
    captions, expected = recorded(name)
    half = load(str(GOLDEN / name), length=LENGTHS[name], dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype('bfloat16')}
    text = half.encode(captions)
    assert text.states_BTE.dtype == text.pooled_BE.dtype == np.float32
    error = np.abs(text.states_BTE - expected['states']).max() / np.abs(expected['states']).max()
    assert 1e-4 < error < 0.05
    assert half.identity != towers[name].identity
    assert half.sha256 == towers[name].sha256
    with pytest.raises(UserError, match='float16'):
        load(str(GOLDEN / name), dtype='float16')


# Against PyTorch, where it is installed


CLIPS = {
    'quick': dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=80),
    'named_end': dict(hidden_size=32, num_hidden_layers=2, hidden_act='gelu', eos_token_id=68),
    'stable_diffusion': dict(
        hidden_size=1024,
        num_hidden_layers=1,
        num_attention_heads=16,
        intermediate_size=4096,
        hidden_act='gelu',
    ),
}
T5S = {
    'relu': dict(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4),
    'silu': dict(d_model=32, d_kv=16, d_ff=64, num_heads=2, feed_forward_proj='gated-silu'),
    'gelu': dict(d_model=32, d_kv=16, d_ff=64, num_heads=2, feed_forward_proj='gelu'),
    'xl': dict(
        d_model=2048, d_kv=64, d_ff=5120, num_layers=1, num_heads=32, feed_forward_proj='gated-gelu'
    ),
    'ul2': dict(
        d_model=512, d_kv=256, d_ff=2048, num_layers=2, num_heads=4, feed_forward_proj='gated-silu'
    ),
}


def randomise(torch, model) -> None:
    """Randomises every parameter at a scale that keeps attention far from uniform.

    T5 scales its initial queries instead of its scores. Without that scale (scores of deviation 25
    at a head width of 256) attention is so nearly one-hot that PyTorch's float32 is 1.4e-5 from its
    float64, and the float32 of this library 2.0e-5: a float32 comparison at 1e-5 would fail there.
    """
    head_width = getattr(model.config, 'd_kv', 1)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.normal_(1.0 if 'norm' in name and 'bias' not in name else 0.0, 0.3)
            elif 'embed' in name or 'shared' in name or 'relative' in name:
                parameter.normal_(0.0, 1.0)
            elif name.endswith('SelfAttention.q.weight'):
                parameter.normal_(0.0, 3.0 * (parameter.shape[1] * head_width) ** -0.5)
            else:
                parameter.normal_(0.0, 1.2 * parameter.shape[1] ** -0.5)


@pytest.mark.parametrize('name', CLIPS)
@pytest.mark.parametrize('kind', ['CLIPTextModel', 'CLIPTextModelWithProjection', 'CLIPModel'])
def test_random_clip_matches_transformers(tmp_path, name, kind):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    fields = {'eos_token_id': 2, 'num_attention_heads': 4, 'intermediate_size': 64, **CLIPS[name]}
    config = transformers.CLIPTextConfig(vocab_size=69, **fields)
    if kind == 'CLIPModel':
        vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
        config = transformers.CLIPConfig(text_config=config.to_dict(), vision_config=vision)
    model = getattr(transformers, kind)(config).eval()
    randomise(torch, model)
    model.save_pretrained(tmp_path / 'text_encoder')
    shutil.copytree(GOLDEN / 'tiny_clip' / 'tokenizer', tmp_path / 'tokenizer')
    encoder = load(str(tmp_path))
    captions, _ = recorded('tiny_clip')
    tokens = encoder.tokenize(captions)
    assert tokens.ids_BT.shape[1] == 77
    inner = getattr(model, 'text_model', model)
    with torch.no_grad():
        output = inner(
            input_ids=torch.tensor(tokens.ids_BT).long(),
            attention_mask=torch.tensor(tokens.mask_BT),
        )
    text = encoder.encode(captions)
    assert_close(text.states_BTE, output.last_hidden_state.numpy() * tokens.mask_BT[:, :, None])
    assert_close(text.pooled_BE, output.pooler_output.numpy())


@pytest.mark.parametrize('name', T5S)
def test_random_t5_matches_transformers(tmp_path, name):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=49, **T5S[name])).eval()
    randomise(torch, model)
    model.save_pretrained(tmp_path, max_shard_size='20MB')
    shutil.copy(GOLDEN / 'tiny_t5' / 'tokenizer.json', tmp_path)
    encoder = load(str(tmp_path))
    captions, _ = recorded('tiny_t5')
    tokens = encoder.tokenize(captions)
    with torch.no_grad():
        states_BTE = model(
            input_ids=torch.tensor(tokens.ids_BT).long(),
            attention_mask=torch.tensor(tokens.mask_BT),
        ).last_hidden_state.numpy()
    text = encoder.encode(captions)
    assert_close(text.states_BTE, states_BTE * tokens.mask_BT[:, :, None])
    assert_close(text.pooled_BE, states_BTE.mean(1))


def test_distance_buckets_match_transformers():
    torch = pytest.importorskip('torch')
    t5 = pytest.importorskip('transformers.models.t5.modeling_t5')
    positions_T = torch.arange(600)
    for count, max_distance in (
        (32, 128),
        (12, 20),
        (64, 256),
        (32, 64),
        (16, 1000),
        (32, 131),
        (128, 512),
    ):
        expected = t5.T5Attention._relative_position_bucket(
            positions_T[None] - positions_T[:, None], num_buckets=count, max_distance=max_distance
        )
        np.testing.assert_array_equal(distance_buckets(600, count, max_distance), expected.numpy())
