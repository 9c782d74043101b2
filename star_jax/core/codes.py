"""What is one token?

A head returns flat logits, which `Codes` parses. `Index` is one of many codes, `Bits` is a
vector of independent bits.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Sampled(NamedTuple):
    """The tokens of one step.

    Attributes:
        codes_BL: codes, [B, L, *codes.shape].
        vectors_BLC: the vectors that stand for them on the canvas, float32.
    """

    codes_BL: jax.Array
    vectors_BLC: jax.Array


class Targets(NamedTuple):
    """Inputs and labels of a network in training.

    Attributes:
        inputs_BLC: inputs of all steps but the first, as sampling would compute them, float32.
        codes_BL: labels of all tokens, [B, L, *codes.shape].
    """

    inputs_BLC: jax.Array
    codes_BL: jax.Array


class Codes(Protocol):
    """How the flat output of a head becomes codes.

    Logits here are parsed: their last axis is one categorical distribution.

    Attributes:
        num_logits: the flat width V of a head.
        shape: the shape of the code of one token: () for an index, (K,) for bits.
        dtype: the dtype in which codes are stored.
        num_codes: how many values one number of a code takes.
    """

    @property
    def num_logits(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def num_codes(self) -> int: ...

    def parse(self, flat_BLV: jax.Array) -> jax.Array:
        """[B, L, V] of a head -> logits [B, L, *shape, num_codes]."""

    def nll(self, logits: jax.Array, codes: jax.Array, smoothing: float = 0.0) -> jax.Array:
        """[B, L] float32 negative log-likelihood (natural logarithm), a mean over bits.

        Args:
            logits: [B, L, *shape, num_codes], from `parse`.
            codes: [B, L, *shape].
            smoothing: share of the uniform distribution in the labels.
        """

    def hits(self, logits: jax.Array, codes: jax.Array) -> jax.Array:
        """[B, L] float32: the share of a token's code that the most probable one gets right."""

    def sample(self, keys_B: jax.Array, logits: jax.Array) -> jax.Array:
        """[B, L, *shape] codes, with one key per image."""

    def top(self, logits: jax.Array) -> jax.Array:
        """[B, L, *shape]: the most probable codes."""

    def pack(self, codes: jax.Array) -> jax.Array:
        """[B, L, *shape] codes as a cache stores them."""

    def unpack(self, packed: jax.Array) -> jax.Array:
        """The codes that `pack` made [B, L, ...] of."""

    def count(self, codes: jax.Array, weights: jax.Array) -> jax.Array:
        """[num_logits] float32: how often each value of each number occurs, as a head orders them.

        `weights` has the shape of `codes` without the axes of one code.
        """

    def perplexity(self, counts: jax.Array) -> jax.Array:
        """The exponential of the entropy of counts [..., num_logits], a mean over bits.

        It is `num_codes` where all values are equally frequent, and 1 where only one occurs.
        """


class Categorical:
    """Everything that is done with one categorical distribution per number of a code."""

    def nll(self, logits: jax.Array, codes: jax.Array, smoothing: float = 0.0) -> jax.Array:
        """[B, L] float32: (1 - e) cross-entropy + e mean of -log p over the values, e `smoothing`.

        Several numbers of one code are averaged.
        """
        logits = logits.astype(jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, codes.astype(jnp.int32))
        if smoothing:
            uniform = -jax.nn.log_softmax(logits).mean(-1)
            nll = (1 - smoothing) * nll + smoothing * uniform
        return _mean_of_token(nll)

    def hits(self, logits: jax.Array, codes: jax.Array) -> jax.Array:
        """[B, L] float32: the share of a code that the most probable one gets right."""
        return _mean_of_token((logits.argmax(-1) == codes).astype(jnp.float32))

    def perplexity(self, counts: jax.Array) -> jax.Array:
        """exp(entropy) of counts [..., num_logits], a mean over the numbers of a code."""
        counts = counts.reshape(*counts.shape[:-1], -1, self.num_codes)
        probs = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
        return jnp.exp(-jnp.sum(probs * jnp.log(probs + 1e-10), -1)).mean(-1)

    # Static: as a field of a sampling method, a method bound to a new object would compile anew.
    @staticmethod
    def sample(keys_B: jax.Array, logits: jax.Array) -> jax.Array:
        """Codes, int32, with one key per image: those of `jax.random.categorical`.

        Gumbel noise belongs to the code, so a filter's -inf never moves the noise of another code.
        """

        def noise(key: jax.Array) -> jax.Array:
            return jax.random.gumbel(key, logits.shape[1:], logits.dtype)

        return first_largest(jax.vmap(noise)(keys_B) + logits)

    @staticmethod
    def top(logits: jax.Array) -> jax.Array:
        """The most probable codes, int32."""
        return first_largest(logits)


@dataclasses.dataclass(frozen=True)
class Index(Categorical):
    """One of `size` codes; codes_BL are int32.

    Attributes:
        size: number of codes, V.
    """

    size: int

    shape = ()
    dtype = np.dtype(np.int32)

    @property
    def num_logits(self) -> int:
        return self.size

    @property
    def num_codes(self) -> int:
        return self.size

    def parse(self, flat_BLV: jax.Array) -> jax.Array:
        return flat_BLV

    def pack(self, codes: jax.Array) -> jax.Array:
        return codes

    def unpack(self, packed: jax.Array) -> jax.Array:
        return packed

    def count(self, codes: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.bincount(codes.reshape(-1), weights.reshape(-1), length=self.size)


@dataclasses.dataclass(frozen=True)
class Bits(Categorical):
    """`width` independent bits; codes_BLK are 0 or 1, two neighbouring logits each.

    Attributes:
        width: number of bits, K.
    """

    width: int

    dtype = np.dtype(np.int8)
    num_codes = 2

    @property
    def num_logits(self) -> int:
        return 2 * self.width

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width,)

    def parse(self, flat_BLV: jax.Array) -> jax.Array:
        return flat_BLV.reshape(*flat_BLV.shape[:-1], self.width, 2)

    def pack(self, codes: jax.Array) -> jax.Array:
        """[..., K] -> [..., ceil(K / 8)] uint8; the first bit is the highest of the first byte."""
        return jnp.packbits(codes.astype(jnp.uint8), axis=-1)

    def unpack(self, packed: jax.Array) -> jax.Array:
        """[..., ceil(K / 8)] uint8 -> [..., K] int8."""
        return jnp.unpackbits(packed, axis=-1, count=self.width).astype(jnp.int8)

    def count(self, codes: jax.Array, weights: jax.Array) -> jax.Array:
        ones_K = jnp.tensordot(weights.reshape(-1), codes.reshape(-1, self.width), 1)
        return jnp.stack([weights.sum() - ones_K, ones_K], axis=-1).reshape(-1)


def first_largest(x: jax.Array) -> jax.Array:
    """[...] int32: the number of the largest value of x [..., V], the first of equal ones.

    Two reductions of numbers, which a CPU vectorises: for 16,384 values they take 40 % of the time
    of `argmax`, one reduction of pairs.
    """
    largest, last = x.max(-1, keepdims=True), x.shape[-1] - 1
    return jnp.where(x == largest, jnp.arange(last + 1, dtype=jnp.int32), last).min(-1)


def _mean_of_token(x: jax.Array) -> jax.Array:
    """[B, L] of [B, L, ...]."""
    return x.mean(tuple(range(2, x.ndim))) if x.ndim > 2 else x
