"""What is the largest batch that fits?"""

from typing import NamedTuple

from star_jax.plan import analytic
from star_jax.plan.estimate import Planner, Point
from star_jax.plan.workload import share

CHECKS = 2  # compilations that may check the largest batch
STEP = 0.9  # from one of them to the next


class Found(NamedTuple):
    """Bytes per image of a device, the largest batch (0: none), and whether it was compiled."""

    slope: float
    largest: int
    checked: bool


def search(planner: Planner, point: Point) -> Found:
    """From what one batch asks: two make a line, and a compilation more checks what it says."""
    ways, images = planner.run.batch // point.images, point.images
    slope = max(_slope(planner, point), 1.0)
    fixed = max(point.beside[point.main] - slope * images, 0.0)
    each = slope + share(point.work.resident.get('batch')) / images
    others = [size for name, size in point.beside.items() if name != point.main]
    each = max(each, max(others, default=0) / images)
    state = sum(share(tree) for name, tree in point.work.resident.items() if name != 'batch')
    most = max(int((planner.pod.chip.memory - state - fixed) / each), 0)
    if planner.pod.platform != 'tpu':
        return Found(slope, most * ways, False)
    for _ in range(CHECKS):
        if not most:
            break
        if planner.fits(point if most == images else planner.look(most * ways, alone=True)):
            return Found(slope, most * ways, True)
        most = int(most * STEP)
    return Found(slope, most * ways, False)


def _slope(planner: Planner, point: Point) -> float:
    """Bytes per image of the main program."""
    images, main = point.images, point.main
    if planner.pod.platform != 'tpu':
        return (
            point.beside[main] - analytic.fixed(planner.run, point.work, planner.sizes)
        ) / images
    other = 2 * images if planner.fits(point) or images == 1 else images // 2
    ways = planner.run.batch // images
    second = planner.look(other * ways, alone=True)
    return (second.beside[main] - point.beside[main]) / (other - images)
