"""How is attention computed?

All kernels compute the same numbers. `Dense` is the formula, with which the tests compare the
others; these skip keys that no row attends to, or keep less in memory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from star_jax.core.cache import HEADS, KV, join
from star_jax.core.visibility import ALL, StaticVisibility, TracedVisibility, Visibility, masks
from star_jax.protocols import Kernel


@dataclasses.dataclass(frozen=True)
class Dense:
    """The formula: one softmax over all pieces, which are not joined.

    All scores, float32 [B, N, L, M], exist at once.
    """

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        pieces = (*past, new)
        batch, rows, heads, width = q_BLNH.shape
        q_BLKGH = q_BLNH.reshape(batch, rows, new.heads, heads // new.heads, width)
        # With L behind the heads in the queries, no scores are transposed after their product.
        q_BKGLH = q_BLKGH.transpose(0, 2, 3, 1, 4)
        visible = masks(visibility, tuple(kv.rows for kv in pieces))
        scores = [_scores(q_BKGLH, kv, mask) for kv, mask in zip(pieces, visible, strict=True)]
        if not past:
            weights_BKGLM = jax.nn.softmax(scores[0]).astype(new.values.dtype)
            y_BKGLH = jnp.einsum('BKGLM,BKMH->BKGLH', weights_BKGLM, new.values)
        else:
            y_BKGLH = _split_softmax(scores, pieces)
        # With L first, XLA would make the projection that follows transpose its kernel.
        return y_BKGLH.reshape(batch, heads, rows, width).swapaxes(1, 2)


def _scores(q_BKGLH: jax.Array, kv: KV, mask_BNLM: jax.Array | None) -> jax.Array:
    """[B, K, G, L, M] float32, -inf for hidden keys."""
    scores_BKGLM = jnp.einsum(
        'BKGLH,BKMH->BKGLM', q_BKGLH, kv.keys, preferred_element_type=jnp.float32
    )
    if mask_BNLM is None:
        return scores_BKGLM
    batch, heads, *rest = mask_BNLM.shape
    groups = (1, 1) if heads == 1 else scores_BKGLM.shape[1:3]
    return jnp.where(mask_BNLM.reshape(batch, *groups, *rest), scores_BKGLM, -jnp.inf)


def _split_softmax(scores: list[jax.Array], pieces: tuple[KV, ...]) -> jax.Array:
    """[B, K, G, L, H]: one softmax over the scores of all pieces, times their values.

    Some key of each row is visible, so that the largest score is finite, also where a whole piece
    is hidden.
    """
    largest = [piece.max(-1, keepdims=True) for piece in scores]
    shift_BKGL1 = jax.lax.stop_gradient(functools.reduce(jnp.maximum, largest))
    total_BKGL1, y_BKGLH = 0.0, 0.0
    for scores_BKGLM, kv in zip(scores, pieces, strict=True):
        weights_BKGLM = jnp.exp(scores_BKGLM - shift_BKGL1)
        total_BKGL1 += weights_BKGLM.sum(-1, keepdims=True)
        y_BKGLH += jnp.einsum(
            'BKGLM,BKMH->BKGLH',
            weights_BKGLM.astype(kv.values.dtype),
            kv.values,
            preferred_element_type=jnp.float32,
        )
    return (y_BKGLH / total_BKGL1).astype(pieces[-1].values.dtype)


@dataclasses.dataclass(frozen=True)
class WriteFirst:
    """Writes new keys and values into the last piece of the past before `inner` reads it.

    All unwritten rows of the past must be in its last piece. A caller that writes the same rows
    into that piece afterwards costs nothing: the compiler merges both writes, and because nothing
    reads the old piece, it writes in place. Without `written`, this is `inner`.

    Attributes:
        inner: the kernel that reads the pieces; the last one holds the new rows, too.
    """

    inner: Kernel

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        written, bounds = visibility.written, visibility.bounds
        if written is None:
            return self.inner(q_BLNH, past, new, visibility)
        *before, last = past
        if bounds is None:
            bounds = TracedVisibility((written + new.rows)[None])
        visibility = visibility.replace(bounds=bounds, written=None)
        last = last.write(new, written - sum(kv.rows for kv in before))
        return self.inner(q_BLNH, tuple(before), last, visibility)


@dataclasses.dataclass(frozen=True)
class MergedHeads:
    """`inner`, for a past whose key/value heads are merged in groups (`KV.merge_heads`).

    A query has zeros in the channels of the other heads of its group, and of its output its own
    channels are kept: the numbers are the same, for `count` times the arithmetic. Without a past,
    this is `inner`.

    Attributes:
        inner: the kernel over merged heads.
        count: heads of a group.
    """

    inner: Kernel
    count: int

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        if not past or self.count == 1:
            return self.inner(q_BLNH, past, new, visibility)
        batch, rows, heads, width = q_BLNH.shape
        # C heads of a group, each with G heads of queries, over the channels of C heads.
        shape = (batch, rows, new.heads // self.count, self.count, heads // new.heads)
        own_C1C1 = jnp.eye(self.count, dtype=q_BLNH.dtype)[:, None, :, None]
        q_BLKCGCH = q_BLNH.reshape(*shape, 1, width) * own_C1C1
        wide = q_BLKCGCH.reshape(batch, rows, heads, self.count * width)
        y = self.inner(wide, past, new.merge_heads(self.count), visibility)
        y_BLKCGCH = y.reshape(*shape, self.count, width) * own_C1C1.astype(y.dtype)
        return y_BLKCGCH.sum(-2).reshape(q_BLNH.shape)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """The formula for one group of images, or of heads of one image, at a time.

    A processor is up to four times as fast while the scores of a turn stay in its cache. Fewer than
    two turns are not worth it.

    Attributes:
        most: bytes of the scores of one turn.
    """

    most: int = 24 * 2**20

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        batch, rows, heads, _ = q_BLNH.shape
        per_head = 4 * rows * sum(kv.rows for kv in (*past, new))
        if batch * heads * per_head < 2 * self.most:
            return Dense()(q_BLNH, past, new, visibility)
        images = _divisor(batch, self.most // (heads * per_head))
        kv_heads = new.heads
        if images == 1:
            kv_heads = _divisor(new.heads, self.most * new.heads // (heads * per_head))
        inner = _in_turns(KV_HEADS, new.heads // kv_heads, Dense())
        return _in_turns(IMAGES, batch // images, inner)(q_BLNH, past, new, visibility)


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, at least 1."""
    return next(n for n in range(max(min(count, most), 1), 0, -1) if count % n == 0)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis along which attention is independent, as numbered in each array."""

    queries: int
    keys: int
    mask: int
    per_image: bool


IMAGES = _Axis(queries=0, keys=-4, mask=-4, per_image=True)
KV_HEADS = _Axis(queries=2, keys=HEADS, mask=-3, per_image=False)


def _in_turns(axis: _Axis, turns: int, kernel: Kernel) -> Kernel:
    """`kernel` for equal parts of images or heads, one after the other."""
    if turns == 1:
        return kernel

    def attend(
        q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        def split(x: jax.Array, along: int) -> jax.Array:
            along %= x.ndim
            return _split(x, axis=along, length=x.shape[along], chunks=turns)

        queries = split(q_BLNH, axis.queries)
        pieces = jax.tree.map(lambda x: split(x, axis.keys), (*past, new))
        varying = {}
        if axis.per_image:
            bounds = {'first_B': visibility.first_B, 'end_B': visibility.end_B}
            varying = {name: split(x, 0) for name, x in bounds.items() if x is not None}
        mask = visibility.mask
        if mask is not None and mask.ndim >= -axis.mask and mask.shape[axis.mask] > 1:
            varying['mask'] = split(mask, axis.mask)

        def turn(part: tuple) -> jax.Array:
            q_BLNH, (*past, new), varying = part
            return kernel(q_BLNH, tuple(past), new, visibility.replace(**varying))

        y_CBLNH = jax.lax.map(turn, (queries, pieces, varying))
        return jnp.moveaxis(y_CBLNH, 0, axis.queries).reshape(q_BLNH.shape)

    return attend


@dataclasses.dataclass(frozen=True)
class ByScale:
    """Each span of rows with the same upper bound over the keys below it: no mask, no lost work.

    Neighbours share a span, with a mask, while it has fewer than `rows` rows: the first scales of a
    pyramid, and the single rows of a raster. Visibility without static upper bounds goes to `inner`
    as it is.

    Attributes:
        inner: the kernel of spans without a mask.
        ragged: the kernel of spans with a mask.
        rows: below so many rows neighbours share a span.
    """

    inner: Kernel = Dense()
    ragged: Kernel = Dense()
    rows: int = 64

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        bounds, before = visibility.bounds, sum(kv.rows for kv in past)
        if not isinstance(bounds, StaticVisibility) or visibility.written is not None:
            return self.inner(q_BLNH, past, new, visibility)
        if bounds.sees_all(before + new.rows):
            return self.inner(q_BLNH, past, new, visibility.replace(bounds=None))
        if before and min(bounds.bound_L) <= before:
            (new, _), past, before = join(past, new, visibility), (), 0
        return jnp.concatenate(
            [
                (self.inner if span.within is None else self.ragged)(
                    q_BLNH[:, span.first : span.end],
                    past,
                    new.part(0, span.keys - before),
                    visibility.replace(bounds=span.within),
                )
                for span in bounds.spans(self.rows)
            ],
            axis=1,
        )


@dataclasses.dataclass(frozen=True)
class Chunked:
    """The formula for about `rows` rows at a time, computed again in the backward pass.

    Only the scores of one chunk exist at once, so memory grows with M and not with L M.

    Attributes:
        rows: rows of queries per chunk, about.
    """

    rows: int = 256

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        kv, visibility = join(past, new, visibility)
        length = q_BLNH.shape[1]
        split = functools.partial(_split, length=length, chunks=-(-length // self.rows))
        bounds, mask, varying = visibility.bounds, visibility.mask, {}
        if isinstance(bounds, StaticVisibility) and bounds.sees_all(kv.rows):
            visibility = visibility.replace(bounds=None)
        elif bounds is not None and len(bounds.bound_L) == length:
            varying['bounds'] = TracedVisibility(split(jnp.asarray(bounds.bound_L), axis=0))
        if mask is not None and mask.ndim > 1 and mask.shape[-2] == length:
            varying['mask'] = split(mask, axis=mask.ndim - 2)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def attend(kv: KV, chunk: tuple) -> jax.Array:
            q_BLNH, varying = chunk
            return Dense()(q_BLNH, (), kv, visibility.replace(**varying))

        y = jax.lax.map(functools.partial(attend, kv), (split(q_BLNH, axis=1), varying))
        return jnp.moveaxis(y, 0, 1).reshape(len(q_BLNH), -1, *y.shape[-2:])[:, :length]


def _split(x: jax.Array, axis: int, length: int, chunks: int) -> jax.Array:
    """[chunks, ...]: equal parts of `axis`, the last filled up with copies of its last row."""
    rows = -(-length // chunks)
    fill = [(0, rows * chunks - length if a == axis else 0) for a in range(x.ndim)]
    parts = jnp.pad(x, fill, mode='edge').reshape(
        *x.shape[:axis], chunks, rows, *x.shape[axis + 1 :]
    )
    return jnp.moveaxis(parts, axis, 0)
