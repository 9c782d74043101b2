"""What does a training step cost with each kind of positions?

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
from star_jax.studies.positions import PositionsStudy
from star_jax.studies.positions_unit import PositionsUnit


def measure(study: PositionsStudy, out: Path, rounds: int, console: Console) -> None:
    """Times a training step of every kind of the first stage, and writes a JSON file.

    Args:
        study: the study.
        out: the file.
        rounds: how often every kind is timed.
        console: shows the table.
    """
    startup.start()
    stage = study.stages[0]
    units_of_kinds = {
        arm.kind: PositionsUnit(data=stage.data, arm=arm, seed=0, codes=study.codes)
        for arm in stage.arms
    }
    steps = {kind: _step(unit) for kind, unit in units_of_kinds.items()}
    seconds = time_in_turn(steps, rounds, averaged=steps)
    base = next(iter(seconds))
    report = {
        'commit': units.read_commit(),
        'hardware': machine.describe(),
        'rounds': rounds,
        'batch': stage.data.run.batch,
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


def _step(unit: PositionsUnit) -> Callable[[], Any]:
    """A function that runs the next training step and returns what to wait for."""
    benchmark = TrainingJob(run=unit.run).prepare()
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
