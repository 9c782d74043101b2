"""Makes docs/plans.md: plans of every STAR stage and of Infinity on TPU pods and GPUs.

    python docs/plans.py [docs/plans.json]

Each row runs in its own process and takes minutes; as many processes run at once as there are
cores. Each finished row is added to the JSON file, and the page is written again. An interrupted
run continues with the same command. To make a row again, remove it from the JSON file.
"""

import json
import subprocess
import sys
import tempfile
from concurrent import futures
from pathlib import Path

from star_jax.checkpoint import config
from star_jax.parallel import mesh
from star_jax.plan import plan_report

HERE = Path(__file__).parent
STAGES = (
    'star_d16_256',
    'star_d30_256',
    'star_d30_256_stage2',
    'star_d30_512',
    'star_d30_1024',
    'star_d30_1024_sampler',
)
# Counted rows take a minute and come first; compiled rows leave out the search for a batch.
COUNTED = ('8xA100-80G', '64xH100')
COMPILED = ('v5p-128', 'v5e-256', 'v6e-256')
TOPOLOGIES = COUNTED + COMPILED
INFINITY = ('infinity_2b', 'infinity_8b', 'infinity_20b')
# Every row of the page: those of the largest models are counted only.
ROWS = (
    *((stage, topology) for stage in STAGES for topology in TOPOLOGIES),
    *((stage, topology) for stage in INFINITY for topology in COUNTED),
    *((INFINITY[0], topology) for topology in COMPILED),
)
SEARCHED = (('star_d30_256', 'v5e-256'),)  # compiled three times, to find the largest batch
HEAD = """\
# What every STAR stage and Infinity need on pods and GPUs

Made by `python docs/plans.py`, which runs `star-jax plan configs/STAGE.py --topology NAME` for each
row; none of the named machines was used. TPU rows are compiled ahead of time from the real training
step and contain the compiler's own sizes; GPU rows are counted from the arrays of the jaxpr and
from formulas. All sizes are GiB of one device: *state* is parameters, Adam's moments and averages;
*frozen* is the tokenizer, the text encoder and the batch (and the model below a refinement head);
*activations* grow with the batch, *temporaries* do not. *Sent* is what one device sends per step,
by kind of collective. The lower bound of a step is the longest of arithmetic, memory traffic and
communication at the chips' peak rates, communication on the links of the mesh axes that it uses
([plan](plan.md)), so images/s and MFU are upper bounds that assume perfect overlap, and chip-hours
are a lower bound for the whole stage. `plan` chose the mesh: it splits the published batch as far
as the batch divides, and uses the other chips for heads and tokens; the advice below names batches
that need neither. The largest batch of a TPU row takes two more compilations and was searched for
one row; the others were made with `--no-search`.

The programs of the TPU rows were compiled before their bounds were computed by axis. Where the
record of a collective does not tell its mesh axis (v5e-256 and v6e-256 with three or four axes,
except for star_d30_256 on v5e-256), the one with the most links was assumed.

Infinity trains at 1024 x 1024 px with 256 images per step; the length of its published runs is not
known, and 100,000 steps are assumed. Its text encoder is flan-t5-xl in bfloat16.

"""


def main(path: Path) -> None:
    rows = json.loads(path.read_text()) if path.exists() else {}
    write(path, rows)
    with futures.ThreadPoolExecutor(mesh.cores()) as pool:
        jobs = [
            pool.submit(plan, stage, topology)
            for stage, topology in sorted(ROWS, key=lambda row: row[1] in COMPILED)
            if f'{stage} {topology}' not in rows
        ]
        for job in futures.as_completed(jobs):
            row = job.result()
            rows[f'{row["config"]} {row["topology"]}'] = row
            write(path, rows)


def write(path: Path, rows: dict[str, dict]) -> None:
    """Writes the rows to the JSON file, and the page beside it."""
    config.write_json(path, rows)
    path.with_suffix('.md').write_text(HEAD + page(rows))


def plan(stage: str, topology: str) -> dict:
    """The report of one row, or the error message of the command."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'row.json'
        words = (HERE.parent / 'configs' / f'{stage}.py', '--topology', topology, '--json', out)
        command = (sys.executable, '-m', 'star_jax', 'plan', *map(str, words))
        if topology in COMPILED and (stage, topology) not in SEARCHED:
            command += ('--no-search',)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f'status {done.returncode}']
            return {'config': stage, 'topology': topology, 'error': lines[-1]}
        return json.loads(out.read_text())


def page(rows: dict[str, dict]) -> str:
    """The table, the advice of each row, and the rows that are missing."""
    names = [f'{stage} {topology}' for stage, topology in ROWS]
    present = [rows[name] for name in names if name in rows]
    lines = [
        f'- {row["config"]} on {row["topology"]}: {"; ".join(row["advice"])}'
        for row in present
        if row.get('advice')
    ]
    if missing := [name for name in names if name not in rows]:
        lines.append(f'- Not made yet: {", ".join(missing)}')
    return plan_report.markdown(present) + '\n' + '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / 'plans.json')
