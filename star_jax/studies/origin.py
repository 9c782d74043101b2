"""Where was a run of a study trained, and how large is it?

A file beside the run's own, written when it starts: a report made later, perhaps on another
machine, tells of the machines that trained.
"""

import math
from pathlib import Path
from typing import Any

import jax

from star_jax.checkpoint import config
from star_jax.parallel import machine
from star_jax.training import trainer

FILE = 'origin.json'


def note(folder: Path, parameters: int) -> None:
    """Adds this machine to those that a run was trained on, unless it is the last of them."""
    folder.mkdir(parents=True, exist_ok=True)
    machines = read(folder)['machines'] if (folder / FILE).exists() else []
    here = machine.describe()
    if not machines or machines[-1] != here:
        machines.append(here)
    config.write_json(folder / FILE, {'parameters': parameters, 'machines': machines})


def read(folder: Path) -> dict[str, Any]:
    """`parameters`, a number, and `machines`, a list of what `machine.describe` said."""
    return config.read_json(folder / FILE)


def count_parameters(job: trainer.Job) -> int:
    """Those that training changes, averages not counted again."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(job.abstract().params))
