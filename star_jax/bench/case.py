"""What is measured: a program, its arguments, and the pieces that are timed alone beside it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.flops import count_flops

NOISE = 1_000_003  # so many normal numbers, over and over, are the weights: more take seconds
NOISE_SIZE = 0.02

Args = tuple[Any, ...]


class Piece(NamedTuple):
    """A jitted program, its arguments, and its floating-point operations.

    A part without arguments takes those that the whole takes next: it needs no copy of them.
    """

    program: Any
    args: Args | None
    flops: int

    @classmethod
    def counted(cls, program: Any, *args: Any) -> 'Piece':
        return cls(program, args, count_flops(program, *args))


def _same(args: Args, result: Any) -> Args:
    return args


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What one process measures.

    `whole` makes `images` images of `pixels` px. `parts` are what it holds and can be timed alone,
    `rest` the name of what else it does. `before` makes what runs before it and is no part of it,
    once memory has been looked at. `again` makes the arguments of the next run from those of the
    last and its result (a donated state). `weights` are the parameters or their shapes: memory is
    compared with their size.
    """

    whole: Piece
    parts: Mapping[str, Piece]
    rest: str
    weights: Any
    images: int
    pixels: int
    before: Callable[[], Mapping[str, Piece]] = dict
    again: Callable[[Args, Any], Args] = _same


def invent(abstract: Any) -> Any:
    """Arrays of small random numbers on the default device, for a tree of abstract ones."""
    leaves = jax.tree.leaves(abstract)
    noise = NOISE_SIZE * np.random.default_rng(0).standard_normal(NOISE, np.float32)
    noise = np.resize(noise, max(leaf.size for leaf in leaves))
    # Copies: arrays that shared memory would stay in the processor's cache.
    return jax.tree.map(
        lambda leaf: jnp.array(noise[: leaf.size].reshape(leaf.shape), leaf.dtype, copy=True),
        abstract,
    )
