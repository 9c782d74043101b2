"""How is a plan read by people?"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from star_jax.plan.plan_report import Report

GIB = 2**30
LIMITS = {
    'compute': 'arithmetic',
    'memory': 'its memory',
    'links': 'the links between chips',
    'network': 'the network between slices or nodes',
}


def summary(report: Report) -> str:
    """What was planned, where."""
    mesh = ' '.join(f'{axis}={size}' for axis, size in report.mesh.items())
    how = 'compiled ahead of time' if report.compiled else 'counted, not compiled'
    return (
        f'{report.config} on {report.topology}: {report.chips} chips, {mesh}, batch '
        f'{report.batch}, {how}'
    )


def tables(report: Report) -> list[Table]:
    """Memory, exchanges and time of a report."""
    return [_memory(report), _exchanges(report), _time(report)]


def sentences(report: Report) -> list[str]:
    """What fits, what it costs, what to change, and what was taken for what."""
    return [*_verdict(report), *report.advice, *report.notes]


def _memory(report: Report) -> Table:
    memory = report.memory
    table = _table('Memory of a device', 'GiB', 'of its memory')
    grown = 'activations' if report.parted else 'activations and temporaries'
    sizes = memory.resident | {grown: memory.activations}
    if report.parted:
        sizes['temporaries'] = memory.temporaries
    for name, size in [*sizes.items(), ('total', memory.total), ('there is', memory.limit)]:
        if name == 'total':
            table.add_section()
        table.add_row(name, f'{size / GIB:,.2f}', f'{size / memory.limit:.1%}')
    return table


def _exchanges(report: Report) -> Table:
    title = 'Sent by a device, per run of the main program'
    table = _table(title, 'among', 'times', 'GiB', 'of all')
    total = sum(one.bytes for one in report.exchanges)
    for one in report.exchanges:
        far = '' if one.near == one.group else f' ({one.near} near)'
        table.add_row(
            one.kind,
            f'{one.group}{far}',
            f'{one.times:,}',
            f'{one.bytes / GIB:,.3f}',
            f'{one.bytes / max(total, 1):.1%}',
        )
    if not report.known:
        table.add_row('unknown: it does not fit', '', '', '', '')
    return table


def _time(report: Report) -> Table:
    seconds = report.seconds
    table = _table('Time of a step, at least', 'seconds', 'of the step', 'limited by')
    for name, roof in report.roofs.items():
        limit = LIMITS[roof.limit]
        table.add_row(name, f'{roof.seconds:.4f}', f'{roof.seconds / seconds:.0%}', limit)
        for part in LIMITS:
            if value := getattr(roof, part):
                share = f'{value / seconds:.0%}'
                table.add_row(f'  {LIMITS[part]}', f'{value:.4f}', share, '')
    return table


def _verdict(report: Report) -> Iterator[str]:
    memory = report.memory
    fits = 'fits' if memory.fits else 'does not fit'
    said = f'it {fits}: {memory.total / GIB:,.2f} of {memory.limit / GIB:,.2f} GiB'
    if report.largest is not None:
        how = ', compiled' if report.checked else ''
        said += f'; the largest batch that fits is {report.largest:,}{how}'
    yield said
    yield (
        f'{report.flops / 1e12:,.1f} TFLOP a step on all chips, {report.needed / 1e12:,.1f} of '
        f'them needed once; at least {report.seconds:.3f} s, at most '
        f'{report.images_per_second:,.0f} images/s and an MFU of {report.mfu:.0%}'
    )
    cost = f', {report.hours * report.price:,.0f} at {report.price:g} each' if report.price else ''
    yield f'{report.steps:,} steps take at least {report.hours:,.0f} chip-hours{cost}'


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of reports as JSON (`Report.to_json`), or of errors."""
    heads = (
        'config',
        'on',
        'mesh (data, fsdp, tensor, sequence)',
        'batch',
        'state',
        'frozen',
        'activations',
        'temporaries',
        'total of',
        'fits',
        'largest batch',
        'sent, GiB',
        'step at least',
        'limit',
        'images/s',
        'MFU',
        'chip-hours',
    )
    lines = ['| ' + ' | '.join(heads) + ' |', '| --- ' * len(heads) + '|']
    lines += ['| ' + ' | '.join(_cells(row)) + ' |' for row in rows]
    return '\n'.join(lines) + '\n'


def _cells(row: dict[str, Any]) -> list[str]:
    if 'error' in row:
        return [row['config'], row['topology'], row['error'], *[''] * 14]
    memory, predicted = row['memory'], row['predicted']
    resident = memory['resident']
    state = sum(resident.get(name, 0) for name in ('parameters', 'optimizer', 'averages'))
    frozen = sum(resident.values()) - state
    limits = {name: roof for name, roof in row['roofs'].items()}
    main = limits[next(iter(limits))]
    limit = max(main, key=main.get)
    largest = '' if row['largest'] is None else f'{row["largest"]:,}'
    return [
        row['config'],
        row['topology'] + ('' if row['compiled'] else ' (counted)'),
        ' '.join(map(str, row['mesh'].values())),
        f'{row["batch"]:,}',
        _gib(state),
        _gib(frozen),
        _gib(memory['activations']),
        _gib(memory['temporaries']) if row['parted'] else 'with them',
        f'{_gib(memory["total"])} of {_gib(memory["limit"])}',
        'yes' if memory['fits'] else '**no**',
        largest + (' (compiled)' if row['checked'] else ''),
        ', '.join(f'{_gib(size)} {kind}' for kind, size in _by_kind(row)) or 'none',
        f'{predicted["seconds"]:.3f} s',
        limit,
        f'{predicted["images_per_second"]:,.0f}',
        f'{predicted["mfu"]:.0%}',
        f'{predicted["hours"]:,.0f}',
    ]


def _by_kind(row: dict[str, Any]) -> list[tuple[str, int]]:
    sums: dict[str, int] = {}
    for one in row['exchanges']:
        sums[one['kind']] = sums.get(one['kind'], 0) + one['bytes']
    return sorted(sums.items(), key=lambda item: -item[1])


def _gib(size: float) -> str:
    digits = 2 if size < 10 * GIB else 1
    return f'{size / GIB:,.{digits}f}' if math.isfinite(size) else '?'


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify='left')
    table.add_column('')
    for column in columns:
        table.add_column(column, justify='right')
    return table
