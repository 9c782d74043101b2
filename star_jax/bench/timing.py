"""How long does work take, beside what the machine could do at that moment?

A machine that others share changes its speed within minutes, so everything that is compared is
timed in turn.
"""

import math
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# Of the matrices whose product tells the machine's matrix rate: large enough to be at it.
SIDE = 2048
SIDE_ON_ACCELERATORS = 8192
LEAST_SECONDS = 0.05  # a shorter piece of work is run several times in a row

Work = Callable[[], jax.Array]


def matrix_work(dtype: str = 'float32') -> tuple[Work, int]:
    """A product of two square matrices, compiled, and its floating-point operations.

    One of float32 is as exact as JAX makes the work's own by default: TF32 on NVIDIA GPUs.
    """
    side = SIDE if jax.default_backend() == 'cpu' else SIDE_ON_ACCELERATORS
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a)).lower(matrix).compile()
    return lambda: product(matrix), 2 * side**3


def take_turns(works: Mapping[str, Work], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of one run of each piece of work, [repeats], after one that warms it up.

    A run ends when its result is there.
    """
    counts = {name: _count(work) for name, work in works.items()}
    rounds = [
        {name: _seconds(work, counts[name]) for name, work in works.items()} for _ in range(repeats)
    ]
    return {name: np.array([seconds[name] for seconds in rounds]) for name in works}


def _count(work: Work) -> int:
    """How many runs in a row last long enough for the clock."""
    jax.block_until_ready(work())
    return math.ceil(LEAST_SECONDS / max(_seconds(work, 1), 1e-6))


def _seconds(work: Work, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        result = work()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / count
