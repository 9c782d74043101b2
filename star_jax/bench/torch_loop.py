"""How long does a step of sampling a raster take beside a plain PyTorch loop?

The loop has the form of the published code: one call per layer and step, fused projections of
queries, keys and values by `F.linear`, two rows per image, a static cache of all rows rounded up to
8, and an explicit mask over all of it. Weights are random in both, and both use all cores of the
CPU. Rounds alternate: the program of this package, its decoder alone, a sum that measures the read
rate, steps of the loop. PyTorch is not a requirement of this package.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from star_jax.bench import timing
from star_jax.bench.sampling import SamplingJob, cache_read
from star_jax.core.schedule import Raster
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.parallel import machine, mesh
from star_jax.protocols import Family

ROUNDED = 8  # rows of the cache are a multiple of it
GUIDANCE = 4.0
STD = 0.02  # standard deviation of random weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchLoopJob:
    """A model whose steps are timed in turn with those of the loop.

    Attributes:
        model: sizes of the transformer, of a family on rasters (LlamaGen).
        batch: images at once, each with a prompted and an unprompted row.
        rounds: how often both are timed, in turn.
        steps: steps of the loop in a round.
    """

    model: Family
    batch: int = 1
    rounds: int = 3
    steps: int = 32

    def __post_init__(self) -> None:
        if min(self.batch, self.rounds, self.steps) < 1:
            raise UserError(
                'batch, rounds and steps must be at least 1, not '
                f'{self.batch}, {self.rounds} and {self.steps}'
            )
        schedule = self.model.schedule
        if not isinstance(schedule, Raster):
            raise UserError(
                f'the loop samples a raster token by token, and the schedule of this model is a '
                f'{type(schedule).__name__}: name the config of a LlamaGen model'
            )
        if self.model.kv_heads not in (0, self.model.heads):
            raise UserError(
                f'the loop has as many heads of keys and values as of queries, {self.model.heads}, '
                f'and the model has {self.model.kv_heads}: give kv_heads 0'
            )
        if self.steps > schedule.steps:
            raise UserError(
                f'an image has {schedule.steps} steps: give at most as many, not {self.steps}'
            )


def loop(model: Family, batch: int, steps: int) -> Callable[[], float]:
    """A function that runs `steps` steps of the loop and returns the seconds of one of them.

    Every step reads the whole cache, so its place does not matter. Raises UserError without
    PyTorch.

    Args:
        model: sizes of the transformer.
        batch: images, each with a prompted and an unprompted row.
        steps: steps of a call.
    """
    try:
        import torch
        from torch.nn import functional
    except ImportError as error:
        raise UserError('the loop needs PyTorch: pip install torch') from error

    torch.set_num_threads(mesh.cores())  # as many as XLA's
    width, heads, rows = model.width, model.heads, 2 * batch
    head = width // heads
    total = model.schedule.prefix + model.schedule.steps
    total = -(-total // ROUNDED) * ROUNDED

    def weight(*shape: int) -> Any:
        return STD * torch.randn(*shape)

    layers = [
        {
            'attention_norm': torch.ones(width),
            'wqkv': weight(3 * width, width),
            'wo': weight(width, width),
            'mlp_norm': torch.ones(width),
            'w1': weight(model.hidden, width),
            'w3': weight(model.hidden, width),
            'w2': weight(width, model.hidden),
            'keys': torch.zeros(rows, heads, total, head),
            'values': torch.zeros(rows, heads, total, head),
        }
        for _ in range(model.depth)
    ]
    embedding, output = weight(model.codes, width), weight(model.codes, width)
    norm = torch.ones(width)
    angles = torch.rand(total, 1, head // 2)
    cosines, sines = angles.cos(), angles.sin()
    mask = torch.tril(torch.ones(total, total, dtype=torch.bool))

    def normalise(x: Any, scale: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * scale

    def rotate(x: Any, place: Any) -> Any:
        even, odd = x.reshape(rows, 1, heads, head // 2, 2).unbind(-1)
        cosine, sine = cosines[place], sines[place]
        turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1)
        return turned.flatten(3)

    def step(codes: Any, place: Any) -> Any:
        x = functional.embedding(codes, embedding)
        visible = mask[place][None, None]
        for layer in layers:
            qkv = functional.linear(normalise(x, layer['attention_norm']), layer['wqkv'])
            queries, keys, values = qkv.reshape(rows, 1, 3, heads, head).unbind(2)
            queries, keys = rotate(queries, place), rotate(keys, place)
            layer['keys'][:, :, place] = keys.transpose(1, 2)
            layer['values'][:, :, place] = values.transpose(1, 2)
            mixed = functional.scaled_dot_product_attention(
                queries.transpose(1, 2), layer['keys'], layer['values'], attn_mask=visible
            )
            x = x + functional.linear(mixed.transpose(1, 2).reshape(rows, 1, width), layer['wo'])
            inner = normalise(x, layer['mlp_norm'])
            gate = functional.silu(functional.linear(inner, layer['w1']))
            x = x + functional.linear(gate * functional.linear(inner, layer['w3']), layer['w2'])
        logits = functional.linear(normalise(x, norm), output)[:, -1]
        prompted, unprompted = logits.chunk(2)
        probs = (unprompted + GUIDANCE * (prompted - unprompted)).softmax(-1)
        return torch.multinomial(probs, 1).repeat(2, 1)

    @torch.no_grad()
    def run() -> float:
        codes = torch.zeros(rows, 1, dtype=torch.long)
        start = time.perf_counter()
        for index in range(steps):
            codes = step(codes, torch.tensor([index]))
        return (time.perf_counter() - start) / steps

    run()
    return run


def run(job: TorchLoopJob) -> dict[str, Any]:
    """Times a step of both in turn: milliseconds, their ratio, and bytes read beside the read rate.

    Raises UserError without PyTorch, and where the program would not run on the CPU as the loop
    does.
    """
    if (backend := jax.default_backend()) != 'cpu':
        raise UserError(
            f'the loop runs on the CPU, and the program would run on a {backend.upper()}: set '
            'JAX_PLATFORMS=cpu'
        )
    model, batch = job.model, job.batch
    settings = Settings(guidance=GUIDANCE, top_k=0, top_p=0.0)
    other = loop(model, batch, job.steps)
    benchmark = SamplingJob(model=model, settings=settings, batch=batch).prepare()
    main, decoder = benchmark.main, benchmark.parts['decoder']
    start = time.perf_counter()
    compiled = main.program.lower(*main.args).compile()
    compiling = time.perf_counter() - start
    decode = decoder.program.lower(*decoder.args).compile()
    rate = timing.read(jax.devices()[:1])
    calls = {
        'program': lambda: compiled(*main.args),
        'decoder': lambda: decode(*decoder.args),
        'read': rate.call,
    }
    for call in calls.values():
        jax.block_until_ready(call())
    found = {name: [] for name in (*calls, 'loop')}
    for _ in range(job.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - start)
        found['loop'].append(other())
    median = {name: float(np.median(values)) for name, values in found.items()}
    count, network = model.schedule.steps, model.build()
    ours = (median['program'] - median['decoder']) / count
    reads = (main.cost()[1] - decoder.cost()[1]) / count
    return {
        'batch': batch,
        'threads': mesh.cores(),
        'step_ms': 1000 * ours,
        'loop_step_ms': 1000 * median['loop'],
        'ratio': ours / median['loop'],
        'read_gbytes_a_step': reads / 1e9,
        'cache_read_gbytes_a_step': cache_read(network, 2 * batch, count) / count / 1e9,
        'read_rate_gbytes': rate.amount / median['read'] / 1e9,
        'read_rate_share': reads / ours / (rate.amount / median['read']),
        'decoder_seconds_an_image': median['decoder'] / batch,
        'compile_seconds': compiling,
        'seconds': found,
        'hardware': machine.describe(),
    }
