"""What does one benchmark process measure?

`python -m star_jax.bench JOB.json start|measure` prints a line per stage, and at the end its
report, the word `report:` and one line of JSON:

    start        when each stage was complete (seconds since the epoch), processor seconds of
                 compilation and of all work up to the first dispatch, hits of the persistent cache
    with `measure` also: time, devices, matrix and read rate, parts, memory, environment
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
from star_jax.bench.benchmark import Args, Benchmark, TimedProgram
from star_jax.bench.process import REPORT, JobFile
from star_jax.checkpoint import config
from star_jax.parallel import machine, startup

CACHE_HIT = '/jax/compilation_cache/cache_hits'
PROFILED_RUNS = 2


class StageTimes:
    """The times at which stages were complete, in seconds since the epoch."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    def record(self, stage: str) -> None:
        self.stages[stage] = time.time()
        sys.stdout.write(f'{stage}\n')
        sys.stdout.flush()


class RepeatedProgram:
    """A compiled program that is called again and again, each time with the next arguments."""

    def __init__(self, compiled: Any, args: Args, next_args: Callable[[Args, Any], Args]) -> None:
        self._compiled, self.args, self._next_args = compiled, args, next_args

    def __call__(self) -> Any:
        result = self._compiled(*self.args)
        self.args = self._next_args(self.args, result)
        return result


def main(path: str, task: str) -> None:
    times = StageTimes()
    times.record('imports')
    content = config.read(path, JobFile)
    startup.start()
    jax.devices()
    times.record('JAX')
    benchmark = content.job.prepare()
    jax.block_until_ready(benchmark.main.args)
    times.record('weights')
    compiled, start = _compile(benchmark.main, times)
    start['processor_seconds_to_dispatch'] = time.process_time()
    repeated = RepeatedProgram(compiled, benchmark.main.args, benchmark.next_args)
    result = repeated()
    times.record('dispatch')
    jax.block_until_ready(result)
    times.record('first result')
    report = {'start': {'stages': times.stages, **start}}
    if task == 'measure':
        report |= _measure(content, benchmark, compiled, repeated)
    sys.stdout.write(f'{REPORT}{json.dumps(report)}\n')


def _compile(program: TimedProgram, times: StageTimes) -> tuple[Any, dict[str, float]]:
    """The compiled program, processor seconds of its compilation, and hits of the cache."""
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event == CACHE_HIT else None
    )
    lowered = program.program.lower(*program.args)
    times.record('lowered')
    hits.clear()
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    times.record('compiled')
    return compiled, {'processor_seconds': seconds, 'cache_hits': len(hits)}


def _measure(
    content: JobFile, benchmark: Benchmark, compiled: Any, repeated: RepeatedProgram
) -> dict[str, Any]:
    """Times of the main program, of its parts alone and of the matrix product, in turn."""
    memory = _memory(benchmark, compiled)
    load = _load_average()
    programs = {**benchmark.parts, **benchmark.make_preceding()}
    devices = _devices(compiled)
    rates = {'product': timing.matrix_product(content.job.dtype, devices)}
    rates['read'] = timing.read(devices)
    calls = {'program': repeated} | {name: rate.call for name, rate in rates.items()}
    calls |= {name: _call(program, repeated) for name, program in programs.items()}
    seconds = timing.time_in_turn(calls, content.job.repeats, averaged=rates)
    if content.profile:
        with jax.profiler.trace(content.profile):
            for _ in range(PROFILED_RUNS):
                jax.block_until_ready(repeated())
    p50 = {name: float(np.median(times)) for name, times in seconds.items()}
    giga = {name: rate.amount / p50[name] / 1e9 for name, rate in rates.items()}
    programs_and_main = {**programs, 'program': benchmark.main}
    costs = {name: program.cost() for name, program in programs_and_main.items()}
    flops, reads = ({name: cost[which] for name, cost in costs.items()} for which in (0, 1))
    for amounts in (flops, reads, p50):
        parts = sum(amounts[name] for name in benchmark.parts)
        amounts[benchmark.remainder] = amounts['program'] - parts
    return {
        'pixels': benchmark.pixels,
        'time': _times(seconds['program'], benchmark.images),
        'devices': len(devices),
        'matrix_rate_gflops': giga['product'],
        'read_rate_gbytes': giga['read'],
        'parts': {
            name: _part(flops[name], reads[name], p50[name])
            | {'time_share': p50[name] / p50['program']}
            | {'matrix_rate_share': flops[name] / p50[name] / 1e9 / giga['product']}
            | {'read_rate_share': reads[name] / p50[name] / 1e9 / giga['read']}
            for name in ('program', benchmark.remainder, *programs)
        },
        'parts_of_program': [benchmark.remainder, *benchmark.parts],
        'memory': memory,
        'environment': machine.describe() | {'load': [load, _load_average()]},
    }


def _call(program: TimedProgram, repeated: RepeatedProgram) -> timing.Call:
    compiled = program.program.lower(*(program.args or repeated.args)).compile()
    return lambda: compiled(*(program.args or repeated.args))


def _times(seconds: np.ndarray, images: int) -> dict[str, Any]:
    latencies = timing.percentiles(seconds)
    p50 = latencies['p50_seconds']
    return latencies | {
        'seconds': seconds.tolist(),
        'images_per_second': images / p50,
        'seconds_per_image': p50 / images,
    }


def _part(flops: int, reads: int, seconds: float) -> dict[str, float]:
    return {
        'gflop': flops / 1e9,
        'gbytes': reads / 1e9,
        'seconds': seconds,
        'gflops': flops / seconds / 1e9,
        'gbytes_per_second': reads / seconds / 1e9,
    }


def _devices(compiled: Any) -> list[jax.Device]:
    """The devices that a compiled program runs on."""
    shardings = jax.tree.leaves(compiled.input_shardings)
    used = set().union(*(sharding.device_set for sharding in shardings))
    return sorted(used, key=lambda device: device.id)


def _memory(benchmark: Benchmark, compiled: Any) -> dict[str, float]:
    """MiB of the weights, of the program's temporaries, of all memory, and of the peak.

    The peak is that of the device if it counts one, otherwise that of the process.
    """
    analysis = compiled.memory_analysis()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(benchmark.weights))
    memory = {'weights': weights / 2**20}
    if analysis is not None:
        memory['temporaries'] = analysis.temp_size_in_bytes / 2**20
    device = jax.devices()[0].memory_stats() or {}
    memory['limit'] = device.get('bytes_limit', machine.host_memory()) / 2**20
    if 'peak_bytes_in_use' in device:
        return memory | {'device_peak': device['peak_bytes_in_use'] / 2**20}
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return memory | {'process_peak': peak / 2**20}


def _load_average() -> float:
    """The mean number of runnable processes over the last minute."""
    return os.getloadavg()[0]
