"""How long does a step of sampling a raster take beside a plain PyTorch loop?

    python -m star_jax.bench.torch_loop configs/llamagen_b.py --side 16 --batch 1

The loop has the form of the published code: one call per layer and step, fused projections of
queries, keys and values by `F.linear`, two rows per image, a static cache of all rows rounded up to
8, and an explicit mask over all of it. Weights are random in both. Rounds alternate: the program of
this package, its decoder alone, a sum that measures the read rate, steps of the loop. PyTorch is
not a requirement of this package.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from star_jax import terminal
from star_jax.bench import timing
from star_jax.bench.sampling import SamplingJob, cache_read
from star_jax.checkpoint import config
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.parallel import machine, startup
from star_jax.protocols import Family
from star_jax.training.run import Run

ROUNDED = 8  # rows of the cache are a multiple of it
GUIDANCE = 4.0
STD = 0.02  # standard deviation of random weights
THREADS = 2


def loop(model: Family, batch: int, steps: int) -> Callable[[], float]:
    """A function that runs `steps` steps of the loop and returns the seconds of one of them.

    Every step reads the whole cache, so its place does not matter.

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

    torch.set_num_threads(THREADS)
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


def measure(model: Family, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of both, in turn, the read rate, and the share of it that ours reaches."""
    job = SamplingJob(
        model=model, settings=Settings(guidance=GUIDANCE, top_k=0, top_p=0.0), batch=batch
    )
    benchmark = job.prepare()
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
    other, found = loop(model, batch, steps), {name: [] for name in (*calls, 'loop')}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - start)
        found['loop'].append(other())
    median = {name: float(np.median(values)) for name, values in found.items()}
    count, network = model.schedule.steps, model.build()
    ours = (median['program'] - median['decoder']) / count
    reads = (main.reads - decoder.reads) / count
    rows = model.schedule.starts[-1]
    kept = jax.eval_shape(lambda: network.empty_cache(2 * batch, rows))
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {
        'batch': batch,
        'step_ms': 1000 * ours,
        'loop_step_ms': 1000 * median['loop'],
        'ratio': ours / median['loop'],
        'read_gbytes_a_step': reads / 1e9,
        'cache_read_gbytes_a_step': cache_read(network, 2 * batch) / count / 1e9,
        'read_rate_gbytes': rate.amount / median['read'] / 1e9,
        'read_rate_share': reads / ours / (rate.amount / median['read']),
        'decoder_seconds_an_image': median['decoder'] / batch,
        'temporaries_of_cache': temporaries / cache,
        'compile_seconds': compiling,
        'seconds': found,
        'hardware': machine.describe(),
    }


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('config', type=Path, help='config of a run whose model is a raster')
    parser.add_argument('--side', type=int, default=16, help='side of an image in tokens')
    parser.add_argument('--batch', type=int, default=1, help='images at once')
    parser.add_argument('--rounds', type=int, default=3, help='how often both are timed, in turn')
    parser.add_argument('--steps', type=int, default=32, help='steps of the loop in a round')
    options = parser.parse_args(words)
    startup.start()
    model = config.load_run(options.config, Run).model
    model = dataclasses.replace(model, grid=(options.side, options.side))
    report = measure(model, options.batch, options.rounds, options.steps)
    terminal.write_line(json.dumps(report))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
