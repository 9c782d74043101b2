"""How much faster is sampling if layers read their weights in place?

The program from encoded prompts to codes, without the decoder, in both forms: every layer a slice
of stacked arrays, in one scanned body; and as the sampler arranges the weights for this platform.
Runs of both alternate with a matrix product and a sum, which measure the rates of the machine.
"""

import functools
import time
from typing import Any

import jax
import numpy as np

from star_jax.bench import timing
from star_jax.bench.sampling import SamplingJob
from star_jax.errors import UserError
from star_jax.parallel import machine
from star_jax.sampling import program
from star_jax.sampling.weight_layout import LARGE

SCANNED, ARRANGED = 'one scan', 'as sampled'


def run(job: SamplingJob) -> dict[str, Any]:
    """Measures both forms: seconds of a run, compilation, MiB of temporaries, equality of codes.

    Raises UserError if the sampler slices stacked weights of this model, too, or if images of a
    batch depend on each other.
    """
    network, tokenizer, params = job.build()
    forms = {SCANNED: params, ARRANGED: job.arrange(params)}
    if forms[ARRANGED] is params:
        raise UserError(
            f'on {jax.default_backend().upper()}s the sampler slices the weights of this model, so '
            'that there is nothing to compare: name a raster, or on a CPU a model of at least '
            f'{LARGE / 2**20:.0f} MiB'
        )
    if network.mixes_rows and job.batch > 1:
        raise UserError(
            'the released cross-attention samples every image alone: give --batch 1, or leave '
            '--released-cross-attention out'
        )
    inputs = job.inputs()

    def codes(params: Any, inputs: program.SamplingInputs) -> jax.Array:
        return program.sample_batch(network, tokenizer, (), params, inputs).codes

    compiled, report = {}, {}
    for name, weights in forms.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(codes).lower(weights, inputs).compile()
        report[name] = {
            'compile_seconds': time.perf_counter() - start,
            'temporaries': compiled[name].memory_analysis().temp_size_in_bytes / 2**20,
        }
    devices = jax.devices()[:1]
    rates = {'product': timing.matrix_product(job.dtype, devices), 'read': timing.read(devices)}
    calls = {name: functools.partial(run, forms[name], inputs) for name, run in compiled.items()}
    results = {name: np.asarray(call()) for name, call in calls.items()}
    calls |= {name: rate.call for name, rate in rates.items()}
    seconds = timing.time_in_turn(calls, job.repeats, averaged=rates)
    flops, reads = np.subtract(
        job.cost(tokenizer, params, inputs), job.decoder(tokenizer, params).cost()
    ).tolist()
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    matrix_rate, read_rate = (rates[name].amount / median[name] for name in ('product', 'read'))
    for name in forms:
        report[name] |= {
            **timing.percentiles(seconds[name]),
            'seconds': seconds[name].tolist(),
            'ratio': median[name] / median[SCANNED],
            'matrix_rate_share': flops / median[name] / matrix_rate,
            'read_rate_share': reads / median[name] / read_rate,
        }
    return {
        'batch': job.batch,
        'steps': job.steps,
        'forms': report,
        'same_codes': bool((results[SCANNED] == results[ARRANGED]).all()),
        'matrix_rate_gflops': matrix_rate / 1e9,
        'read_rate_gbytes': read_rate / 1e9,
        'environment': machine.describe(),
    }
