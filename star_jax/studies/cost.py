"""What does a training step of each kind of a study cost?

All kinds are timed in turn, in one process, so that every kind meets the same load of the machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from star_jax.bench.timing import time_in_turn
from star_jax.bench.training import TrainingJob
from star_jax.checkpoint import config
from star_jax.console import Console
from star_jax.parallel import machine, startup
from star_jax.studies import units
from star_jax.studies.cells import Cells
from star_jax.studies.units import Study
from star_jax.training.run import Run


def measure(study: Study, out: Path, rounds: int, console: Console) -> None:
    """Times a training step of every kind of a study, and writes a JSON file.

    Args:
        study: the study.
        out: the file.
        rounds: how often every kind is timed.
        console: shows the table.
    """
    startup.start()
    steps = {kind: _step(run) for kind, run in study.timed_runs.items()}
    seconds = time_in_turn(steps, rounds, averaged=steps)
    base = next(iter(seconds))
    report = {
        'commit': units.read_commit(),
        'hardware': machine.describe(),
        'rounds': rounds,
        'batch': next(iter(study.timed_runs.values())).batch,
        'kinds': {
            kind: {
                'seconds': float(np.median(times)),
                'ratio': float(np.median(times / seconds[base])),
                'ratios': [float(ratio) for ratio in times / seconds[base]],
            }
            for kind, times in seconds.items()
        },
    }
    config.write_json(out, report)
    for table in _cells(report, base).for_terminal():
        console.print(table)
    console.print(f'{out}')


def _step(run: Run) -> Callable[[], Any]:
    """A function that runs the next training step and returns what to wait for."""
    benchmark = TrainingJob(run=run).prepare()
    program, args = benchmark.main.program, benchmark.main.args

    def step() -> Any:
        nonlocal args
        result = program(*args)
        args = benchmark.next_args(args, result)
        return jax.tree.leaves(result[1])

    return step


def _cells(report: dict[str, Any], base: str) -> Cells:
    rows = [
        [
            kind,
            f'{1000 * one["seconds"]:.1f}',
            f'{one["ratio"]:.3f} ({min(one["ratios"]):.3f} to {max(one["ratios"]):.3f})',
        ]
        for kind, one in report['kinds'].items()
    ]
    title = (
        f'Training step of {report["batch"]} images, median of {report["rounds"]} rounds in turn'
    )
    return Cells(title=title, columns=['kind', 'ms', f'of {base}'], rows=rows)
