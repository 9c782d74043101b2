"""How long does training attention take, for each kernel and for the masked formula?

Self-attention of one layer over all rows of an image, forward alone and with its gradient. Its
floating-point operations are those of the visible pairs of a row and a key: 2 multiply-adds per
pair and head channel, and three times as many with the gradient.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.bench import timing
from star_jax.core.cache import KV
from star_jax.core.settings import Dtype
from star_jax.core.visibility import StaticVisibility, Visibility
from star_jax.errors import UserError
from star_jax.nn.attention_dispatch import Name, named
from star_jax.parallel import machine
from star_jax.protocols import Family, Kernel

KERNELS: tuple[Name, ...] = ('dense', 'by_scale', 'chunked', 'automatic')  # run on every platform
GRADIENT_FACTOR = 3  # operations with the gradient, relative to the forward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionJob:
    """A layer whose attention is timed.

    Attributes:
        model: the sizes of the layer.
        batch: images at once.
        repeats: timed runs of each kernel.
        dtype: the dtype of queries, keys and values.
        kernels: names of kernels; 'dense' is the masked formula.
    """

    model: Family
    batch: int = 1
    repeats: int = 5
    dtype: Dtype = 'float32'
    kernels: tuple[Name, ...] = KERNELS

    def __post_init__(self) -> None:
        if min(self.batch, self.repeats) < 1:
            raise UserError(
                f'batch and repeats must be at least 1, not {self.batch} and {self.repeats}'
            )
        timing.check_runs('repeats', self.repeats)
        row = 3 * jnp.dtype(self.dtype).itemsize * self.model.width  # query, key and value
        rows = self.batch * self.model.schedule.starts[-1]
        machine.check_memory(f'a batch of {self.batch:,} images', rows * row)


def run(job: AttentionJob) -> dict[str, Any]:
    """Measures every kernel: seconds, GFLOP/s, share of the matrix rate, MiB of temporaries."""
    schedule, heads = job.model.schedule, job.model.heads
    rows = schedule.starts[-1]
    shape = (3, job.batch, rows, heads, job.model.width // heads)
    visibility = Visibility(bounds=StaticVisibility.of(schedule.visible_rows))
    q_BLNH, *kv = jax.random.normal(jax.random.key(0), shape, job.dtype)
    args = (q_BLNH, KV.from_rows(*kv))
    pairs = int(np.sum(schedule.visible_rows, dtype=np.int64))
    flops = 4 * pairs * job.batch * job.model.width
    compiled = {
        (name, passes): jax.jit(_passes(named(name, jax.default_backend()), visibility)[passes])
        .lower(*args)
        .compile()
        for name in job.kernels
        for passes in ('forward', 'with gradient')
    }
    product = timing.matrix_product(job.dtype, list(q_BLNH.devices()))
    calls = {key: (lambda program=program: program(*args)) for key, program in compiled.items()}
    calls['product'] = product.call
    seconds = timing.time_in_turn(calls, job.repeats, averaged=('product',))
    rate = product.amount / float(np.median(seconds.pop('product'))) / 1e9
    kernels = []
    for (name, passes), times in seconds.items():
        latencies = timing.percentiles(times)
        p50 = latencies['p50_seconds']
        gflop = flops / 1e9 * (GRADIENT_FACTOR if passes == 'with gradient' else 1)
        kernels.append(
            {
                'kernel': name,
                'passes': passes,
                **latencies,
                'gflops': gflop / p50,
                'matrix_rate_share': gflop / p50 / rate,
                'temporaries': compiled[name, passes].memory_analysis().temp_size_in_bytes / 2**20,
            }
        )
    return {
        'rows': rows,
        'visible_share': pairs / rows**2,
        'kernels': kernels,
        'matrix_rate_gflops': rate,
        'environment': machine.describe(),
    }


def _passes(kernel: Kernel, visibility: Visibility) -> dict[str, Any]:
    def forward(q_BLNH: jax.Array, kv: KV) -> jax.Array:
        return kernel(q_BLNH, (), kv, visibility)

    def total(q_BLNH: jax.Array, kv: KV) -> jax.Array:
        return forward(q_BLNH, kv).astype(jnp.float32).sum()

    return {'forward': forward, 'with gradient': jax.grad(total, argnums=(0, 1))}
