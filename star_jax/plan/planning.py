"""How is a run planned: its memory, its time, and what to change where it does not fit?"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from star_jax.core.buckets import Buckets
from star_jax.core.settings import Remat
from star_jax.errors import UserError
from star_jax.parallel import gradient_sum_time, rules
from star_jax.parallel.chips import GIB
from star_jax.parallel.collectives import Collective, mesh_axes
from star_jax.parallel.mesh import AXES, MeshShape
from star_jax.parallel.rules import device_bytes
from star_jax.plan import analytic, workload
from star_jax.plan.estimate import Estimate, Estimator
from star_jax.plan.plan_report import Alternative, DeviceMemory, PlanReport, compute_roof
from star_jax.plan.search import choose_mesh, largest_batch, mesh_options
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import state_bytes
from star_jax.training.run import Run

FROZEN_SHARE = 0.1  # least share of the time of all arithmetic for which a cache is advised
FASTER = 1.05  # another batch is advised from this many times the images/s of the run
IMAGES = 1_000_000  # generated images that the chip-hours of sampling are computed for


def plan(
    run: Run,
    pod: Pod,
    *,
    config: str,
    samples: bool = False,
    buckets: Buckets | None = None,
    search: bool = True,
    compiles: bool = True,
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
        compiles: compile the programs for TPUs; otherwise their arrays are counted.
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
        compiles=compiles and pod.platform == 'tpu',
        on_progress=on_progress,
    )
    estimate = estimator.estimate(run.batch)
    work, sizes = estimate.workload, estimator.sizes
    largest = largest_batch(estimator, estimate) if search else None
    activations = estimate.peak_temporaries
    if largest:
        activations = min(largest.bytes_per_image * estimate.images, activations)
    memory = DeviceMemory(
        resident={name: device_bytes(tree) for name, tree in work.resident.items()},
        activations=int(activations),
        temporaries=int(estimate.peak_temporaries - activations),
        grid=estimate.grid,
        limit=int(pod.chip.memory),
    )
    flops = workload.count_flops(work.counted_programs)
    needed_flops = workload.count_flops(work.needed_programs)
    batch = largest.batch if largest else None
    found = alternatives(estimator, not samples, flops=flops, needed_flops=needed_flops)
    checkpoint = 0 if samples else state_bytes(dict(_sizes(work.resident)))
    roofs = {
        name: compute_roof(
            estimator.fabric,
            sizes=sizes,
            flops=flops[name],
            traffic=estimate.traffic[name],
            collectives=estimate.collectives.get(name, []),
        )
        for name in work.programs
    }
    return PlanReport(
        config=config,
        topology=pod.name,
        chips=pod.chips,
        compiled=estimator.compiles,
        mesh=dict(zip(AXES, sizes, strict=True)),
        batch=run.batch,
        images=_step_images(estimate),
        memory=memory,
        separated=largest is not None,
        largest_batch=batch,
        largest_batch_compiled=largest is not None and largest.compiled,
        collectives=_named(estimate.collectives[estimate.main], sizes),
        complete=estimate.complete,
        roofs=roofs,
        gradient_dtype=run.gradient_dtype,
        replica_sum=_replica_sum(estimator, work),
        alternatives=found,
        flops=sum(sum(kinds.values()) for kinds in flops.values()),
        needed_flops=sum(sum(kinds.values()) for kinds in needed_flops.values()),
        peak_flops=pod.chip.bfloat16,
        steps=-(-IMAGES // run.batch) if samples else run.pace.steps,
        checkpoint=checkpoint,
        checkpoint_copy=min(pod.chips_per_host * state_bytes(memory.resident), checkpoint),
        price=price,
        compile_seconds=estimate.compile_seconds,
        notes=[*notes, *work.notes],
        advice=[
            *advise(estimator, estimate, memory, batch),
            *advise_batch(found),
            *advise_cache(estimator, flops),
        ],
    )


def alternatives(
    estimator: Estimator,
    trains: bool,
    *,
    flops: Mapping[str, Mapping[str, int]],
    needed_flops: Mapping[str, Mapping[str, int]],
) -> list[Alternative]:
    """The run itself and small changes to it, all counted from arrays, so that they compare.

    The changes are the other policies of remat, and the next batches that split over all chips
    where the run's own batch needs other mesh axes.

    Args:
        estimator: the run and the pod.
        trains: whether the run trains.
        flops: floating-point operations of each program, by kind.
        needed_flops: the same with nothing computed twice.
    """
    found = [_alternative('this run', estimator, flops)]
    if trains:
        found += other_remats(estimator, flops, needed_flops)
    found += other_batches(estimator, trains, flops)
    return found if len(found) > 1 else []


def other_remats(
    estimator: Estimator,
    flops: Mapping[str, Mapping[str, int]],
    needed_flops: Mapping[str, Mapping[str, int]],
) -> Iterator[Alternative]:
    """The run with each of the other policies of remat."""
    run = estimator.run
    for remat in typing.get_args(Remat):
        if remat == run.remat:
            continue
        changed = dataclasses.replace(estimator, run=dataclasses.replace(run, remat=remat))
        costs = needed_flops
        if remat != 'none':
            costs = workload.count_flops(changed.workload(run.batch).counted_programs)
        yield _alternative(f'--remat {remat}', changed, costs)


def other_batches(
    estimator: Estimator, trains: bool, flops: Mapping[str, Mapping[str, int]]
) -> Iterator[Alternative]:
    """The run with the next batches that split over all chips, smaller and larger.

    None for a run whose own batch does, or whose mesh needs no `tensor` or `sequence` axis.
    """
    run, pod, (_, _, tensor, sequence) = estimator.run, estimator.pod, estimator.sizes
    if tensor * sequence == 1 or run.batch % pod.chips == 0:
        return
    below = run.batch // pod.chips * pod.chips
    for batch in (below, below + pod.chips):
        if not batch:
            continue
        changed = dataclasses.replace(run, batch=batch)
        try:
            shape = choose_mesh(changed, pod, trains)
        except UserError:
            continue
        scaled = {
            name: {kind: count * batch // run.batch for kind, count in kinds.items()}
            for name, kinds in flops.items()
        }
        beside = dataclasses.replace(estimator, run=changed, shape=shape)
        yield _alternative(f'--batch {batch} {mesh_options(shape)}', beside, scaled)


def advise_batch(found: list[Alternative]) -> list[str]:
    """A sentence about the best batch beside the run's own, if it is faster per image."""
    if not found:
        return []
    own, *others = found
    others = [item for item in others if item.batch != own.batch and item.fits]
    best = max(others, key=lambda item: item.images_per_second, default=own)
    if best.images_per_second < FASTER * own.images_per_second:
        return []
    return [
        f'{best.name} splits over data and fsdp alone: an upper bound of '
        f'{best.images_per_second:,.0f} images/s instead of {own.images_per_second:,.0f} (both '
        'counted)'
    ]


def _alternative(
    name: str, estimator: Estimator, flops: Mapping[str, Mapping[str, int]]
) -> Alternative:
    """A run, counted from its arrays; `flops` are its operations by program and kind."""
    estimate, sizes = estimator.count(estimator.run.batch), estimator.sizes
    roofs = [
        compute_roof(
            estimator.fabric,
            sizes=sizes,
            flops=flops[program],
            traffic=traffic,
            collectives=estimate.collectives.get(program, []),
        )
        for program, traffic in estimate.traffic.items()
    ]
    return Alternative(
        name=name,
        batch=estimator.run.batch,
        images=_step_images(estimate),
        mesh=dict(zip(AXES, sizes, strict=True)),
        temporaries=estimate.peak_temporaries,
        total=estimate.total,
        fits=estimator.fits(estimate),
        flops=sum(sum(kinds.values()) for kinds in flops.values()),
        seconds=sum(roof.seconds for roof in roofs),
    )


def _replica_sum(estimator: Estimator, work: workload.Workload) -> dict[str, float]:
    """The seconds in which replicas sum their gradients, by dtype; empty without replicas."""
    data, *_ = estimator.sizes
    if work.trained is None or data == 1:
        return {}
    return gradient_sum_time.replica_sum_seconds(
        estimator.fabric,
        device_bytes(work.trained),
        estimator.sizes,
        local_chips=estimator.pod.local_chips,
    )


def _step_images(estimate: Estimate) -> int:
    """Images of a step, of all its micro-batches."""
    return estimate.workload.images * estimate.workload.micro_batches


def _sizes(resident: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Names of arrays and their bytes on all devices together, each part once."""
    for name, tree in resident.items():
        leaves = (leaf for leaf in jax.tree.leaves(tree) if name in workload.STATE)
        yield name, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _named(collectives: list[Collective], sizes: Sequence[int]) -> list[Collective]:
    """Collectives with the names of their mesh axes instead of their groups, equal ones summed."""
    sums: dict[tuple, list[Collective]] = {}
    for item in collectives:
        axes = mesh_axes(item, sizes)
        sums.setdefault((item.kind, item.group_size, item.local_size, axes), []).append(item)
    named = [
        dataclasses.replace(
            items[0],
            count=sum(item.count for item in items),
            bytes=sum(item.bytes for item in items),
            groups=(),
            axes=axes,
        )
        for (*_, axes), items in sums.items()
    ]
    return sorted(named, key=lambda item: -item.bytes)


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
    if trains and run.remat != 'full':
        less = activations * _remat_ratio(estimator, estimate)
        yield f'--remat full: {activations:,.1f} GiB of activations would become about {less:,.1f}'
    data, fsdp, _, _ = estimator.sizes
    state = state_bytes(memory.resident)
    factors = (n for n in (4, 2) if data % n == 0 and _mesh_divides_model(estimator, n * fsdp))
    if factor := next(factors, None):
        yield (
            f'--mesh.fsdp {fsdp * factor}: {state / GIB:,.2f} GiB of parameters, averages and '
            f'optimizer would become {state / factor / GIB:,.2f}'
        )
    model = run.model
    first, length = model.schedule.offsets[-2], model.keep_tokens or model.schedule.length
    keep = first + (length - first) // 2
    drops_tokens = 'keep_tokens' in {field.name for field in dataclasses.fields(model)}
    if trains and drops_tokens and first < keep < length:
        yield (
            f'--model.keep-tokens {keep}: training on {keep} of {length} tokens would leave about '
            f'{activations * keep / length:,.1f} of {activations:,.1f} GiB of activations'
        )
    yield 'more chips: with twice as many, each device has half of the images'


def advise_cache(estimator: Estimator, flops: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A sentence about `star-jax data cache` if frozen models take much of the arithmetic.

    A cache of codes replaces the tokenizer. The text encoder stays in the training program of a
    run with `text_features` inside, until the run reads features from the cache, too.
    """
    run, chip = estimator.run, estimator.pod.chip
    seconds = {
        name: sum(count / chip.rate(kind) for kind, count in kinds.items())
        for name, kinds in flops.items()
    }
    total = sum(seconds.values())
    if workload.TRAINING_STEP not in seconds:
        return []
    text = flops[workload.TRAINING_STEP].get('exact', 0) / chip.rate('exact') / total
    codes = sum(size for name, size in seconds.items() if name != workload.TRAINING_STEP) / total
    inside = run.text_features == 'inside' and bool(run.model.text_width)
    text *= inside  # other exact arithmetic stays
    if text + codes < FROZEN_SHARE:
        return []
    parts = [f'the text encoder, in exact float32, takes {text:.0%} of the arithmetic'] * inside
    if not run.cache:
        parts.append(f'the tokenizer takes {codes:.0%} of the arithmetic')
    options = f'--cache {run.cache or "FOLDER"}'
    options += ' --text-features cached' * inside  # else a cache stores codes alone
    return [
        f'{" and ".join(parts)}: `star-jax data cache CONFIG {options}` computes each image and '
        'caption once; train with the same options'
    ]


def _remat_ratio(estimator: Estimator, estimate: Estimate) -> float:
    """The share of activations that remains if layers are computed again."""

    def live(remat: Remat) -> int:
        run, platform = dataclasses.replace(estimator.run, remat=remat), estimator.pod.platform
        splits_rows = estimator.sizes[-1] > 1
        needs = analytic.program_needs(
            run, estimate.images, estimator.make_workload, platform, splits_rows
        )
        return needs[estimate.main].live

    return live('full') / max(live(estimator.run.remat), 1)


def _mesh_divides_model(estimator: Estimator, fsdp: int) -> bool:
    shape = dataclasses.replace(estimator.shape, data=0, fsdp=fsdp)
    try:
        rules.abstract(estimator.run.model.abstract(), shape.abstract_mesh(estimator.pod.chips))
    except UserError:
        return False
    return True
