"""Does every kernel give the numbers and gradients of the formula?"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from star_jax.core.cache import KV
from star_jax.core.schedule import Pyramid, Raster
from star_jax.core.visibility import ALL, StaticVisibility, TracedVisibility, Visibility, pack
from star_jax.errors import UserError
from star_jax.nn import attention_dispatch, flash
from star_jax.nn.flash import Flash
from star_jax.nn.kernels import ByScale, Chunked, Dense, MergedHeads, Tiled
from star_jax.nn.sharded_attention import ShardedAttention
from star_jax.nn.splash import Splash
from star_jax.parallel.mesh import MeshShape
from star_jax.parallel.rules import ActivationSharding
from star_jax.protocols import Kernel

B, N, H = 2, 2, 4
PYRAMID = Pyramid.square((1, 2, 2, 3))  # 18 rows
RASTER = Raster(3, 4, prefix=3)  # 14 rows
# Upper bounds of the rows, and how many keys there are.
BOUNDS = {
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
FIRST_B, END_B = jnp.array([2, 0]), jnp.array([3, 6])


def random(
    rows: int, keys: int, dtype: str = 'float32', heads: int = N, kv_heads: int = N
) -> tuple[jax.Array, KV]:
    """Queries and keys with scores that differ, and values."""
    rng = np.random.default_rng(0)
    sizes = ((rows, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (jnp.asarray(rng.normal(size=(B, *size, H)).astype(dtype)) for size in sizes)
    return q, KV.from_rows(k, v)


def pieces_of(kv: KV, *ends: int) -> tuple[KV, ...]:
    """The keys and values cut at these rows."""
    return tuple(kv.part(*span) for span in itertools.pairwise((0, *ends, kv.rows)))


@functools.partial(jax.jit, static_argnames='kernel')
def forward_and_backward(kernel: Kernel, q_BLNH: jax.Array, pieces, visibility) -> tuple:
    """The output, and the gradients of a weighted sum of it."""

    def loss(q_BLNH, pieces):
        *past, new = pieces
        y_BLNH = kernel(q_BLNH, tuple(past), new, visibility)
        weights = jnp.cos(jnp.arange(y_BLNH.size, dtype=jnp.float32)).reshape(y_BLNH.shape)
        return (y_BLNH * weights).sum(), y_BLNH

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(q_BLNH, pieces)


def formula(q_BLNH, past, new, visibility: Visibility) -> jax.Array:
    """The definition of visibility and of attention, key by key, on joined keys."""
    keys, values = (jnp.concatenate(x, -2) for x in zip(*past, new, strict=True))
    before, rows = sum(kv.rows for kv in past), q_BLNH.shape[1]
    written = before if visibility.written is None else visibility.written
    number_M = jnp.arange(before + new.rows)
    number_M = jnp.where(number_M < before, number_M, number_M - before + written)
    unwritten_M = (jnp.arange(before + new.rows) < before) & (number_M >= written)
    upper_L = jnp.full(rows, written + new.rows)
    if visibility.bounds is not None:
        upper_L = jnp.broadcast_to(jnp.asarray(visibility.bounds.bound_L), rows)
    first_B = jnp.zeros(B, int) if visibility.first_B is None else visibility.first_B
    end_B = jnp.full(B, before + new.rows) if visibility.end_B is None else visibility.end_B
    lower_BL = jnp.minimum(first_B[:, None], upper_L[None] - 1)
    visible_BLM = (
        (number_M >= lower_BL[..., None])
        & (number_M < upper_L[None, :, None])
        & (number_M < end_B[:, None, None])
        & ~unwritten_M[None, None]
    )[:, None]
    if visibility.mask is not None:
        visible_BLM = visibility.mask
    repeats = q_BLNH.shape[2] // new.heads
    keys, values = (jnp.repeat(x, repeats, axis=1) for x in (keys, values))
    scores = jnp.where(visible_BLM, jnp.einsum('BLNH,BNMH->BNLM', q_BLNH, keys), -1e30)
    return jnp.einsum('BNLM,BNMH->BLNH', jax.nn.softmax(scores), values)


def assert_same(
    kernel: Kernel, q_BLNH: jax.Array, pieces, visibility: Visibility = ALL, atol: float = 2e-6
) -> None:
    """`kernel` and the formula under a mask agree, forward and backward."""
    pieces = (pieces,) if isinstance(pieces, KV) else pieces
    outputs, expected = (
        forward_and_backward(attend, q_BLNH, pieces, visibility) for attend in (kernel, formula)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), outputs, expected)


def rows_of(visibility: StaticVisibility | None) -> int:
    return 5 if visibility is None else visibility.rows


def test_dense_computes_a_softmax_over_visible_keys():
    q_BLNH, kv = random(2, 3)
    y_BLNH = Dense()(q_BLNH, (), kv, Visibility(bounds=StaticVisibility.of(np.array([1, 2]))))
    keys_BMNH, values_BMNH = kv.to_rows()
    np.testing.assert_allclose(y_BLNH[:, 0], values_BMNH[:, 0], rtol=1e-6)
    scores = np.einsum('nh,mnh->nm', q_BLNH[1, 1], keys_BMNH[1, :2])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum('nm,mnh->nh', weights, values_BMNH[1, :2])
    np.testing.assert_allclose(y_BLNH[1, 1], expected, rtol=1e-5)


ALL_KERNELS = {'dense': Dense(), **KERNELS}


@pytest.mark.parametrize('name', BOUNDS)
@pytest.mark.parametrize('kernel', ALL_KERNELS.values(), ids=ALL_KERNELS)
def test_kernels_agree_with_the_formula(kernel, name):
    bounds, keys = BOUNDS[name]
    assert_same(kernel, *random(rows_of(bounds), keys), Visibility(bounds=bounds))


@pytest.mark.parametrize('name', ['pyramid', 'raster', 'everything'])
@pytest.mark.parametrize('kernel', ALL_KERNELS.values(), ids=ALL_KERNELS)
def test_kernels_hide_the_first_keys_of_an_image(kernel, name):
    """Rows of hidden padding attend to themselves alone."""
    bounds, keys = BOUNDS[name]
    visibility = Visibility(bounds=bounds, first_B=FIRST_B)
    assert_same(kernel, *random(rows_of(bounds), keys), visibility)


@pytest.mark.parametrize('kernel', ALL_KERNELS.values(), ids=ALL_KERNELS)
def test_kernels_hide_the_last_keys_of_an_image(kernel):
    assert_same(kernel, *random(9, 7), Visibility(end_B=END_B))


PIECEWISE = ['dense', 'heads_in_turn', 'chunked_by_scale']
PAST = {  # upper bounds, keys, where the keys are cut, keys that images hide
    'a_step': (StaticVisibility.of(PYRAMID.visible_rows[9:18]), 18, (9,), None),
    'blocks': (StaticVisibility.of(PYRAMID.visible_rows[9:18]), 18, (4, 8, 9), FIRST_B),
    'several_steps': (StaticVisibility.of(PYRAMID.visible_rows[5:]), 18, (2, 5), None),
    'a_row': (StaticVisibility.of(RASTER.visible_rows[13:]), 14, (8, 13), FIRST_B),
    'a_past_that_is_hidden_in_part': (StaticVisibility.of(np.array([2, 3, 12])), 12, (4, 9), None),
    'everything': (None, 9, (2, 5), FIRST_B),
}


@pytest.mark.parametrize('name', PAST)
@pytest.mark.parametrize('kernel', PIECEWISE)
def test_kernels_read_the_past_in_pieces(kernel, name):
    bounds, keys, ends, first_B = PAST[name]
    q_BLNH, kv = random(4 if bounds is None else bounds.rows, keys)
    visibility = Visibility(bounds=bounds, first_B=first_B)
    assert_same(ALL_KERNELS[kernel], q_BLNH, pieces_of(kv, *ends), visibility)


@pytest.mark.parametrize('name', ['one', 'each', 'all'])
@pytest.mark.parametrize('kernel', PIECEWISE)
def test_kernels_hide_rows_that_are_not_written(kernel, name):
    """Whole pieces of the past are hidden in some cases, which must not give NaN."""
    q_BLNH, kv = random(4, 10)
    for written in (0, 1, 3, 6):
        bounds = {
            'one': TracedVisibility(jnp.array([written + 3])),
            'each': TracedVisibility(written + jnp.array([1, 2, 4, 3])),
            'all': None,
        }[name]
        visibility = Visibility(bounds=bounds, written=jnp.int32(written))
        assert_same(ALL_KERNELS[kernel], q_BLNH, pieces_of(kv, 2, 6), visibility)


@pytest.mark.parametrize('kernel', ALL_KERNELS.values(), ids=ALL_KERNELS)
def test_query_heads_share_keys_in_order(kernel):
    """Head i of 6 reads key head i // 3 of 2."""
    bounds = StaticVisibility.of(PYRAMID.visible_rows[5:])
    q_BLNH, kv = random(bounds.rows, 18, heads=6, kv_heads=2)
    visibility = Visibility(bounds=bounds, first_B=FIRST_B)
    assert_same(kernel, q_BLNH, pieces_of(kv, 2, 5), visibility)


@pytest.mark.parametrize('kernel', [Dense(), Chunked(rows=4), Tiled(most=400)], ids=str)
def test_shared_keys_are_not_repeated_in_memory(kernel):
    q, kv = (jax.ShapeDtypeStruct(s, 'float32') for s in ((2, 12, 8, H), (2, 2, 40, H)))
    program = str(jax.make_jaxpr(kernel)(q, (), KV(kv, kv)))
    assert not re.search(r'f32\[(2,)*8,40,4\]|f32\[(2,)*40,8,4\]', program)


def test_traced_bounds_agree_with_static_ones():
    """The rows are a subset in any order, as where queries are split over devices."""
    bound_L = np.random.default_rng(1).permutation(PYRAMID.visible_rows)[:10]
    visibility = Visibility(bounds=TracedVisibility(jnp.asarray(bound_L)))
    assert_same(KERNELS['chunked_by_scale'], *random(10, 18), visibility)


@pytest.mark.parametrize('shape', [(B, 1, 1, 6), (1, N, 1, 6), (9, 6), (B, N, 9, 6), (6,)], ids=str)
@pytest.mark.parametrize('kernel', ['dense', 'chunked_by_scale', 'images_in_turn'])
def test_kernels_take_any_mask(kernel, shape):
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask[..., 0] = True
    q_BLNH, kv = random(9, 6)
    for pieces in ((kv,), pieces_of(kv, 2, 3)):
        assert_same(ALL_KERNELS[kernel], q_BLNH, pieces, Visibility(mask=jnp.asarray(mask)))


def test_a_mask_with_holes_becomes_lengths():
    """Attention to packed states is attention to the visible ones."""
    q_BLNH, kv = random(3, 6)
    mask_BT = np.array([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    expected = Dense()(q_BLNH, (), kv, Visibility(mask=jnp.asarray(mask_BT > 0)[:, None, None]))
    keys, values = kv.to_rows()
    packed = [pack(x.reshape(B, 6, -1), jnp.asarray(mask_BT)) for x in (keys, values)]
    kv = KV.from_rows(*(x.reshape(B, 6, N, H) for x, _ in packed))
    np.testing.assert_array_equal(packed[0][1], [3, 2])
    y_BLNH = Dense()(q_BLNH, (), kv, Visibility(end_B=packed[0][1]))
    np.testing.assert_allclose(y_BLNH, expected, atol=1e-6)
    leading, length_B = pack(values.reshape(B, 6, -1), jnp.asarray(mask_BT[[1, 1]]))
    np.testing.assert_array_equal(leading, values.reshape(B, 6, -1))


def test_tiles_are_as_large_as_the_cache_allows():
    def turns(most: int) -> list[int]:
        q = jax.ShapeDtypeStruct((4, 8, 6, H), jnp.float32)  # 256 bytes of scores per head
        kv = jax.ShapeDtypeStruct((4, 6, 8, H), jnp.float32)
        program = str(jax.make_jaxpr(Tiled(most))(q, (), KV(kv, kv)))
        return sorted(map(int, re.findall(r'length=(\d+)', program)))

    assert turns(4 * 6 * 256) == turns(4 * 6 * 256 // 2 + 1) == []
    assert turns(2 * 6 * 256) == [2]
    assert turns(6 * 256) == turns(2 * 6 * 256 - 1) == [4]
    assert turns(3 * 256) == [2, 4]
    assert turns(1) == [4, 6]


def test_spans_have_no_mask_but_the_first():
    """A pyramid's scales are spans; its first ones and a raster's rows share some."""
    spans = Pyramid.square((1, 2, 3, 4, 6, 8, 8)).visibility().spans(32)
    assert [span[:3] for span in spans] == [(0, 66, 66), (66, 130, 130), (130, 194, 194)]
    assert [span.within is None for span in spans] == [False, True, True]
    assert spans[0].within == Pyramid.square((1, 2, 3, 4, 6)).visibility()
    causal = Raster(24, 24).visibility().spans(64)
    assert len(causal) == 9
    assert [span.keys for span in causal] == [span.end for span in causal]
    assert len(Raster(64, 64).visibility().spans(64)) <= 32


def test_memory_of_chunks_grows_linearly_with_the_rows():
    def temporary(kernel: Kernel, rows: int) -> int:
        q = jax.ShapeDtypeStruct((1, rows, N, H), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, N, rows, H), jnp.float32)
        lowered = forward_and_backward.lower(kernel, q, (KV(kv, kv),), ALL)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    dense, chunked = (
        [temporary(kernel, rows) for rows in (512, 1024)] for kernel in (Dense(), Chunked(rows=64))
    )
    assert dense[1] > 3.5 * dense[0]
    assert chunked[1] < 2.5 * chunked[0] < 0.5 * dense[0]


@pytest.fixture
def flash_here(monkeypatch) -> Kernel:
    """The calls for a GPU with XLA's implementation in the place of cuDNN's, in float32.

    A call of the kernel for masks fails.
    """
    monkeypatch.setattr(flash, 'HALVES', (jnp.float32,))
    return Flash(otherwise=None, implementation='xla')


def test_float32_is_not_for_cudnn():
    assert_same(Flash(), *random(18, 18), Visibility(bounds=PYRAMID.visibility()))


@pytest.mark.parametrize('first_B', [None, FIRST_B], ids=['all', 'padded'])
@pytest.mark.parametrize('schedule', [Pyramid.square((1, 4, 8, 8)), RASTER], ids=str)
def test_a_gpu_needs_no_mask(flash_here, schedule, first_B):
    bounds = schedule.visibility()
    arrays, visibility = (
        random(bounds.rows, bounds.rows),
        Visibility(bounds=bounds, first_B=first_B),
    )
    assert_same(flash_here, *arrays, visibility)
    with pytest.raises(RuntimeError, match='cuDNN'):
        Flash()(arrays[0], (), arrays[1], visibility)


@pytest.mark.parametrize('kv_heads', [6, 2])
def test_a_gpu_counts_the_keys_of_each_image(flash_here, kv_heads):
    q_BLNH, kv = random(9, 7, heads=6, kv_heads=kv_heads)
    assert_same(flash_here, q_BLNH, kv, Visibility(end_B=END_B))
    assert_same(flash_here, q_BLNH, kv, Visibility(first_B=FIRST_B))
    both = Visibility(first_B=FIRST_B, end_B=jnp.array([3, 6]))
    assert_same(flash_here, q_BLNH, kv, both)


def test_a_gpu_counts_the_rows_that_are_written(flash_here):
    q_BLNH, kv = random(4, 10)
    for written in (1, 3, 6):
        bounds = TracedVisibility(jnp.array([written + 3]))
        visibility = Visibility(bounds=bounds, written=jnp.int32(written))
        assert_same(flash_here, q_BLNH, pieces_of(kv, 2, 6), visibility)


@pytest.mark.parametrize('first_B', [None, FIRST_B], ids=['all', 'padded'])
@pytest.mark.parametrize('schedule', [Pyramid.square((1, 9, 11)), Raster(5, 5, prefix=2)], ids=str)
def test_a_gpu_trains_on_odd_numbers_of_rows(monkeypatch, schedule, first_B):
    """JAX checks the shapes when it traces, also where there is no GPU."""
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91400)
    monkeypatch.setattr(fused_attention_stablehlo, 'check_compute_capability', lambda _: True)
    bounds = schedule.visibility()
    rows = jax.ShapeDtypeStruct((2, bounds.rows, 4, 64), jnp.bfloat16)

    def loss(q_BLNH: jax.Array, k_BMNH: jax.Array, v_BMNH: jax.Array) -> jax.Array:
        new, visibility = KV.from_rows(k_BMNH, v_BMNH), Visibility(bounds=bounds, first_B=first_B)
        return Flash()(q_BLNH, (), new, visibility).astype(jnp.float32).sum()

    gradients = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(rows, rows, rows)
    assert 'dot_product_attention_bwd' in str(gradients)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('first_B', [None, FIRST_B], ids=['all', 'padded'])
@pytest.mark.parametrize('schedule', [Pyramid.square((1, 2, 4, 8, 13, 16)), Raster(16, 24, 8)])
def test_a_gpu_agrees_with_the_formula(schedule, first_B):
    bounds, rng = schedule.visibility(), np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, bounds.rows, 4, 64)), 'bfloat16') for _ in range(3))
    visibility = Visibility(bounds=bounds, first_B=first_B)
    assert_same(Flash(), q / 8, KV.from_rows(k, v), visibility, atol=0.05)


@pytest.mark.parametrize(
    'name', ['known', 'traced', 'past', 'unseen', 'padded', 'lengths', 'written', 'shared']
)
def test_a_tpu_agrees_with_the_formula(name):
    bounds = Pyramid.square((1, 2, 3, 4, 6, 8)).visibility()  # 130 rows, two blocks
    visibility, keys = {
        'known': (Visibility(bounds=bounds), 130),
        'traced': (Visibility(bounds=TracedVisibility(jnp.asarray(bounds.bound_L))), 130),
        'past': (ALL, 140),
        'unseen': (Visibility(bounds=StaticVisibility.of(np.arange(1, 10))), 260),
        'padded': (Visibility(bounds=Raster(8, 16, 3).visibility(), first_B=FIRST_B), 130),
        'lengths': (Visibility(end_B=END_B), 7),
        'written': (Visibility(TracedVisibility(jnp.array([34])), written=jnp.int32(30)), 140),
        'shared': (Visibility(bounds=bounds), 130),
    }[name]
    rows = 9 if name in ('past', 'unseen', 'lengths', 'written') else 130
    q_BLNH, kv = random(rows, keys, heads=4, kv_heads=2 if name == 'shared' else 4)
    pieces = pieces_of(kv, keys - 9) if name in ('past', 'written') else (kv,)
    assert_same(Splash(None, interpret=True), q_BLNH, pieces, visibility, atol=1e-5)


SHARDED = {  # key/value heads, where the keys are cut, visibility
    'rows': (2, (), Visibility(bounds=PYRAMID.visibility())),
    'heads_that_share_keys': (1, (), Visibility(bounds=PYRAMID.visibility(), first_B=FIRST_B)),
    'past': (2, (8,), Visibility(StaticVisibility.of(PYRAMID.visible_rows[8:]), FIRST_B)),
    'written': (2, (8,), Visibility(TracedVisibility(jnp.array([12])), written=jnp.int32(2))),
    'lengths': (2, (), Visibility(end_B=END_B)),
    'mask': (2, (), Visibility(mask=jnp.arange(18)[None] <= jnp.arange(18)[:, None])),
}


@pytest.mark.parametrize('case', SHARDED)
def test_devices_compute_what_one_computes(case):
    """Images, heads and rows are split over two devices each."""
    kv_heads, ends, visibility = SHARDED[case]
    mesh = MeshShape(data=2, tensor=2, sequence=2).build()
    q_BLNH, kv = random(18 - sum(ends), 18, heads=4, kv_heads=kv_heads)
    sharded = ShardedAttention(Dense(), ActivationSharding(mesh))
    assert_same(sharded, q_BLNH, pieces_of(kv, *ends), visibility)


def test_platform_and_shape_decide_the_kernel():
    def choose(
        platform: str, rows: int, dtype: str = 'bfloat16', width: int = 64, cached: bool = False
    ) -> Kernel:
        q = jax.ShapeDtypeStruct((2, rows, 16, width), dtype)
        kv = jax.ShapeDtypeStruct((2, 16, rows, width), dtype)
        past = (KV(kv, kv),) if cached else ()
        return attention_dispatch.Automatic(platform).choose(q, past, KV(kv, kv))

    assert choose('cpu', 680) == attention_dispatch.TEACHER_FORCED
    assert choose('cpu', 680, cached=True) == attention_dispatch.CACHED
    assert choose('gpu', 680, 'float32') == ByScale()
    assert choose('cpu', 9451) == attention_dispatch.CHUNKED
    assert choose('gpu', 680) == Flash(ByScale())
    assert choose('tpu', 9451) == Splash(attention_dispatch.CHUNKED)
    assert choose('gpu', 100) == choose('tpu', 100) == choose('tpu', 680, width=4) == ByScale()


def test_a_run_names_its_kernel():
    assert attention_dispatch.named('automatic', 'gpu') == attention_dispatch.Automatic('gpu')
    assert attention_dispatch.named('dense', 'cpu') == Dense()
    assert attention_dispatch.named('splash', 'tpu') == Splash(attention_dispatch.CHUNKED)
    with pytest.raises(UserError, match='flash is a kernel of GPUs'):
        attention_dispatch.named('flash', 'cpu')


@pytest.mark.parametrize('count', [1, 2, 4])
def test_merged_heads_compute_what_heads_compute(count):
    random = np.random.default_rng(7)
    queries = random.normal(size=(B, 3, 8, H)).astype(np.float32)  # two for each of 4 heads
    past, new = (KV(*random.normal(size=(2, B, 4, rows, H)).astype(np.float32)) for rows in (5, 3))
    visibility = Visibility(first_B=jnp.asarray([0, 2]))
    merged = past.merge_heads(count)
    assert merged.keys.shape == (B, 4 // count, 5, count * H)
    np.testing.assert_array_equal(merged.split_heads(count).values, past.values)
    expected = Dense()(queries, (past,), new, visibility)
    actual = MergedHeads(Dense(), count)(queries, (merged,), new, visibility)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
