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

from star_jax.core.visibility import StaticVisibility, TracedVisibility


class KV(NamedTuple):
    """Keys and values, [..., B, M, N, H]."""

    keys: jax.Array
    values: jax.Array


# What may be seen: the leading keys of each row, or a mask that broadcasts to [B, N, L, M] and is
# True where a row may look, or everything (None). No row may be blind.
Visibility = StaticVisibility | TracedVisibility | jax.Array | None
Kernel = Callable[[jax.Array, KV, Visibility], jax.Array]


def mask_of(visibility: Visibility, keys: int) -> jax.Array | None:
    """A mask of `keys` keys, for who must have one; None where everything is seen."""
    if isinstance(visibility, StaticVisibility) and visibility.sees_all(keys):
        return None
    if isinstance(visibility, StaticVisibility | TracedVisibility):
        return jnp.arange(keys) < jnp.asarray(visibility.keys_L)[:, None]
    return visibility


@dataclasses.dataclass(frozen=True)
class Dense:
    """The formula. All scores, float32 [B, N, L, M], exist at once."""

    def __call__(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        scores_BNLM = jnp.einsum(
            'BLNH,BMNH->BNLM', q_BLNH, kv.keys, preferred_element_type=jnp.float32
        )
        mask = mask_of(visibility, kv.keys.shape[1])
        if mask is not None:
            scores_BNLM = jnp.where(mask, scores_BNLM, -jnp.inf)
        weights_BNLM = jax.nn.softmax(scores_BNLM).astype(kv.values.dtype)
        # With L first, XLA would make the projection that follows transpose its kernel.
        return jnp.einsum('BNLM,BMNH->BNLH', weights_BNLM, kv.values).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """The formula for some images, or for some heads of one image, after the other.

    While the scores of each turn, at most `most` bytes, stay in its cache a processor is up to four
    times as fast. Fewer than two turns' are not worth it.
    """

    most: int = 24 * 2**20

    def __call__(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        batch, rows, heads, _ = q_BLNH.shape
        each = 4 * rows * kv.keys.shape[1]
        if batch * heads * each < 2 * self.most:
            return Dense()(q_BLNH, kv, visibility)
        images = _divisor(batch, self.most // (heads * each))
        some = _divisor(heads, self.most // each) if images == 1 else heads
        return _tiled(0, batch // images, _tiled(2, heads // some, Dense()))(q_BLNH, kv, visibility)


def _divisor(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, at least 1."""
    return next(n for n in range(max(min(count, most), 1), 0, -1) if count % n == 0)


def _tiled(axis: int, turns: int, kernel: Kernel) -> Kernel:
    """`kernel` for equal parts of images (axis 0) or heads (axis 2), one after the other."""

    def attend(q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        split = functools.partial(_split, length=q_BLNH.shape[axis], chunks=turns)
        own, every = None, visibility
        at = {0: -4, 2: -3}[axis]  # of the same in a mask
        if (
            isinstance(visibility, jax.Array)
            and visibility.ndim >= -at
            and visibility.shape[at] > 1
        ):
            own, every = split(visibility, axis=visibility.ndim + at), None
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

    def __call__(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        if not isinstance(visibility, StaticVisibility) or visibility.sees_all(kv.keys.shape[1]):
            return self.inner(
                q_BLNH, kv, None if isinstance(visibility, StaticVisibility) else visibility
            )
        return jnp.concatenate(
            [
                (self.inner if span.within is None else self.ragged)(
                    q_BLNH[:, span.first : span.end],
                    KV(kv.keys[:, : span.keys], kv.values[:, : span.keys]),
                    span.within,
                )
                for span in visibility.spans(self.rows)
            ],
            axis=1,
        )


@dataclasses.dataclass(frozen=True)
class Chunked:
    """The formula for about `rows` rows at a time, again in the backward pass.

    Only the scores of one chunk exist at once, so memory grows with M and not with L M.
    """

    rows: int = 256

    def __call__(self, q_BLNH: jax.Array, kv: KV, visibility: Visibility = None) -> jax.Array:
        if isinstance(visibility, StaticVisibility):
            visibility = (
                None
                if visibility.sees_all(kv.keys.shape[1])
                else TracedVisibility(visibility.keys_L)
            )
        length = q_BLNH.shape[1]
        chunks = -(-length // self.rows)
        split = functools.partial(_split, length=length, chunks=chunks)
        queries_CBLNH = split(q_BLNH, axis=1)
        if isinstance(visibility, TracedVisibility):
            seen_C, whole = TracedVisibility(split(jnp.asarray(visibility.keys_L), axis=0)), None
        elif visibility is not None and visibility.ndim > 1 and visibility.shape[-2] == length:
            seen_C, whole = split(visibility, axis=visibility.ndim - 2), None
        else:
            seen_C, whole = None, visibility

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def attend(kv: KV, chunk: tuple) -> jax.Array:
            q, visibility = chunk
            return Dense()(q, kv, whole if visibility is None else visibility)

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
