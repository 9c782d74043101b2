"""What would a program need on chips for which nothing can be compiled here?

Sizes of arrays from the jaxpr of one device's part of the batch, exchanges by formula.
"""

import dataclasses
import functools

import jax.numpy as jnp

from star_jax.parallel.mesh import MeshShape
from star_jax.plan import jaxpr_memory
from star_jax.plan.hlo import Collective
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import Make, Piece, Work, share
from star_jax.training.run import Run

LARGE = (256, 512)  # images of one device
KEEPS_SCORES = ('dense', 'by_scale')  # kernels; all others remember as little as chunks
PER_LAYER = 3  # results that tensor parallelism sums: self-attention, cross-attention, MLP


@dataclasses.dataclass(frozen=True)
class Local:
    """Bytes of one device for its images, whole layers counted: what lives because of them, and
    what products move."""

    live: int
    moved: int


@functools.lru_cache(maxsize=4)  # asked for again where a run does not fit
def local(run: Run, images: int, make: Make) -> dict[str, Local]:
    """What each piece of the work asks of a device that has so many images to itself.

    Seen on batches so large that their activations outweigh the update of the parameters.
    """
    fewer, more = (_pieces(run, count, make) for count in LARGE)
    step = LARGE[1] - LARGE[0]
    return {
        name: Local(
            live=images * (jaxpr_memory.peak(more[name]) - jaxpr_memory.peak(piece)) // step,
            moved=jaxpr_memory.traffic(piece)
            - (LARGE[0] - images)
            * (jaxpr_memory.traffic(more[name]) - jaxpr_memory.traffic(piece))
            // step,
        )
        for name, piece in fewer.items()
    }


def _pieces(run: Run, images: int, make: Make) -> dict[str, Piece]:
    attention = run.attention if run.attention in KEEPS_SCORES else 'chunked'
    alone = dataclasses.replace(run, batch=images, attention=attention, released_loss_scale=False)
    return make(alone, MeshShape().abstract_mesh(1), 'cpu').pieces


def fixed(run: Run, work: Work, sizes: tuple[int, ...]) -> int:
    """Bytes of one device that do not grow with the batch: gradients, and layers gathered whole."""
    if work.trained is None:
        return 0
    _, fsdp, tensor, _ = sizes
    layers = 2 * fsdp * share(work.trained) // run.model.depth if fsdp > 1 else 0
    return share(work.trained) + layers


def traffic(work: Work, moved: int, sizes: tuple[int, ...]) -> int:
    """Bytes that one device reads and writes at least: products, and once the whole state."""
    state = sum(share(work.resident.get(name)) for name in ('parameters', 'optimizer', 'averages'))
    update = 2 * (state + share(work.trained)) if work.trained is not None else 0
    return moved // (sizes[2] * sizes[3]) + update


def collectives(run: Run, work: Work, sizes: tuple[int, ...], pod: Pod) -> list[Collective]:
    """The exchanges of one training step, or of one batch drawn."""
    data, fsdp, tensor, sequence = sizes
    images = work.images // (data * fsdp)
    width = jnp.dtype(run.dtype).itemsize
    model, depth = run.model, run.model.depth
    rows = model.schedule.length * images
    held = {name: share(tree) * fsdp for name, tree in work.resident.items()}
    trains = work.trained is not None
    walks = 2 + run.remat if trains else 1
    if trains:  # float32 parameters are gathered as what they are computed in
        passes = (2 * held['parameters'] + held.get('frozen model', 0)) * width // 4
        passes += held.get('text encoder', 0)
    else:
        passes = model.schedule.steps * held['parameters']
        rows *= 2 if run.sampling.guidance else 1
    gradients = share(work.trained) * fsdp
    summed = PER_LAYER * depth * rows * model.width * width // sequence
    seen = 2 * depth * rows * model.width * width // tensor
    asked = [
        ('all-gather', fsdp, tensor * sequence, passes * (fsdp - 1) // fsdp),
        ('reduce-scatter', fsdp, tensor * sequence, gradients * (fsdp - 1) // fsdp),
        (
            'all-reduce',
            data,
            fsdp * tensor * sequence,
            2 * gradients // fsdp * (data - 1) // data,
        ),
        ('all-reduce', tensor, sequence, walks * 2 * summed * (tensor - 1) // tensor),
        ('all-gather', sequence, 1, walks * seen * (sequence - 1) // sequence),
    ]
    return [
        Collective(kind, group, max(min(group, pod.near // apart), 1), depth, size)
        for kind, group, apart, size in asked
        if group > 1 and size
    ]
