"""Makes docs/plans.md: plans of every STAR stage and of Infinity on TPU pods and GPUs.

Each row runs in a process of its own, takes minutes, and is added to a JSON file, after which the
page is written again. An interrupted run continues with the same command. To make a row again,
remove it from the JSON file.
"""

import argparse
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
GPUS = ('8xA100-80G', '64xH100')
TPUS = ('v5p-128', 'v5e-256', 'v6e-256')
TOPOLOGIES = GPUS + TPUS
INFINITY = ('infinity_2b', 'infinity_8b', 'infinity_20b')
SAMPLING = ' sampling'  # follows the name of a config whose sampling is planned
# Compiled rows take long, and leave out the search for a batch; the others are counted, in minutes.
COMPILED = tuple(
    (stage, topology)
    for stage in (*STAGES, 'infinity_2b', f'infinity_2b{SAMPLING}')
    for topology in TPUS
)
SEARCHED = (('star_d30_256', 'v5e-256'),)  # compiled three times, to find the largest batch
# Every row of the page.
ROWS = tuple(
    (stage, topology)
    for stage in (*STAGES, *INFINITY, *(name + SAMPLING for name in INFINITY))
    for topology in TOPOLOGIES
)
HEAD = """\
# What every STAR stage and Infinity need on pods and GPUs

Made by `python docs/plans.py`, which runs `star-jax plan configs/STAGE.py --topology NAME` for each
row; none of the named machines was used. TPU rows of STAR and of infinity_2b are compiled ahead of
time from the real program and contain the compiler's own sizes; rows marked as counted are counted
from the arrays of the jaxpr and from formulas (`--no-compile`). All sizes are GiB of one device:
*state* is parameters, Adam's moments and averages; *frozen* is the tokenizer, the text encoder and
the batch (and the model below a refinement head); *activations* grow with the batch, *temporaries*
do not. *Sent* is what one device sends per step, by kind of collective. The lower bound of a step
is the longest of arithmetic, memory traffic and communication at the chips' peak rates,
communication on the links of the mesh axes that it uses ([plan](plan.md)), so images/s and MFU are
upper bounds that assume perfect overlap, and chip-hours are a lower bound for the whole stage.
`plan` chose the mesh: it splits the published batch as far as the batch divides, and uses the other
chips for heads and tokens; the advice below names batches that need neither. The largest batch of a
compiled row takes two more compilations and was searched for one row; the other compiled ones were
made with `--no-search`.

The programs of the compiled rows were compiled before their bounds were computed by axis. Where the
record of a collective does not name its mesh axis (v5e-256 and v6e-256 with three or four axes,
except for star_d30_256 on v5e-256), the one with the most links was assumed.

Infinity trains at 1024 x 1024 px with 256 images per step; the length of its published runs is not
known, and 100,000 steps are assumed. Its text encoder is flan-t5-xl in bfloat16, with texts of 512
tokens. A row of sampling (`--sample`) is a batch of as many images, with guidance and the decoder;
its chip-hours are for 1,000,000 images.

Counted rows leave out what a compiler adds. The compiled training of infinity_2b holds 28.8 GiB of
activations and temporaries on v5p-128, where 19.6 are counted for as many images on 64xH100, and on
v6e-256 its memory traffic takes longer than its arithmetic. Its compiled sampling needs 19.9 GiB
beside the weights for 4 images a chip on v5p-128, where 10.0 are counted, and 5.5 for one image a
chip on v5e-256, where 2.5 are counted. A TPU fills up heads of 64 channels to 128: the compiled
program that samples STAR-d30 at 1024 px on v5p:4x4x4 takes 8.4 GiB beside its weights, where 1.9
are counted.

"""


def main(path: Path, processes: int) -> None:
    rows = json.loads(path.read_text()) if path.exists() else {}
    write(path, rows)
    with futures.ThreadPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(plan, stage, topology)
            for stage, topology in sorted(ROWS, key=COMPILED.__contains__)
            if name(stage, topology) not in rows
        ]
        for job in futures.as_completed(jobs):
            row = job.result()
            rows[name(row['config'], row['topology'])] = row
            write(path, rows)


def name(stage: str, topology: str) -> str:
    """The key of a row."""
    return f'{stage} {topology}'


def write(path: Path, rows: dict[str, dict]) -> None:
    """Writes the rows to the JSON file, and the page beside it."""
    config.write_json(path, rows)
    path.with_suffix('.md').write_text(HEAD + page(rows))


def plan(stage: str, topology: str) -> dict:
    """The report of one row, or the error message of the command."""
    config_name = stage.removesuffix(SAMPLING)
    options = ['--sample'] if stage != config_name else []
    if (stage, topology) not in COMPILED:
        options.append('--no-compile')
    elif (stage, topology) not in SEARCHED:
        options.append('--no-search')
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'row.json'
        path = HERE.parent / 'configs' / f'{config_name}.py'
        words = (path, '--topology', topology, '--json', out, *options)
        command = (sys.executable, '-m', 'star_jax', 'plan', *map(str, words))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f'status {done.returncode}']
            return {'config': stage, 'topology': topology, 'error': lines[-1]}
        return json.loads(out.read_text()) | {'config': stage}


def page(rows: dict[str, dict]) -> str:
    """The table, the advice of each row, and the rows that are missing."""
    names = [name(stage, topology) for stage, topology in ROWS]
    present = [rows[key] for key in names if key in rows]
    lines = [
        f'- {row["config"]} on {row["topology"]}: {"; ".join(row["advice"])}'
        for row in present
        if row.get('advice')
    ]
    if missing := [key for key in names if key not in rows]:
        lines.append(f'- Not made yet: {", ".join(missing)}')
    return plan_report.markdown(present) + '\n' + '\n'.join(lines) + '\n'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('json', nargs='?', type=Path, default=HERE / 'plans.json')
    parser.add_argument('--processes', type=int, default=mesh.cores(), help='rows at once')
    options = parser.parse_args()
    main(options.json, options.processes)
