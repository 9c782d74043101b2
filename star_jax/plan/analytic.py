"""What does a program need on chips for which no program can be compiled here?

Memory and traffic come from the jaxpr of one device's part of the batch, collectives from formulas.
"""

import dataclasses
import functools

import jax.numpy as jnp

from star_jax.parallel.mesh import MeshShape
from star_jax.plan import jaxpr_memory
from star_jax.plan.hlo import Collective
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import MakeWorkload, Program, Workload, device_bytes
from star_jax.training.run import Run

BATCHES = (256, 512)  # so large that activations outweigh the update of the parameters
KEEPS_SCORES = (
    'dense',
    'by_scale',
)  # these kernels store scores; others need no more than chunks
SUMS_PER_LAYER = 3  # results that tensor parallelism sums: self-attention, cross-attention, MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramNeeds:
    """The needs of a program on one device for its images, with whole layers.

    Attributes:
        live: bytes of intermediate arrays that grow with the batch.
        traffic: bytes that matrix products read and write.
    """

    live: int
    traffic: int


@functools.lru_cache(maxsize=4)  # advice for a run that does not fit needs the same values again
def program_needs(run: Run, images: int, make_workload: MakeWorkload) -> dict[str, ProgramNeeds]:
    """The needs of each program on one device that has `images` images and no other device.

    The needs per image are the difference between two large batches.
    """
    programs, larger = (_programs(run, batch, make_workload) for batch in BATCHES)
    step = BATCHES[1] - BATCHES[0]
    return {
        name: ProgramNeeds(
            live=images * (jaxpr_memory.peak(larger[name]) - jaxpr_memory.peak(program)) // step,
            traffic=jaxpr_memory.traffic(program)
            - (BATCHES[0] - images)
            * (jaxpr_memory.traffic(larger[name]) - jaxpr_memory.traffic(program))
            // step,
        )
        for name, program in programs.items()
    }


def _programs(run: Run, images: int, make_workload: MakeWorkload) -> dict[str, Program]:
    attention = run.attention if run.attention in KEEPS_SCORES else 'chunked'
    run = dataclasses.replace(run, batch=images, attention=attention, released_loss_scale=False)
    return make_workload(run, MeshShape().abstract_mesh(1), 'cpu').programs


def fixed(run: Run, workload: Workload, sizes: tuple[int, ...]) -> int:
    """Bytes of one device for any batch: gradients, and layers gathered over `fsdp`."""
    if workload.trained is None:
        return 0
    _, fsdp, _, _ = sizes
    gradients = device_bytes(workload.trained)
    return gradients + (2 * fsdp * gradients // run.model.depth if fsdp > 1 else 0)


def traffic(workload: Workload, products: int, sizes: tuple[int, ...]) -> int:
    """A lower bound of the bytes that one device reads and writes.

    Args:
        workload: the programs and the resident arrays.
        products: bytes that the products of its images move, with whole layers.
        sizes: the lengths of the mesh axes.
    """
    _, _, tensor, sequence = sizes
    names = ('parameters', 'optimizer', 'averages')
    state = sum(device_bytes(workload.resident.get(name)) for name in names)
    trained = workload.trained
    update = 2 * (state + device_bytes(trained)) if trained is not None else 0
    return products // (tensor * sequence) + update


def collectives(run: Run, workload: Workload, sizes: tuple[int, ...], pod: Pod) -> list[Collective]:
    """The collectives of one training step, or of generating one batch."""
    data, fsdp, tensor, sequence = sizes
    images = workload.images // (data * fsdp)
    itemsize = jnp.dtype(run.dtype).itemsize
    model, depth = run.model, run.model.depth
    rows = model.schedule.length * images
    gathered = {name: device_bytes(tree) * fsdp for name, tree in workload.resident.items()}
    trains = workload.trained is not None
    passes = 2 + run.remat if trains else 1  # over the activations of all layers
    if trains:  # float32 parameters are gathered in the compute dtype, forward and backward
        weights = (2 * gathered['parameters'] + gathered.get('frozen model', 0)) * itemsize // 4
        weights += gathered.get('text encoder', 0)
    else:
        weights = model.schedule.steps * gathered['parameters']
        rows *= 2 if model.guidance_weights(run.sampling.guidance).any() else 1
    gradients = device_bytes(workload.trained) * fsdp
    summed = SUMS_PER_LAYER * depth * rows * model.width * itemsize // sequence
    keys_and_values = 2 * depth * rows * model.width * itemsize // tensor
    # kind, group size, distance of a group's neighbours in device numbers, bytes
    candidates = [
        ('all-gather', fsdp, tensor * sequence, weights * (fsdp - 1) // fsdp),
        ('reduce-scatter', fsdp, tensor * sequence, gradients * (fsdp - 1) // fsdp),
        (
            'all-reduce',
            data,
            fsdp * tensor * sequence,
            2 * gradients // fsdp * (data - 1) // data,
        ),
        ('all-reduce', tensor, sequence, passes * 2 * summed * (tensor - 1) // tensor),
        ('all-gather', sequence, 1, passes * keys_and_values * (sequence - 1) // sequence),
    ]
    return [
        Collective(
            kind=kind,
            group_size=group_size,
            local_size=max(min(group_size, pod.local_chips // distance), 1),
            count=depth,
            bytes=size,
        )
        for kind, group_size, distance, size in candidates
        if group_size > 1 and size
    ]
