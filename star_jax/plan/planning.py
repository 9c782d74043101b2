"""How is a run planned: its memory, its time, and what to change where it does not fit?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from star_jax.core.buckets import Buckets
from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.parallel.chips import GIB
from star_jax.parallel.mesh import AXES, MeshShape
from star_jax.plan import analytic, workload
from star_jax.plan.estimate import Estimate, Estimator
from star_jax.plan.plan_report import DeviceMemory, PlanReport, compute_roof
from star_jax.plan.search import choose_mesh, largest_batch, mesh_options
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import device_bytes
from star_jax.training.run import Run

TEXT_SHARE = 0.1  # of the time of all arithmetic, from which a cache of features is advised
IMAGES = 1_000_000  # generated images that the chip-hours of sampling are computed for


def plan(
    run: Run,
    pod: Pod,
    *,
    config: str,
    samples: bool = False,
    buckets: Buckets | None = None,
    search: bool = True,
    price: float = 0.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> PlanReport:
    """Plans a run on a pod.

    Args:
        run: the settings.
        pod: the machines.
        config: the name of the run in the report.
        samples: plan the generation of a batch instead of its training.
        buckets: scales that share a program body in sampling (None: the default of the platform).
        search: find the largest batch that fits, too.
        price: price of a chip-hour.
        on_progress: receives a line of text before each slow step.

    Raises:
        UserError: for an invalid mesh, batch or program.
    """
    make_workload = workload.training
    if samples:
        make_workload = functools.partial(workload.sampling, buckets=buckets)
    # libtpu reads its environment when it loads, so before JAX initialises any backend.
    devices = pod.devices() if pod.platform == 'tpu' else ()
    notes, shape = [f'chip-hours are for {IMAGES:,} images'] if samples else [], run.mesh
    if shape == MeshShape():
        shape = choose_mesh(run, pod, not samples)
        if shape != MeshShape():
            notes.append(f'plan chose the mesh: run with {mesh_options(shape)}')
    estimator = Estimator(
        run=run,
        pod=pod,
        make_workload=make_workload,
        shape=shape,
        devices=devices,
        on_progress=on_progress,
    )
    estimate = estimator.estimate(run.batch)
    work = estimate.workload
    largest = largest_batch(estimator, estimate) if search else None
    activations = estimate.peak_temporaries
    if largest:
        activations = min(largest.bytes_per_image * estimate.images, activations)
    memory = DeviceMemory(
        resident={name: device_bytes(tree) for name, tree in work.resident.items()},
        activations=int(activations),
        temporaries=int(estimate.peak_temporaries - activations),
        limit=int(pod.chip.memory),
    )
    flops = workload.count_flops(work.counted_programs)
    needed_flops = workload.count_flops(work.needed_programs)
    batch = largest.batch if largest else None
    return PlanReport(
        config=config,
        topology=pod.name,
        chips=pod.chips,
        compiled=pod.platform == 'tpu',
        mesh=dict(zip(AXES, estimator.sizes, strict=True)),
        batch=run.batch,
        memory=memory,
        separated=largest is not None,
        largest_batch=batch,
        largest_batch_compiled=largest is not None and largest.compiled,
        collectives=estimate.collectives[estimate.main],
        complete=estimate.complete,
        roofs={
            name: compute_roof(
                chip=pod.chip,
                chips=pod.chips,
                flops=flops[name],
                traffic=estimate.traffic[name],
                collectives=estimate.collectives.get(name, []),
            )
            for name in work.programs
        },
        flops=sum(sum(kinds.values()) for kinds in flops.values()),
        needed_flops=sum(sum(kinds.values()) for kinds in needed_flops.values()),
        peak_flops=pod.chip.bfloat16,
        steps=-(-IMAGES // run.batch) if samples else run.pace.steps,
        price=price,
        compile_seconds=estimate.compile_seconds,
        notes=[*notes, *work.notes],
        advice=[*advise(estimator, estimate, memory, batch), *advise_cache(pod, flops)],
    )


def advise(
    estimator: Estimator, estimate: Estimate, memory: DeviceMemory, largest: int | None
) -> Iterator[str]:
    """Changes that make a run fit, as sentences with numbers; none if it fits.

    Args:
        estimator: the run and the pod.
        estimate: the needs of the run's batch.
        memory: the memory of one device.
        largest: the largest batch that fits, if it was searched.
    """
    if memory.fits:
        return
    run, pod = estimator.run, estimator.pod
    excess = (memory.total - memory.limit) / GIB
    yield f'{excess:,.1f} GiB more than the {memory.limit / GIB:,.2f} GiB of one {pod.chip.name}'
    if largest:
        yield f'--batch {largest} is the largest that fits (now {run.batch})'
    activations = memory.activations / GIB
    trains = estimate.workload.trained is not None
    if trains and not run.remat:
        less = activations * _remat_ratio(estimator, estimate)
        yield f'--remat: {activations:,.1f} GiB of activations would become about {less:,.1f}'
    data, fsdp, _, _ = estimator.sizes
    state = sum(memory.resident.get(name, 0) for name in ('parameters', 'optimizer', 'averages'))
    factors = (n for n in (4, 2) if data % n == 0 and _mesh_divides_model(estimator, n * fsdp))
    if factor := next(factors, None):
        yield (
            f'--mesh.fsdp {fsdp * factor}: {state / GIB:,.2f} GiB of parameters, averages and '
            f'optimizer would become {state / factor / GIB:,.2f}'
        )
    model = run.model
    first, length = model.schedule.offsets[-2], model.keep_tokens or model.schedule.length
    keep = first + (length - first) // 2
    if trains and first < keep < length:
        yield (
            f'--model.keep-tokens {keep}: training on {keep} of {length} tokens would leave about '
            f'{activations * keep / length:,.1f} of {activations:,.1f} GiB of activations'
        )
    yield 'more chips: with twice as many, each device has half of the images'


def advise_cache(pod: Pod, flops: dict[str, dict[str, int]]) -> list[str]:
    """A sentence about `star-jax data cache` if a frozen text encoder takes much of the time."""
    seconds = {
        kind: sum(kinds[kind] for kinds in flops.values()) / pod.chip.rate(kind)
        for kind in ('bfloat16', 'float32', 'exact')
    }
    share = seconds['exact'] / sum(seconds.values())
    if share < TEXT_SHARE:
        return []
    return [
        f'the text encoder, in exact float32, takes {share:.0%} of the arithmetic: `star-jax data '
        'cache` computes its features once, with the codes of the images'
    ]


def _remat_ratio(estimator: Estimator, estimate: Estimate) -> float:
    """The share of activations that remains if layers are computed again."""

    def live(remat: bool) -> int:
        run = dataclasses.replace(estimator.run, remat=remat)
        needs = analytic.program_needs(run, estimate.images, estimator.make_workload)
        return needs[estimate.main].live

    return live(True) / max(live(False), 1)


def _mesh_divides_model(estimator: Estimator, fsdp: int) -> bool:
    shape = dataclasses.replace(estimator.shape, data=0, fsdp=fsdp)
    try:
        rules.abstract(estimator.run.model.abstract(), shape.abstract_mesh(estimator.pod.chips))
    except UserError:
        return False
    return True
