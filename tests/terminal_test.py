"""Does a command end well though its reader has left, or a signal comes while it loads?"""

import logging
import os
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from star_jax import cli, files
from star_jax.bench import process
from star_jax.parallel import malloc

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {'PYTHONPATH': str(ROOT)}
WORK = """
import sys
from pathlib import Path
from star_jax import cli, terminal

def work(arguments, load):
    for _ in range(9):
        sys.stdout.write('much to say\\n' * 999)
        sys.stdout.flush()
        sys.stderr.write('and to complain of\\n')
    sys.stdout.write('more')
    Path(sys.argv[1]).touch()
    return 0

cli._run = work
sys.exit(cli.main())
"""


WARNING = """
import logging, sys, types
from star_jax import cli
from star_jax.parallel import malloc

def work(words):
    logging.warning('of a library')
    logging.getLogger('star_jax.data.folder').warning('%s\\nof two lines', words)
    return 0

memory.keep = lambda: sys.stdout.write('kept')
cli._load = lambda command: types.SimpleNamespace(main=work)
sys.exit(cli.main())
"""


def run(*words: object, stdout: int, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """Exit status and stderr."""
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(
        words, env=ENVIRONMENT, stdout=stdout, stderr=stderr, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.fixture
def left():
    """A pipe whose reader has left."""
    heard, told = os.pipe()
    os.close(heard)
    yield told
    os.close(told)


def test_what_nobody_reads_is_dropped_and_the_work_goes_on(left, tmp_path):
    assert run('-c', WORK, tmp_path / 'one', stdout=left) == (0, 'and to complain of\n' * 9)
    assert run('-c', WORK, tmp_path / 'two', stdout=left, stderr=left) == (0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['one', 'two']


def test_a_warning_is_one_line_and_a_process_keeps_its_memory(tmp_path):
    with (tmp_path / 'out').open('wb') as out:
        status, said = run('-c', WARNING, 'sample', 'a', stdout=out)
    ours = [line for line in said.splitlines() if 'library' not in line]
    assert (status, ours) == (0, ["star-jax sample: warning: ['a'] of two lines"])
    assert (tmp_path / 'out').read_text() == 'kept'


def test_a_command_inside_another_process_changes_nothing_of_it(monkeypatch, capsys):
    monkeypatch.setattr(malloc, 'keep', pytest.fail)
    assert cli.main(['smaple']) == 2 and 'sample' in capsys.readouterr().err
    assert logging.getLogger('star_jax').propagate and not logging.getLogger('star_jax').handlers


def test_a_benchmark_measures_a_process_as_users_have_it(monkeypatch):
    done = []
    monkeypatch.setattr(malloc, 'keep', lambda: done.append('kept'))
    worker = types.SimpleNamespace(main=lambda *words: done.append(words))
    monkeypatch.setitem(sys.modules, 'star_jax.bench.worker', worker)
    monkeypatch.setattr('star_jax.bench.worker', worker, raising=False)
    monkeypatch.setattr(sys, 'argv', ['bench', 'job.json', 'start'])
    runpy.run_module(process.WORKER, run_name='__main__')
    assert done == ['kept', ('job.json', 'start')]


def test_help_that_nobody_reads_ends_quietly(left):
    assert run('-m', 'star_jax', '--help', stdout=left) == (0, '')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
def test_output_that_cannot_be_written_is_told_in_one_line():
    with open('/dev/full', 'w') as full:
        status, said = run('-m', 'star_jax', '--help', stdout=full.fileno())
    assert status == 1
    assert said == 'star-jax: what it says cannot be written (No space left on device)\n'


@pytest.mark.parametrize(
    ('command', 'number', 'status', 'said'),
    [
        ('train', signal.SIGTERM, 0, 'stopped; the same command goes on'),
        ('train-tokenizer', signal.SIGINT, 0, 'stopped; the same command goes on'),
        ('sample', signal.SIGINT, 130, 'stopped'),
        ('sample', signal.SIGTERM, -signal.SIGTERM, None),
    ],
)
def test_a_signal_while_a_command_loads_ends_it_in_one_line(command, number, status, said):
    """Half of what it needs is imported then: Python names each module that it has."""
    words = [sys.executable, '-X', 'importtime', '-m', 'star_jax', command, 'nothing.py']
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits SIG_IGN
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        while 'numpy' not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        rest = process.stderr.read()
    told = [line for line in rest.splitlines() if not line.startswith('import time:')]
    assert (process.returncode, told) == (status, [f'star-jax {command}: {said}'] if said else [])


# Folders that are replaced.

REPLACE = """
import os, signal, sys
from pathlib import Path
from star_jax import files

rename = Path.rename

def die(path, target):
    if '.new.' in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)

Path.rename = die
with files.replacing_folder(Path(sys.argv[1]), lambda name: name == 'weights') as new:
    (new / 'weights').write_text('of the dead')
    print(new, flush=True)
    sys.stdin.read()
"""


def begin(folder: Path) -> subprocess.Popen:
    """A process that has filled the new folder; it dies between two renames when it may go on."""
    return subprocess.Popen(
        [sys.executable, '-S', '-c', REPLACE, str(folder)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def replace(folder: Path, content: str) -> None:
    with files.replacing_folder(folder, lambda name: name == 'weights') as new:
        (new / 'weights').write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_is_cleared_of_what_a_killed_process_left_beside_it(tmp_path):
    folder = tmp_path / 'model'
    replace(folder, 'first')
    (folder / 'notes').write_text('of the user')
    (tmp_path / '.model.new').mkdir()  # somebody's own
    with begin(folder) as process:
        new = Path(process.stdout.readline().strip())
        replace(folder, 'second')
        assert new.is_dir()  # a living process writes there
        process.kill()
    assert new.is_dir()
    replace(folder, 'third')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.model.new', 'model']
    assert contents(folder) == {'weights': 'third', 'notes': 'of the user'}


def test_a_kill_between_two_renames_costs_nothing(tmp_path):
    folder = tmp_path / 'model'
    replace(folder, 'first')
    (folder / 'notes').write_text('of the user')
    with begin(folder) as process:
        process.communicate('')
    assert process.returncode == -signal.SIGKILL and not folder.exists()
    replace(folder, 'second')
    assert [path.name for path in tmp_path.iterdir()] == ['model']
    assert contents(folder) == {'weights': 'second', 'notes': 'of the user'}
