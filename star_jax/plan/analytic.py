"""What does a program need on chips for which no program can be compiled here?

Memory and traffic come from the jaxpr of one device's part of the batch, collectives from formulas.
"""

import dataclasses
import functools

import jax.numpy as jnp

from star_jax.nn.attention_dispatch import named
from star_jax.parallel.collectives import Collective, collective_along
from star_jax.parallel.gradient_sum_time import replica_sum
from star_jax.parallel.mesh import AXES, MeshShape
from star_jax.parallel.rules import device_bytes
from star_jax.plan.fused import Counted
from star_jax.plan.jaxpr_memory import Needs, measure
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import MakeWorkload, Workload, state_bytes
from star_jax.sampling.program import step_settings
from star_jax.training.run import Run

BATCHES = (256, 512)  # so large that activations outweigh the update of the parameters
SUMS_PER_LAYER = 3  # results that tensor parallelism sums: self-attention, cross-attention, MLP


def program_needs(
    run: Run,
    images: int,
    make_workload: MakeWorkload,
    platform: str = 'gpu',
    splits_rows: bool = False,
) -> dict[str, Needs]:
    """The needs of each program on one device that has `images` images and no other device.

    The needs per image are the difference between two large batches.

    Args:
        run: the config.
        images: images of the device.
        make_workload: makes the programs of a run.
        platform: decides the attention kernel.
        splits_rows: whether a mesh splits the rows of an image.
    """
    batch, step = BATCHES[0], BATCHES[1] - BATCHES[0]
    run = dataclasses.replace(run, batch=batch)
    smaller, larger = _measured(run, make_workload, platform, splits_rows)
    return {
        name: Needs(
            live=images * (larger[name].live - needs.live) // step,
            traffic=needs.traffic
            - (batch - images) * (larger[name].traffic - needs.traffic) // step,
        )
        for name, needs in smaller.items()
    }


@functools.lru_cache(maxsize=16)  # the same run is counted for several batches and meshes
def _measured(
    run: Run, make_workload: MakeWorkload, platform: str, splits_rows: bool
) -> tuple[dict[str, Needs], ...]:
    """The needs of each program on one device for each of BATCHES."""
    attend, needs = Counted(named(run.attention, platform), splits_rows), []
    for batch in BATCHES:
        changed = dataclasses.replace(run, batch=batch, released_loss_scale=False)
        mesh = MeshShape().abstract_mesh(1)
        programs = make_workload(changed, mesh, platform, attend=attend).programs
        needs.append({name: measure(program) for name, program in programs.items()})
    return tuple(needs)


def fixed(run: Run, workload: Workload, sizes: tuple[int, ...]) -> int:
    """Bytes of one device for any batch: gradients, their sums, and layers gathered over `fsdp`."""
    if workload.trained is None:
        return 0
    _, fsdp, _, _ = sizes
    gradients = device_bytes(workload.trained)
    sums = gradients if run.optimizer.accumulate > 1 else 0
    return gradients + sums + (2 * fsdp * gradients // run.model.depth if fsdp > 1 else 0)


def traffic(run: Run, workload: Workload, products: int, sizes: tuple[int, ...]) -> int:
    """A lower bound of the bytes that one device reads and writes.

    Args:
        run: the settings.
        workload: the programs and the resident arrays.
        products: bytes that the products of its images move, with whole layers.
        sizes: the lengths of the mesh axes.
    """
    _, _, tensor, sequence = sizes
    products //= tensor * sequence
    if workload.trained is None:
        return products
    state = state_bytes({name: device_bytes(tree) for name, tree in workload.resident.items()})
    gradients, accumulate = device_bytes(workload.trained), run.optimizer.accumulate
    sums = 2 * accumulate * gradients if accumulate > 1 else 0
    return products + sums + 2 * (state + gradients)


def collectives(run: Run, workload: Workload, sizes: tuple[int, ...], pod: Pod) -> list[Collective]:
    """The collectives of one training step, or of generating one batch."""
    data, fsdp, tensor, sequence = sizes
    images = workload.images // (data * fsdp)
    itemsize = jnp.dtype(run.dtype).itemsize
    model, depth = run.model, run.model.depth
    gathered = {name: device_bytes(tree) * fsdp for name, tree in workload.resident.items()}
    trains = workload.trained is not None
    passes = 2 + (run.remat == 'full') if trains else 1  # over the activations of all layers
    if trains:  # float32 parameters are gathered in the compute dtype, forward and backward
        rows = model.schedule.length * images
        weights = (2 * gathered['parameters'] + gathered.get('frozen model', 0)) * itemsize // 4
        weights += gathered.get('text encoder', 0)
    else:
        steps = run.sampling.stop or model.schedule.steps
        weights = steps * gathered['parameters']
        guided = step_settings(model, run.sampling).guided
        rows = (1 + guided) * model.schedule.offsets[steps] * images
    gradients = device_bytes(workload.trained) if trains else 0
    reduced = gradients * fsdp * itemsize // 4  # over fsdp, in the compute dtype
    summed = SUMS_PER_LAYER * depth * rows * model.width * itemsize // sequence
    keys_and_values = 2 * depth * rows * model.width * itemsize // tensor
    # kind, mesh axis, bytes that a device sends for a micro-batch
    candidates = [
        ('all-gather', 'fsdp', weights * (fsdp - 1) // fsdp),
        ('reduce-scatter', 'fsdp', reduced * (fsdp - 1) // fsdp),
        ('all-reduce', 'tensor', passes * 2 * summed * (tensor - 1) // tensor),
        ('all-gather', 'sequence', passes * keys_and_values * (sequence - 1) // sequence),
    ]
    runs = run.optimizer.accumulate if trains else 1
    items = [
        collective_along(
            kind, axis, runs * size, sizes, local_chips=pod.local_chips, count=runs * depth
        )
        for kind, axis, size in candidates
        if sizes[AXES.index(axis)] > 1 and size
    ]
    if trains and data > 1:
        items.append(replica_sum(gradients, run.gradient_dtype, sizes, local_chips=pod.local_chips))
    return items
