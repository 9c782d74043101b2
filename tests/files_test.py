"""Do killed and terminated processes leave nothing behind after the next write?"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared_test import record

from star_jax import files, image_io
from star_jax.data import prepared
from star_jax.errors import UserError
from star_jax.sampling.sample_folder import SampleFolder

IMAGE = np.zeros((4, 4, 3), np.uint8)
LEFT = '0123abcd'  # end of the name of a temporary file

# Writes a file, a folder and a prepared dataset, and waits in the middle of them.
WRITER = """
import sys
from pathlib import Path
from star_jax import files, terminal
from star_jax.cli import TERMINATED
from star_jax.data import prepared

def records():
    print('ready', flush=True, file=sys.__stdout__)  # tfds is silenced
    sys.stdin.read()
    yield

root = Path(sys.argv[1])
terminal.exit_at_once(TERMINATED, 'stopped', files.remove_unfinished)
with (
    files.temporary_folder(),
    files.replacing(root / 'a.png'),
    files.replacing_folder(root / 'model', bool),
):
    prepared.write(root / 'set', {'train': records()})
"""
# The main thread is in one call of C, which no handler of Python interrupts.
BUSY = """
import hashlib
from star_jax import files, terminal
from star_jax.cli import TERMINATED

terminal.exit_at_once(TERMINATED, 'stopped', files.remove_unfinished)
print('ready', flush=True)
hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)
"""
OWN_HANDLER = """
import signal, sys, time
from star_jax import files, terminal
from star_jax.cli import TERMINATED

terminal.exit_at_once(TERMINATED, 'stopped', files.remove_unfinished)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print('ready', flush=True)
time.sleep(60)
"""


def start(script: str, root: Path) -> subprocess.Popen:
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1]), 'TMPDIR': str(root)}
    words = [sys.executable, '-c', script, str(root)]
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a child inherits SIG_IGN
    process = subprocess.Popen(words, text=True, env=environment, **pipes)
    signal.signal(signal.SIGHUP, before)
    assert process.stdout.readline() == 'ready\n'
    return process


def write_all(root: Path) -> None:
    with files.replacing(root / 'b.png') as temporary:
        temporary.touch()
    with files.replacing_folder(root / 'model', bool) as folder:
        (folder / 'weights').touch()
    prepared.write(root / 'set', {'train': [record(1)]})


@pytest.mark.parametrize(
    ('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_stopped_writes_leave_nothing(tmp_path, number, status):
    """A signal that can be handled cleans up; after any other, the next writes do."""
    with start(WRITER, tmp_path) as process:
        left = sorted(path.name for path in tmp_path.iterdir())
        assert [name[0] for name in left] == ['.', '.', '.', 't']
        write_all(tmp_path)  # beside a running process: removes nothing of it
        assert set(left) < {path.name for path in tmp_path.iterdir()}
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == status
    if number == signal.SIGKILL:
        files._searched.clear()  # as in a new process
        write_all(tmp_path)
        (tmp_path / left[-1]).rmdir()  # in the temporary folder of the system: not removed
    else:
        assert error.endswith('stopped\n')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['b.png', 'model', 'set']


@pytest.mark.parametrize(('script', 'status'), [(BUSY, 143), (OWN_HANDLER, 7)])
def test_sigterm_ends_a_process_at_once(tmp_path, script, status):
    """Even while it computes outside of Python, unless it has a handler of its own."""
    with start(script, tmp_path) as process:
        process.terminate()
        assert process.wait(10) == status


def test_first_write_removes_abandoned_files_of_its_kind(tmp_path):
    other = [tmp_path / f'.notes.txt.{LEFT}', tmp_path / '.a.png.other', tmp_path / 'a.png']
    for path in (tmp_path / f'.00003.png.{LEFT}', *other):
        path.touch()
    with files.replacing(tmp_path / '00004.png') as temporary:
        temporary.write_bytes(b'content')
    assert set(tmp_path.iterdir()) == {*other, tmp_path / '00004.png'}
    with files.replacing(tmp_path / 'notes.txt') as temporary:
        temporary.touch()
    assert not other[0].exists()


def test_files_without_locks_are_abandoned_after_a_day(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError('no locks here')

    monkeypatch.setattr(files.fcntl, 'flock', flock)
    new, old = tmp_path / f'.a.png.{LEFT}', tmp_path / f'.b.png.{LEFT}'
    for path in (new, old):
        path.touch()
    os.utime(old, (1, 1))
    image_io.save_png(IMAGE, tmp_path / 'c.png')
    assert set(tmp_path.iterdir()) == {new, tmp_path / 'c.png'}


def test_sample_folder_is_clean_after_the_next_run(tmp_path):
    records = [{'prompt': 'a', 'seed': 0}, {'prompt': 'b', 'seed': 1}]
    with SampleFolder(tmp_path, records) as folder:
        folder.add(0, IMAGE)
    for name in (f'.000001.png.{LEFT}', f'.grid.png.{LEFT}'):
        (tmp_path / name).touch()
    files._searched.clear()  # as in a new process
    with SampleFolder(tmp_path, records) as folder:
        for index in folder.missing():
            folder.add(index, IMAGE)
        folder.grid()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'000000.png', '000001.png', 'grid.png', 'samples.jsonl'}


def test_images_are_readable_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        image_io.save_png(IMAGE, tmp_path / 'a.png')
    finally:
        os.umask(before)
    assert (tmp_path / 'a.png').stat().st_mode & 0o777 == 0o644
    with Image.open(tmp_path / 'a.png') as image:
        assert image.size == (4, 4)


def test_datasets_leave_no_temporary_folders(tmp_path, monkeypatch):
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))
    prepared.write(tmp_path / 'set', {'train': [record(1)]})
    prepared.Prepared(path=str(tmp_path / 'set')).open(8)
    with pytest.raises(files.UserError):
        prepared.Prepared(path='no_such_set_anywhere').open(8)
    assert not list((tmp_path / 'tmp').iterdir()) and tempfile.gettempdir() == str(tmp_path / 'tmp')


def test_pipes_and_devices_are_not_replaced(tmp_path):
    """A user with all rights, as in a container, could otherwise replace /dev/null."""
    pipe, link = tmp_path / 'pipe', tmp_path / 'link'
    os.mkfifo(pipe)
    link.symlink_to('/dev/null')
    for path, kind in ((pipe, 'a pipe'), (Path('/dev/null'), 'a device'), (link, 'a device')):
        with pytest.raises(UserError, match=f'is {kind}, expected the name of a file'):
            files.check_file(path)
    with pytest.raises(UserError, match='/dev/stdout is a'):
        files.check_file(Path('/dev/stdout'))
    with pytest.raises(FileExistsError, match='it is a pipe'), files.replacing(pipe):
        pass
    assert sorted(tmp_path.iterdir()) == [link, pipe]


def test_lines_end_as_any_system_ends_them():
    text = 'a\nb\r\nc\rd\u2028e\x0cf\x85g\x1ch'
    assert files.lines(text) == ['a', 'b', 'c', 'd\u2028e\x0cf\x85g\x1ch']
