"""Does a command handle closed pipes, and signals while it loads?"""

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
        sys.stdout.write('output\\n' * 999)
        sys.stdout.flush()
        sys.stderr.write('warning\\n')
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

malloc.keep_freed_memory = lambda: sys.stdout.write('kept')
cli._load = lambda command: types.SimpleNamespace(main=work)
sys.exit(cli.main())
"""


def run(*arguments: object, stdout: int, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """Exit status and stderr."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=stdout, stderr=stderr, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.fixture
def closed_pipe():
    """The write end of a pipe whose read end is closed."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_command_continues_after_its_reader_has_closed_the_pipe(closed_pipe, tmp_path):
    assert run('-c', WORK, tmp_path / 'one', stdout=closed_pipe) == (0, 'warning\n' * 9)
    assert run('-c', WORK, tmp_path / 'two', stdout=closed_pipe, stderr=closed_pipe) == (0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['one', 'two']


def test_command_prints_a_warning_in_one_line_and_keeps_its_memory(tmp_path):
    with (tmp_path / 'out').open('wb') as out:
        status, output = run('-c', WARNING, 'sample', 'a', stdout=out)
    ours = [line for line in output.splitlines() if 'library' not in line]
    assert (status, ours) == (0, ["star-jax sample: warning: ['a'] of two lines"])
    assert (tmp_path / 'out').read_text() == 'kept'


def test_command_within_a_process_does_not_change_its_settings(monkeypatch, capsys):
    monkeypatch.setattr(malloc, 'keep_freed_memory', pytest.fail)
    assert cli.main(['smaple']) == 2 and 'sample' in capsys.readouterr().err
    assert logging.getLogger('star_jax').propagate and not logging.getLogger('star_jax').handlers


def test_benchmark_process_has_the_settings_of_a_command(monkeypatch):
    done = []
    monkeypatch.setattr(malloc, 'keep_freed_memory', lambda: done.append('kept'))
    worker = types.SimpleNamespace(main=lambda *words: done.append(words))
    monkeypatch.setitem(sys.modules, 'star_jax.bench.worker', worker)
    monkeypatch.setattr('star_jax.bench.worker', worker, raising=False)
    monkeypatch.setattr(sys, 'argv', ['bench', 'job.json', 'start'])
    runpy.run_module(process.WORKER, run_name='__main__')
    assert done == ['kept', ('job.json', 'start')]


def test_help_to_a_closed_pipe_is_no_error(closed_pipe):
    assert run('-m', 'star_jax', '--help', stdout=closed_pipe) == (0, '')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
def test_command_reports_output_that_cannot_be_written():
    with open('/dev/full', 'w') as full:
        status, output = run('-m', 'star_jax', '--help', stdout=full.fileno())
    assert status == 1
    assert output == 'star-jax: the output cannot be written (No space left on device)\n'


@pytest.mark.parametrize(
    ('command', 'number', 'status', 'line'),
    [
        ('train', signal.SIGTERM, 0, 'stopped; the same command continues the run'),
        ('train-tokenizer', signal.SIGHUP, 0, 'stopped; the same command continues the run'),
        ('sample', signal.SIGINT, 130, 'stopped'),
        ('sample', signal.SIGTERM, -signal.SIGTERM, None),
    ],
)
def test_signal_while_a_command_loads_ends_it_with_one_line(command, number, status, line):
    """The signal is sent when half of the modules are imported, by the log of Python."""
    arguments = [sys.executable, '-X', 'importtime', '-m', 'star_jax', command, 'nothing.py']
    # A child inherits SIG_IGN.
    before = signal.signal(number, signal.default_int_handler)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    signal.signal(number, before)
    with process:
        while 'numpy' not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        rest = process.stderr.read()
    output = [text for text in rest.splitlines() if not text.startswith('import time:')]
    expected = [f'star-jax {command}: {line}'] if line else []
    assert (process.returncode, output) == (status, expected)


# Replacing a folder.

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
    (new / 'weights').write_text('of the killed process')
    print(new, flush=True)
    sys.stdin.read()
"""


def start_replacing(folder: Path) -> subprocess.Popen:
    """A process that has filled the new folder; at the end of stdin it dies between two renames."""
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


def test_replacing_folder_removes_the_leftovers_of_killed_processes(tmp_path):
    folder = tmp_path / 'model'
    replace(folder, 'first')
    (folder / 'notes').write_text('of the user')
    (tmp_path / '.model.new').mkdir()  # a folder of the user
    with start_replacing(folder) as process:
        new = Path(process.stdout.readline().strip())
        replace(folder, 'second')
        assert new.is_dir()  # a running process writes there
        process.kill()
    assert new.is_dir()
    replace(folder, 'third')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.model.new', 'model']
    assert contents(folder) == {'weights': 'third', 'notes': 'of the user'}


def test_replacing_folder_recovers_from_a_kill_between_two_renames(tmp_path):
    folder = tmp_path / 'model'
    replace(folder, 'first')
    (folder / 'notes').write_text('of the user')
    with start_replacing(folder) as process:
        process.communicate('')
    assert process.returncode == -signal.SIGKILL and not folder.exists()
    replace(folder, 'second')
    assert [path.name for path in tmp_path.iterdir()] == ['model']
    assert contents(folder) == {'weights': 'second', 'notes': 'of the user'}


# Outputs that are closed or full.

PRINT = """
import sys
from star_jax import cli
from star_jax.console import progress_bar, number_table
from rich.console import Console

def work(arguments, load):
    console = Console()
    for _ in range(999):
        console.rule('unit')
        sys.stdout.write('output\\n')
        sys.stdout.flush()
    console.print(number_table('title', 'column'))
    with progress_bar() as progress:
        progress.add_task('task', total=1, note='')
    open(sys.argv[1], 'x').close()
    return 0

cli._run = work
sys.exit(cli.main())
"""


@pytest.mark.parametrize('output', ['>&-', '>&- 2>&-', '<&- >&- 2>&-', '2>&- | true', '| head -1'])
def test_command_continues_without_its_outputs(tmp_path, output):
    line = f'{{ "$0" -c "$1" "$2"; echo $? > "$3"; }} {output}'
    words = [sys.executable, PRINT, str(tmp_path / 'done'), str(tmp_path / 'status')]
    done = subprocess.run(
        ['bash', '-c', line, *words], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert (tmp_path / 'status').read_text() == '0\n', done.stderr
    assert (tmp_path / 'done').read_text() == '' and 'Traceback' not in done.stderr


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
def test_command_ends_its_work_before_it_reports_a_full_output(tmp_path):
    with open('/dev/full', 'w') as full:
        status, output = run('-c', PRINT, tmp_path / 'done', stdout=full.fileno())
    assert (tmp_path / 'done').exists() and status == 1
    assert output.splitlines()[-1] == (
        'star-jax: the output cannot be written (No space left on device)'
    )


@pytest.mark.parametrize('words', [['--help'], ['bench', 'train', '--help'], ['--version']])
def test_help_without_an_output_is_no_error(words):
    line = 'exec "$@" >&-'
    command = ['bash', '-c', line, 'bash', sys.executable, '-m', 'star_jax', *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, '')
