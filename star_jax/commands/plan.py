"""`star-jax plan CONFIG --topology NAME`"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from star_jax import files
from star_jax.checkpoint import config
from star_jax.commands import arguments, training
from star_jax.core.buckets import Buckets
from star_jax.errors import UserError
from star_jax.plan import plan_report, planning, topologies
from star_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Says what a run will need and take on machines that are not here, before anybody pays.

    CONFIG, the first word, is a Python file that defines `run` (see configs/) or a run's
    config.json; every field can be changed by an option. Its data, weights and text encoder need
    not be here. For TPUs the real program is compiled (pip install -e '.[plan]'; minutes), for GPUs
    its arrays are counted. Times are what the chips' peak rates allow at best.

    Example: star-jax plan configs/star_d30_256.py --topology v5p-128 --price 4.2

    Attributes:
        run: the settings.
        topology: v5p:4x4x4 by shape, v5p-128 or v5e-256 by name, 2xv5e-256 two of them, 8xA100-80G.
        sample: plan the drawing of a batch instead of its training.
        buckets: of sampling, the first and the last of scales that share a part of the program, in
            pairs (by default what suits the platform).
        search: find the largest batch that fits, too (two compilations more).
        price: of a chip for an hour.
        json: a file for the whole plan.
    """

    run: Annotated[Run, tyro.conf.arg(name='')]
    topology: str
    sample: bool = False
    buckets: Buckets | None = None
    search: bool = True
    price: float = 0.0
    json: Path | None = None


def main(words: Sequence[str]) -> int:
    words = list(words)
    run, name = Run(), 'the default run'
    if words and not words[0].startswith('-'):
        path = Path(words.pop(0))
        run, name = training.load(path, Run), path.stem
    default = Plan(run=run, topology='')
    given = arguments.parse(Plan, words, 'plan [CONFIG]', default)
    config.check(given.run, where='the settings of the run')
    if not given.topology:
        raise UserError(f'where? give --topology, such as {topologies.EXAMPLES}')
    if not 0 <= given.price < math.inf:
        raise UserError(f'--price must be a number and not negative, not {given.price}')
    if given.buckets and not given.sample:
        raise UserError('buckets are of a program that draws: add --sample, or leave --buckets out')
    pod = topologies.parse_topology(given.topology)
    if given.json is not None:
        files.check_file(given.json)
    jax.config.update('jax_platforms', 'cpu')  # nothing runs, and accelerators may be in use
    # A program for a chip that is not here can be written to a cache, but not read.
    jax.config.update('jax_enable_compilation_cache', False)
    console = Console()
    with console.status('counting') as status:
        report = planning.plan(
            given.run,
            pod,
            config=name,
            samples=given.sample,
            buckets=given.buckets,
            search=given.search,
            price=given.price,
            on_progress=status.update,
        )
    console.print(plan_report.summary(report), highlight=False)
    for table in plan_report.tables(report):
        console.print(table)
    for sentence in plan_report.sentences(report):
        console.print(sentence, highlight=False, soft_wrap=True)
    if given.json is not None:
        with files.writing(given.json):
            given.json.parent.mkdir(parents=True, exist_ok=True)
            config.write_json(given.json, report.to_json())
    return 0
