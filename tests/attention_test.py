"""Does every way of computing attention give the formula's numbers and gradients?"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from star_jax.core.schedule import Pyramid, Raster
from star_jax.core.visibility import StaticVisibility, TracedVisibility
from star_jax.errors import UserError
from star_jax.nn import attention_dispatch, flash
from star_jax.nn.flash import Flash
from star_jax.nn.kernels import KV, ByScale, Chunked, Dense, Kernel, Tiled, mask_of
from star_jax.nn.splash import Splash

B, N, H = 2, 2, 4
PYRAMID = Pyramid.square((1, 2, 2, 3))  # 18 rows
RASTER = Raster(3, 4, prefix=3)  # 14 rows
# What is seen, and of how many keys.
SEEN = {
    'pyramid': (PYRAMID.visibility(), 18),
    'raster': (RASTER.visibility(), 14),
    'thinned': (PYRAMID.visibility(np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13])), 11),
    'several_steps_and_their_past': (StaticVisibility.of(PYRAMID.visible_rows[5:]), 18),
    'a_prefix_and_empty_places': (StaticVisibility.of(RASTER.visible_rows[:3]), 14),
    'everything': (None, 7),
}
KERNELS = {
    'by_scale': ByScale(rows=4),
    'images_in_turn': Tiled(most=280),  # of 5 rows and 7 keys; of more rows the heads, too
    'heads_in_turn': ByScale(Tiled(most=100), rows=2),
    'chunked': Chunked(rows=4),
    'chunked_by_scale': ByScale(Chunked(rows=4), Chunked(rows=3), rows=2),
}


def draw(rows: int, keys: int, dtype: str = 'float32') -> tuple[jax.Array, KV]:
    """Queries and keys that prefer some over others, and values."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, n, N, H)).astype(dtype) for n in (rows, keys, keys))
    return jnp.asarray(q), KV(jnp.asarray(k), jnp.asarray(v))


@functools.partial(jax.jit, static_argnames='kernel')
def learn(kernel: Kernel, q_BLNH: jax.Array, kv: KV, visibility) -> tuple:
    """What is gathered, and the gradients of a weighting of it."""

    def loss(q_BLNH, kv):
        y_BLNH = kernel(q_BLNH, kv, visibility)
        weights = jnp.cos(jnp.arange(y_BLNH.size, dtype=jnp.float32)).reshape(y_BLNH.shape)
        return (y_BLNH * weights).sum(), y_BLNH

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(q_BLNH, kv)


def assert_same(kernel: Kernel, q_BLNH: jax.Array, kv: KV, visibility, atol: float = 2e-6) -> None:
    """`kernel` and the formula under a mask agree, forward and backward."""
    found = learn(kernel, q_BLNH, kv, visibility)
    expected = learn(Dense(), q_BLNH, kv, mask_of(visibility, kv.keys.shape[1]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), found, expected)


def rows_of(visibility: StaticVisibility | None) -> int:
    return 5 if visibility is None else visibility.rows


def test_the_formula_is_a_softmax_over_what_is_seen():
    q_BLNH, kv = draw(2, 3)
    found = Dense()(q_BLNH, kv, StaticVisibility.of(np.array([1, 2])))
    np.testing.assert_allclose(found[:, 0], kv.values[:, 0], rtol=1e-6)
    scores = np.einsum('nh,mnh->nm', q_BLNH[1, 1], kv.keys[1, :2])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum('nm,mnh->nh', weights, kv.values[1, :2])
    np.testing.assert_allclose(found[1, 1], expected, rtol=1e-5)


@pytest.mark.parametrize('name', SEEN)
@pytest.mark.parametrize('kernel', KERNELS.values(), ids=KERNELS)
def test_kernels_give_what_the_formula_gives(kernel, name):
    visibility, keys = SEEN[name]
    assert_same(kernel, *draw(rows_of(visibility), keys), visibility)


def test_a_traced_reach_is_a_known_one():
    """Of some rows in any order, as where queries are split over devices."""
    keys_L = np.random.default_rng(1).permutation(PYRAMID.visible_rows)[:10]
    assert_same(KERNELS['chunked_by_scale'], *draw(10, 18), TracedVisibility(jnp.asarray(keys_L)))


@pytest.mark.parametrize('shape', [(B, 1, 1, 6), (1, N, 1, 6), (9, 6), (B, N, 9, 6), (6,)], ids=str)
@pytest.mark.parametrize('kernel', ['chunked_by_scale', 'images_in_turn'])
def test_any_mask_may_be_given(kernel, shape):
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask[..., 0] = True
    assert_same(KERNELS[kernel], *draw(9, 6), jnp.asarray(mask))


def test_as_many_images_and_heads_at_once_as_the_cache_holds():
    def turns(most: int) -> list[int]:
        q = jax.ShapeDtypeStruct((4, 8, 6, H), jnp.float32)  # 256 bytes of scores per head
        program = str(jax.make_jaxpr(Tiled(most))(q, KV(q, q)))
        return sorted(map(int, re.findall(r'length=(\d+)', program)))

    assert turns(4 * 6 * 256) == turns(4 * 6 * 256 // 2 + 1) == []
    assert turns(2 * 6 * 256) == [2]
    assert turns(6 * 256) == turns(2 * 6 * 256 - 1) == [4]
    assert turns(3 * 256) == [2, 4]
    assert turns(1) == [4, 6]


def test_pieces_have_no_mask_but_the_first():
    """A pyramid's scales are pieces, its first ones and a raster's rows share some."""
    spans = Pyramid.square((1, 2, 3, 4, 6, 8, 8)).visibility().spans(32)
    assert [span[:3] for span in spans] == [(0, 66, 66), (66, 130, 130), (130, 194, 194)]
    assert [span.within is None for span in spans] == [False, True, True]
    assert spans[0].within == Pyramid.square((1, 2, 3, 4, 6)).visibility()
    causal = Raster(24, 24).visibility().spans(64)
    assert len(causal) == 9
    assert [span.keys for span in causal] == [span.end for span in causal]
    assert len(Raster(64, 64).visibility().spans(64)) <= 32


def test_memory_of_chunks_grows_with_the_rows_and_not_with_their_square():
    def temporary(kernel: Kernel, rows: int) -> int:
        q = jax.ShapeDtypeStruct((1, rows, N, H), jnp.float32)
        return learn.lower(kernel, q, KV(q, q), None).compile().memory_analysis().temp_size_in_bytes

    dense, chunked = (
        [temporary(kernel, rows) for rows in (512, 1024)] for kernel in (Dense(), Chunked(rows=64))
    )
    assert dense[1] > 3.5 * dense[0]
    assert chunked[1] < 2.5 * chunked[0] < 0.5 * dense[0]


def test_pieces_for_a_gpu_need_no_mask(monkeypatch):
    """The same calls with XLA's implementation in the place of cuDNN's."""
    assert_same(Flash(), *draw(18, 18), PYRAMID.visibility())  # float32 is not for cuDNN
    monkeypatch.setattr(flash, 'HALVES', (jnp.float32,))
    for schedule in (Pyramid.square((1, 4, 8, 8)), RASTER):
        visibility = schedule.visibility()
        assert_same(
            Flash(implementation='xla'), *draw(visibility.rows, visibility.rows), visibility
        )
        with pytest.raises(RuntimeError, match='cuDNN'):
            Flash()(*draw(visibility.rows, visibility.rows), visibility)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('schedule', [Pyramid.square((1, 2, 4, 8, 13, 16)), Raster(16, 24, 8)])
def test_a_gpu_gives_what_the_formula_gives(schedule):
    visibility, rng = schedule.visibility(), np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, visibility.rows, 4, 64)), 'bfloat16') for _ in range(3)
    )
    assert_same(Flash(), q / 8, KV(k, v), visibility, atol=0.05)


@pytest.mark.parametrize('name', ['known', 'traced', 'past', 'unseen'])
def test_blocks_for_a_tpu_give_what_the_formula_gives(name):
    visibility = Pyramid.square((1, 2, 3, 4, 6, 8)).visibility()  # 130 rows, two blocks
    visibility, keys = {
        'known': (visibility, 130),
        'traced': (TracedVisibility(jnp.asarray(visibility.keys_L)), 130),
        'past': (None, 140),
        'unseen': (StaticVisibility.of(np.arange(1, 10)), 260),
    }[name]
    rows = 9 if name in ('past', 'unseen') else 130
    assert_same(Splash(interpret=True), *draw(rows, keys), visibility, atol=1e-5)


def test_platform_and_shape_choose_the_kernel():
    def choose(platform: str, rows: int, dtype: str = 'bfloat16', width: int = 64) -> Kernel:
        q = jax.ShapeDtypeStruct((2, rows, 16, width), dtype)
        return attention_dispatch.Automatic(platform).choose(q, KV(q, q), None)

    assert choose('cpu', 680) == attention_dispatch.CACHED
    assert choose('gpu', 680, 'float32') == ByScale()
    assert choose('cpu', 9451) == attention_dispatch.CHUNKED
    assert choose('gpu', 680) == Flash(ByScale())
    assert choose('tpu', 9451) == Splash(attention_dispatch.CHUNKED)
    assert choose('gpu', 100) == choose('tpu', 100) == choose('tpu', 680, width=4) == ByScale()


def test_a_run_may_name_its_kernel():
    assert attention_dispatch.named('automatic', 'gpu') == attention_dispatch.Automatic('gpu')
    assert attention_dispatch.named('dense', 'cpu') == Dense()
    assert attention_dispatch.named('splash', 'tpu') == Splash(attention_dispatch.CHUNKED)
    with pytest.raises(UserError, match='flash is a kernel of GPUs'):
        attention_dispatch.named('flash', 'cpu')
