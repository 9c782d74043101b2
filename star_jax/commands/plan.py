"""`star-jax plan CONFIG --topology NAME`"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro

from star_jax import files
from star_jax.checkpoint import config
from star_jax.commands import arguments, run_config
from star_jax.console import Console
from star_jax.core.buckets import Buckets
from star_jax.core.sizes import LARGEST_BATCH
from star_jax.errors import UserError
from star_jax.plan import plan_report, planning, topologies
from star_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimates memory, traffic, time and cost of a run on machines that are not available here.

    CONFIG is a Python file that defines `run` (see configs/) or the config.json of a run; options
    replace its fields. Data, weights and text encoder of the run are not needed. For TPUs the
    program is compiled (pip install -e '.[plan]'; takes minutes); for GPUs, and with --no-compile,
    its arrays are counted. Times are lower bounds from the peak rates of the chips.

    Example: star-jax plan configs/star_d30_256.py --topology v5p-128 --price 4.2

    Attributes:
        run: config of the run.
        topology: accelerators: a TPU slice by shape (v5p:4x4x4) or by name (v5p-128, v5e-256),
            several slices (2xv5e-256), or GPUs (8xA100-80G).
        sample: plan the sampling of a batch instead of its training.
        buckets: for --sample, pairs of the first and the last scale that share a program body
            (none: chosen by platform).
        compile: compile the program for TPUs, for the compiler's own sizes and collectives.
        search: also find the largest batch that fits, which takes two more compilations.
        price: price of one chip for one hour (0: no costs are printed).
        json: JSON file of the plan.
    """

    run: Annotated[Run, tyro.conf.arg(name='')]
    topology: str
    sample: bool = False
    buckets: Buckets | None = None
    compile: bool = True
    search: bool = True
    price: float = 0.0
    json: Path | None = None


def main(words: Sequence[str]) -> int:
    words = list(words)
    run, name = Run(), 'the default run'
    if words and not words[0].startswith('-'):
        path = Path(words.pop(0))
        run, name = run_config.load(path, Run), path.stem
    default = Plan(run=run, topology='')
    options = arguments.parse(Plan, words, 'plan [CONFIG]', default, run_config.PROGRAM)
    config.check(options.run, where='the settings of the run')
    if options.run.batch > LARGEST_BATCH:
        raise UserError(
            f'the batch of a plan is at most {LARGEST_BATCH:,}, not {options.run.batch:,}: give a '
            'smaller --batch'
        )
    if not options.topology:
        raise UserError(f'no --topology is given: name one, such as {topologies.EXAMPLES}')
    if not 0 <= options.price < math.inf:
        raise UserError(f'--price must be a number and not negative, not {options.price}')
    if options.buckets and not options.sample:
        raise UserError('--buckets are for sampling: add --sample, or leave --buckets out')
    pod = topologies.parse_topology(options.topology)
    if options.json is not None:
        files.check_file(options.json)
    jax.config.update('jax_platforms', 'cpu')  # nothing runs, and accelerators may be in use
    # The cache stores programs for other chips, but cannot load them here.
    jax.config.update('jax_enable_compilation_cache', False)
    console = Console()
    with console.status('counting') as status:
        report = planning.plan(
            options.run,
            pod,
            config=name,
            samples=options.sample,
            buckets=options.buckets,
            search=options.search,
            compiles=options.compile,
            price=options.price,
            on_progress=status.update,
        )
    console.print(plan_report.summary(report), highlight=False)
    for table in plan_report.tables(report):
        console.print(table)
    for sentence in plan_report.sentences(report):
        console.print(sentence, highlight=False, soft_wrap=True)
    if options.json is not None:
        with files.writing(options.json):
            options.json.parent.mkdir(parents=True, exist_ok=True)
            config.write_json(options.json, report.to_json())
    return 0
