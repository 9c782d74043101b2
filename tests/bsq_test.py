"""Do bits of every scale add up to what Infinity's transformer is trained on?"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.checkpoint import weights
from star_jax.convert.bsq import IGNORED, bsq_entries
from star_jax.core import templates
from star_jax.core.codes import Bits, Index, Sampled
from star_jax.core.schedule import Step
from star_jax.core.self_correction import PLAIN, SelfCorrection, flip_mask
from star_jax.errors import UserError
from star_jax.nn.bind import bind
from star_jax.tokenizers import sign_quantiser
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.tokenizers.residual_vq import VQ

TABLES = Path(__file__).parents[1] / 'docs' / 'specification' / 'tables'
GRIDS = ((1, 1), (2, 2), (3, 2), (4, 3))
PUBLISHED_SIZES = {
    'd16 stride16': BSQ(bits=16),
    'd32 stride16': BSQ(bits=32),
    'd64 stride16': BSQ(bits=64),
    'd14 stride8 (for 8B, patchify)': BSQ(
        autoencoder=Autoencoder(width=128, multipliers=(1, 2, 4, 4), groups=0, attention=False),
        bits=14,
        patchify=True,
    ),
}


def table(name: str) -> dict:
    return json.loads((TABLES / f'infinity_{name}.json').read_text())


def tiny(patchify: bool = False, **fields) -> BSQ:
    autoencoder = Autoencoder(width=2, multipliers=(1,), blocks=1, groups=1, attention=False)
    return BSQ(autoencoder=autoencoder, grids=GRIDS, bits=3, patchify=patchify, **fields)


def features(config: BSQ, batch: int = 2) -> jax.Array:
    shape = (batch, *config.cells[-1], config.bits)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def targets(config: BSQ, encoded: jax.Array, seed: int = 0, correction: SelfCorrection = PLAIN):
    tokenizer = bind(config.build_training(correction), {})
    return jax.jit(tokenizer.training_targets)(encoded, jax.random.key(seed))


@functools.cache
def bits_of(config: BSQ) -> jax.Array:
    """Packed bits of the features of `config`."""
    tokenizer = bind(config.build(), {})

    def pack(f_BhwK):
        return tokenizer.codes.pack(tokenizer.tokens(tokenizer.quantise(f_BhwK).bits))

    return jax.jit(pack)(features(config))


def test_published_templates_are_those_of_the_specification():
    recorded = table('dynamic_resolution_transformer')
    assert list(map(float, templates.PUBLISHED.names)) == recorded['h_div_w_templates']
    for ratio, resolutions in recorded['table'].items():
        for name, count in templates.RESOLUTIONS.items():
            grids = templates.PUBLISHED.schedule(ratio, count).grids
            assert [[1, *grid] for grid in grids] == resolutions[name]['scales']
            assert [16 * side for side in grids[-1]] == resolutions[name]['image_hw']


@pytest.mark.parametrize('name', PUBLISHED_SIZES)
def test_published_tokenizers_have_their_names_shapes_and_counts(name):
    config, recorded = PUBLISHED_SIZES[name], table('tokenizer_shapes')[name]
    flat = weights.flatten(config.abstract())
    assert sum(leaf.size for leaf in flat.values()) == recorded['parameters']
    assert config.autoencoder.downsampling == recorded['patch_size']
    if recorded['state_dict']:
        shapes = {
            e.torch_name: list(e.torch_shape(flat[e.param_name].shape)) for e in bsq_entries(config)
        }
        published = {k: v for k, v in recorded['state_dict'].items() if not k.endswith(IGNORED)}
        assert shapes == published
    plain = {entry.torch_name for entry in bsq_entries(config, ['encoder.conv_in.weight'])}
    assert 'encoder.conv_in.weight' in plain and 'encoder.down.0.downsample.conv.weight' in plain


def test_tokens_of_the_largest_model_are_four_cells_of_fourteen_bits():
    config = PUBLISHED_SIZES['d14 stride8 (for 8B, patchify)']
    assert config.vocabulary == Bits(56) and config.cells[0] == (2, 2)
    assert config.resolution == (1024, 1024)


@pytest.mark.parametrize('width', [1, 8, 31, 32, 33, 56])
def test_packed_bits_are_bytes_and_come_back(width):
    bits = np.random.default_rng(width).integers(0, 2, (2, 3, width)).astype(np.int8)
    bits[0, 0] = 1  # more than an int32 holds
    packed = Bits(width).pack(jnp.asarray(bits))
    assert packed.dtype == jnp.uint8 and packed.shape == (2, 3, -(-width // 8))
    np.testing.assert_array_equal(packed, np.packbits(bits, axis=-1))
    found = Bits(width).unpack(packed)
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, bits)


def test_neighbouring_cells_are_joined_in_the_order_of_pixel_unshuffle():
    cells = jnp.arange(2 * 4 * 3).reshape(1, 2, 4, 3)
    joined = sign_quantiser.unshuffle(cells)
    assert joined.shape == (1, 1, 2, 12)
    for c in range(3):
        for y in range(2):
            for x in range(2):
                assert joined[0, 0, 1, 4 * c + 2 * y + x] == cells[0, y, 2 + x, c]
    np.testing.assert_array_equal(sign_quantiser.shuffle(joined), cells)


@pytest.mark.parametrize('patchify', [False, True])
def test_bits_give_the_inputs_and_labels_of_their_features(patchify):
    config = tiny(patchify)
    from_bits = targets(config, bits_of(config))
    from_features = targets(config, features(config))
    np.testing.assert_array_equal(from_bits.codes_BL, from_features.codes_BL)
    np.testing.assert_allclose(from_bits.inputs_BLC, from_features.inputs_BLC, atol=1e-6)
    length = config.schedule.length
    assert from_bits.codes_BL.shape == (2, length, config.vocabulary.width)
    assert from_bits.inputs_BLC.shape == (2, length - 1, config.vector_width)


def test_strength_zero_is_plain_teacher_forcing():
    plain = targets(tiny(), features(tiny()))
    for correction in (
        SelfCorrection(strength=0.0),
        SelfCorrection(strength=0.5, scales=0),
        SelfCorrection(strength=0.5, requant=False),
    ):
        found = targets(tiny(), features(tiny()), seed=3, correction=correction)
        for ours, theirs in zip(found, plain, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_flips_change_later_labels_and_those_of_the_last_scale_change_nothing():
    config, correction = tiny(), SelfCorrection(strength=1.0, scales=4)
    f_BhwK, offsets = features(config), config.schedule.offsets
    found, plain = targets(config, f_BhwK, 1, correction), targets(config, f_BhwK)
    np.testing.assert_array_equal(found.codes_BL[:, :1], plain.codes_BL[:, :1])
    assert (found.codes_BL[:, 1:] != plain.codes_BL[:, 1:]).any()
    tokenizer = bind(config.build(), {})

    def only_last(step, shape):
        return jnp.ones(shape, bool) if step == len(offsets) - 2 else None

    flipped = jax.jit(lambda f: tokenizer.corrected(f, only_last))(f_BhwK)
    for ours, theirs in zip(flipped, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_rate_per_scale_and_batch_and_no_flips_behind_the_last_noisy_scale():
    correction = SelfCorrection(strength=1.0, scales=2)
    flips = jax.jit(correction.flips, static_argnums=(1, 2))
    shares = [
        np.asarray(flips(jax.random.key(seed), 0, (2, 64, 64))).mean((1, 2)) for seed in range(8)
    ]
    assert np.ptp([share.mean() for share in shares]) > 0.2  # another rate for each batch
    assert max(abs(first - second) for first, second in shares) < 0.05  # the same for its images
    assert correction.flips(jax.random.key(0), 2, (2, 3)) is None


@pytest.mark.parametrize(('strength', 'largest'), [(0.3, 30), (0.29, 28), (0.57, 56), (0.0, 0)])
def test_rates_are_whole_percentages_truncated_as_published(strength, largest):
    assert SelfCorrection(strength=strength).rates == largest + 1


def test_bits_are_flipped_below_the_rate():
    uniform = jnp.asarray([0.0, 0.069, 0.07, 0.5], jnp.float32)
    assert flip_mask(uniform, jnp.int32(7)).tolist() == [True, True, False, False]
    assert not flip_mask(uniform, jnp.int32(0)).any()


def test_packed_bits_serve_no_self_correction():
    with pytest.raises(UserError, match='labels of later scales'):
        targets(tiny(), bits_of(tiny()), correction=SelfCorrection(strength=0.3))
    with pytest.raises(UserError, match='a VQ tokenizer has no bits to flip'):
        VQ().build_training(SelfCorrection(strength=0.3))


@pytest.mark.parametrize('patchify', [False, True])
def test_padded_steps_add_and_follow_like_single_ones(patchify):
    config = tiny(patchify, decay=True)
    tokenizer, like = bind(config.build(), {}), 2
    codes = tokenizer.codes.unpack(bits_of(tiny(patchify)))
    widest = config.schedule.sizes[like]

    @jax.jit
    def padded(canvas, codes_BLK, index):
        step = Step(index, like, padded=True)
        return tokenizer.advance(canvas, Sampled(codes_BLK, tokenizer.embed(codes_BLK)), step)

    for index in range(1, like + 1):
        first, end = config.schedule.offsets[index : index + 2]
        own = codes[:, first:end]
        canvas = features(config)
        expected = jax.jit(tokenizer.advance, static_argnums=2)(
            canvas, Sampled(own, tokenizer.embed(own)), Step.at(index)
        )
        wide = jnp.pad(own, ((0, 0), (0, widest - own.shape[1]), (0, 0)))
        found = padded(canvas, wide, jnp.int32(index))
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
        if index < like:
            rows = expected[1].shape[1]
            np.testing.assert_allclose(found[1][:, :rows], expected[1], atol=1e-5)


def test_probabilities_of_bits_make_a_soft_vector():
    tokenizer = bind(tiny().build(), {})
    weights_ = jnp.asarray([[[[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]]])
    expected = np.asarray([[[0.5, -1.0, 0.0]]]) / np.sqrt(3)
    np.testing.assert_allclose(tokenizer.mix(weights_), expected, atol=1e-6)


@pytest.mark.parametrize('patchify', [False, True])
def test_indices_of_bits_are_the_same_tokens(patchify):
    config = tiny(patchify)
    indexed = dataclasses.replace(config, indexed=True)
    assert indexed.vocabulary == Index(2**config.vector_width)
    ours, theirs = (
        targets(one, features(one), correction=SelfCorrection(strength=0.5))
        for one in (indexed, config)
    )
    np.testing.assert_array_equal(ours.inputs_BLC, theirs.inputs_BLC)
    values = 2 ** np.arange(config.vector_width)[::-1]
    np.testing.assert_array_equal(ours.codes_BL, theirs.codes_BL @ values)
    tokenizer = bind(indexed.build(), {})
    np.testing.assert_allclose(
        tokenizer.embed(ours.codes_BL), bind(config.build(), {}).embed(theirs.codes_BL)
    )
    sure = jax.nn.one_hot(ours.codes_BL, indexed.vocabulary.size)
    np.testing.assert_allclose(tokenizer.mix(sure), tokenizer.embed(ours.codes_BL), atol=1e-6)


def test_video_keeps_its_time_axis():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 4, 5)), jnp.float32)
    trace = jax.jit(sign_quantiser.quantise, static_argnums=1)(x, ((1, 1, 1), (2, 3, 2), (3, 4, 4)))
    assert [bits.shape for bits in trace.bits] == [
        (1, 1, 1, 1, 5),
        (1, 2, 3, 2, 5),
        (1, 3, 4, 4, 5),
    ]
    assert trace.canvases[0].shape == x.shape


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'bits': 0}, 'bits must lie in'),
        ({'indexed': True, 'bits': 21}, 'codes must lie in'),
        ({'features': -1}, 'features must not be negative'),
        ({'grids': ((2, 2), (1, 1))}, 'must not shrink'),
        ({'grids': ((2**14 + 1, 1),)}, 'px a side'),
    ],
)
def test_impossible_tokenizers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **fields)


def test_groups_follow_the_channels():
    autoencoder = Autoencoder(width=48, multipliers=(1, 2), groups=0, attention=False)
    assert autoencoder.widths == (48, 96)  # 24 groups, then 32
    with pytest.raises(ValueError, match='20 channels divide into neither 32 nor 24'):
        Autoencoder(width=20, multipliers=(1,), groups=0)


@pytest.mark.parametrize('strength', [-0.1, 1.1])
def test_impossible_strength_is_refused(strength):
    with pytest.raises(ValueError, match='strength in'):
        SelfCorrection(strength=strength)
