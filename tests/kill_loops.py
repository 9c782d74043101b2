"""Does a command that was killed at any point, and is given again, end as if undisturbed?

    python tests/kill_loops.py [COMMAND...] [--points N]

A command runs once undisturbed, which takes some seconds. Then, for each of some points of that
time, it is ended there by SIGKILL or SIGTERM in turn, and runs again to its end: its results must
be those of the undisturbed run, byte for byte (the fields of a prepared dataset's records have no
order), and nothing else may be left in its folders, in the folder of temporary files and in the
cache.
"""

import argparse
import dataclasses
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tiny
import xla_flags
from array_record.python import array_record_module
from PIL import Image

from star_jax.checkpoint import config

ROOT = Path(__file__).parents[1]
FEW, MANY, LONG = 5, 20, 20  # points of a run; of one that takes longer than so many seconds
PATIENCE = 1800  # seconds
# The status after each; a process without its handlers yet dies of SIGTERM itself.
SIGNALS = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}
RECORDS = 'array_record'
MOMENT = re.compile(r'(?<=/)\d{20}-')
CACHE, TEMPORARY, RESULTS = 'cache', 'temporary', 'results'

# The folder of inputs, and that of results -> the words of a command.
COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    'sample': lambda inputs, out: [
        *('sample', 'a red circle', 'a blue star', 'a green ring', 'two crosses', '--batch', '1'),
        *('--model', inputs / 'model', '--out', out / 'samples'),
    ],
    'data cache': lambda inputs, out: [
        *('data', 'cache', inputs / 'star.json', '--cache', out / 'codes')
    ],
    'data prepare': lambda inputs, out: [
        *('data', 'prepare', 'folder', inputs / 'images', out / 'set', '--size', '64')
    ],
    'convert': lambda inputs, out: ['convert', inputs / 'model', '--out', out / 'published'],
    'export': lambda inputs, out: ['export', inputs / 'run', '--out', out / 'model'],
    'evaluate': lambda inputs, out: [
        *('evaluate', inputs / 'model', '--metrics', 'tokenizer', 'loss', '--count', '8'),
        *('--out', out / 'scores.json', '--grid', out / 'grid.png'),
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a loop.

    Attributes:
        seconds: seconds of the undisturbed run.
        points: how often the command was ended.
        ended: how often that was before its own end.
    """

    seconds: float
    points: int
    ended: int


def write_inputs(folder: Path) -> None:
    """A model, a run with a checkpoint, a config and a folder of captioned images."""
    tiny.write_model(folder / 'model')
    tokenizer = tiny.write_tokenizer(folder / 'tokenizer')
    pace = dataclasses.replace(tiny.STAR.pace, steps=3, images=0)
    run = dataclasses.replace(tiny.STAR, tokenizer=tokenizer, pace=pace)
    config.write(folder / 'star.json', run)
    (folder / 'images').mkdir()
    random = np.random.default_rng(0)
    for number in range(60):
        pixels = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / f'{number}.png')
        (folder / 'images' / f'{number}.txt').write_text(f'noise {number}')


def loop(name: str, inputs: Path, work: Path, points: int = 0) -> Outcome:
    """Ends a command at some points of its time; asserts what this module promises.

    Args:
        name: one of COMMANDS.
        inputs: from `write_inputs`; `export` adds its run.
        work: an empty folder.
        points: how often (0: FEW, or MANY for a long run).
    """
    programs = work / 'programs'
    if name == 'export' and not (inputs / 'run').exists():
        words = ['train', inputs / 'star.json', '--out', inputs / 'run']
        with _start(words, work / 'training', programs) as process:
            assert process.wait(PATIENCE) == 0, process.stderr.read()
    words = COMMANDS[name]
    _finish(words(inputs, _empty(work / 'first') / RESULTS), work / 'first', programs)  # compiles
    began = time.monotonic()
    _finish(words(inputs, _empty(work / 'whole') / RESULTS), work / 'whole', programs)
    seconds, expected = time.monotonic() - began, _contents(work / 'whole' / RESULTS)
    assert expected and not _leftovers(work / 'whole')
    points = points or (MANY if seconds > LONG else FEW)
    ended = 0
    for point, (number, statuses) in zip(
        range(points), itertools.cycle(SIGNALS.items()), strict=False
    ):
        torn = _empty(work / 'torn')
        where = f'{name}, {number.name} at point {point} of {points}'
        with _start(words(inputs, torn / RESULTS), torn, programs) as process:
            try:
                process.wait(seconds * (point + 0.5) / points)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
            assert process.wait(PATIENCE) in (*statuses, 0), f'{where}: {process.stderr.read()}'
            ended += process.returncode != 0
        if number is signal.SIGTERM:
            assert not _leftovers(torn), f'{where} left {_leftovers(torn)}'
        _finish(words(inputs, torn / RESULTS), torn, programs)
        found = _contents(torn / RESULTS)
        assert found.keys() == expected.keys(), where
        assert not [path for path in found if found[path] != expected[path]], where
        assert not _leftovers(torn), f'{where}: {_leftovers(torn)} left after the next run'
    return Outcome(seconds=seconds, points=points, ended=ended)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name in (CACHE, TEMPORARY, RESULTS):
        (folder / name).mkdir(parents=True)
    return folder


def _start(words: list[object], folder: Path, programs: Path) -> subprocess.Popen:
    folders = {'STAR_JAX_CACHE': folder / CACHE, 'TMPDIR': folder / TEMPORARY}
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    variables = {name: str(path) for name, path in folders.items()} | {
        'JAX_COMPILATION_CACHE_DIR': str(programs),
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': xla_flags.devices(1),
    }
    command = [sys.executable, '-m', 'star_jax', *map(str, words)]
    return subprocess.Popen(
        command,
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(words: list[object], folder: Path, programs: Path) -> None:
    with _start(words, folder, programs) as process:
        assert process.wait(PATIENCE) == 0, process.stderr.read()


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without the moment that names of cached features begin with."""
    return {
        MOMENT.sub('', str(path.relative_to(folder))): _content(path)
        for path in folder.rglob('*')
        if path.is_file()
    }


def _content(path: Path) -> bytes:
    if RECORDS not in path.name:
        return path.read_bytes()
    records = array_record_module.ArrayRecordReader(str(path)).read_all()
    return b''.join(bytes(sorted(record)) for record in records)


def _leftovers(folder: Path) -> list[str]:
    """Hidden files, unfinished ones, and whatever is among the temporary files."""

    def find() -> Iterator[Path]:
        for path in folder.rglob('*'):
            if path.name.startswith('.') and path.name != '.lock' or path.suffix == '.partial':
                yield path
        yield from (folder / TEMPORARY).iterdir()

    return sorted(str(path.relative_to(folder)) for path in find())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('commands', nargs='*', help=f'of {", ".join(COMMANDS)} (none: all)')
    parser.add_argument('--points', type=int, default=0, help='how often each is ended')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / 'inputs'
        write_inputs(inputs)
        for command in options.commands or COMMANDS:
            work = Path(name) / command.replace(' ', '_')
            outcome = loop(command, inputs, work, options.points)
            sys.stdout.write(f'{command}: {outcome}\n')
            sys.stdout.flush()


if __name__ == '__main__':
    main()
