"""How long does work take, compared with what the machine can do at that moment?

The speed of a shared machine changes within minutes, so calls that are compared are timed in turn.
"""

import math
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# Sides of the square matrices whose product measures the matrix rate: large enough to reach it.
SIDE = 2048
SIDE_ON_ACCELERATORS = 8192
MIN_SECONDS = 0.05  # shorter calls are timed several times in a row

Call = Callable[[], jax.Array]


def matrix_product(dtype: str = 'float32') -> tuple[Call, int]:
    """A compiled product of two square matrices, and its floating-point operations.

    Its precision is JAX's default for the dtype, as in the measured programs: TF32 for float32 on
    NVIDIA GPUs.
    """
    side = SIDE if jax.default_backend() == 'cpu' else SIDE_ON_ACCELERATORS
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a)).lower(matrix).compile()
    return lambda: product(matrix), 2 * side**3


def time_in_turn(calls: Mapping[str, Call], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of one run of each call, [repeats], after a run that warms it up.

    A run ends when its result is ready. Every round runs all calls one after another.
    """
    counts = {name: _runs_per_measurement(call) for name, call in calls.items()}
    rounds = [
        {name: _seconds(call, counts[name]) for name, call in calls.items()} for _ in range(repeats)
    ]
    return {name: np.array([seconds[name] for seconds in rounds]) for name in calls}


def _runs_per_measurement(call: Call) -> int:
    """The number of runs in a row that take at least MIN_SECONDS."""
    jax.block_until_ready(call())
    return math.ceil(MIN_SECONDS / max(_seconds(call, 1), 1e-6))


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count
