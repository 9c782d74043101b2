"""What should be changed?"""

import dataclasses
from collections.abc import Iterator

from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.plan import analytic
from star_jax.plan.chips import GIB
from star_jax.plan.estimate import Planner, Point
from star_jax.plan.plan_report import Memory
from star_jax.plan.topologies import Pod

DEAR = 0.1  # of the time of all arithmetic, what is worth a word


def advise(planner: Planner, point: Point, memory: Memory, largest: int | None) -> Iterator[str]:
    """What to change where a run does not fit, in sentences with numbers."""
    if memory.fits:
        return
    run, pod = planner.run, planner.pod
    over = (memory.total - memory.limit) / GIB
    yield f'{over:,.1f} GiB more than the {memory.limit / GIB:,.2f} GiB of one {pod.chip.name}'
    if largest:
        yield f'--batch {largest} is the largest that fits (now {run.batch})'
    grown = memory.activations / GIB
    if point.work.trained is not None and not run.remat:
        kept = _remat(planner, point)
        yield f'--remat: {grown:,.1f} GiB of activations would become about {grown * kept:,.1f}'
    data, fsdp, _, _ = planner.sizes
    state = sum(memory.resident.get(name, 0) for name in ('parameters', 'optimizer', 'averages'))
    times = next((n for n in (4, 2) if data % n == 0 and _divides(planner, n * fsdp)), None)
    if times:
        yield (
            f'--mesh.fsdp {fsdp * times}: {state / GIB:,.2f} GiB of parameters, averages and '
            f'optimizer would become {state / times / GIB:,.2f}'
        )
    model = run.model
    first, length = model.schedule.offsets[-2], model.keep_tokens or model.schedule.length
    keep = first + (length - first) // 2
    if point.work.trained is not None and first < keep < length:
        yield (
            f'--model.keep-tokens {keep}: training on {keep} of {length} tokens would leave about '
            f'{grown * keep / length:,.1f} of {grown:,.1f} GiB of activations'
        )
    yield 'more chips: with twice as many, a device has half of the images'


def _remat(planner: Planner, point: Point) -> float:
    """The share of activations that is left where layers are computed again."""

    def grown(remat: bool) -> int:
        run = dataclasses.replace(planner.run, remat=remat)
        return analytic.local(run, point.images, planner.make)[point.main].live

    return grown(True) / max(grown(False), 1)


def _divides(planner: Planner, fsdp: int) -> bool:
    """Whether the model can be split so."""
    shape = dataclasses.replace(planner.shape, data=0, fsdp=fsdp)
    try:
        rules.abstract(planner.run.model.abstract(), shape.abstract_mesh(planner.pod.chips))
    except UserError:
        return False
    return True


def spare(pod: Pod, flops: dict[str, dict[str, int]]) -> list[str]:
    """A sentence, where a frozen text encoder takes much of the time."""
    seconds = {
        kind: sum(kinds[kind] for kinds in flops.values()) / pod.chip.rate(kind)
        for kind in ('bfloat16', 'float32', 'exact')
    }
    part = seconds['exact'] / sum(seconds.values())
    if part < DEAR:
        return []
    return [
        f'the text encoder, in exact float32, takes {part:.0%} of the arithmetic: `star-jax data '
        'cache` computes it once, with the codes of the pictures'
    ]
