"""Does the tokenizer quantise residuals, sum code vectors on the canvas, and get gradients?"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from star_jax.checkpoint import models
from star_jax.core import resize
from star_jax.core.codes import Sampled
from star_jax.core.schedule import Pyramid, Step, square_grids
from star_jax.losses.tokenizer import EntropyOfCodes, psnr
from star_jax.nn import layers
from star_jax.nn.bind import bind
from star_jax.sampling import program
from star_jax.tokenizers.autoencoder import Autoencoder, depth_to_space, space_to_depth
from star_jax.tokenizers.residual_vq import VQ, ResidualVQ, phi_of_scale
from star_jax.training.objective import Objective

SIDES, V, C = (1, 2, 4), 64, 3

# phi_index_table.json of the recorded cases: the published rule in float64.
PHI_INDEX_TABLE = {
    2: [0, 3],
    3: [0, 2, 3],
    4: [0, 1, 2, 3],
    5: [0, 1, 2, 2, 3],
    6: [0, 0, 1, 2, 3, 3],
    7: [0, 0, 1, 2, 2, 3, 3],
    8: [0, 0, 1, 1, 2, 2, 3, 3],
    9: [0, 0, 1, 1, 2, 2, 2, 3, 3],
    10: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
    11: [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3],
    12: [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    13: [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3],
    14: [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3],
    15: [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
    16: [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
}


def quantiser(phis=2, normalised=False):
    return ResidualVQ(Pyramid.square(SIDES), V, C, phis, 0.5, normalised)


def sampled(init, *args):
    """Random parameters of the right shapes, without compiling their initialisation."""
    rng = np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), *args))
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, 0.3, p.shape)), shapes)


@pytest.fixture(scope='module')
def features():
    """Maps with something to say at every scale."""
    rng = np.random.default_rng(0)
    up = (resize.bicubic_matrix(side, SIDES[-1]) for side in SIDES)
    maps = [
        np.einsum('yh,xw,bhwc->byxc', m, m, rng.normal(size=(8, side, side, C)))
        for side, m in zip(SIDES, up, strict=True)
    ]
    return sum(maps).astype(np.float32)


@pytest.fixture(scope='module')
def params():
    """A codebook as wide as the features; phi convolutions near the identity."""
    rng = np.random.default_rng(1)
    kernel = rng.normal(0, 0.02, (2, 3, 3, C, C))
    kernel[:, 1, 1] += np.eye(C)
    made = {
        'codebook': rng.normal(size=(V, C)),
        'phi_kernel': kernel,
        'phi_bias': rng.normal(0, 0.02, (2, C)),
    }
    return {name: jnp.float32(array) for name, array in made.items()}


@pytest.fixture(scope='module')
def quantised(params, features):
    return quantise(params, features)


@functools.partial(jax.jit, static_argnames='normalised')
def quantise(params, f, normalised=False):
    return quantiser(normalised=normalised).apply({'params': params}, f, method='quantise')


@functools.partial(jax.jit, static_argnames=('step', 'phis'))
def refine(params, vectors, step, phis=2):
    where = Step.at(step)
    return quantiser(phis).apply({'params': params}, vectors, where, method='refine')


@pytest.fixture(scope='module')
def narrow():
    """A tokenizer of two levels whose stem folds 2 x 2 pixels, and its parameters."""
    sizes = Autoencoder(width=4, multipliers=(1, 2), blocks=1, groups=2, stem=2)
    vq = VQ(autoencoder=sizes, grids=square_grids(SIDES), codes=V, channels=C, phis=1)
    images = np.random.default_rng(2).uniform(-1, 1, (2, *vq.resolution, 3))
    images = images.astype(np.float32)
    params = sampled(vq.build().init, images)
    return vq, params, images


def test_residual_shrinks_with_every_scale(quantised, features):
    errors = [np.square(canvas - features).mean() for canvas in quantised.canvases]
    before = np.square(features).mean()
    assert before > errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * before


def test_scale_quantises_the_residual_of_coarser_scales(quantised, params, features):
    canvas = np.zeros_like(features)
    for step, side in enumerate(SIDES):
        rest = np.asarray(resize.area(jnp.asarray(features - canvas), side, side))
        np.testing.assert_allclose(quantised.targets[step], rest, atol=1e-5)
        distances = np.square(rest[..., None, :] - params['codebook']).sum(-1)
        np.testing.assert_array_equal(quantised.codes[step], distances.argmin(-1))
        canvas = canvas + refine(params, params['codebook'][quantised.codes[step]], step)
        np.testing.assert_allclose(quantised.canvases[step], canvas, atol=1e-5)


def test_entropy_of_codes_trains_the_codebook_alone(params, features):
    vq = VQ(grids=square_grids(SIDES), codes=V, channels=C, phis=2).build()

    def loss(params, f):
        tokenizer = bind(vq, {'quantiser': params})
        return EntropyOfCodes().losses(tokenizer, tokenizer.quantise(f)).sum()

    of_params, of_features = jax.grad(loss, (0, 1))(params, features[:1])
    assert np.any(of_params['codebook']) and not np.any(of_features)


def test_codes_are_ordered_coarse_to_fine_and_row_by_row(quantised):
    expected = np.concatenate([np.asarray(c).reshape(8, -1) for c in quantised.codes], axis=1)
    np.testing.assert_array_equal(quantised.codes_BL, expected)
    assert quantised.codes_BL.shape == (8, Pyramid.square(SIDES).length)


def test_folding_codes_gives_the_canvas_of_quantising(quantised, params):
    vq = VQ(grids=square_grids(SIDES), codes=V, channels=C, phis=2)
    apply = functools.partial(vq.build().apply, {'params': {'quantiser': params}})

    @jax.jit
    def walk(codes_BL):
        canvas, inputs = apply(8, method='blank'), []
        schedule = Pyramid.square(SIDES)
        for step, (first, end) in enumerate(itertools.pairwise(schedule.offsets)):
            codes = codes_BL[:, first:end]
            one = Sampled(codes, apply(codes, method='embed'))
            canvas, following = apply(canvas, one, Step.at(step), method='advance')
            inputs.append(following)
        return canvas, inputs, apply(codes_BL, method='inputs')

    canvas, (*inputs, after_the_last), at_once = walk(quantised.codes_BL)
    np.testing.assert_allclose(canvas, quantised.canvases[-1], atol=1e-5)
    np.testing.assert_allclose(np.concatenate(inputs, 1), at_once, atol=1e-6)
    assert after_the_last is None
    for step, side in enumerate(SIDES[1:]):
        coarse = resize.area(quantised.canvases[step], side, side).reshape(8, -1, C)
        np.testing.assert_allclose(inputs[step], coarse, atol=1e-5)


def test_decoder_receives_codes_and_encoder_receives_a_gradient(quantised, params, features):
    weights = np.random.default_rng(3).normal(size=features.shape).astype(np.float32)

    @jax.jit
    def through(params, f):
        out = quantise(params, f).straight_through(f)
        return (out * weights).sum(), out

    (of_params, of_f), out = jax.grad(through, (0, 1), has_aux=True)(params, features)
    np.testing.assert_allclose(out, quantised.canvases[-1], atol=1e-6)
    np.testing.assert_array_equal(of_f, weights)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(of_params))


def test_losses_pull_features_to_codes_and_codes_to_features(quantised, params, features):
    errors = np.array([np.square(canvas - features).mean() for canvas in quantised.canvases])
    losses = quantised.losses(jnp.asarray(features), 0.25)
    np.testing.assert_allclose(losses, 1.25 * errors, rtol=1e-5)

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(params, f, step):
        def loss(params, f, commitment):
            return quantise(params, f).losses(f, commitment)[step]

        both = jax.grad(loss, (0, 1))
        return both(params, f, 0.0), both(params, f, 0.25)

    (to_codes, none), (same_codes, to_f) = gradients(params, features, 1)
    assert (none == 0).all()  # the codebook loss leaves the features alone
    expected = 0.25 * 2 * (features - quantised.canvases[1]) / features.size
    np.testing.assert_allclose(to_f, expected, atol=1e-8)
    for leaf, same in zip(jax.tree.leaves(to_codes), jax.tree.leaves(same_codes), strict=True):
        np.testing.assert_allclose(leaf, same, atol=1e-8)  # commitment leaves the codes alone
    moved = np.abs(to_codes['codebook']).sum(-1) > 0
    chosen = np.unique(np.asarray(quantised.codes_BL)[:, :5])  # of the scales up to this one
    np.testing.assert_array_equal(np.flatnonzero(moved), chosen)
    assert np.abs(to_codes['phi_kernel']).max() > 0


def test_losses_of_scales_are_averaged_or_summed(quantised, features):
    features = jnp.asarray(features)
    losses = quantised.losses(features, 0.25)
    mean = Objective(quantiser=2.0, scales='mean').quantisation(features, quantised)
    total = Objective(quantiser=2.0, scales='sum').quantisation(features, quantised)
    np.testing.assert_allclose(mean, 2 * np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(total, 2 * np.sum(losses), rtol=1e-5)


def test_directions_are_compared_when_normalised(params, features):
    book = np.asarray(params['codebook'])
    units = book / np.linalg.norm(book, axis=-1, keepdims=True)
    found = quantise(params, features, normalised=True)
    for step in range(len(SIDES)):
        target = np.asarray(found.targets[step])
        np.testing.assert_array_equal(found.codes[step], (target @ units.T).argmax(-1))
    # The vectors on the canvas are not normalised.
    first = refine(params, params['codebook'][found.codes[0]], 0)
    np.testing.assert_allclose(found.canvases[0], first, atol=1e-5)
    louder = quantise(params, 3 * features, normalised=True)
    np.testing.assert_array_equal(louder.codes[0], found.codes[0])


@pytest.mark.parametrize('normalised', [False, True])
def test_the_first_of_equally_near_codes_is_taken(normalised, params):
    twice = np.tile(params['codebook'][: V // 2], (2, 1))
    search = functools.partial(
        quantiser(normalised=normalised).apply, {'params': {**params, 'codebook': twice}}
    )
    codes = jax.jit(functools.partial(search, method='search'))(twice[V // 2 :])
    np.testing.assert_array_equal(codes, np.arange(V // 2))
    assert codes.dtype == jnp.int32


def test_four_phis_serve_the_scales_as_recorded():
    for scales, expected in PHI_INDEX_TABLE.items():
        assert list(phi_of_scale(4, scales)) == expected


def test_the_phi_of_a_scale_is_the_nearest_tick():
    assert phi_of_scale(1, 5) == (0, 0, 0, 0, 0)
    assert phi_of_scale(2, 5) == (0, 0, 0, 1, 1)
    assert (
        phi_of_scale(3, 14) == (0,) * 5 + (1,) * 4 + (2,) * 5
    )  # 4/13 is nearer to 1/6 than to 1/2
    assert phi_of_scale(4, 1) == phi_of_scale(3, 1) == (0,)


@pytest.mark.parametrize('scales', [*range(1, 17), 25])
def test_as_many_phis_as_scales_are_one_each(scales):
    assert phi_of_scale(scales, scales) == tuple(range(scales))


def test_phis_start_near_the_identity(features):
    @jax.jit
    def start(vectors):
        where = Step.at(2)
        return quantiser().init_with_output(jax.random.key(0), vectors, where, method='refine')[0]

    error = start(features) - features
    assert 0 < np.abs(error).mean() < 0.1 * np.abs(features).mean()


def test_each_scale_goes_through_its_own_phi(params):
    """With four phis for three scales the table skips the second one."""
    kernel = np.zeros((4, 3, 3, C, C), np.float32)
    bias = np.arange(4, dtype=np.float32)[:, None] * np.ones(C, np.float32)
    own = {**params, 'phi_kernel': kernel, 'phi_bias': bias}
    for step, (side, phi) in enumerate(zip(SIDES, (0, 2, 3), strict=True)):
        ones = np.ones((1, side, side, C), np.float32)
        # Half of the vectors stay as they are, the other half is this phi's bias.
        expected = np.full((1, 4, 4, C), 0.5 + 0.5 * phi)
        np.testing.assert_allclose(refine(own, ones, step, phis=4), expected, atol=1e-6)


def test_pixels_fold_into_channels_and_back():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    folded = space_to_depth(jnp.asarray(x), 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(depth_to_space(folded, 2), x)
    np.testing.assert_array_equal(space_to_depth(jnp.asarray(x), 1), x)


def test_a_stem_is_part_of_the_downsampling(narrow):
    vq, params, images = narrow
    assert (vq.autoencoder.downsampling, vq.resolution) == (4, (16, 16))
    apply = functools.partial(vq.build().apply, params)

    @jax.jit
    def there_and_back(images):
        f = apply(images, method='features')
        found = apply(f, method='quantise')
        canvas = found.canvases[-1]
        codes = apply(images, method='encode')
        return (
            f,
            canvas,
            found.codes_BL,
            codes,
            *(apply(canvas, method=way) for way in ('decode_unclamped', 'decode')),
        )

    f, canvas, codes, encoded, painted, decoded = there_and_back(images)
    assert f.shape == canvas.shape == (2, 4, 4, C)
    np.testing.assert_array_equal(codes, encoded)
    assert painted.shape == images.shape
    np.testing.assert_array_equal(decoded, np.clip(painted, -1, 1))
    kernels = params['params']
    assert kernels['encoder']['conv_in']['kernel'].shape == (3, 3, 12, 4)
    assert kernels['decoder']['conv_out']['kernel'].shape == (3, 3, 4, 12)


def test_images_of_a_batch_do_not_mix(narrow):
    vq, params, images = narrow
    encode = jax.jit(functools.partial(vq.build().apply, params, method='features'))
    other = images.copy()
    other[1] = -other[1]
    before, after = encode(images), encode(other)
    np.testing.assert_allclose(before[0], after[0], atol=1e-6)
    assert np.abs(before[1] - after[1]).max() > 1e-3


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_groups_of_channels_are_normalised_together(groups):
    x = np.random.default_rng(4).normal(3, 2, (2, 3, 3, 4)).astype(np.float32)
    norm = layers.group_norm(groups)
    out = norm.apply({'params': {'scale': np.ones(4), 'bias': np.zeros(4)}}, x)
    with_batch_groups = x.reshape(2, 9, groups, -1)
    centred = with_batch_groups - with_batch_groups.mean((1, 3), keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize(
    'make',
    [
        lambda: Autoencoder(width=10, groups=4),
        lambda: Autoencoder(stem=0),
        lambda: Autoencoder(multipliers=(1, 0)),
        lambda: VQ(codes=0),
        lambda: VQ(phi_ratio=1.5),
        lambda: VQ(grids=square_grids((0, 1))),
        lambda: VQ(grids=square_grids((4, 2))).build().schedule,
    ],
)
def test_sizes_that_cannot_be_built_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_decoder_in_bfloat16_gives_the_same_image():
    tokenizer = models.read_tokenizer('shipped')
    canvas = 0.5 * jax.random.normal(jax.random.key(0), (2, 8, 8, tokenizer.config.channels))
    exact = tokenizer.config.build().apply({'params': tokenizer.params}, canvas, method='decode')
    params = program.cast({'tokenizer': tokenizer.params}, 'bfloat16')['tokenizer']
    decode = functools.partial(tokenizer.config.build('bfloat16').apply, method='decode')
    close = decode({'params': params}, canvas)
    assert close.dtype == jnp.float32
    assert 45 < float(psnr(exact, close).min()) < 70
    (traced,) = jax.make_jaxpr(decode)({'params': params}, canvas).out_avals
    convolutions = str(jax.make_jaxpr(decode)({'params': params}, canvas)).count('bf16[3,3,')
    assert traced.dtype == jnp.float32 and convolutions > 10


def test_autoencoder_without_attention_has_a_latent_width_of_its_own():
    sizes = Autoencoder(width=8, multipliers=(1, 2), blocks=1, groups=4, attention=False, latent=6)
    vq = VQ(autoencoder=sizes, grids=square_grids((1, 2)), codes=16, channels=3)
    params = nn.unbox(vq.abstract())
    assert not [name for part in ('encoder', 'decoder') for name in params[part] if 'attn' in name]
    assert params['encoder']['conv_out']['kernel'].shape[-1] == 6
    assert params['quant_conv']['kernel'].shape[-2:] == (6, 3)
    assert params['post_quant_conv']['kernel'].shape[-2:] == (3, 6)
    images = jax.ShapeDtypeStruct((2, *vq.resolution, 3), jnp.float32)
    decoded = jax.eval_shape(vq.build().apply, {'params': params}, images)
    assert decoded.shape == images.shape
