"""What will a run need and take on machines that are not here?

For TPUs the real program is compiled ahead of time; for GPUs its arrays are counted.
"""

import functools
from collections.abc import Callable

from star_jax.core.buckets import Buckets
from star_jax.parallel.mesh import AXES, MeshShape
from star_jax.plan import advice, meshes, plan_report, workload
from star_jax.plan import search as searching
from star_jax.plan.estimate import Planner
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import share
from star_jax.training.run import Run


def plan(
    run: Run,
    pod: Pod,
    *,
    config: str,
    samples: bool = False,
    buckets: Buckets | None = None,
    search: bool = True,
    price: float = 0.0,
    notice: Callable[[str], None] = lambda _: None,
) -> plan_report.Report:
    """The plan of a run on a pod, with the largest batch that fits if `search`.

    `samples`: of drawing a batch instead of training, with scales that share `buckets`. `price` of
    a chip for an hour. Raises UserError for a mesh, a batch or a program that cannot be.
    """
    make = functools.partial(workload.sampling, buckets=buckets) if samples else workload.training
    devices = pod.devices() if pod.platform == 'tpu' else ()  # before JAX looks for any itself
    notes, shape = ['chip-hours are of a million images'] if samples else [], run.mesh
    if shape == MeshShape():
        shape = meshes.choose(run, pod, not samples)
        if shape != MeshShape():
            notes.append(f'the mesh was chosen here: run with {meshes.options(shape)}')
    planner = Planner(run, pod, make, shape, devices, notice)
    point = planner.look(run.batch)
    found = searching.search(planner, point) if search else None
    grows = point.temporaries
    if found:
        grows = min(found.slope * point.images, grows)
    memory = plan_report.Memory(
        resident={name: share(tree) for name, tree in point.work.resident.items()},
        activations=int(grows),
        temporaries=int(point.temporaries - grows),
        limit=int(pod.chip.memory),
    )
    flops = workload.arithmetic(point.work.seen)
    needed = workload.arithmetic(point.work.needed)
    largest = found.largest if found else None
    return plan_report.Report(
        config=config,
        topology=pod.name,
        chips=pod.chips,
        compiled=pod.platform == 'tpu',
        mesh=dict(zip(AXES, planner.sizes, strict=True)),
        batch=run.batch,
        memory=memory,
        parted=found is not None,
        largest=largest,
        checked=found is not None and found.checked,
        exchanges=point.exchanges[point.main],
        known=point.known,
        roofs={
            name: plan_report.roof(
                pod.chip,
                pod.chips,
                flops[name],
                point.traffic[name],
                point.exchanges.get(name, []),
            )
            for name in point.work.pieces
        },
        flops=sum(sum(kinds.values()) for kinds in flops.values()),
        needed=sum(sum(kinds.values()) for kinds in needed.values()),
        peak=pod.chip.bfloat16,
        steps=-(-1_000_000 // run.batch) if samples else run.pace.steps,
        price=price,
        compile_seconds=point.seconds,
        notes=[*notes, *point.work.notes],
        advice=[*advice.advise(planner, point, memory, largest), *advice.spare(pod, flops)],
    )
