"""What does a plan contain, and how is it printed?"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from star_jax.console import number_table
from star_jax.parallel import gradient_sum_time, links
from star_jax.parallel.chips import GIB
from star_jax.parallel.collectives import Collective
from star_jax.parallel.links import Fabric
from star_jax.plan.workload import state_bytes

LIMITS = {
    'compute': 'arithmetic',
    'memory': 'memory traffic',
    'links': 'links between chips',
    'network': 'network between slices or nodes',
}
SHOWN_SHARE = 0.01  # least share of the step for which the time of a mesh axis is shown
COLUMNS = (
    'config',
    'topology',
    'mesh (data, fsdp, tensor, sequence)',
    'batch',
    'state',
    'frozen',
    'activations',
    'temporaries',
    'total of available',
    'fits',
    'largest batch',
    'sent, GiB',
    'step, lower bound',
    'bound by',
    'images/s, upper bound',
    'MFU, upper bound',
    'chip-hours, lower bound',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roof:
    """Lower bounds of the seconds that a program takes, one for each resource of a chip.

    Attributes:
        compute: arithmetic at the peak rates of matrix products.
        memory: traffic at the bandwidth of main memory.
        links: bytes sent within a slice or node, over the links that collectives can use.
        network: bytes sent to other slices or nodes.
        axes: the collectives along some mesh axes, alone, by the names of the axes.
    """

    compute: float
    memory: float
    links: float
    network: float
    axes: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The lower bound with perfect overlap of all four."""
        return max(getattr(self, name) for name in LIMITS)

    @property
    def limit(self) -> str:
        """The name of the largest bound."""
        return max(LIMITS, key=lambda name: getattr(self, name))


def compute_roof(
    fabric: Fabric,
    *,
    sizes: Sequence[int],
    flops: Mapping[str, float],
    traffic: int,
    collectives: Sequence[Collective],
) -> Roof:
    """The roof of one program.

    Args:
        fabric: the chips and their links.
        sizes: the lengths of the mesh axes.
        flops: floating-point operations of all chips, by kind.
        traffic: bytes that one chip reads and writes.
        collectives: the collectives of the program, with the bytes that one chip sends.
    """
    chip, communication = fabric.chip, links.bound(fabric, collectives, sizes)
    return Roof(
        compute=sum(count / chip.rate(kind) for kind, count in flops.items()) / math.prod(sizes),
        memory=traffic / chip.bandwidth,
        links=communication.links,
        network=communication.network,
        axes=communication.axes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes of one device.

    Attributes:
        resident: arrays that stay in memory, by name.
        activations: temporaries that grow with the batch.
        temporaries: temporaries that do not.
        grid: bytes that a sample grid needs instead of both, with its copies of the weights.
        limit: bytes that a program can use.
    """

    resident: dict[str, int]
    activations: int
    temporaries: int
    grid: int
    limit: int

    @property
    def total(self) -> int:
        resident = sum(self.resident.values())
        return resident + max(self.activations + self.temporaries, self.grid)

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """A run beside the planned one, counted from its arrays.

    Attributes:
        name: the options that lead to it.
        batch: the global batch size.
        images: images of a step.
        mesh: the lengths of the mesh axes.
        temporaries: bytes of one device beside the resident arrays.
        total: bytes of one device.
        fits: whether the memory suffices.
        flops: floating-point operations of a step on all chips.
        seconds: a lower bound of the seconds of a step.
    """

    name: str
    batch: int
    images: int
    mesh: dict[str, int]
    temporaries: int
    total: int
    fits: bool
    flops: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """An upper bound."""
        return self.images / self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan of a run on machines.

    Attributes:
        config: the name of the run.
        topology: the name of the machines.
        chips: the number of chips.
        compiled: whether programs were compiled; otherwise their arrays were counted.
        mesh: the lengths of the mesh axes.
        batch: the global batch size: images of a micro-batch.
        images: images of a step, of all its micro-batches.
        memory: bytes of one device.
        separated: whether activations are known apart from temporaries, not as one sum.
        largest_batch: the largest batch that fits (0: none does, None: not searched).
        largest_batch_compiled: whether the largest batch was compiled.
        collectives: the collectives of the main program.
        complete: whether the programs compiled; otherwise collectives and traffic are missing.
        roofs: lower bounds by program; programs run one after another.
        gradient_dtype: the dtype in which replicas sum their gradients.
        replica_sum: a lower bound of the seconds of that sum in each dtype; empty without replicas.
        alternatives: the run and small changes to it, counted from arrays.
        flops: floating-point operations of a step on all chips.
        needed_flops: the operations among them that are needed (nothing recomputed or padded).
        peak_flops: bfloat16 FLOP/s of one chip.
        steps: training steps of the run, or batches of a million generated images.
        checkpoint: bytes of a checkpoint.
        checkpoint_copy: bytes of a host's memory that hold its part while it is written, at most.
        price: price of a chip-hour.
        compile_seconds: seconds that compilation took.
        notes: sentences about sizes that were assumed.
        advice: sentences about what to change.
    """

    config: str
    topology: str
    chips: int
    compiled: bool
    mesh: dict[str, int]
    batch: int
    images: int
    memory: DeviceMemory
    separated: bool
    largest_batch: int | None
    largest_batch_compiled: bool
    collectives: list[Collective]
    complete: bool
    roofs: dict[str, Roof]
    gradient_dtype: str
    replica_sum: dict[str, float]
    alternatives: list[Alternative]
    flops: int
    needed_flops: int
    peak_flops: float
    steps: int
    checkpoint: int
    checkpoint_copy: int
    price: float
    compile_seconds: float
    notes: list[str]
    advice: list[str]

    @property
    def seconds(self) -> float:
        """A lower bound of the seconds of a step."""
        return sum(roof.seconds for roof in self.roofs.values())

    @property
    def mfu(self) -> float:
        """An upper bound: the share of the peak rate at which the needed arithmetic runs."""
        return self.needed_flops / (self.seconds * self.chips * self.peak_flops)

    @property
    def images_per_second(self) -> float:
        """An upper bound."""
        return self.images / self.seconds

    @property
    def hours(self) -> float:
        """A lower bound of the chip-hours of all steps."""
        return self.seconds * self.steps * self.chips / 3600

    def to_json(self) -> dict[str, Any]:
        """All fields, and the values that follow from them."""
        derived = ('seconds', 'mfu', 'images_per_second', 'hours')
        memory = {'total': self.memory.total, 'fits': self.memory.fits}
        return dataclasses.asdict(self) | {
            'bounds': {name: getattr(self, name) for name in derived},
            'memory': dataclasses.asdict(self.memory) | memory,
        }


def summary(report: PlanReport) -> str:
    """One line: the run, the machines and the mesh."""
    mesh = ' '.join(f'{axis}={size}' for axis, size in report.mesh.items())
    how = 'compiled ahead of time' if report.compiled else 'counted, not compiled'
    return (
        f'{report.config} on {report.topology}: {report.chips} chips, {mesh}, batch '
        f'{report.batch}{_micro_batches(report)}, {how}'
    )


def _micro_batches(report: PlanReport) -> str:
    count = report.images // report.batch
    return f' x {count} micro-batches' if count > 1 else ''


def tables(report: PlanReport) -> list[Table]:
    """Memory, collectives, time, and runs beside this one."""
    made = [_memory_table(report), _collectives_table(report), _time_table(report)]
    return [*made, _alternatives_table(report)] if report.alternatives else made


def sentences(report: PlanReport) -> list[str]:
    """The verdict, the costs, the advice and the notes."""
    sums = []
    if report.replica_sum:
        sums = [f'sum of gradients over data: {_replica_sum(report)}']
    return [*_verdict(report), *sums, *report.advice, *report.notes]


def _replica_sum(report: PlanReport) -> str:
    return gradient_sum_time.sum_sentence(report.replica_sum, report.gradient_dtype)


def _memory_table(report: PlanReport) -> Table:
    memory = report.memory
    table = number_table('Memory of one device', 'GiB', 'of available')
    growing = 'activations' if report.separated else 'activations and temporaries'
    sizes = memory.resident | {growing: memory.activations}
    if report.separated:
        sizes['temporaries'] = memory.temporaries
    if memory.grid:
        sizes['or a sample grid instead (counted)'] = memory.grid
    for name, size in [*sizes.items(), ('total', memory.total), ('available', memory.limit)]:
        if name == 'total':
            table.add_section()
        table.add_row(name, f'{size / GIB:,.2f}', f'{size / memory.limit:.1%}')
    return table


def _collectives_table(report: PlanReport) -> Table:
    title = 'Sent by one device per run of the main program'
    table = number_table(title, 'along', 'devices of a group', 'count', 'GiB', 'of all')
    total = sum(item.bytes for item in report.collectives)
    small = [item for item in report.collectives if item.bytes < SHOWN_SHARE * total]
    for item in report.collectives:
        if item in small:
            continue
        apart = item.local_size < item.group_size
        local = f' ({item.local_size} in a slice or node)' if apart else ''
        cells = (
            ' and '.join(item.axes),
            f'{item.group_size}{local}',
            f'{item.count:,}',
            f'{item.bytes / GIB:,.3f}',
            f'{item.bytes / max(total, 1):.1%}',
        )
        table.add_row(item.kind, *cells)
    if small:
        size, count = (sum(getattr(item, name) for item in small) for name in ('bytes', 'count'))
        cells = (f'{count:,}', f'{size / GIB:,.3f}', f'{size / max(total, 1):.1%}')
        table.add_row('smaller ones', '', '', *cells)
    if not report.complete:
        table.add_row('unknown: the program does not fit', '', '', '', '', '')
    return table


def _time_table(report: PlanReport) -> Table:
    seconds = report.seconds
    title = 'Lower bounds of the time of a step'
    table = number_table(title, 'seconds', 'of the step', 'bound by')
    for name, roof in report.roofs.items():
        limit = LIMITS[roof.limit]
        table.add_row(name, f'{roof.seconds:.4f}', f'{roof.seconds / seconds:.0%}', limit)
        for resource, label in LIMITS.items():
            if value := getattr(roof, resource):
                table.add_row(f'  {label}', f'{value:.4f}', f'{value / seconds:.0%}', '')
        for axes, value in roof.axes.items():
            if value >= SHOWN_SHARE * seconds:
                cells = (f'{value:.4f}', f'{value / seconds:.0%}', '')
                table.add_row(f'    collectives along {axes}', *cells)
    return table


def _alternatives_table(report: PlanReport) -> Table:
    title = (
        'Beside this run, all counted from arrays, not compiled: GiB of one device,\n'
        'lower bound of the seconds of a step, upper bound of images/s'
    )
    columns = ('temporaries', 'total', 'fits', 'TFLOP', 'seconds', 'images/s')
    table = number_table(title, *columns)
    for item in report.alternatives:
        table.add_row(
            item.name,
            f'{item.temporaries / GIB:,.2f}',
            f'{item.total / GIB:,.2f}',
            'yes' if item.fits else 'no',
            f'{item.flops / 1e12:,.1f}',
            f'{item.seconds:.4f}',
            f'{item.images_per_second:,.0f}',
        )
    return table


def _verdict(report: PlanReport) -> Iterator[str]:
    memory = report.memory
    fits = 'fits' if memory.fits else 'does not fit'
    verdict = f'it {fits}: {memory.total / GIB:,.2f} of {memory.limit / GIB:,.2f} GiB per device'
    if report.largest_batch is not None:
        how = ' (compiled)' if report.largest_batch_compiled else ''
        verdict += f'; the largest batch that fits is {report.largest_batch:,}{how}'
    yield verdict
    yield (
        f'{report.flops / 1e12:,.1f} TFLOP per step on all chips, '
        f'{report.needed_flops / 1e12:,.1f} of them needed once; lower bound of a step: '
        f'{report.seconds:.3f} s; upper bounds: {report.images_per_second:,.0f} images/s, '
        f'{report.mfu:.0%} MFU'
    )
    cost = f', {report.hours * report.price:,.0f} at {report.price:g} each' if report.price else ''
    if report.checkpoint:
        yield (
            f'a checkpoint has {report.checkpoint / GIB:,.1f} GiB; while it is written, each host '
            f'keeps a copy of up to {report.checkpoint_copy / GIB:,.1f} GiB in its memory'
        )
    yield f'lower bound of {report.steps:,} steps: {report.hours:,.0f} chip-hours{cost}'


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of reports as JSON (`PlanReport.to_json`), or of errors."""
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '| --- ' * len(COLUMNS) + '|']
    lines += ['| ' + ' | '.join(_cells(row)) + ' |' for row in rows]
    return '\n'.join(lines) + '\n'


def _cells(row: dict[str, Any]) -> list[str]:
    if 'error' in row:
        cells = [row['config'], row['topology'], row['error']]
        return cells + [''] * (len(COLUMNS) - len(cells))
    memory, bounds = row['memory'], row['bounds']
    resident = memory['resident']
    state = state_bytes(resident)
    frozen = sum(resident.values()) - state
    main_roof = next(iter(row['roofs'].values()))
    largest = '' if row['largest_batch'] is None else f'{row["largest_batch"]:,}'
    return [
        row['config'],
        row['topology'] + ('' if row['compiled'] else ' (counted)'),
        ' '.join(map(str, row['mesh'].values())),
        f'{row["batch"]:,}',
        _gib(state),
        _gib(frozen),
        _gib(memory['activations']),
        _gib(memory['temporaries']) if row['separated'] else 'with activations',
        f'{_gib(memory["total"])} of {_gib(memory["limit"])}',
        'yes' if memory['fits'] else '**no**',
        largest + (' (compiled)' if row['largest_batch_compiled'] else ''),
        ', '.join(f'{_gib(size)} {kind}' for kind, size in _sent_by_kind(row)) or 'none',
        f'{bounds["seconds"]:.3f} s',
        max(LIMITS, key=main_roof.get),
        f'{bounds["images_per_second"]:,.0f}',
        f'{bounds["mfu"]:.0%}',
        f'{bounds["hours"]:,.0f}',
    ]


def _sent_by_kind(row: dict[str, Any]) -> list[tuple[str, int]]:
    """Kinds of collectives and their bytes, the largest first."""
    sums: dict[str, int] = {}
    for item in row['collectives']:
        sums[item['kind']] = sums.get(item['kind'], 0) + item['bytes']
    return sorted(sums.items(), key=lambda item: -item[1])


def _gib(size: float) -> str:
    digits = 2 if size < 10 * GIB else 1
    return f'{size / GIB:,.{digits}f}' if math.isfinite(size) else '?'
