"""How is the report of a benchmark printed?"""

from typing import Any

from rich.table import Table

from star_jax.bench.timing import READ
from star_jax.console import number_table

STAGES = {
    'imports': 'Python and imports',
    'JAX': 'JAX and its devices',
    'weights': 'weights on the devices',
    'lowered': 'traced and lowered',
    'compiled': 'compiled',
    'dispatch': 'first dispatch',
    'first result': 'first result',
}
START_TIMES = {
    'compile_seconds': 'compiling, or reading the compiled program',
    'processor_seconds': '  processor seconds of it',
    'weights_to_dispatch_seconds': 'from the weights to the first dispatch',
    'jax_to_dispatch_seconds': 'from the first JAX call to the first dispatch',
    'processor_seconds_to_dispatch': 'processor seconds up to the first dispatch',
}
PARTS = {
    'program': 'whole program',
    'scales': '  all scales (remainder)',
    'decoder': '  decoder (timed alone)',
    'forward': '  forward (timed alone)',
    'backward and update': '  backward and update (remainder)',
    'text': 'before it: text encoder',
}
MEMORY = {
    'weights': 'weights',
    'temporaries': 'temporaries of the program',
    'limit': 'available',
    'device_peak': 'peak of the device',
    'process_peak': 'peak of the process',
}
SUMMARY_COLUMNS = (
    'p50, s',
    'p95/p50',
    'images/s',
    'TFLOP/s',
    'of matrix rate',
    'of read rate',
    'compile, s',
    'first result, s',
    'peak, MiB',
)


def tables(report: dict[str, Any]) -> list[Table]:
    """Start, speed and memory of a report of `bench.process.measure`."""
    return [_start_table(report), _speed_table(report), _memory_table(report)]


def sweep(reports: dict[str, dict[str, Any]]) -> Table:
    """One row per report; times of starts are given cold / with a cache of programs."""
    table = number_table('All measurements', *SUMMARY_COLUMNS)
    for name, report in reports.items():
        table.add_row(name, *_summary_cells(report))
    return table


def markdown(reports: dict[str, dict[str, Any]]) -> str:
    """The table of `sweep` in Markdown, below the machine of the first report."""
    machine = summary(next(iter(reports.values()))).splitlines()[-1]
    lines = [
        machine,
        '',
        f'| | {" | ".join(SUMMARY_COLUMNS)} |',
        '| --- |' + ' ---: |' * len(SUMMARY_COLUMNS),
    ]
    for name, report in reports.items():
        lines.append(f'| {name} | {" | ".join(_summary_cells(report))} |')
    return '\n'.join(lines) + '\n'


def _summary_cells(report: dict[str, Any]) -> tuple[str, ...]:
    time, program = report['time'], report['parts']['program']
    peak = next(size for kind, size in report['memory'].items() if kind.endswith('_peak'))
    starts = [report[name] for name in ('cold_start', 'warm_start') if name in report]
    return (
        f'{time["p50_seconds"]:.3g}',
        f'{time["p95_seconds"] / time["p50_seconds"]:.2f}',
        f'{time["images_per_second"]:.3g}',
        f'{program["gflops"] / 1e3:.3g}',
        f'{program["matrix_rate_share"]:.1%}',
        f'{program["read_rate_share"]:.1%}',
        ' / '.join(f'{start["compile_seconds"]:.1f}' for start in starts),
        ' / '.join(f'{start["stages"]["first result"]:.1f}' for start in starts),
        f'{peak:,.0f}',
    )


def summary(report: dict[str, Any]) -> str:
    """Two lines: the job, and the machine."""
    env = report['environment']
    is_sampling = report['kind'] == 'SamplingJob'
    described = _describe_sampling(report) if is_sampling else _describe_training(report)
    described = (*described, f'{report["pixels"]} px')
    machine = (
        f'{env["cores"]} cores',
        f'{env["devices"]} x {env["device"]}',
        f'load {env["load"][0]:.1f} to {env["load"][1]:.1f}',
        *(f'{name} {env[name]}' for name in ('jax', 'jaxlib', 'flax', 'python')),
        *(f'{name}={value!r}' for name, value in env['settings'].items()),
    )
    return ', '.join(described) + '\n' + ', '.join(machine)


def _describe_sampling(report: dict[str, Any]) -> tuple[str, ...]:
    job, guidance = report['job'], 'without guidance'
    if report['guided']:
        settings = job['settings']
        number = 'per step' if settings['guidance_per_step'] else f'{settings["guidance"]:g}'
        guidance = f'guidance {number}'
    return (
        'sampling',
        *_describe_model(job['model']),
        job['folder'] or 'random weights',
        guidance,
        f'batch {job["batch"]}',
        job['dtype'],
    )


def _describe_training(report: dict[str, Any]) -> tuple[str, ...]:
    run = report['job']['run']
    return (
        'training',
        *_describe_model(run['model']),
        f'batch {run["batch"]}',
        run['dtype'],
        f'remat {run["remat"]}',
        f'mesh {run["mesh"]}',
    )


def _describe_model(model: dict[str, Any]) -> tuple[str, ...]:
    described = [model['kind'], f'depth {model["depth"]}', f'width {model["width"]}']
    if 'sides' in model:
        described.append(f'sides {" ".join(map(str, model["sides"]))}')
    return tuple(described)


def attention(report: dict[str, Any]) -> Table:
    """One row per kernel and direction of a report of `bench.attention.run`."""
    title = (
        f'{report["rows"]:,} rows, {report["visible_share"]:.0%} of them visible to a row on '
        f'average; matrix rate {report["matrix_rate_gflops"]:,.1f} GFLOP/s'
    )
    columns = ('p50, s', 'p95/p50', 'GFLOP/s', 'of matrix rate', 'temporaries, MiB', 'to the first')
    table = number_table(title, 'passes', *columns)
    first: dict[str, float] = {}
    for row in report['kernels']:
        p50 = row['p50_seconds']
        cells = (
            row['passes'],
            f'{p50:.3g}',
            f'{row["p95_seconds"] / p50:.2f}',
            f'{row["gflops"]:,.1f}',
            f'{row["matrix_rate_share"]:.1%}',
            f'{row["temporaries"]:,.1f}',
            f'{p50 / first.setdefault(row["passes"], p50):.2f}',
        )
        table.add_row(row['kernel'], *cells)
    return table


def layers(report: dict[str, Any]) -> Table:
    """One row per form of the report of `bench.layers.run`."""
    title = (
        f'{report["batch"]:,} at once in {report["steps"]:,} steps, without decoder; matrix rate '
        f'{report["matrix_rate_gflops"]:,.1f} GFLOP/s, read rate '
        f'{report["read_rate_gbytes"]:,.1f} GB/s; codes '
        f'{"are equal" if report["same_codes"] else "differ"}'
    )
    columns = ('p50, s', 'ms a step', 'to the scan', 'of matrix rate', 'of read rate')
    table = number_table(title, *columns, 'compile', 'MiB')
    for name, form in report['forms'].items():
        p50 = form['p50_seconds']
        cells = (
            f'{p50:.3g}',
            f'{1000 * p50 / report["steps"]:,.1f}',
            f'{form["ratio"]:.2f}',
            f'{form["matrix_rate_share"]:.1%}',
            f'{form["read_rate_share"]:.1%}',
            f'{form["compile_seconds"]:,.1f}',
            f'{form["temporaries"]:,.0f}',
        )
        table.add_row(name, *cells)
    return table


def torch_loop(report: dict[str, Any]) -> Table:
    """The report of `bench.torch_loop.run`."""
    title = (
        f'One step of sampling on {report["threads"]:,} threads; memory is read with '
        f'{report["read_rate_gbytes"]:,.1f} GB/s'
    )
    columns = ('ms', 'loop, ms', 'to the loop', 'MB read', 'of read rate', 'compile, s')
    table = number_table(title, *columns)
    cells = (
        f'{report["step_ms"]:,.1f}',
        f'{report["loop_step_ms"]:,.1f}',
        f'{report["ratio"]:.2f}',
        f'{1000 * report["read_gbytes_a_step"]:,.0f}',
        f'{report["read_rate_share"]:.0%}',
        f'{report["compile_seconds"]:,.1f}',
    )
    table.add_row(f'batch {report["batch"]:,}', *cells)
    return table


def data(report: dict[str, Any]) -> Table:
    """The report of `bench.data.run`."""
    columns = ('images/s', 'to one thread', 'per core')
    table = number_table(f'{report["examples"]:,} examples', *columns)
    one_thread, pipelined = report['one_thread_images_per_second'], report['images_per_second']
    per_core = 1 / report['environment']['cores']
    table.add_row('one thread', f'{one_thread:,.1f}', '1.00', f'{per_core:.0%}')
    shares = (f'{report["speedup"]:.2f}', f'{report["speedup_per_core"]:.0%}')
    table.add_row('pipeline', f'{pipelined:,.1f}', *shares)
    return table


def _start_table(report: dict[str, Any]) -> Table:
    """Stages of both processes, in seconds since the command started the process."""
    cold, warm = report['cold_start'], report['warm_start']
    table = number_table('Seconds since the process was started', 'cold', 'warm', 'warm/cold')
    for stage, label in STAGES.items():
        table.add_row(label, *_pair(cold['stages'][stage], warm['stages'][stage]))
    table.add_section()
    for name, label in START_TIMES.items():
        table.add_row(label, *_pair(cold[name], warm[name]))
    hits = ('yes' if start['cache_hits'] else 'no' for start in (cold, warm))
    table.add_row('compiled program read from the cache', *hits, '')
    return table


def _speed_table(report: dict[str, Any]) -> Table:
    time = report['time']
    p50, p95 = time['p50_seconds'], time['p95_seconds']
    title = (
        f'{len(time["seconds"])} runs: p50 {p50:.3g} s, p95 {p95:.3g} s ({p95 / p50:.2f} x), '
        f'{time["seconds_per_image"]:.3g} s per image, {time["images_per_second"]:.3g} images/s'
    )
    columns = ('seconds', 'of time', 'GFLOP', 'GFLOP/s', 'of matrix rate')
    table = number_table(title, *columns, 'GB read', 'of read rate')
    for name, part in report['parts'].items():
        cells = (
            f'{part["seconds"]:.3g}',
            f'{part["time_share"]:.0%}',
            f'{part["gflop"]:,.1f}',
            f'{part["gflops"]:,.1f}',
            f'{part["matrix_rate_share"]:.1%}',
            f'{part["gbytes"]:,.3g}',
            f'{part["read_rate_share"]:.1%}',
        )
        table.add_row(PARTS[name], *cells)
    many = f' on each of {report["devices"]} devices' if report['devices'] > 1 else ''
    cells = ('', '', '', f'{report["matrix_rate_gflops"]:,.1f}', '100.0%')
    table.add_row(f'a large matrix product{many}', *cells)
    rate = f'100.0% of {report["read_rate_gbytes"]:,.1f} GB/s'
    table.add_row(f'a sum of {READ // 2**20} MiB{many}', *[''] * 6, rate)
    return table


def _memory_table(report: dict[str, Any]) -> Table:
    table = number_table('Memory', 'MiB', 'of weights')
    for name, size in report['memory'].items():
        table.add_row(MEMORY[name], f'{size:,.1f}', f'{size / report["memory"]["weights"]:.2f} x')
    return table


def _pair(cold: float, warm: float) -> tuple[str, str, str]:
    return f'{cold:.1f}', f'{warm:.1f}', f'{warm / max(cold, 1e-9):.2f}'
