"""Which mesh suits a pod, and what is the largest batch that fits?"""

import dataclasses
from typing import NamedTuple

from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.parallel.mesh import MeshShape
from star_jax.parallel.rules import device_bytes
from star_jax.plan import analytic
from star_jax.plan.estimate import Estimate, Estimator
from star_jax.plan.topologies import Pod
from star_jax.training.run import Run

STATE_FRACTION = 0.25  # share of the memory for parameters, optimizer and averages
MAX_CHECKS = 2  # compilations that check the largest batch
CHECK_FACTOR = 0.9  # factor from one checked batch to the next


class LargestBatch(NamedTuple):
    """The result of `largest_batch`.

    Attributes:
        bytes_per_image: temporaries of a device that grow with the batch, per image.
        batch: the largest global batch that fits (0: none does).
        compiled: whether that batch was compiled, not only computed.
    """

    bytes_per_image: float
    batch: int
    compiled: bool


def largest_batch(estimator: Estimator, estimate: Estimate) -> LargestBatch:
    """The largest batch that fits, by the line through two batches and a check of the result."""
    ways, images = estimator.run.batch // estimate.images, estimate.images
    slope = max(_bytes_per_image(estimator, estimate), 1.0)
    resident, main = estimate.workload.resident, estimate.main
    fixed = max(estimate.temporaries[main] - slope * images, 0.0)
    per_image = slope + device_bytes(resident.get('batch')) / images
    others = [size for name, size in estimate.temporaries.items() if name != main]
    per_image = max(per_image, max(others, default=0) / images)
    state = sum(device_bytes(tree) for name, tree in resident.items() if name != 'batch')
    most = max(int((estimator.pod.chip.memory - state - fixed) / per_image), 0)
    if state + estimate.grid > estimator.pod.chip.memory:
        most = 0  # no batch is small enough for the sample grid
    if not estimator.compiles:
        return LargestBatch(slope, most * ways, False)
    for _ in range(MAX_CHECKS):
        if not most:
            break
        same = most == images
        checked = estimate if same else estimator.estimate(most * ways, main_only=True)
        if estimator.fits(checked):
            return LargestBatch(slope, most * ways, True)
        most = int(most * CHECK_FACTOR)
    return LargestBatch(slope, most * ways, False)


def _bytes_per_image(estimator: Estimator, estimate: Estimate) -> float:
    """Temporaries of the main program that each image of a device adds."""
    images, main = estimate.images, estimate.main
    if not estimator.compiles:
        fixed = analytic.fixed(estimator.run, estimate.workload, estimator.sizes)
        return (estimate.temporaries[main] - fixed) / images
    other = 2 * images if estimator.fits(estimate) or images == 1 else images // 2
    ways = estimator.run.batch // images
    second = estimator.estimate(other * ways, main_only=True)
    return (second.temporaries[main] - estimate.temporaries[main]) / (other - images)


def choose_mesh(run: Run, pod: Pod, trains: bool) -> MeshShape:
    """A mesh that splits the batch as far as it divides; heads, then tokens, take the other chips.

    Parameters are split over `fsdp` as little as memory allows, because every split is gathered
    again.

    Args:
        run: the config; its mesh is not read.
        pod: the chips.
        trains: whether gradients and the state of the optimizer need memory.

    Raises:
        UserError: no such mesh divides the model.
    """
    ways = max(n for n in _divisors(pod.chips) if run.batch % n == 0)
    copies = 3 + (run.ema > 0) if trains else 1
    refused = None
    for tensor in sorted(_divisors(pod.chips // ways), reverse=True):
        if run.model.heads % tensor:
            continue
        shapes = [
            MeshShape(fsdp=fsdp, tensor=tensor, sequence=pod.chips // ways // tensor)
            for fsdp in _divisors(ways)
        ]
        possible = []
        for shape in shapes:
            try:
                params = rules.abstract(run.model.abstract(), shape.abstract_mesh(pod.chips))
            except UserError as error:
                refused = error
                continue
            possible.append(shape)
            if copies * device_bytes(params) <= STATE_FRACTION * pod.chip.memory:
                return shape
        if possible:
            return possible[-1]
    raise refused or UserError(f'no mesh of {pod.chips} chips divides this model')


def mesh_options(shape: MeshShape) -> str:
    """The options of a command line that select a mesh."""
    sizes = dataclasses.asdict(shape).items()
    options = [f'--mesh.{axis} {size}' for axis, size in sizes if size > 1]
    return ' '.join(options) or '--mesh.fsdp 1'


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
