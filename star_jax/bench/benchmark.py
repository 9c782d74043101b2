"""Which programs does a benchmark time?

The main program, parts of it that can run alone, and programs that run before it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.flops import count_flops
from star_jax.plan.jaxpr_memory import weights_read

NOISE_LENGTH = 1_000_003  # normal numbers that repeat in random arrays: more would take seconds
NOISE_SCALE = 0.02

Args = tuple[Any, ...]


class TimedProgram(NamedTuple):
    """A jitted program with its cost.

    Attributes:
        program: the jitted function.
        args: its arguments; None for a part that takes the next arguments of the main program,
            which therefore need no copy.
        cost: counts, by tracing it, its floating-point operations, and the bytes of weights and
            cache that devices must read from memory in a run, in all.
    """

    program: Any
    args: Args | None
    cost: Callable[[], tuple[int, int]]

    @classmethod
    def of(cls, program: Any, *args: Any) -> 'TimedProgram':
        """A program that reads its first argument, the weights, and no cache."""

        def cost() -> tuple[int, int]:
            return count_flops(program, *args), weights_read(program, *args)

        return cls(program=program, args=args, cost=cost)


def _same_args(args: Args, result: Any) -> Args:
    return args


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The programs that one process measures.

    Attributes:
        main: the program that is measured.
        parts: parts of it that are also timed alone.
        remainder: the name of the work that is in no part.
        weights: the parameters or their shapes; memory is compared with their size.
        images: images per run of the main program.
        pixels: the side of an image, in px.
        make_preceding: makes the programs that run before the main one and are no part of it; it
            is called after the peak memory of the main program was read.
        next_args: (arguments, result) of a run -> arguments of the next run, because a training
            step donates its state.
    """

    main: TimedProgram
    parts: Mapping[str, TimedProgram]
    remainder: str
    weights: Any
    images: int
    pixels: int
    make_preceding: Callable[[], Mapping[str, TimedProgram]] = dict
    next_args: Callable[[Args, Any], Args] = _same_args


def random_arrays(abstract: Any) -> Any:
    """Small random arrays on the default device, with the shapes of a tree of abstract arrays."""
    leaves = jax.tree.leaves(abstract)
    noise = NOISE_SCALE * np.random.default_rng(0).standard_normal(NOISE_LENGTH, np.float32)
    noise = np.resize(noise, max(leaf.size for leaf in leaves))
    # Each array is a copy: arrays that shared memory would stay in the processor's cache. They are
    # cast on the host, because the peak of the device is measured.
    return jax.tree.map(
        lambda leaf: jnp.array(noise[: leaf.size].astype(leaf.dtype).reshape(leaf.shape)), abstract
    )
