"""What will a run cost, before it starts?"""

import logging
import math
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.core.schedule import Schedule
from star_jax.errors import UserError
from star_jax.parallel.mesh import batch_ways
from star_jax.training.run import Run, TokenizerRun
from star_jax.training.state import TrainState

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
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    }


def check_batch(batch: int, mesh: Mesh) -> None:
    """A UserError if the mesh cannot split the batch."""
    ways = batch_ways(mesh)
    if batch % ways:
        fits = ways * max(round(batch / ways), 1)
        raise UserError(
            f'a batch of {batch} does not divide over {ways} devices: give a multiple of {ways}, '
            f'such as {fits}'
        )


def warn_of_collapse(used: float, least: float) -> None:
    """Warns if validation images use less than the share `least` of the codes."""
    if used < least:
        log.warning(
            'codebook collapse: validation images use %.0f %% of the codes, less than %.0f %%',
            100 * used,
            100 * least,
        )


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
