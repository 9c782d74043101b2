"""Are published Infinity files converted to model folders and back bit for bit?"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from convert_test import PARTS, Names, assert_same, back_as, content_of, fake_torch, save
from safetensors.numpy import load_file

from star_jax import cli
from star_jax.checkpoint import models
from star_jax.checkpoint.stored import TensorSpec
from star_jax.convert import infer, published
from star_jax.convert.entries import to_state
from star_jax.convert.infer import ModelOptions
from star_jax.convert.infinity import chunks_of
from star_jax.convert.layouts import layout
from star_jax.convert.table import ConversionTable
from star_jax.convert.writers import FLAT
from star_jax.core.templates import PUBLISHED
from star_jax.families.infinity import Infinity
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_bsq import BSQ

TABLES = Path(__file__).parents[1] / 'docs' / 'specification' / 'tables'
SQUARE = ((1, 1), (2, 2), (4, 4))
SMALL = Infinity(
    depth=4, width=16, heads=2, bits=6, grids=SQUARE, reference=(0, 0), text_width=8, text_rows=6
)
AUTOENCODER = Autoencoder(width=24, multipliers=(1, 1), blocks=1, groups=0, attention=False)
BITS = BSQ(autoencoder=AUTOENCODER, grids=SQUARE, bits=6)
PATCHED = dataclasses.replace(BITS, bits=3, patchify=True)
OPTIONS = ('--sides', '1', '2', '4', '--heads', '2')


def table_of(name: str) -> dict:
    return json.loads((TABLES / f'infinity_{name}.json').read_text())


def state_of(config, names=(), seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """A state dict as published, with random parameters."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(dtype), tiny.random_params(config.abstract())
    )
    parts = layout(config, names)
    computed = {n: make() for n, make in parts.buffers.items()}
    return to_state(parts.entries, params) | computed


def there_and_back(tmp_path: Path, model, tokenizer, *options: str) -> dict[str, dict]:
    file = save(tmp_path / 'model.safetensors', model)
    beside = save(tmp_path / 'vae.safetensors', tokenizer)
    words = ['--tokenizer', beside, *OPTIONS, *options, '--out', str(tmp_path / 'folder')]
    assert cli.main(['convert', file, *words]) == 0
    assert cli.main(['convert', str(tmp_path / 'folder'), '--out', str(tmp_path / 'back')]) == 0
    return {name: load_file(tmp_path / 'back' / f'{name}.{FLAT}') for name in PARTS}


@pytest.mark.parametrize(
    'fields',
    [
        {},
        {'rms_norm': True, 'input_norm': True, 'cross_scale': 0.0, 'head_layers': 2},
        {'shared_adaln': False, 'modulated_head': False, 'qk_norm': False},
        {'modulated_head': False, 'head_layers': 2, 'mlp_ratio': 48.0, 'swiglu': True},
        {'mlp_ratio': 32.0},
    ],
)
def test_files_are_converted_back_bit_for_bit(tmp_path, fields):
    config = dataclasses.replace(SMALL, **fields)
    state, vae = state_of(config), state_of(BITS, seed=1)
    back = there_and_back(tmp_path, state, vae)
    assert_same(back['transformer'], state)
    assert_same(back['tokenizer'], vae)
    model = models.read(tmp_path / 'folder')
    assert model.config == config and model.tokenizer.config == BITS
    assert 'block_chunks.3.module.0.sa.q_bias' in state


@pytest.mark.parametrize('name', ['block_chunks.1.module.0.sa.q_bias', 'blocks.0.sa.q_bias'])
def test_every_number_of_chunks_is_kept(tmp_path, name):
    state = state_of(SMALL, [name])
    assert name in state
    assert_same(there_and_back(tmp_path, state, state_of(BITS))['transformer'], state)


def test_tokens_of_joined_cells_and_plain_names_are_converted(tmp_path):
    config = dataclasses.replace(SMALL, bits=12)
    vae = state_of(PATCHED, ['encoder.conv_in.weight'])
    assert 'encoder.mid.block_1.norm1.weight' in vae
    back = there_and_back(tmp_path, state_of(config), vae)
    assert_same(back['tokenizer'], vae)
    assert models.read(tmp_path / 'folder').tokenizer.config == PATCHED


def test_a_tokenizer_alone_is_converted(tmp_path):
    projected = dataclasses.replace(BITS, features=5, normalised=True)
    state = state_of(projected)
    file, out = save(tmp_path / 'vae.safetensors', state), str(tmp_path / 'folder')
    assert cli.main(['convert', file, '--sides', '1', '2', '4', '--out', out]) == 0
    assert models.read_tokenizer(out).config == projected
    assert cli.main(['convert', out, '--out', str(tmp_path / 'back')]) == 0
    assert_same(load_file(tmp_path / 'back' / f'tokenizer.{FLAT}'), state)


def test_names_of_a_trainer_are_removed_and_those_of_chunks_stay(tmp_path):
    state = state_of(SMALL)
    prefix = 'trainer.gpt_fsdp._fsdp_wrapped_module.'
    wrapped = {f'{prefix}{name}': array for name, array in state.items()}
    wrapped |= {f'trainer.gpt_ema_fsdp.{name}': 2 * array for name, array in state.items()}
    wrapped |= {f'vae.{name}': array for name, array in state_of(BITS).items()}
    save(tmp_path / 'file.safetensors', wrapped)
    found = published.read(tmp_path / 'file.safetensors', 'gpt_fsdp')
    assert found.parts['transformer'].path == 'trainer.gpt_fsdp'
    assert found.parts['transformer'].wrappers == ('_fsdp_wrapped_module',)
    assert set(found.parts['transformer'].tensors.specs()) == set(state)
    assert found.parts['tokenizer'].path == 'vae'
    averaged = published.read(tmp_path / 'file.safetensors').parts['transformer']
    assert averaged.path == 'trainer.gpt_ema_fsdp'


@pytest.mark.parametrize(
    ('layout_name', 'keys'), [('pth', ()), ('trainer', ('trainer', 'gpt_fsdp'))]
)
def test_files_of_torch_are_nested_as_the_originals_open_them(
    tmp_path, monkeypatch, layout_name, keys
):
    fake_torch(monkeypatch)
    state, vae = state_of(SMALL), state_of(BITS, seed=1)
    files = back_as(layout_name, tmp_path, state, vae, *OPTIONS)
    transformer, tokenizer = map(content_of, files)
    for key in keys:
        assert set(transformer) == {key}
        transformer = transformer[key]
    assert_same(transformer, state)
    assert_same(tokenizer['vae'], vae)
    assert set(tokenizer) == {'vae'}


def test_published_types_of_buffers_are_kept(tmp_path):
    state = {name: x.astype(np.float16) for name, x in state_of(SMALL).items()}
    assert_same(there_and_back(tmp_path, state, state_of(BITS))['transformer'], state)


def test_another_mask_is_refused(tmp_path, capsys):
    vae = state_of(BITS)
    vae['quantizer.lfq.mask'] = vae['quantizer.lfq.mask'][::-1]
    file = save(tmp_path / 'vae.safetensors', vae)
    assert cli.main(['convert', file, '--out', str(tmp_path / 'folder')]) == 2
    assert 'quantizer.lfq.mask differs' in capsys.readouterr().err


def test_the_mask_of_64_bits_overflows_as_published():
    mask = layout(dataclasses.replace(BITS, bits=64)).buffers['quantize.lfq.mask']()
    assert mask.dtype == np.int64 and mask[0] == -(2**63) and mask[-2:].tolist() == [2, 1]


SIZES = {
    'infinity_layer12 (125M)': (Infinity(), 256),
    'infinity_layer16 (361M)': (Infinity(depth=16, width=1152, heads=12), 256),
    'infinity_2b': (Infinity(depth=32, width=2048, heads=16, grids=PUBLISHED.by_name['1.0']), 0),
    'infinity_8b': (
        Infinity(depth=40, width=3584, heads=28, bits=56, grids=PUBLISHED.by_name['1.0']),
        1024,
    ),
}


@pytest.mark.parametrize('name', SIZES)
def test_published_names_and_shapes_of_every_transformer(name):
    """The table names the tensors outside of the blocks, and those of the first and last block."""
    config, size = SIZES[name]
    sizes = table_of('model_sizes')['sizes'][name]
    assert chunks_of(config, []) == sizes['block_chunks']
    parts = ConversionTable.from_config(config, [])
    shapes = {entry.torch_name: parts.shape(entry) for entry in parts.entries}
    shapes |= {name: make().shape for name, make in parts.buffers.items()}
    assert len(shapes) == sizes['n_state_dict_entries']
    for listed, shape in table_of('state_dict_shapes')['models'].get(name, {}).items():
        assert shapes[listed] == tuple(shape)
    specs = {n: TensorSpec(shape, np.dtype(np.float32)) for n, shape in shapes.items()}
    assert infer.transformer(specs, ModelOptions(size=size)) == config
    parts.check(Names(specs, parts.buffers), name)
    count = sum(math.prod(leaf.shape) for leaf in parts.abstract.values())
    assert count == sizes['parameters_total']


@pytest.mark.parametrize('name', ['d32 stride16', 'd14 stride8 (for 8B, patchify)'])
def test_published_names_and_shapes_of_every_tokenizer(name):
    listed = table_of('tokenizer_shapes')[name]
    kinds = {True: np.dtype(np.int64), False: np.dtype(np.float32)}
    specs = {
        n: TensorSpec(tuple(shape), kinds[n.endswith('mask')])
        for n, shape in listed['state_dict'].items()
    }
    config = infer.tokenizer(specs, ModelOptions())
    assert config.bits == listed['codebook_dim'] and config.resolution == (1024, 1024)
    table = ConversionTable.from_config(config, specs)
    table.check(Names(specs, table.buffers), name)
    assert {e.torch_name: table.shape(e) for e in table.entries} == {
        n: spec.shape for n, spec in specs.items() if not n.endswith('mask')
    }
    count = sum(math.prod(leaf.shape) for leaf in table.abstract.values())
    assert count == listed['parameters']
