"""What does each kind of a study cost: a training step, and sampling an image?

All kinds are timed in turn, in one process, so that every kind meets the same load of the machine.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from star_jax import files
from star_jax.bench.benchmark import Benchmark
from star_jax.bench.timing import time_in_turn
from star_jax.bench.training import TrainingJob
from star_jax.checkpoint import config
from star_jax.console import Console
from star_jax.errors import UserError
from star_jax.parallel import machine, startup
from star_jax.studies import provenance, report_files
from star_jax.studies.cost_result import CostResult, KindCost
from star_jax.studies.units import Study

BATCHES = (1, 16)  # images per run of a sampling program


def measure(study: Study, out: Path, rounds: int, text_tokens: int, console: Console) -> None:
    """Times a training step and sampling of every kind of a study, and writes a JSON file.

    Args:
        study: the study.
        out: the file.
        rounds: how often every kind is timed.
        text_tokens: tokens of a caption.
        console: shows the tables.

    Raises:
        UserError: the study has no runs, or the file cannot be written.
    """
    startup.start()
    runs, samplers = study.timed_runs, study.timed_samplers
    if not runs:
        raise UserError(f'the study {study.name} has no runs to time: give it some')
    batch = next(iter(runs.values())).batch
    report = CostResult(
        study=study.name,
        commit=provenance.read_commit(),
        hardware=machine.describe(),
        rounds=rounds,
        text_tokens=text_tokens,
        training={
            f'{batch} images a step': _measure(
                {
                    kind: TrainingJob(run=run, text_tokens=text_tokens).prepare()
                    for kind, run in runs.items()
                },
                rounds,
            )
        },
        sampling={
            f'{images} at once': _measure(
                {
                    kind: dataclasses.replace(job, batch=images, text_tokens=text_tokens).prepare()
                    for kind, job in samplers.items()
                },
                rounds,
            )
            for images in (BATCHES if samplers else ())
        },
    )
    report_files.show(report.parts(), console)
    with files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        config.write(out, report)
    console.print(f'{out}')


def _measure(benchmarks: Mapping[str, Benchmark], rounds: int) -> dict[str, KindCost]:
    """Time and memory of the main program of each benchmark."""
    programs = {kind: _compile(benchmark) for kind, benchmark in benchmarks.items()}
    calls = {kind: call for kind, (call, _) in programs.items()}
    seconds = time_in_turn(calls, rounds, averaged=calls)
    base = next(iter(seconds))
    return {
        kind: KindCost(
            seconds=float(np.median(times)),
            seconds_per_image=float(np.median(times)) / benchmarks[kind].images,
            ratio=float(np.median(times / seconds[base])),
            ratios=tuple(float(ratio) for ratio in times / seconds[base]),
            gflop=benchmarks[kind].main.cost()[0] / 1e9,
            bytes=programs[kind][1],
        )
        for kind, times in seconds.items()
    }


def _compile(benchmark: Benchmark) -> tuple[Callable[[], Any], int]:
    """A function that runs the next step and returns what to wait for, and the bytes it holds."""
    args = benchmark.main.args
    compiled = benchmark.main.program.lower(*args).compile()
    analysis = compiled.memory_analysis()

    def step() -> Any:
        nonlocal args
        result = compiled(*args)
        args = benchmark.next_args(args, result)
        return jax.tree.leaves(result)[-1]

    return step, analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
