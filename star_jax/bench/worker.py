"""What does one process of the sampling benchmark see?

`python -m star_jax.bench JOB.json start|measure` prints what it is doing, and at the end its
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.bench import timing
from star_jax.bench.sampling import Job
from star_jax.checkpoint import config, models
from star_jax.core.condition import Condition, Text
from star_jax.core.flops import count_flops
from star_jax.parallel import machine, startup
from star_jax.sampling import program, stable
from star_jax.text import TextEncoder
from star_jax.tokenizers.residual_vq import VQTokenizer

NOISE = 1_000_003  # so many normal numbers, over and over, are the weights: more take seconds
NOISE_SIZE = 0.02
CACHE_HIT = '/jax/compilation_cache/cache_hits'


class Drawing(NamedTuple):
    """The sampling program of a job, its arguments, and the part of it that decodes."""

    program: program.Program
    args: tuple
    decode: Any
    decode_args: tuple


class Diary:
    """When was which stage over?"""

    def __init__(self) -> None:
        self.reached: dict[str, float] = {}

    def note(self, stage: str) -> None:
        self.reached[stage] = time.time()
        sys.stdout.write(f'{stage}\n')
        sys.stdout.flush()


def main(path: str, task: str) -> None:
    diary = Diary()
    diary.note('imports')
    job = config.read(path, Job)
    startup.start()
    jax.devices()
    diary.note('JAX')
    drawing = prepare(job)
    jax.block_until_ready(drawing.args)
    diary.note('weights')
    compiled, start = _compile(drawing, diary)
    start['processor_seconds_to_dispatch'] = time.process_time()
    image = compiled(*drawing.args)
    diary.note('dispatch')
    jax.block_until_ready(image)
    diary.note('first image')
    report = {'start': {'reached': diary.reached, **start}}
    if task == 'measure':
        report |= {'pixels': image.shape[1], **_measure(job, drawing, compiled)}
    sys.stdout.write(json.dumps(report) + '\n')


def _compile(drawing: Drawing, diary: Diary) -> tuple[Any, dict[str, float]]:
    """The compiled program, the processor seconds of its compilation and whether it was found."""
    found = []
    jax.monitoring.register_event_listener(
        lambda event, **_: found.append(event) if event == CACHE_HIT else None
    )
    lowered = drawing.program.lower(*drawing.args)
    diary.note('lowered')
    found.clear()
    begin = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - begin
    diary.note('compiled')
    return compiled, {'processor_seconds': seconds, 'found': len(found)}


def prepare(job: Job) -> Drawing:
    """Everything on the default device."""
    network = job.model.build(job.dtype)
    tokenizer, params = _load(job) if job.folder else _invent(job)
    params = params | {'model': program.cast(params['model'], job.dtype)}
    unprompted = _condition(job, 1) if job.settings.guidance else None
    keys_B = program.image_keys(range(job.batch))
    drawn = stable.arguments(job.settings, network, tokenizer.codes)
    args = (params, keys_B, _condition(job, job.batch), unprompted, *drawn)
    side = job.model.sides[-1]
    canvas = jnp.zeros((job.batch, side, side, job.model.channels))
    decode = jax.jit(lambda params, canvas: tokenizer.apply(params, canvas, method='decode'))
    decode_args = ({'params': params['tokenizer']}, canvas)
    return Drawing(program.compile_program(network, tokenizer), args, decode, decode_args)


def _load(job: Job) -> tuple[VQTokenizer, dict[str, Any]]:
    """The tokenizer of a model folder, and the weights of both."""
    model = models.read(job.folder)
    params = {'model': model.params, 'tokenizer': model.tokenizer.params}
    return model.tokenizer.config.at(job.model.sides).build(), jax.device_put(params)


def _invent(job: Job) -> tuple[VQTokenizer, dict[str, Any]]:
    """The published tokenizer at the sizes of the job, and random weights of both."""
    tokenizer = job.tokenizer.build()
    params = nn.unbox({'model': job.model.abstract(), 'tokenizer': job.tokenizer.abstract()})
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    noise = NOISE_SIZE * np.random.default_rng(0).standard_normal(NOISE, np.float32)
    noise = np.resize(noise, largest)
    # Copies: arrays that shared memory would stay in the processor's cache.
    return tokenizer, jax.tree.map(
        lambda leaf: jnp.array(noise[: leaf.size].reshape(leaf.shape), copy=True), params
    )


def _condition(job: Job, rows: int) -> Condition:
    """A class, or random features of captions that use all of their tokens."""
    if job.model.PROMPT == 'label':
        return job.model.reader(_no_text).encode(['0'] * rows)
    states = np.random.default_rng(1).standard_normal(
        (rows, job.text_tokens, job.model.text_width), np.float32
    )
    mask = jnp.ones((rows, job.text_tokens), jnp.int32)
    return Text(jnp.asarray(states), mask, jnp.asarray(states.mean(1)))


def _no_text() -> TextEncoder:
    raise LookupError('text is random here')


def _measure(job: Job, drawing: Drawing, compiled: Any) -> dict[str, Any]:
    """Times of the program, of its decoder alone and of the matrix product, in turn."""
    decode = drawing.decode.lower(*drawing.decode_args).compile()
    product, product_flops = timing.matrix_work()
    load = _load_average()
    works = {
        'program': lambda: compiled(*drawing.args),
        'decoder': lambda: decode(*drawing.decode_args),
        'product': product,
    }
    seconds = timing.take_turns(works, job.repeats)
    p50 = {name: float(np.median(taken)) for name, taken in seconds.items()}
    matrix_rate = product_flops / p50['product'] / 1e9
    flops = {
        'program': count_flops(drawing.program, *drawing.args),
        'decoder': count_flops(drawing.decode, *drawing.decode_args),
    }
    flops['scales'] = flops['program'] - flops['decoder']
    p50['scales'] = p50['program'] - p50['decoder']
    parts = {
        name: _part(flops[name], p50[name], p50['program'], matrix_rate)
        for name in ('program', 'scales', 'decoder')
    }
    return {
        'time': {
            'p50_seconds': p50['program'],
            'p95_seconds': float(np.percentile(seconds['program'], 95)),
            'seconds': seconds['program'].tolist(),
            'images_per_second': job.batch / p50['program'],
            'seconds_per_image': p50['program'] / job.batch,
        },
        'matrix_rate_gflops': matrix_rate,
        'parts': parts,
        'memory': _memory(drawing, compiled),
        'environment': machine.describe() | {'load': [load, _load_average()]},
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


def _memory(drawing: Drawing, compiled: Any) -> dict[str, float]:
    """MiB of the weights, of what the program needs beside its arguments, and the peak.

    The peak is the device's where it keeps one, otherwise that of the whole process.
    """
    analysis = compiled.memory_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(drawing.args[0]))
    found = {'weights': weights / 2**20}
    if analysis is not None:
        found['temporaries'] = analysis.temp_size_in_bytes / 2**20
    device = jax.devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in device:
        return found | {'device_peak': device['peak_bytes_in_use'] / 2**20}
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found | {'process_peak': peak / 2**20}


def _load_average() -> float:
    """How many processes wanted a core over the last minute."""
    return os.getloadavg()[0]
