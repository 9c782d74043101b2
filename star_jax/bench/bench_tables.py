"""How is a report read by people?"""

from typing import Any

from rich.table import Table

STAGES = {
    'imports': 'Python and the imports',
    'JAX': 'JAX and its devices',
    'weights': 'weights in place',
    'lowered': 'traced and lowered',
    'compiled': 'compiled',
    'dispatch': 'first dispatch',
    'first result': 'first result',
}
LEGS = {
    'compile_seconds': 'compiling, or reading the program',
    'processor_seconds': '  processor seconds of that',
    'since_weights': 'from the weights to the dispatch',
    'since_jax': 'from the first JAX call to it',
    'processor_seconds_to_dispatch': 'processor seconds up to it, in all',
}
PARTS = {
    'program': 'the whole program',
    'scales': '  all scales (rest)',
    'decoder': '  decoder (alone)',
    'forward': '  forward (alone)',
    'backward and update': '  backward and update (rest)',
    'text': 'before it: the text encoder',
}
MEMORY = {
    'weights': 'weights',
    'temporaries': 'temporaries of the program',
    'limit': 'all there is',
    'device_peak': 'peak of the device',
    'process_peak': 'peak of the process',
}


def tables(report: dict[str, Any]) -> list[Table]:
    """Those of a report of `bench.process.run`."""
    return [_start(report), _speed(report), _memory(report)]


SWEPT = (
    'p50, s',
    'p95/p50',
    'images/s',
    'TFLOP/s',
    'of matrix rate',
    'compile, s',
    'to the first, s',
    'peak, MiB',
)


def sweep(reports: dict[str, dict[str, Any]]) -> Table:
    """A line for each of several reports, by what makes it another.

    What starting takes stands there twice: cold, and with a cache of programs.
    """
    table = _table('All of them', *SWEPT)
    for name, report in reports.items():
        table.add_row(name, *_swept(report))
    return table


def markdown(reports: dict[str, dict[str, Any]]) -> str:
    """The same table for a document, with the machines of the first report above it."""
    where = summary(next(iter(reports.values()))).splitlines()[-1]
    lines = [where, '', f'| | {" | ".join(SWEPT)} |', '| --- |' + ' ---: |' * len(SWEPT)]
    lines += [f'| {name} | {" | ".join(_swept(report))} |' for name, report in reports.items()]
    return '\n'.join(lines) + '\n'


def _swept(report: dict[str, Any]) -> tuple[str, ...]:
    time, whole = report['time'], report['parts']['program']
    peak = next(size for kind, size in report['memory'].items() if kind.endswith('_peak'))
    starts = [report[name] for name in ('cold_start', 'warm_start') if name in report]
    return (
        f'{time["p50_seconds"]:.3g}',
        f'{time["p95_seconds"] / time["p50_seconds"]:.2f}',
        f'{time["images_per_second"]:.3g}',
        f'{whole["gflops"] / 1e3:.3g}',
        f'{whole["share"]:.1%}',
        ' / '.join(f'{start["compile_seconds"]:.1f}' for start in starts),
        ' / '.join(f'{start["reached"]["first result"]:.1f}' for start in starts),
        f'{peak:,.0f}',
    )


def summary(report: dict[str, Any]) -> str:
    """What was measured, where."""
    job, env = report['job'], report['environment']
    described = _drawing(job) if report['kind'] == 'Sampling' else _training(job)
    described = (*described, f'{report["pixels"]} px')
    where = (
        f'{env["cores"]} cores',
        f'{env["devices"]} x {env["device"]}',
        f'load {env["load"][0]:.1f} to {env["load"][1]:.1f}',
        *(f'{name} {env[name]}' for name in ('jax', 'jaxlib', 'flax', 'python')),
        *(f'{name}={value!r}' for name, value in env['settings'].items()),
    )
    return ', '.join(described) + '\n' + ', '.join(where)


def _drawing(job: dict[str, Any]) -> tuple[str, ...]:
    guidance = job['settings']['guidance']
    return (
        'drawing',
        *_sizes(job['model']),
        job['folder'] or 'random weights',
        f'guidance {guidance:g}' if guidance else 'prompts only',
        f'batch {job["batch"]}',
        job['dtype'],
    )


def _training(job: dict[str, Any]) -> tuple[str, ...]:
    run = job['run']
    return (
        'training',
        *_sizes(run['model']),
        f'batch {run["batch"]}',
        run['dtype'],
        'activations computed twice' if run['remat'] else 'activations kept',
        f'mesh {run["mesh"]}',
    )


def _sizes(model: dict[str, Any]) -> tuple[str, ...]:
    sides = ' '.join(map(str, model['sides']))
    return f'depth {model["depth"]}', f'width {model["width"]}', f'sides {sides}'


def attention(report: dict[str, Any]) -> Table:
    """A line for each kernel and direction of a report of `bench.attention.run`."""
    title = (
        f'{report["rows"]:,} rows, each sees {report["seen"]:.0%} of them on average; '
        f'matrix rate {report["matrix_rate_gflops"]:,.1f} GFLOP/s'
    )
    columns = ('p50, s', 'p95/p50', 'GFLOP/s', 'of matrix rate', 'temporaries, MiB', 'to the first')
    table = _table(title, 'passes', *columns)
    first: dict[str, float] = {}
    for row in report['kernels']:
        p50 = row['p50_seconds']
        table.add_row(
            row['kernel'],
            row['passes'],
            f'{p50:.3g}',
            f'{row["p95_seconds"] / p50:.2f}',
            f'{row["gflops"]:,.1f}',
            f'{row["share"]:.1%}',
            f'{row["temporaries"]:,.1f}',
            f'{p50 / first.setdefault(row["passes"], p50):.2f}',
        )
    return table


def data(report: dict[str, Any]) -> Table:
    """Of a report of `bench.data.run`."""
    table = _table(f'{report["examples"]:,} examples', 'images/s', 'to one thread', 'of all cores')
    alone, together = report['one_thread_images_per_second'], report['images_per_second']
    table.add_row(
        'one thread', f'{alone:,.1f}', '1.00', f'{1 / report["environment"]["cores"]:.0%}'
    )
    shares = (f'{report["ratio"]:.2f}', f'{report["of_cores"]:.0%}')
    table.add_row('the pipeline', f'{together:,.1f}', *shares)
    return table


def _start(report: dict[str, Any]) -> Table:
    """When both processes reached each stage, in seconds from the command on."""
    cold, warm = report['cold_start'], report['warm_start']
    table = _table('Seconds since the process was asked for', 'cold', 'warm', 'warm/cold')
    for stage, label in STAGES.items():
        table.add_row(label, *_pair(cold['reached'][stage], warm['reached'][stage]))
    table.add_section()
    for leg, label in LEGS.items():
        table.add_row(label, *_pair(cold[leg], warm[leg]))
    found = ('yes' if start['found'] else 'no' for start in (cold, warm))
    table.add_row('program found in the cache', *found, '')
    return table


def _speed(report: dict[str, Any]) -> Table:
    time = report['time']
    p50, p95 = time['p50_seconds'], time['p95_seconds']
    title = (
        f'{len(time["seconds"])} runs: p50 {p50:.3g} s, p95 {p95:.3g} s ({p95 / p50:.2f} x), '
        f'{time["seconds_per_image"]:.3g} s per image, {time["images_per_second"]:.3g} images/s'
    )
    table = _table(title, 'seconds', 'of time', 'GFLOP', 'GFLOP/s', 'of matrix rate')
    for name, part in report['parts'].items():
        table.add_row(
            PARTS[name],
            f'{part["seconds"]:.3g}',
            f'{part["of_time"]:.0%}',
            f'{part["gflop"]:,.1f}',
            f'{part["gflops"]:,.1f}',
            f'{part["share"]:.1%}',
        )
    rate = f'{report["matrix_rate_gflops"]:,.1f}'
    table.add_row('a large matrix product', '', '', '', rate, '100.0%')
    return table


def _memory(report: dict[str, Any]) -> Table:
    table = _table('Memory', 'MiB', 'of weights')
    for name, size in report['memory'].items():
        table.add_row(MEMORY[name], f'{size:,.1f}', f'{size / report["memory"]["weights"]:.2f} x')
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify='left')
    table.add_column('')
    for column in columns:
        table.add_column(column, justify='right')
    return table


def _pair(cold: float, warm: float) -> tuple[str, str, str]:
    return f'{cold:.1f}', f'{warm:.1f}', f'{warm / max(cold, 1e-9):.2f}'
