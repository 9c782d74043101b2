"""How long does work take, compared with what the machine can do at that moment?

The speed of a shared machine changes within minutes, so calls that are compared are timed in turn.
A latency is the time of one run alone, from its dispatch until its result is ready. The rates of
the machine are those of runs back to back, on all devices that the work uses.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from star_jax.errors import UserError

# Sides of the square matrices whose product measures the matrix rate: large enough for it.
SIDE = 2048
SIDE_ON_ACCELERATORS = 8192
READ = 2**29  # bytes whose sum measures the read rate: no cache holds them
SUMS = 1024  # parts of them that are summed side by side
MOST_RUNS = 100_000  # timed runs of one program: each time is kept
MIN_SECONDS = 0.05  # shorter runs of a machine's rates are timed several times in a row

Call = Callable[[], Any]


def check_runs(name: str, runs: int) -> None:
    """Raises UserError if `runs`, the value of the option `name`, exceeds MOST_RUNS."""
    if runs > MOST_RUNS:
        raise UserError(f'{name} must be at most {MOST_RUNS:,}, not {runs:,}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """Work that measures a rate of the machine.

    Attributes:
        call: runs it once.
        amount: floating-point operations or bytes of one run, on all devices.
    """

    call: Call
    amount: int


def matrix_product(dtype: str, devices: Sequence[jax.Device]) -> Rate:
    """A compiled product of two square matrices on every device at once.

    Its precision is JAX's default for the dtype, as in the measured programs: TF32 for float32 on
    NVIDIA GPUs.
    """
    side = SIDE if devices[0].platform == 'cpu' else SIDE_ON_ACCELERATORS
    call, _ = _on_each(lambda a: jnp.matmul(a, a), devices, (side, side), dtype)
    return Rate(call=call, amount=len(devices) * 2 * side**3)


def read(devices: Sequence[jax.Device]) -> Rate:
    """A compiled sum of READ bytes of float32: on each accelerator, or on all CPU devices together.

    CPU devices share the memory of their machine.
    """
    size = READ // (len(devices) if devices[0].platform == 'cpu' else 1)
    shape = (SUMS, size // (4 * SUMS))  # one sum alone would use one core
    call, amount = _on_each(lambda x: x.sum(axis=1), devices, shape, 'float32')
    return Rate(call=call, amount=amount)


def time_in_turn(
    calls: Mapping[str, Call], repeats: int, averaged: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Seconds of one run of each call, [repeats], after a run that warms it up.

    Every round runs all calls one after another, and waits for the result of each run before the
    next one starts, so that the seconds are latencies. A call that is named in `averaged` runs
    several times in a row, for MIN_SECONDS; a round waits for the last run alone, and gives the
    mean.

    Args:
        calls: the calls by name.
        repeats: number of rounds.
        averaged: names of short calls.
    """
    counts = {name: 1 for name in calls}
    for name, call in calls.items():
        jax.block_until_ready(call())
        if name in averaged:
            counts[name] = math.ceil(MIN_SECONDS / max(_seconds(call, 1), 1e-6))
    rounds = [
        {name: _seconds(call, counts[name]) for name, call in calls.items()} for _ in range(repeats)
    ]
    return {name: np.array([seconds[name] for seconds in rounds]) for name in calls}


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """The median and the 95th percentile of latencies."""
    return {
        'p50_seconds': float(np.median(seconds)),
        'p95_seconds': float(np.percentile(seconds, 95)),
    }


def _on_each(
    function: Callable[[jax.Array], jax.Array],
    devices: Sequence[jax.Device],
    shape: tuple[int, ...],
    dtype: str,
) -> tuple[Call, int]:
    """A function of an array of ones on every device, compiled, and bytes of all arrays."""
    mesh = Mesh(np.array(devices), ('devices',), axis_types=(AxisType.Auto,))
    spec = PartitionSpec('devices')
    ones = jnp.ones((len(devices), *shape), dtype, device=NamedSharding(mesh, spec))
    each = jax.shard_map(lambda x: function(x[0])[None], mesh=mesh, in_specs=spec, out_specs=spec)
    compiled = jax.jit(each).lower(ones).compile()
    return lambda: compiled(ones), ones.nbytes


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count
