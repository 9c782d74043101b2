"""What will a run cost, before it starts?"""

import logging
import math
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.core.schedule import Schedule
from star_jax.errors import UserError
from star_jax.parallel import machine, rules
from star_jax.parallel.mesh import batch_shards
from star_jax.training.run import Run, TokenizerRun
from star_jax.training.state import TrainState

LEAST_IN_ALL = 0.2  # shares of the codes below which a codebook counts as collapsed
LEAST_AT_SCALE = 0.01  # a coarse scale says little and needs few codes, but more than one

log = logging.getLogger(__name__)


def describe(
    state: TrainState, schedule: Schedule, flops: int, run: Run | TokenizerRun, images: int
) -> dict[str, str]:
    """Lines for a user. `state` may be abstract, `flops` are those of one step."""
    state = nn.unbox(state)
    epochs = run.batch * run.pace.steps / images
    return {
        'parameters': f'{_count(state.params):,}',
        'state in memory': f'{_bytes(state) / 2**20:,.0f} MiB (parameters, averages, optimizer)',
        'tokens per image': f'{schedule.length:,} in {schedule.steps} steps',
        'arithmetic per step': f'{flops / 1e9:,.1f} GFLOP',
        'images': f'{run.batch} per step, {run.pace.steps:,} steps, {epochs:,.2f} epochs',
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}' + _processes(),
    }


def _processes() -> str:
    return f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''


def check_batch(batch: int, resolution: tuple[int, int], mesh: Mesh) -> None:
    """A UserError if the mesh cannot split a batch of images, or if no memory holds it.

    Only the pictures are counted, in float32, so that a batch which passes may still be too large.
    """
    ways = batch_shards(mesh)
    if batch % ways:
        fits = ways * max(round(batch / ways), 1)
        raise UserError(
            f'a batch of {batch} does not divide over {ways} devices: give a multiple of {ways}, '
            f'such as {fits}'
        )
    held = batch // ways * len(rules.process_rows(mesh, ways))
    size = held * 3 * math.prod(resolution) * np.dtype(np.float32).itemsize
    machine.check_memory(
        f'a batch of {batch:,} images of {" x ".join(map(str, resolution))} px', size
    )


def check_state(state: TrainState) -> None:
    """A UserError if the memory of this machine, which a CPU works in, cannot hold a state."""
    if jax.default_backend() == 'cpu':
        size = _bytes(nn.unbox(state)) // jax.process_count()
        machine.check_memory('parameters, averages and optimizer of this model', size)


def warn_of_collapse(usage_KV: np.ndarray) -> None:
    """Warns if validation images use too small a share of the codes, at a scale or in all.

    `usage_KV` counts how often each scale chose each code. Fewer tokens than codes tell nothing.
    """
    scales = {f'scale {scale}': (row, LEAST_AT_SCALE) for scale, row in enumerate(usage_KV)}
    for where, (usage_V, least) in {
        'all scales': (usage_KV.sum(0), LEAST_IN_ALL),
        **scales,
    }.items():
        share = (usage_V > 0).mean()
        if usage_V.sum() >= len(usage_V) and share < least:
            log.warning(
                'codebook collapse: %s of validation images use %.1f %% of the codes, '
                'less than %.0f %%',
                where,
                100 * share,
                100 * least,
            )


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
