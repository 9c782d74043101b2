"""Is LlamaGen's tokenizer whole: codes, canvas, published files?"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from convert_test import assert_same, save
from flax import linen as nn
from safetensors.numpy import load_file

from star_jax import cli
from star_jax.checkpoint import folder, models
from star_jax.convert.entries import to_state
from star_jax.convert.layouts import layout
from star_jax.convert.raster_vq import raster_vq_entries
from star_jax.convert.writers import FLAT
from star_jax.core.codes import Bits, Index, Sampled
from star_jax.core.schedule import Pyramid, Raster, Step
from star_jax.errors import UserError
from star_jax.nn.bind import bind
from star_jax.tokenizers import codebook
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.raster_vq import PUBLISHED, RasterVQ
from star_jax.tokenizers.residual_vq import Quantised
from star_jax.tokenizers.scale_dropout import drop_scales

SIZES = Autoencoder(
    width=32, multipliers=(1, 1, 2), blocks=1, groups=32, latent=6, fused_attention=False
)
SMALL = RasterVQ(autoencoder=SIZES, grid=(2, 3), codes=16, channels=4)
VQ_8 = dataclasses.replace(PUBLISHED, multipliers=(1, 2, 2, 4))


def count(config: RasterVQ) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(config.abstract())))


@functools.cache
def bound(config: RasterVQ):
    """The quantiser's part of a tokenizer; its methods need no other parameters."""
    vectors = np.random.default_rng(0).normal(size=(config.codes, config.channels))
    return bind(config.build(), {'quantiser': {'codebook': jnp.asarray(vectors, jnp.float32)}})


@pytest.mark.parametrize(
    ('config', 'parameters', 'tensors', 'resolution'),
    [
        (RasterVQ(), 71_883_403, 343, (256, 256)),
        (RasterVQ(autoencoder=VQ_8, grid=(32, 32)), 70_109_835, 299, (256, 256)),
    ],
)
def test_published_sizes(config, parameters, tensors, resolution):
    """LlamaGen specification 1.1 and 6.3; the files also hold the buffer of used codes."""
    assert count(config) == parameters and config.resolution == resolution
    names = [entry.torch_name for entry in raster_vq_entries(config)]
    assert len(names) == len(set(names)) == tensors
    assert list(layout(config).idle) == ['quantize.codebook_used']
    levels = len(config.autoencoder.multipliers)
    assert f'encoder.conv_blocks.{levels - 1}.attn.1.proj_out.weight' in names
    assert 'decoder.conv_blocks.0.attn.2.q.bias' in names  # the lowest resolution
    assert f'decoder.conv_blocks.{levels - 1}.upsample.conv.weight' not in names
    assert {'encoder.mid.1.norm.weight', 'decoder.mid.2.conv2.bias'} <= set(names)


@pytest.mark.parametrize('normalised', [True, False])
def test_the_nearest_vector_is_found(normalised):
    tokenizer = bound(dataclasses.replace(SMALL, normalised=normalised))
    vectors = np.asarray(tokenizer.quantiser.vectors)
    if normalised:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)
    z = tokenizer.quantiser.enter(jax.random.normal(jax.random.key(0), (2, 2, 3, 4)))
    quantised = tokenizer.quantise(z)
    distances = np.square(np.asarray(z)[..., None, :] - vectors).sum(-1)
    np.testing.assert_array_equal(quantised.codes[0], distances.argmin(-1))
    np.testing.assert_allclose(quantised.canvases[-1], vectors[distances.argmin(-1)])
    np.testing.assert_allclose(tokenizer.distances(z), distances, atol=1e-5)


def test_canvas_of_all_steps_is_the_map_of_the_codes():
    tokenizer = bound(SMALL)
    codes_BL = jnp.asarray(np.random.default_rng(1).integers(16, size=(2, 6)), jnp.int32)
    canvas, inputs = tokenizer.blank(2), []
    for step in range(6):
        one = codes_BL[:, step : step + 1]
        canvas, following = tokenizer.advance(
            canvas, Sampled(one, tokenizer.embed(one)), Step.at(step)
        )
        inputs.append(following)
    assert inputs.pop() is None
    np.testing.assert_array_equal(jnp.concatenate(inputs, axis=1), tokenizer.inputs(codes_BL))
    np.testing.assert_array_equal(canvas, tokenizer.embed(codes_BL).reshape(2, 2, 3, 4))


def test_another_grid_keeps_the_parameters_and_scales_are_refused():
    assert SMALL.at(Raster(4, 5, prefix=120)).grid == (4, 5)
    assert SMALL.at(Pyramid(((3, 3),))).schedule == Raster(3, 3)
    with pytest.raises(UserError, match='one scale'):
        SMALL.at(Pyramid(((1, 1), (2, 2))))


@pytest.mark.parametrize('wrapper', ['', 'model.', 'module.', 'state_dict.'])
def test_files_are_converted_back_bit_for_bit(tmp_path, wrapper):
    config = dataclasses.replace(SMALL, grid=(3, 3), normalised=bool(wrapper))
    rng = np.random.default_rng(0)
    params = tiny.random_params(config.abstract())
    state = to_state(layout(config).entries, params)
    state['quantize.codebook_used'] = rng.integers(16, size=65536).astype(np.float32)
    file = save(tmp_path / 'vq.safetensors', {f'{wrapper}{k}': v for k, v in state.items()})
    words = ['--sides', '3', *([] if wrapper else ['--raw-vectors'])]
    out = str(tmp_path / 'folder')
    assert cli.main(['convert', file, *words, '--out', out]) == 0
    assert models.read_tokenizer(out).config == config
    assert cli.main(['convert', out, '--out', str(tmp_path / 'back')]) == 0
    assert_same(load_file(tmp_path / 'back' / f'tokenizer.{FLAT}'), state)


def test_a_file_of_a_tokenizer_that_was_trained_here_has_the_buffer_of_used_codes(tmp_path):
    """The original loader is strict (LlamaGen specification 6.1)."""
    params = tiny.random_params(SMALL.abstract())
    folder.write(tmp_path / 'folder', folder.StoredTokenizer(config=SMALL, params=params))
    words = [str(tmp_path / 'folder'), '--out', str(tmp_path / 'back')]
    assert cli.main(['convert', *words]) == 0
    state = to_state(layout(SMALL).entries, params)
    state['quantize.codebook_used'] = np.zeros(65536, np.float32)
    assert_same(load_file(tmp_path / 'back' / f'tokenizer.{FLAT}'), state)


def test_a_single_scale_is_refused_other_scales(tmp_path, capsys):
    state = to_state(layout(SMALL).entries, tiny.random_params(SMALL.abstract()))
    file = save(tmp_path / 'vq.safetensors', state)
    out = str(tmp_path / 'folder')
    assert cli.main(['convert', file, '--sides', '1', '2', '--out', out]) == 2
    assert 'one scale' in capsys.readouterr().err


def test_values_are_counted_per_code_and_per_bit():
    codes = jnp.array([[0, 2], [2, 1]])
    counts = codebook.usage([codes], Index(4), jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(counts, [[1, 0, 1, 0]])
    np.testing.assert_allclose(Index(4).perplexity(counts), [2], rtol=1e-6)
    bits = jnp.array([[[0, 1], [0, 0]], [[0, 1], [0, 1]]], jnp.int8)
    counts = codebook.usage([bits], Bits(2))
    np.testing.assert_array_equal(counts, [[4, 0, 1, 3]])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    np.testing.assert_allclose(Bits(2).perplexity(counts), [(1 + math.exp(entropy)) / 2], rtol=1e-6)


def test_dropped_scales_leave_an_earlier_canvas():
    canvases = tuple(jnp.full((64, 1, 1, 1), float(scale)) for scale in range(3))
    quantised = Quantised((), (), canvases)
    kept = drop_scales(quantised, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(kept.canvases[-1], canvases[-1])
    dropped = drop_scales(quantised, jax.random.key(0), 1.0).canvases[-1]
    assert set(np.unique(dropped)) == {0, 1, 2}
