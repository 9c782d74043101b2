"""Are published files converted to model folders and back bit for bit, or refused by name?"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import gzip
import itertools
import json
import math
import os
import shutil
import sys
import types
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from star_jax import cli
from star_jax.checkpoint import folder, models, stored, weights
from star_jax.checkpoint.stored import StreamedArray, TensorSpec
from star_jax.convert import infer, published
from star_jax.convert.entries import to_state
from star_jax.convert.infer import SIDES, ModelOptions
from star_jax.convert.layouts import layout
from star_jax.convert.star import star_entries, vq_entries
from star_jax.convert.table import ConversionTable
from star_jax.convert.var import var_entries
from star_jax.convert.writers import FLAT
from star_jax.core.schedule import square_grids
from star_jax.errors import UserError
from star_jax.families.star import Refinement, Star
from star_jax.families.var import Var
from star_jax.nn.positions import Learned
from star_jax.text.encoder import load as load_text
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ

GOLDEN = Path(__file__).parent / 'golden' / 'star' / 'names'
PARTS = ('transformer', 'tokenizer')
SMALL = {'depth': 3, 'width': 16, 'heads': 2, 'codes': 32, 'channels': 4}
STAR = Star(**SMALL, sides=(1, 2, 4), text_width=32)
VQ_SMALL = VQ(
    autoencoder=Autoencoder(width=8, multipliers=(1, 2), blocks=1, groups=4),
    grids=square_grids((1, 2, 4)),
    codes=32,
    channels=4,
)


def published_specs(name: str) -> dict[str, TensorSpec]:
    text = gzip.decompress((GOLDEN / f'{name}.txt.gz').read_bytes()).decode()
    lines = [line.split(' | ') for line in text.splitlines() if not line.startswith('#')]
    return {
        name: TensorSpec(tuple(json.loads(shape)), np.dtype(kind)) for name, shape, kind, _ in lines
    }


class Names:
    """A published file with names, shapes and buffers, but without parameters."""

    def __init__(self, specs, computed=None):
        self._specs, self._buffers = specs, computed or {}

    def specs(self):
        return self._specs

    def read(self, name, row=None):
        return self._buffers[name]()


def assert_idle(table: ConversionTable, specs) -> None:
    """A file of a model that was trained here also has every ignored tensor of the published one:
    its loaders are strict."""
    idle = {name: make() for name, make in table.layout.idle.items()}
    assert set(idle) == set(table.ignored_names(specs))
    assert all((array.shape, array.dtype) == tuple(specs[name]) for name, array in idle.items())


@pytest.mark.parametrize(
    ('name', 'options', 'expected', 'parameters'),
    [
        ('star_d16_256', {}, Star(), 274_934_272),
        ('star_d30_256_or_512', {}, Star(depth=30, width=1920, heads=30), 1_678_731_016),
        (
            'star_d30_256_or_512',
            {'size': 512},
            Star(depth=30, width=1920, heads=30, sides=SIDES[512]),
            1_678_731_016,
        ),
        (
            'star_d30_1024',
            {},
            Star(depth=30, width=1920, heads=30, sides=SIDES[1024]),
            1_678_738_696,
        ),
        (
            'star_d30_1024_sampler',
            {},
            Star(depth=30, width=1920, heads=30, sides=SIDES[1024], refinement=Refinement()),
            1_828_798_562,
        ),
        ('var_d16_256', {}, Var(), 310_283_520),
        (
            'var_d36_512_shared_aln',
            {},
            Var(depth=36, width=2304, heads=36, sides=SIDES[512], shared_adaln=True),
            2_353_893_904,
        ),
    ],
)
def test_model_config_is_inferred_from_published_names(name, options, expected, parameters):
    specs = published_specs(name)
    config = infer.transformer(specs, ModelOptions(**options))
    assert config == expected
    table = ConversionTable.from_config(config, specs)
    table.check(
        Names(specs, table.buffers), name
    )  # every tensor is a parameter, a buffer, or ignored
    shapes = {entry.torch_name: table.shape(entry) for entry in table.entries}
    computed = {name: make() for name, make in table.buffers.items()}
    ignored = table.ignored_names(specs)
    assert set(specs) == {*shapes, *computed, *ignored}
    assert all(specs[name].shape == shape for name, shape in shapes.items())
    assert all((computed[n].shape, computed[n].dtype) == tuple(specs[n]) for n in computed)
    assert_idle(table, specs)
    unused = sum(math.prod(specs[name].shape) for name in ignored)
    assert sum(math.prod(leaf.shape) for leaf in table.abstract.values()) + unused == parameters


def test_tokenizer_config_is_inferred_from_published_names():
    specs = published_specs('vae_ch160v4096z32')
    assert infer.tokenizer(specs, ModelOptions()) == VQ()
    table = ConversionTable.from_config(VQ(), specs)
    table.check(Names(specs), 'vae')
    assert table.ignored_names(specs) == ['quantize.ema_vocab_hit_SV']
    assert_idle(table, specs)
    assert sum(math.prod(leaf.shape) for leaf in table.abstract.values()) == 108_948_355


def state_of(config, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """A state dict as published: random parameters, buffers and unused tensors."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(dtype), tiny.random_params(config.abstract())
    )
    parts = layout(config)
    state = to_state(parts.entries, params) | {n: make() for n, make in parts.buffers.items()}
    if isinstance(config, VQ):
        hits = rng.normal(size=(10, config.codes)).astype(np.float32)
        state |= {'quantize.ema_vocab_hit_SV': hits}
    if isinstance(config, Star):
        state |= {'class_emb.weight': rng.normal(size=(11, config.width)).astype(np.float32)}
        if config.shared_adaln and config.refinement:
            for layer in range(config.refinement.blocks):
                name = f'feat_extract_blocks.{layer}.ada_gss'
                state[name] = rng.normal(size=(1, 1, 6, 16))
    return state


def save(path: Path, state) -> str:
    save_file({name: np.ascontiguousarray(x) for name, x in state.items()}, path)
    return str(path)


OPTIONS = ('--sides', '1', '2', '4', '--groups', '4')


def there_and_back(tmp_path: Path, state, tokenizer, *options: str) -> dict[str, dict]:
    """The two state dicts of the conversion back."""
    file = save(tmp_path / 'model.safetensors', state)
    beside = save(tmp_path / 'vae.safetensors', tokenizer)
    words = ['--tokenizer', beside, '--sides', '1', '2', '4', '--groups', '4', *options]
    assert cli.main(['convert', file, *words, '--out', str(tmp_path / 'folder')]) == 0
    assert cli.main(['convert', str(tmp_path / 'folder'), '--out', str(tmp_path / 'back')]) == 0
    return {name: load_file(tmp_path / 'back' / f'{name}.{FLAT}') for name in PARTS}


def assert_same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


ROTARY = dataclasses.replace(STAR, refinement=Refinement(first=2))


@pytest.mark.parametrize(
    'config',
    [
        STAR,
        dataclasses.replace(STAR, positions=Learned(), cross_attention=False, mlp_ratio=2.0),
        dataclasses.replace(ROTARY, shared_adaln=True, qk_norm=False),
        Var(**SMALL, sides=(1, 2, 4), classes=5),
        Var(**SMALL, sides=(1, 2, 4), classes=5, shared_adaln=True, qk_norm=False),
    ],
    ids=['star', 'star_learned', 'star_head_adaln', 'var', 'var_adaln'],
)
def test_file_is_converted_back_bit_for_bit(tmp_path, config):
    state, vae = state_of(config), state_of(VQ_SMALL, seed=1)
    back = there_and_back(tmp_path, state, vae, '--heads', '2', '--first-refined', '2')
    assert_same(back['transformer'], state)
    assert_same(back['tokenizer'], vae)
    model = models.read(tmp_path / 'folder')
    assert model.config == config
    assert model.tokenizer.config == VQ_SMALL
    entries = (star_entries if isinstance(config, Star) else var_entries)(config)
    again = to_state(entries, model.params)
    assert_same(again, {name: state[name] for name in again})


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_conversion_keeps_narrow_floats(tmp_path, dtype):
    state, vae = state_of(STAR, dtype=dtype), state_of(VQ_SMALL)
    assert_same(there_and_back(tmp_path, state, vae)['transformer'], state)
    kinds = {str(x.dtype) for x in jax.tree.leaves(models.read(tmp_path / 'folder').params)}
    assert kinds == {'float32'}


@pytest.mark.parametrize(
    ('phis', 'name'),
    [(1, 'qresi'), (3, '{}'), (2, 'qresi_ls.{}'), (2, '{}')],
)
def test_conversion_keeps_every_naming_of_phi(tmp_path, phis, name):
    vq = dataclasses.replace(VQ_SMALL, phis=phis)
    state = state_of(vq)
    renamed = {}
    for key, array in state.items():
        if 'quant_resi' in key:
            number = key.split('.')[-2] if phis > 1 else ''
            key = f'quantize.quant_resi.{name.format(number)}.{key.rpartition(".")[2]}'
        renamed[key] = array
    assert_same(there_and_back(tmp_path, state_of(STAR), renamed)['tokenizer'], renamed)


@pytest.mark.parametrize(
    ('phis', 'names'),
    [
        (1, ['quantize.quant_resi.qresi']),
        (2, ['quantize.quant_resi.qresi_ls.0', 'quantize.quant_resi.qresi_ls.1']),
        (3, [f'quantize.quant_resi.{scale}' for scale in range(3)]),
    ],
)
def test_phi_names_default_to_those_of_the_original_code(phis, names):
    entries = vq_entries(dataclasses.replace(VQ_SMALL, phis=phis), [])
    kernels = [entry.torch_name for entry in entries if entry.param_name == 'quantiser/phi_kernel']
    assert kernels == [f'{name}.weight' for name in names]


def test_tokenizer_of_a_folder_is_converted_back_completely(tmp_path):
    names = ((name.replace('.qresi_ls', ''), x) for name, x in state_of(VQ_SMALL).items())
    vae, state = dict(names), state_of(STAR)
    there_and_back(tmp_path, state_of(STAR, seed=2), vae)
    file, sides = str(tmp_path / 'model.safetensors'), ['--sides', '1', '2', '4']
    words = [*sides, '--tokenizer', str(tmp_path / 'folder'), '--out', str(tmp_path / 'other')]
    assert cli.main(['convert', save(Path(file), state), *words]) == 0
    assert cli.main(['convert', str(tmp_path / 'other'), '--out', str(tmp_path / 'again')]) == 0
    assert_same(load_file(tmp_path / 'again' / f'tokenizer.{FLAT}'), vae)
    assert_same(load_file(tmp_path / 'again' / f'transformer.{FLAT}'), state)


def test_tokenizer_file_is_converted_to_a_folder(tmp_path):
    state = state_of(VQ_SMALL)
    file = save(tmp_path / 'vae.safetensors', state)
    words = ['--sides', '1', '2', '4', '--groups', '4', '--out', str(tmp_path / 'folder')]
    assert cli.main(['convert', file, *words]) == 0
    assert folder.has_only_tokenizer(tmp_path / 'folder')
    assert cli.main(['convert', str(tmp_path / 'folder'), '--out', str(tmp_path / 'back')]) == 0
    assert_same(load_file(tmp_path / 'back' / f'tokenizer.{FLAT}'), state)


@pytest.mark.parametrize('head', [False, True], ids=['alone', 'with a head'])
def test_files_of_a_model_that_was_never_published_are_complete(tmp_path, head):
    star = dataclasses.replace(ROTARY, shared_adaln=True) if head else STAR
    tiny.write_model(tmp_path / 'model', star)
    assert cli.main(['convert', str(tmp_path / 'model'), '--out', str(tmp_path / 'back')]) == 0
    for part, config in {'transformer': star, 'tokenizer': tiny.TOKENIZER.model}.items():
        state = load_file(tmp_path / 'back' / f'{part}.{FLAT}')
        assert set(state) == set(state_of(config))
        assert not any(state[name].any() for name in layout(config).idle)


class Tensor:
    """The part of a torch tensor that conversion uses."""

    def __init__(self, array):
        self._array, self.dtype, self.shape = array, f'torch.{array.dtype}', array.shape

    def numpy(self):
        return self._array


@pytest.fixture
def torch(monkeypatch) -> dict:
    """A torch module whose `load` returns the content that a test sets, and records its calls."""
    state_of(STAR)  # at its first use einops looks for a real torch
    fake = {'content': None, 'asked': []}

    def load(path, **options):
        fake['asked'].append(options)
        return fake['load'](path) if 'load' in fake else fake['content']

    monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(load=load))
    return fake


def test_trainer_file_has_both_parts(tmp_path, torch):
    state, vae = state_of(STAR), state_of(VQ_SMALL)
    parts = {
        'var_wo_ddp': {name: Tensor(x) for name, x in state.items()},
        'vae_local': {name: Tensor(x) for name, x in vae.items()},
    }
    torch['content'] = {'epoch': 1, 'iter': 2, 'trainer': {'config': {}, 'var_opt': {}, **parts}}
    (tmp_path / 'star.pth').write_bytes(published.torch_files.ZIP)
    words = ['--sides', '1', '2', '4', '--groups', '4', '--out', str(tmp_path / 'folder')]
    assert cli.main(['convert', str(tmp_path / 'star.pth'), *words]) == 0
    assert torch['asked'] == [{'map_location': 'cpu', 'weights_only': True, 'mmap': True}]
    assert models.read(tmp_path / 'folder').config == STAR
    assert cli.main(['convert', str(tmp_path / 'folder'), '--out', str(tmp_path / 'back')]) == 0
    assert_same(load_file(tmp_path / 'back' / f'transformer.{FLAT}'), state)


def refused(tmp_path, capsys, state, *words: str) -> str:
    """The error message for a file."""
    file = save(tmp_path / 'model.safetensors', state)
    beside = save(tmp_path / 'vae.safetensors', state_of(VQ_SMALL))
    words = words or ('--sides', '1', '2', '4', '--groups', '4', '--tokenizer', beside)
    assert cli.main(['convert', file, *words, '--out', str(tmp_path / 'folder')]) == 2
    assert not (tmp_path / 'folder').exists()
    return capsys.readouterr().err


def test_convert_names_each_wrong_tensor(tmp_path, capsys):
    state = state_of(STAR)
    del state['blocks.1.ffn.fc2.bias']
    state['surprise'] = np.zeros(3, np.float32)
    state['word_embed.bias'] = np.zeros(3, np.float32)
    said = refused(tmp_path, capsys, state)
    assert '1 missing (blocks.1.ffn.fc2.bias)' in said
    assert '1 unknown (surprise)' in said
    assert 'word_embed.bias is float32[3], expected float32[16]' in said


def test_any_integer_mlp_width_is_inferred():
    star = dataclasses.replace(STAR, width=60, heads=3, mlp_ratio=123 / 60)  # 122.99... in all
    assert star.abstract()['blocks']['ffn']['fc1']['bias'].value.shape == (3, 123)
    specs = {name: TensorSpec(x.shape, x.dtype) for name, x in state_of(star).items()}
    assert infer.transformer(specs, ModelOptions(sides=(1, 2, 4))) == star


def test_infer_refuses_tensors_of_another_rank():
    for config in (STAR, dataclasses.replace(STAR, positions=Learned()), VQ_SMALL):
        tell = infer.tokenizer if isinstance(config, VQ) else infer.transformer
        specs = {name: TensorSpec(x.shape, x.dtype) for name, x in state_of(config).items()}
        options = ModelOptions(sides=(1, 2, 4), groups=4, heads=2)
        for name, shape in itertools.product(specs, [(), (3,), (2, 3), (1, 2, 3, 4, 5)]):
            with contextlib.suppress(UserError):
                tell(specs | {name: TensorSpec(shape, np.dtype(np.float32))}, options)
    flat = {'word_embed.weight': TensorSpec((16,), np.dtype(np.float32))}
    specs = {name: TensorSpec(x.shape, x.dtype) for name, x in state_of(STAR).items()}
    with pytest.raises(UserError, match=r'word_embed.weight has the shape \[16\], expected 2 axes'):
        infer.transformer(specs | flat, options)


@pytest.mark.parametrize('kinds', [('float16', 'float32'), ('bfloat16', 'float16', 'float64')])
def test_layers_of_several_types_are_promoted_and_converted_back(tmp_path, kinds):
    state, vae = state_of(STAR), state_of(VQ_SMALL)
    kept = dict(zip(state, itertools.cycle(kinds)))
    state = {
        name: x.astype(kept[name] if 'zero' not in name else x.dtype) for name, x in state.items()
    }
    assert_same(there_and_back(tmp_path, state, vae)['transformer'], state)
    flat = weights.flatten(weights.load(tmp_path / 'folder' / 'model.safetensors'))
    bias = [state[f'blocks.{layer}.ffn.fc2.bias'].astype('f8') for layer in range(3)]
    np.testing.assert_array_equal(flat['blocks/ffn/fc2/bias'].astype('f8'), bias)


def test_types_that_files_cannot_hold_stay_wide(tmp_path, torch):
    state = {name: x.astype('float8_e4m3fnuz') for name, x in state_of(STAR).items()}
    table = ConversionTable.from_config(STAR, state)
    torch['content'] = {name: Tensor(x) for name, x in state.items()}
    (tmp_path / 'x.pth').write_bytes(published.torch_files.ZIP)
    tensors = published.read(tmp_path / 'x.pth').parts['transformer'].tensors
    assert not table.converted_types(tensors, table.params(tensors, []))


@pytest.mark.parametrize('dtype', ['float8_e4m3fn', 'float8_e5m2'])
def test_weights_of_8_bits_are_widened_and_converted_back(tmp_path, dtype):
    state, vae = state_of(STAR), state_of(VQ_SMALL)
    state = {name: x if 'zero' in name else x.astype(dtype) for name, x in state.items()}
    stored.write(tmp_path / 'fp8.safetensors', state)
    words = ['--tokenizer', save(tmp_path / 'vae.SAFETENSORS', vae), *OPTIONS]
    file, out = str(tmp_path / 'fp8.safetensors'), str(tmp_path / 'folder')
    assert cli.main(['convert', file, *words, '--out', out]) == 0
    params = weights.flatten(models.read(out).params)
    assert {str(x.dtype) for x in params.values()} == {'float32'}
    bias = np.stack([state[f'blocks.{layer}.ffn.fc2.bias'] for layer in range(3)])
    np.testing.assert_array_equal(params['blocks/ffn/fc2/bias'], bias.astype(np.float32))
    assert cli.main(['convert', out, '--out', str(tmp_path / 'back')]) == 0
    back = stored.StoredTensors([tmp_path / 'back' / f'transformer.{FLAT}'])
    assert_same({name: back.read(name) for name in back.names()}, state)


def wrapped(state, *words: str) -> dict:
    """The state dict with names of wrappers before its names, and between them in a block."""
    prefix = ''.join(f'{word}.' for word in words)
    inner = '.'.join(['blocks.0', *words[:1], ''])
    return {prefix + name.replace('blocks.0.', inner): x for name, x in state.items()}


WRAPPERS = sorted(published.WRAPPERS)


def test_names_of_wrappers_are_removed_in_any_order(tmp_path, capsys):
    state, vae = state_of(STAR), save(tmp_path / 'vae.bin', state_of(VQ_SMALL))
    orders = [x for count in (1, 2, 3) for x in itertools.permutations(WRAPPERS, count)]
    for words in orders:
        file = save(tmp_path / 'model.safetensors', wrapped(state, *words))
        part = published.read(Path(file)).parts['transformer']
        assert set(part.wrappers) == set(words) and part.path == ''
        assert_same({name: part.tensors.read(name) for name in part.tensors.names()}, state)
    out = str(tmp_path / 'folder')
    assert cli.main(['convert', file, '--tokenizer', vae, *OPTIONS, '--out', out]) == 0
    found = to_state(star_entries(STAR), models.read(out).params)
    assert_same(found, {name: state[name] for name in found})
    assert all(word in capsys.readouterr().out for word in words[:1])


def nested(place: str, state: object, **more: object) -> dict:
    content = state
    for word in reversed(place.split('.')):
        content = {word: content}
    return {'epoch': 3, 'lr': 1e-3} | content | more


@pytest.mark.parametrize(
    'place', ['state_dict', 'model', 'ema', 'module', 'model_ema', 'trainer.var_wo_ddp', 'a.b.c']
)
@pytest.mark.parametrize('prefix', ['', 'model.', 'module.net.'])
def test_state_dict_is_found_anywhere_in_a_file(tmp_path, torch, place, prefix):
    state = {f'{prefix}{name}': Tensor(x) for name, x in state_of(STAR).items()}
    unused = {'loss.weight': Tensor(np.zeros(2))} if prefix else {}
    torch['content'] = nested(place, state | unused, optimizer={'state': {0: Tensor(np.ones(1))}})
    (tmp_path / 'x.CKPT').write_bytes(published.torch_files.ZIP)
    found = published.read(tmp_path / 'x.CKPT')
    (name, part), tensors = found.parts.popitem(), state_of(STAR)
    assert name == 'transformer' and part.tensors.specs().keys() == tensors.keys()
    np.testing.assert_array_equal(
        part.tensors.read('head_logits.bias'), tensors['head_logits.bias']
    )
    assert 'optimizer' in found.unused and len(found.unused) == 1 + bool(unused)


def test_ema_is_taken_unless_another_part_is_named(tmp_path, torch, capsys):
    states = [state_of(STAR, seed) for seed in range(3)]
    dicts = [{name: Tensor(x) for name, x in state.items()} for state in states]
    torch['content'] = {'model': dicts[0], 'ema': dicts[1], 'args': object()}
    (tmp_path / 'x.pth').write_bytes(published.torch_files.ZIP)
    bias = 'head_logits.bias'
    for part, expected in {'': 1, 'ema': 1, 'model': 0}.items():
        found = published.read(tmp_path / 'x.pth', part).parts['transformer']
        np.testing.assert_array_equal(found.tensors.read(bias), states[expected][bias])
    torch['content']['ema'] |= {'n_averaged': Tensor(np.array(3)), 'decay': Tensor(np.ones(1))}
    found = published.read(tmp_path / 'x.pth')
    assert found.parts['transformer'].tensors.specs().keys() == states[1].keys()
    assert {'model', 'ema.n_averaged', 'ema.decay'} == set(found.unused)
    with pytest.raises(UserError, match="no state dict 'best': it has model, ema"):
        published.read(tmp_path / 'x.pth', 'best')
    torch['content'] = {'student': dicts[0], 'teacher': dicts[1]}
    with pytest.raises(UserError, match=r'several .* \(student, teacher\): choose one with --part'):
        published.read(tmp_path / 'x.pth')
    torch['content'] = dicts[0] | {f'module.{bias}': dicts[1][bias]}
    with pytest.raises(UserError, match='two tensors head_logits.bias'):
        published.read(tmp_path / 'x.pth')


def test_gradients_are_detached(tmp_path, torch):
    class Parameter(Tensor):
        requires_grad = True

        def numpy(self):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad")

        def detach(self):
            return Tensor(self._array)

    state = state_of(STAR)
    torch['content'] = {name: Parameter(x) for name, x in state.items()}
    (tmp_path / 'x.pth').write_bytes(published.torch_files.ZIP)
    tensors = published.read(tmp_path / 'x.pth').parts['transformer'].tensors
    assert_same({name: tensors.read(name) for name in tensors.names()}, state)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16', 'float64'])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, capsys, dtype, value):
    names = ['blocks.1.ffn.fc2.bias', 'head_logits.weight']
    state = {name: x if 'zero' in name else x.astype(dtype) for name, x in state_of(STAR).items()}
    for name in names:
        state[name].flat[-1] = value
    said = refused(tmp_path, capsys, state)
    assert 'NaN or infinite' in said and all(name in said for name in names), said
    file, vae = str(tmp_path / 'model.safetensors'), str(tmp_path / 'vae.safetensors')
    words = ['--tokenizer', vae, *OPTIONS, '--allow-nonfinite', '--out', str(tmp_path / 'folder')]
    assert cli.main(['convert', file, *words]) == 0
    found = to_state(star_entries(STAR), models.read(tmp_path / 'folder').params)
    assert not np.isfinite(found[names[0]]).all()  # a folder that was made so is loaded


def test_harmless_classes_are_read_as_stand_ins(tmp_path, torch, monkeypatch):
    """torch refuses a file at first; its classes decide what happens then."""
    known, loads, state = [], [], state_of(STAR)

    @contextlib.contextmanager
    def safe_globals(classes):
        known.extend(classes)
        yield
        known.clear()

    def load(path, **options):
        assert options['weights_only']
        loads.append(list(known))
        if not known:
            raise TypeError('Unsupported global')
        return {name: Tensor(x) for name, x in state.items()}

    classes = ['argparse.Namespace', 'pathlib.PosixPath', 'numpy._core.multiarray.scalar']
    serialization = types.SimpleNamespace(
        safe_globals=safe_globals, get_unsafe_globals_in_checkpoint=lambda path: classes
    )
    module = types.SimpleNamespace(load=load, serialization=serialization)
    monkeypatch.setitem(sys.modules, 'torch', module)
    (tmp_path / 'x.pth').write_bytes(published.torch_files.ZIP)
    assert published.read(tmp_path / 'x.pth').parts.keys() == {'transformer'}
    assert {name for _, name in loads[1]} == set(classes)
    for part, _ in loads[1]:  # anything may be built of them, and nothing is kept
        vars(part('a', 1))
        part.__new__(part, 'a').__setstate__({'b': 2})
    for name in ('posix.system', 'builtins.eval', '__main__.Config', 'numpy.f2py.x', 'os.PathLike'):
        classes[:] = ['argparse.Namespace', name]
        with pytest.raises(UserError, match=f'plain data .{name}., which could execute code'):
            published.read(tmp_path / 'x.pth')


def test_real_files_of_torch_are_read(tmp_path):
    torch = pytest.importorskip('torch')
    tensors = {name: torch.from_numpy(x) for name, x in state_of(STAR).items()}
    beside = {
        'args': argparse.Namespace(lr=1.0, path=Path('a')),
        'best': np.float32(3),
        'counts': collections.defaultdict(list, {'a': [np.arange(2)]}),
        'time': datetime.datetime(2026, 1, 1),
    }
    for number, zipped in enumerate([True, False]):
        file = tmp_path / f'{number}.PT'
        content = {'state_dict': wrapped(tensors, 'module'), **beside}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        found = published.read(file).parts['transformer'].tensors
        assert_same({name: found.read(name) for name in found.names()}, state_of(STAR))
        torch.save(content | {'x': torch.nn.Linear}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match='torch.nn.*Linear.*could execute code'):
            published.read(file)
    torch.save(tensors, file, pickle_protocol=5)
    with pytest.raises(UserError, match='its own pickle protocol, 2'):
        published.read(file)


def test_classes_of_old_files_are_named_by_errors(tmp_path, torch, monkeypatch):
    """torch does not list them; it refuses one after another."""
    waiting = ['pathlib.PurePosixPath', 'numpy.dtype', 'argparse.Namespace', 'builtins.list']
    known, state = [], state_of(STAR)

    def load(path, **options):
        missing = [name for name in waiting if name not in known]
        if missing:
            shown = missing[0].removeprefix('builtins.')
            raise TypeError(f'Unsupported global: GLOBAL {shown} was not an allowed global')
        return {name: Tensor(x) for name, x in state.items()}

    @contextlib.contextmanager
    def safe_globals(classes):
        known[:] = [name for _, name in classes]
        yield

    serialization = types.SimpleNamespace(safe_globals=safe_globals)
    module = types.SimpleNamespace(load=load, serialization=serialization)
    monkeypatch.setitem(sys.modules, 'torch', module)
    (tmp_path / 'x.pth').write_bytes(published.torch_files.PICKLE)
    assert published.read(tmp_path / 'x.pth').parts.keys() == {'transformer'}
    known.clear()
    waiting.append('posix.system')
    with pytest.raises(UserError, match=r'plain data \(posix.system\), which could execute code'):
        published.read(tmp_path / 'x.pth')


def test_numbers_of_layers_beyond_all_tensors_are_refused(tmp_path, capsys):
    state = state_of(STAR) | {'blocks.1000000.ffn.fc1.bias': np.zeros(1, np.float32)}
    assert 'blocks.1000000 and only' in refused(tmp_path, capsys, state)
    many = {f'blocks.{"9" * 5000}.ffn.fc1.bias': np.zeros(1, np.float32)}
    assert '1 unknown (blocks.999' in refused(tmp_path, capsys, state_of(STAR) | many)


def test_published_shards_are_read_through_their_index(tmp_path, torch):
    state = state_of(STAR)
    names = list(state)
    shards = {f'{n}.safetensors': names[n::2] for n in range(2)}
    for shard, mine in shards.items():
        save(tmp_path / shard, {name: state[name] for name in mine})
    index = tmp_path / 'model.safetensors.index.json'
    weight_map = {name: shard for shard, mine in shards.items() for name in mine}
    index.write_text(json.dumps({'weight_map': weight_map}))
    tensors = published.read(index).parts['transformer'].tensors
    assert_same({name: tensors.read(name) for name in names}, state)
    for shard in shards:  # files of torch, which its `load` returns in turn
        (tmp_path / shard).write_bytes(published.torch_files.ZIP)
    torch['load'] = lambda path: {name: Tensor(state[name]) for name in shards[path.name]}
    tensors = published.read(index).parts['transformer'].tensors
    assert_same({name: tensors.read(name) for name in names}, state)


@pytest.mark.parametrize('is_torch', [False, True])
def test_shards_with_a_tensor_of_the_same_name_are_refused(tmp_path, torch, is_torch):
    state = state_of(STAR)
    name, array = next(iter(state.items()))
    save(tmp_path / '0.bin', state)
    save(tmp_path / '1.bin', {name: array + 1})
    index = tmp_path / 'model.index.json'
    index.write_text(json.dumps({'weight_map': {'a': '0.bin', 'b': '1.bin'}}))
    if is_torch:
        for shard in ('0.bin', '1.bin'):
            (tmp_path / shard).write_bytes(published.torch_files.ZIP)
        torch['load'] = lambda path: {name: Tensor(array)}
    with pytest.raises(UserError, match=f'1.bin: has {name}, which another of its files has'):
        published.read(index)


@pytest.mark.parametrize('damaged', [(), ('x/data/1',), ('x/data/0', 'x/data/1')])
def test_damaged_members_of_a_file_are_found(tmp_path, torch, damaged):
    """torch maps the file and would not see it; a file without any checksums is read."""
    torch['content'] = {name: Tensor(x) for name, x in state_of(STAR).items()}
    path = tmp_path / 'x.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        for number in range(2):
            archive.writestr(f'x/data/{number}', bytes([number]) * 100)
        archive.writestr('x/empty', b'')
    content = path.read_bytes()
    for name in damaged:
        letter = name[-1:]
        content = content.replace(bytes([int(letter)]) * 100, bytes([int(letter)]) * 99 + b'!')
    path.write_bytes(content)
    if len(damaged) == 1:
        with pytest.raises(
            UserError, match=r'x/data/1 differs from its checksum\): fetch it again'
        ):
            published.read(path)
    else:
        assert published.read(path).parts


def test_programs_are_not_called_damaged(tmp_path, torch):
    def refuse(path):
        raise RuntimeError('Cannot use ``weights_only=True`` with TorchScript archives passed')

    torch['load'] = refuse
    (tmp_path / 'x.pt').write_bytes(published.torch_files.ZIP)
    with pytest.raises(UserError, match='x.pt is a program of TorchScript: save the state dict'):
        published.read(tmp_path / 'x.pt')


def test_tensors_that_numpy_cannot_hold_are_named(tmp_path, torch):
    class Conjugated(Tensor):
        def numpy(self):
            raise RuntimeError("Can't call numpy() on Tensor that has negative bit set.")

    class Nested:
        dtype = 'torch.float32'

        def numpy(self):
            raise AssertionError

        @property
        def shape(self):
            raise RuntimeError("Internal error: NestedTensorImpl doesn't support sizes.")

    content = {name: Conjugated(x) for name, x in state_of(STAR).items()}
    torch['content'] = content | {'nested': Nested()}
    (tmp_path / 'x.pth').write_bytes(published.torch_files.ZIP)
    tensors = published.read(tmp_path / 'x.pth').parts['transformer'].tensors
    assert 'nested' not in tensors.names()
    with pytest.raises(UserError, match=r'word_embed.weight cannot be read .*negative bit set'):
        tensors.read('word_embed.weight')


def test_convert_refuses_a_nonzero_key_bias(tmp_path, capsys):
    state = state_of(STAR)
    state['blocks.1.cross_attn.zero_k_bias'] = np.ones(16, np.float32)
    assert 'blocks.1.cross_attn.zero_k_bias differs from' in refused(tmp_path, capsys, state)


def test_convert_requires_scales_that_cannot_be_inferred(tmp_path, capsys):
    assert '--sides' in refused(tmp_path, capsys, state_of(STAR), '--groups', '4')


def test_convert_requires_the_first_refined_scale(tmp_path, capsys):
    assert '3 scales' in (said := refused(tmp_path, capsys, state_of(ROTARY)))
    assert '--first-refined' in said


def test_convert_refuses_a_transformer_without_tokenizer(tmp_path, capsys):
    said = refused(tmp_path, capsys, state_of(STAR), '--sides', '1', '2', '4')
    assert 'has no image tokenizer' in said


def test_convert_refuses_a_tokenizer_with_other_codes(tmp_path, capsys):
    state = state_of(dataclasses.replace(STAR, codes=64))
    assert 'model.codes is 64, but tokenizer.codes is' in refused(tmp_path, capsys, state)


def test_convert_refuses_other_files(tmp_path, capsys, torch):
    file = save(tmp_path / 'x.safetensors', {'weight': np.zeros(3, np.float32)})
    for content in ([1], {'weight': 3}, {'trainer': {}}, {'trainer': {'var_wo_ddp': 4}}):
        torch['content'] = content
        (tmp_path / 'x.pth').write_bytes(published.torch_files.ZIP)
        with pytest.raises(UserError, match='not a published'):
            published.read(tmp_path / 'x.pth')
    with pytest.raises(UserError, match='not a published'):
        published.read(Path(file))
    with pytest.raises(UserError, match='no such file'):
        published.read(tmp_path / 'nothing.pth')


@pytest.mark.parametrize(
    'content', [b'', b'version https://git-lfs.github.com/spec/v1\n', b'<!doctype html>' * 40]
)
def test_convert_refuses_an_incomplete_download(tmp_path, content):
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(UserError, match='fetch it again'):
        published.read(tmp_path / 'x.pth')


def back_as(layout_name: str, tmp_path: Path, model, tokenizer, *options: str) -> list[Path]:
    """The two files of a conversion to a folder and back to another layout."""
    there_and_back(tmp_path, model, tokenizer, *options)
    out = tmp_path / layout_name
    words = ['convert', str(tmp_path / 'folder'), '--out', str(out), '--layout', layout_name]
    assert cli.main(words) == 0
    assert not [path.name for path in out.iterdir() if path.name.startswith('.')]
    endings = {'sharded': 'safetensors.index.json', 'pth': 'pth', 'trainer': 'trainer.pth'}
    return [out / f'{part}.{endings[layout_name]}' for part in PARTS]


def fake_torch(monkeypatch) -> None:
    """A torch module that writes its arrays as a file of numpy's."""
    state_of(STAR)  # at its first use einops looks for a real torch

    def frombuffer(content, dtype, count, offset):
        return np.frombuffer(content, dtype, count, offset)

    def write(content, file):
        np.save(file, np.array(content, object), allow_pickle=True)

    dtypes = {name: np.dtype(name) for name in ('float32', 'float16', 'int64')}
    module = types.SimpleNamespace(frombuffer=frombuffer, save=write, **dtypes)
    monkeypatch.setitem(sys.modules, 'torch', module)


def content_of(path: Path) -> dict:
    """The content of a file of `fake_torch`."""
    with path.open('rb') as file:
        return np.load(file, allow_pickle=True).item()


def test_a_folder_is_converted_back_to_shards(tmp_path, monkeypatch):
    state, vae = state_of(STAR), state_of(VQ_SMALL)
    monkeypatch.setattr(weights, 'SHARD_BYTES', 10_000)
    for part, path in zip(PARTS, back_as('sharded', tmp_path, state, vae), strict=True):
        tensors = published.read(path).parts[part].tensors
        found = {name: tensors.read(name) for name in tensors.names()}
        assert_same(found, {'transformer': state, 'tokenizer': vae}[part])
    shards = set((tmp_path / 'sharded').glob('transformer-*-of-*.safetensors'))
    assert len(shards) > 1
    monkeypatch.setattr(weights, 'SHARD_BYTES', 10**9)
    words = ['convert', str(tmp_path / 'folder'), '--out', str(tmp_path / 'sharded')]
    assert cli.main([*words, '--layout', 'sharded']) == 0
    assert len(list((tmp_path / 'sharded').glob('transformer-*-of-*.safetensors'))) == 1


def test_a_folder_is_converted_back_to_files_of_torch(tmp_path, monkeypatch, capsys):
    fake_torch(monkeypatch)
    state, vae = state_of(STAR), state_of(VQ_SMALL)
    transformer, tokenizer = map(content_of, back_as('pth', tmp_path, state, vae))
    assert_same(transformer['trainer']['var_wo_ddp'], state)
    assert_same(tokenizer, vae)
    words = ['convert', str(tmp_path / 'folder'), '--out', str(tmp_path / 'x'), '--layout']
    assert cli.main([*words, 'trainer']) == 2
    assert 'no original code opens a file *.trainer.pth of this model' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'torch', None)
    assert cli.main([*words, 'pth']) == 2
    assert 'reading or writing a .pth file needs torch' in capsys.readouterr().err
    assert not (tmp_path / 'x').exists()


def test_real_files_of_torch_are_written(tmp_path):
    pytest.importorskip('torch')
    state, vae = state_of(STAR), state_of(VQ_SMALL)
    for part, path in zip(PARTS, back_as('pth', tmp_path, state, vae), strict=True):
        tensors = published.read(path).parts[part].tensors
        found = {name: tensors.read(name) for name in tensors.names()}
        assert_same(found, {'transformer': state, 'tokenizer': vae}[part])


def test_files_are_not_written_into_a_model_folder(tmp_path, capsys):
    there_and_back(tmp_path, state_of(STAR), state_of(VQ_SMALL))
    place = str(tmp_path / 'folder')
    assert cli.main(['convert', place, '--out', place, '--layout', 'sharded']) == 2
    assert 'is a model folder' in capsys.readouterr().err


def test_the_layout_of_files_is_refused_for_a_file(tmp_path, capsys):
    file = save(tmp_path / 'x.safetensors', state_of(STAR))
    words = ['convert', file, '--out', str(tmp_path / 'out'), '--layout', 'pth']
    assert cli.main(words) == 2
    assert 'is for the conversion of a model folder' in capsys.readouterr().err


def test_convert_reports_missing_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    (tmp_path / 'x.pth').write_bytes(published.torch_files.ZIP)
    with pytest.raises(UserError, match='pip install torch'):
        published.read(tmp_path / 'x.pth')


def test_text_encoder_is_named_or_copied(tmp_path):
    state, vae = state_of(STAR), state_of(VQ_SMALL)
    there_and_back(tmp_path, state, vae, '--text', tiny.TEXT)
    named = models.read(tmp_path / 'folder').text
    assert named.source == tiny.TEXT
    there_and_back(tmp_path, state, vae, '--text', tiny.TEXT, '--copy-text')
    (tmp_path / 'folder').rename(tmp_path / 'moved')
    inside = models.read(tmp_path / 'moved').text
    assert inside == folder.TextEncoderReference(
        source=str(tmp_path / 'moved' / 'text'), sha256=named.sha256
    )
    assert load_text(inside.source, sha256=inside.sha256).width == STAR.text_width


@pytest.mark.parametrize('below', ['', 'tower'])
def test_text_encoder_inside_the_folder_stays(tmp_path, below):
    state, vae = state_of(STAR), state_of(VQ_SMALL)
    there_and_back(tmp_path, state, vae, '--text', tiny.TEXT)
    place = tmp_path / 'folder' / 'text' / below
    shutil.copytree(tiny.TEXT, place)
    there_and_back(tmp_path, state, vae, '--text', str(place))
    assert sorted(x.name for x in place.iterdir()) == sorted(map(str, os.listdir(tiny.TEXT)))
    (tmp_path / 'folder').rename(tmp_path / 'moved')
    text = models.read(tmp_path / 'moved').text
    assert Path(text.source) == tmp_path / 'moved' / 'text' / below
    assert load_text(text.source, sha256=text.sha256).width == STAR.text_width


@pytest.mark.parametrize('shard_bytes', [100, 10**9])
def test_streamed_arrays_equal_those_of_the_library(tmp_path, shard_bytes):
    rows = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    tree = {
        'a': StreamedArray((4, 3, 2), rows.dtype, lambda: iter(rows)),
        'b': {'c': np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3))},
        'd': np.array([True, False]),
    }
    weights.save(tmp_path / 'x.safetensors', tree, {'who': 'me'}, shard_bytes)
    found = weights.load(tmp_path / 'x.safetensors')
    np.testing.assert_array_equal(found['a'], rows)
    np.testing.assert_array_equal(found['b']['c'], tree['b']['c'])
    assert found['d'].tolist() == [True, False]
    assert weights.read_metadata(tmp_path / 'x.safetensors') == {'who': 'me'}
    opened = stored.StoredTensors(weights.paths(tmp_path / 'x.safetensors'))
    np.testing.assert_array_equal(opened.read('a', 2), rows[2])


def test_write_refuses_parts_that_differ_from_their_array(tmp_path):
    short = StreamedArray((4,), np.dtype(np.float32), lambda: [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match='12 bytes'):
        stored.write(tmp_path / 'x.safetensors', {'x': short})
    wrong = StreamedArray((4,), np.dtype(np.float32), lambda: [np.zeros(2)])
    with pytest.raises(ValueError, match='float64'):
        stored.write(tmp_path / 'x.safetensors', {'x': wrong})
    assert not list(tmp_path.iterdir())
