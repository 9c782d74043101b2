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
    'first image': 'first image',
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
}
MEMORY = {
    'weights': 'weights',
    'temporaries': 'temporaries of the program',
    'device_peak': 'peak of the device',
    'process_peak': 'peak of the process',
}


def sampling(report: dict[str, Any]) -> list[Table]:
    """Tables of a report of `bench.sampling.run`."""
    return [_start(report), _speed(report), _memory(report)]


def summary(report: dict[str, Any]) -> str:
    """What was measured, where."""
    job, env = report['job'], report['environment']
    model, guidance = job['model'], job['settings']['guidance']
    described = (
        f'depth {model["depth"]}',
        f'width {model["width"]}',
        f'sides {" ".join(map(str, model["sides"]))}',
        f'{report["pixels"]} px',
        job['folder'] or 'random weights',
        f'guidance {guidance:g}' if guidance else 'prompts only',
        f'batch {job["batch"]}',
        job['dtype'],
    )
    where = (
        f'{env["cores"]} cores',
        f'{env["devices"]} x {env["device"]}',
        f'load {env["load"][0]:.1f} to {env["load"][1]:.1f}',
        *(f'{name} {env[name]}' for name in ('jax', 'jaxlib', 'flax', 'python')),
        f'XLA_FLAGS={env["xla_flags"]!r}',
    )
    return ', '.join(described) + '\n' + ', '.join(where)


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
    for name, label in PARTS.items():
        part = report['parts'][name]
        table.add_row(
            label,
            f'{part["seconds"]:.3g}',
            f'{part["of_time"]:.0%}',
            f'{part["gflop"]:,.1f}',
            f'{part["gflops"]:,.1f}',
            f'{part["share"]:.1%}',
        )
    rate = f'{report["matrix_rate_gflops"]:,.1f}'
    table.add_row('2048 x 2048 matmul', '', '', '', rate, '100.0%')
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
