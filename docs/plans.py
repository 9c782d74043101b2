"""Makes docs/plans.md: every STAR stage on pods and GPUs, by `star-jax plan`.

    python docs/plans.py [docs/plans.json]

A row is a process of its own and takes minutes; there are as many at once as cores. Every row goes
into the JSON file as soon as it is there, and the page is written anew; the same command goes on
where it was stopped. To make a row again, remove it from the file.
"""

import json
import subprocess
import sys
import tempfile
from concurrent import futures
from pathlib import Path

from star_jax.checkpoint import config
from star_jax.parallel import startup
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
# What is counted takes seconds, so it comes first; the rest is compiled, and once is enough.
COUNTED = ('8xA100-80G', '64xH100')
COMPILED = ('v5p-128', 'v5e-256', 'v6e-256')
TOPOLOGIES = COUNTED + COMPILED
SEARCHED = (('star_d30_256', 'v5e-256'),)  # for its largest batch, three compilations
HEAD = """\
# What every STAR stage needs on pods and GPUs

Made by `python docs/plans.py`, which runs `star-jax plan configs/STAGE.py --topology NAME` for each
row; nothing here ran on the machines named. TPU rows are compiled ahead of time from the real
training step and say what the compiler lays out; GPU rows are counted from the arrays of the jaxpr
and from formulas. All sizes are GiB of one device: *state* is parameters, Adam's moments and
averages, *frozen* the tokenizer, the text encoder and the batch (and the model below a refinement
head), *activations* grow with the batch, *temporaries* do not. *Sent* is what a device sends in a
step, by kind. A step takes at least the longest of arithmetic, memory traffic and exchange at the
chips' peak rates, so that images/s and MFU are what a perfect overlap would reach, and chip-hours
are a lower bound for the whole stage. The mesh was chosen by `plan`: as many parts of the published
batch as it has, the rest of the chips on heads and rows. The largest batch of a TPU takes two
compilations more and was asked of one row; the others were made with `--no-search`.

"""


def main(place: Path) -> None:
    rows = json.loads(place.read_text()) if place.exists() else {}
    write(place, rows)
    with futures.ThreadPoolExecutor(startup.cores()) as pool:
        made = [
            pool.submit(plan, stage, topology)
            for topology in TOPOLOGIES
            for stage in STAGES
            if f'{stage} {topology}' not in rows
        ]
        for each in futures.as_completed(made):
            row = each.result()
            rows[f'{row["config"]} {row["topology"]}'] = row
            write(place, rows)


def write(place: Path, rows: dict[str, dict]) -> None:
    config.write_json(place, rows)
    place.with_suffix('.md').write_text(HEAD + page(rows))


def plan(stage: str, topology: str) -> dict:
    """The report of one row, or the sentence that says why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'row.json'
        words = (HERE.parent / 'configs' / f'{stage}.py', '--topology', topology, '--json', out)
        command = (sys.executable, '-m', 'star_jax', 'plan', *map(str, words))
        if topology in COMPILED and (stage, topology) not in SEARCHED:
            command += ('--no-search',)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f'status {done.returncode}']
            return {'config': stage, 'topology': topology, 'error': said[-1]}
        return json.loads(out.read_text())


def page(rows: dict[str, dict]) -> str:
    """The table, and below it what does not fit and why, and which rows there are not."""
    names = [f'{stage} {topology}' for stage in STAGES for topology in TOPOLOGIES]
    found = [rows[name] for name in names if name in rows]
    lines = [
        f'- {row["config"]} on {row["topology"]}: {"; ".join(row["advice"])}'
        for row in found
        if row.get('advice')
    ]
    if missing := [name for name in names if name not in rows]:
        lines.append(f'- Not made yet: {", ".join(missing)}')
    return plan_report.markdown(found) + '\n' + '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / 'plans.json')
