"""What does one process of a benchmark see?

`python -m star_jax.bench ORDER.json start|measure` prints what it is doing, and at the end its
report, one line of JSON:

    start        when it reached what (seconds since the epoch), processor seconds of compiling and
                 of all up to the first dispatch, programs found in the persistent cache
    and, if it measures: time, matrix rate, parts, memory, environment
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from star_jax.bench import timing
from star_jax.bench.case import Args, Case, Piece
from star_jax.bench.process import Order
from star_jax.checkpoint import config
from star_jax.parallel import machine, startup

CACHE_HIT = '/jax/compilation_cache/cache_hits'
TRACED = 2  # runs in a profiler's trace


class Diary:
    """When was which stage over?"""

    def __init__(self) -> None:
        self.reached: dict[str, float] = {}

    def note(self, stage: str) -> None:
        self.reached[stage] = time.time()
        sys.stdout.write(f'{stage}\n')
        sys.stdout.flush()


class Runs:
    """A compiled program, called over and over."""

    def __init__(self, compiled: Any, args: Args, again: Callable[[Args, Any], Args]) -> None:
        self._compiled, self.args, self._again = compiled, args, again

    def __call__(self) -> Any:
        result = self._compiled(*self.args)
        self.args = self._again(self.args, result)
        return result


def main(path: str, task: str) -> None:
    diary = Diary()
    diary.note('imports')
    order = config.read(path, Order)
    startup.start()
    jax.devices()
    diary.note('JAX')
    case = order.job.prepare()
    jax.block_until_ready(case.whole.args)
    diary.note('weights')
    compiled, start = _compile(case.whole, diary)
    start['processor_seconds_to_dispatch'] = time.process_time()
    runs = Runs(compiled, case.whole.args, case.again)
    result = runs()
    diary.note('dispatch')
    jax.block_until_ready(result)
    diary.note('first result')
    report = {'start': {'reached': diary.reached, **start}}
    if task == 'measure':
        report |= _measure(order, case, compiled, runs)
    sys.stdout.write(json.dumps(report) + '\n')


def _compile(piece: Piece, diary: Diary) -> tuple[Any, dict[str, float]]:
    """The compiled program, the processor seconds of its compilation and whether it was found."""
    found = []
    jax.monitoring.register_event_listener(
        lambda event, **_: found.append(event) if event == CACHE_HIT else None
    )
    lowered = piece.program.lower(*piece.args)
    diary.note('lowered')
    found.clear()
    begin = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - begin
    diary.note('compiled')
    return compiled, {'processor_seconds': seconds, 'found': len(found)}


def _measure(order: Order, case: Case, compiled: Any, runs: Runs) -> dict[str, Any]:
    """Times of the program, of its parts alone and of the matrix product, in turn."""
    memory = _memory(case, compiled)
    load = _load_average()
    pieces = {**case.parts, **case.before()}
    product, product_flops = timing.matrix_work(order.job.dtype)
    works = {'program': runs, 'product': product}
    works |= {name: _work(piece, runs) for name, piece in pieces.items()}
    seconds = timing.take_turns(works, order.job.repeats)
    if order.profile:
        with jax.profiler.trace(order.profile):
            for _ in range(TRACED):
                jax.block_until_ready(runs())
    p50 = {name: float(np.median(taken)) for name, taken in seconds.items()}
    matrix_rate = product_flops / p50['product'] / 1e9
    flops = {name: piece.flops for name, piece in pieces.items()} | {'program': case.whole.flops}
    for told in (flops, p50):
        told[case.rest] = told['program'] - sum(told[name] for name in case.parts)
    return {
        'pixels': case.pixels,
        'time': _times(seconds['program'], case.images),
        'matrix_rate_gflops': matrix_rate,
        'parts': {
            name: _part(flops[name], p50[name], p50['program'], matrix_rate)
            for name in ('program', case.rest, *pieces)
        },
        'inside': [case.rest, *case.parts],
        'memory': memory,
        'environment': machine.describe() | {'load': [load, _load_average()]},
    }


def _work(piece: Piece, runs: Runs) -> timing.Work:
    compiled = piece.program.lower(*(piece.args or runs.args)).compile()
    return lambda: compiled(*(piece.args or runs.args))


def _times(seconds: np.ndarray, images: int) -> dict[str, Any]:
    p50 = float(np.median(seconds))
    return {
        'p50_seconds': p50,
        'p95_seconds': float(np.percentile(seconds, 95)),
        'seconds': seconds.tolist(),
        'images_per_second': images / p50,
        'seconds_per_image': p50 / images,
    }


def _part(flops: int, seconds: float, whole: float, matrix_rate: float) -> dict[str, float]:
    """`share` is that of the machine's matrix rate, `of_time` that of the program's time."""
    rate = flops / seconds / 1e9
    return {
        'gflop': flops / 1e9,
        'seconds': seconds,
        'of_time': seconds / whole,
        'gflops': rate,
        'share': rate / matrix_rate,
    }


def _memory(case: Case, compiled: Any) -> dict[str, float]:
    """MiB of the weights, of what the program needs beside its arguments, all there is, the peak.

    The peak is the device's where it keeps one, otherwise that of the whole process.
    """
    analysis = compiled.memory_analysis()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(case.weights))
    found = {'weights': weights / 2**20}
    if analysis is not None:
        found['temporaries'] = analysis.temp_size_in_bytes / 2**20
    device = jax.devices()[0].memory_stats() or {}
    found['limit'] = device.get('bytes_limit', machine.host_memory()) / 2**20
    if 'peak_bytes_in_use' in device:
        return found | {'device_peak': device['peak_bytes_in_use'] / 2**20}
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found | {'process_peak': peak / 2**20}


def _load_average() -> float:
    """How many processes wanted a core over the last minute."""
    return os.getloadavg()[0]
