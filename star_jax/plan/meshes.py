"""How should the chips be arranged, where nobody has said?"""

import dataclasses

from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.parallel.mesh import MeshShape
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import share
from star_jax.training.run import Run

ROOM = 0.25  # of the memory that parameters, optimizer and averages may take


def choose(run: Run, pod: Pod, trains: bool) -> MeshShape:
    """As many parts of the batch as it has, the rest of the chips for heads and then rows.

    Parameters are split no further than they must be: every split is gathered again. Raises
    UserError where the model divides in no such way.
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
        fitting = []
        for shape in shapes:
            try:
                params = rules.abstract(run.model.abstract(), shape.abstract_mesh(pod.chips))
            except UserError as error:
                refused = error
                continue
            fitting.append(shape)
            if copies * share(params) <= ROOM * pod.chip.memory:
                return shape
        if fitting:
            return fitting[-1]
    raise refused or UserError(f'no mesh of {pod.chips} chips divides this model')


def options(shape: MeshShape) -> str:
    """The words that ask for a mesh on a command line."""
    fields = dataclasses.asdict(shape).items()
    words = [f'--mesh.{name} {size}' for name, size in fields if size > 1]
    return ' '.join(words) or '--mesh.fsdp 1'


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
