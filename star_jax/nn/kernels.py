"""How is attention computed?

Several ways to the same numbers. `Dense` is the formula and the oracle of the others, which skip
what no row sees or keep less in memory. Each is a part: `kernel(q_BLNH, kv, seen)` gives
softmax(q k) v per head over what may be seen, [B, L, N, H]; queries arrive scaled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from star_jax.core.reach import Reach, TracedReach


class KV(NamedTuple):
    """Keys and values, [..., B, M, N, H]."""

    keys: jax.Array
    values: jax.Array


# What may be seen: the leading keys of each row, or a mask that broadcasts to [B, N, L, M] and is
# True where a row may look, or everything (None). No row may be blind.
Seen = Reach | TracedReach | jax.Array | None
Kernel = Callable[[jax.Array, KV, Seen], jax.Array]


def mask_of(seen: Seen, keys: int) -> jax.Array | None:
    """A mask of `keys` keys, for who must have one; None where everything is seen."""
    if isinstance(seen, Reach) and seen.sees_all(keys):
        return None
    if isinstance(seen, Reach | TracedReach):
        return jnp.arange(keys) < jnp.asarray(seen.keys_L)[:, None]
    return seen


@dataclasses.dataclass(frozen=True)
class Dense:
    """The formula. All scores, float32 [B, N, L, M], exist at once."""

    def __call__(self, q_BLNH: jax.Array, kv: KV, seen: Seen = None) -> jax.Array:
        scores_BNLM = jnp.einsum(
            'BLNH,BMNH->BNLM', q_BLNH, kv.keys, preferred_element_type=jnp.float32
        )
        mask = mask_of(seen, kv.keys.shape[1])
        if mask is not None:
            scores_BNLM = jnp.where(mask, scores_BNLM, -jnp.inf)
        weights_BNLM = jax.nn.softmax(scores_BNLM).astype(kv.values.dtype)
        # With L first, XLA would make the projection that follows transpose its kernel.
        return jnp.einsum('BNLM,BMNH->BNLH', weights_BNLM, kv.values).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class InTurn:
    """The formula for some images, or for some heads of one image, after the other.

    While the scores of each turn, at most `most` bytes, stay in its cache a processor is up to four
    times as fast. Fewer than two turns' are not worth it.
    """

    most: int = 24 * 2**20

    def __call__(self, q_BLNH: jax.Array, kv: KV, seen: Seen = None) -> jax.Array:
        batch, rows, heads, _ = q_BLNH.shape
        each = 4 * rows * kv.keys.shape[1]
        if batch * heads * each < 2 * self.most:
            return Dense()(q_BLNH, kv, seen)
        images = _divisor(batch, self.most // (heads * each))
        some = _divisor(heads, self.most // each) if images == 1 else heads
        return _in_turn(0, batch // images, _in_turn(2, heads // some, Dense()))(q_BLNH, kv, seen)


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, at least 1."""
    return next(n for n in range(max(min(count, most), 1), 0, -1) if count % n == 0)


def _in_turn(axis: int, turns: int, kernel: Kernel) -> Kernel:
    """`kernel` for equal parts of images (axis 0) or heads (axis 2), one after the other."""

    def attend(q_BLNH: jax.Array, kv: KV, seen: Seen = None) -> jax.Array:
        split = functools.partial(_split, length=q_BLNH.shape[axis], chunks=turns)
        own, every = None, seen
        at = {0: -4, 2: -3}[axis]  # of the same in a mask
        if isinstance(seen, jax.Array) and seen.ndim >= -at and seen.shape[at] > 1:
            own, every = split(seen, axis=seen.ndim + at), None
        y_CBLNH = jax.lax.map(
            lambda part: kernel(part[0], part[1], every if part[2] is None else part[2]),
            (split(q_BLNH, axis=axis), jax.tree.map(lambda x: split(x, axis=axis), kv), own),
        )
        return jnp.moveaxis(y_CBLNH, 0, axis).reshape(q_BLNH.shape)

    return attend if turns > 1 else kernel


@dataclasses.dataclass(frozen=True)
class ByScale:
    """Rows that see equally far together, over what they see: no mask, and no work for nothing.

    Neighbours share a piece, with a mask, while it has fewer than `rows` rows: the first scales of
    a pyramid, and a raster's single rows. What is no static reach goes to `inner` as it is.
    """

    inner: Kernel = Dense()
    ragged: Kernel = Dense()
    rows: int = 64

    def __call__(self, q_BLNH: jax.Array, kv: KV, seen: Seen = None) -> jax.Array:
        if not isinstance(seen, Reach) or seen.sees_all(kv.keys.shape[1]):
            return self.inner(q_BLNH, kv, None if isinstance(seen, Reach) else seen)
        return jnp.concatenate(
            [
                (self.inner if span.within is None else self.ragged)(
                    q_BLNH[:, span.first : span.end],
                    KV(kv.keys[:, : span.keys], kv.values[:, : span.keys]),
                    span.within,
                )
                for span in seen.spans(self.rows)
            ],
            axis=1,
        )


@dataclasses.dataclass(frozen=True)
class Chunked:
    """The formula for about `rows` rows at a time, again in the backward pass.

    Only the scores of one chunk exist at once, so memory grows with M and not with L M.
    """

    rows: int = 256

    def __call__(self, q_BLNH: jax.Array, kv: KV, seen: Seen = None) -> jax.Array:
        if isinstance(seen, Reach):
            seen = None if seen.sees_all(kv.keys.shape[1]) else TracedReach(seen.keys_L)
        length = q_BLNH.shape[1]
        chunks = -(-length // self.rows)
        split = functools.partial(_split, length=length, chunks=chunks)
        queries_CBLNH = split(q_BLNH, axis=1)
        if isinstance(seen, TracedReach):
            seen_C, whole = TracedReach(split(jnp.asarray(seen.keys_L), axis=0)), None
        elif seen is not None and seen.ndim > 1 and seen.shape[-2] == length:
            seen_C, whole = split(seen, axis=seen.ndim - 2), None
        else:
            seen_C, whole = None, seen

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def attend(kv: KV, chunk: tuple) -> jax.Array:
            q, seen = chunk
            return Dense()(q, kv, whole if seen is None else seen)

        y = jax.lax.map(functools.partial(attend, kv), (queries_CBLNH, seen_C))
        return jnp.moveaxis(y, 0, 1).reshape(len(q_BLNH), -1, *y.shape[-2:])[:, :length]


def _split(x: jax.Array, axis: int, length: int, chunks: int) -> jax.Array:
    """[chunks, ...]: equal parts of `axis`, the last filled up with copies of its last row."""
    rows = -(-length // chunks)
    fill = [(0, rows * chunks - length if a == axis else 0) for a in range(x.ndim)]
    parts = jnp.pad(x, fill, mode='edge').reshape(
        *x.shape[:axis], chunks, rows, *x.shape[axis + 1 :]
    )
    return jnp.moveaxis(parts, axis, 0)
