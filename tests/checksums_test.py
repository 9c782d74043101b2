"""Are weights that changed on disk detected, and unchanged ones hashed once?"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny

from star_jax import checksums, cli
from star_jax.checkpoint import folder, models, weights
from star_jax.errors import UserError
from star_jax.files import SHIPPED, SHIPPED_MODELS, shipped_folder


@pytest.fixture(scope='module')
def written(tmp_path_factory) -> Path:
    return Path(tiny.write_model(tmp_path_factory.mktemp('model') / 'model'))


@pytest.fixture
def model(written, tmp_path, monkeypatch) -> Path:
    """A copy of a model folder that is a second old, and an empty cache folder."""
    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path / 'cache'))
    shutil.copytree(written, tmp_path / 'model')
    age(tmp_path / 'model')
    return tmp_path / 'model'


def age(folder: Path) -> None:
    for path in folder.iterdir():
        past = path.stat().st_mtime_ns - 10**9
        os.utime(path, ns=(past, past))


def flip(path: Path, position: int = -9) -> None:
    """Changes one bit of a float's fraction."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that are hashed."""
    names, compute = [], checksums._hash

    def record(path, stop):
        names.append(path.name)
        return compute(path, stop)

    monkeypatch.setattr(checksums, '_hash', record)
    return names


PARTS = ['model.safetensors', 'tokenizer.safetensors']


def test_list_is_that_of_sha256sum(model):
    assert sorted(checksums.read(model)) == PARTS
    assert all(weights.sha256(model / name) == x for name, x in checksums.read(model).items())
    if shutil.which('sha256sum'):
        subprocess.run(['sha256sum', '--check', '--quiet', checksums.SUMS], cwd=model, check=True)


@pytest.mark.parametrize('name', PARTS)
def test_changed_weights_are_refused_by_name(model, name):
    models.read(model)
    flip(model / name)
    with pytest.raises(UserError, match=f'{name} has changed since .* restore it; .*--no-check'):
        models.read(model)
    models.read(model, check=False)
    if name == PARTS[1]:
        with pytest.raises(UserError, match='changed since'):
            models.read_tokenizer(model)
        models.read_tokenizer(model, check=False)
    else:
        models.read_tokenizer(model)  # the tokenizer's weights are intact
    assert cli.main(['convert', str(model), '--out', str(model.parent / 'out')]) == 2
    assert not (model.parent / 'out').exists()
    assert cli.main(['convert', str(model), '--out', str(model.parent / 'ok'), '--no-check']) == 0
    sums = model / checksums.SUMS
    digests = {part: weights.sha256(model / part) for part in PARTS}
    sums.write_text(''.join(f'{digest}  {part}\n' for part, digest in digests.items()))
    models.read(model)


def test_unchanged_weights_are_hashed_once(model, hashed):
    for _ in range(3):
        models.read(model)
    assert sorted(hashed) == PARTS
    flip(model / PARTS[0])
    for _ in range(2):
        with pytest.raises(UserError, match='changed'):
            models.read(model)
    assert hashed.count(PARTS[0]) >= 2 and hashed.count(PARTS[1]) == 1
    del hashed[:]
    models.read(model, check=False)
    assert not hashed


def test_change_within_a_tick_of_the_clock_is_not_missed(model, hashed):
    now = model / PARTS[0]
    os.utime(now)
    models.read(model)
    models.read(model)
    assert hashed.count(PARTS[0]) in (1, 2)  # remembered only if the file is older than a tick
    future = now.stat().st_mtime_ns + 10**12
    os.utime(now, ns=(future, future))
    del hashed[:]
    models.read(model)
    models.read(model)
    assert hashed == [PARTS[0]] * 2


def test_damaged_or_unwritable_memory_is_ignored(model, monkeypatch, tmp_path):
    models.read(model)
    for path in (tmp_path / 'cache' / checksums.MEMORY).iterdir():
        path.write_text('[' * 99)
    models.read(model)
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path / 'file' / 'x'))
    models.read(model)


def test_nothing_is_written_into_the_model_folder(model):
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    models.read(model)
    models.digest(model)
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_unlisted_files_and_torn_lists_are_refused(model):
    sums = model / checksums.SUMS
    text = sums.read_text()
    sums.write_text(''.join(line for line in text.splitlines(True) if 'tokenizer' in line))
    with pytest.raises(UserError, match=r'model\.safetensors has changed'):
        models.read(model)
    sums.write_text(text[:-30])
    with pytest.raises(UserError, match='line 2 has no SHA-256 and name'):
        models.read(model)


def test_lists_of_other_systems_are_read(model):
    sums = model / checksums.SUMS
    listed, text = checksums.read(model), sums.read_text()
    for changed in (text.replace('  ', '  ./'), f'\ufeff{text}', text.replace('\n', '\r\n')):
        sums.write_text(changed, 'utf-8', newline='')
        assert checksums.read(model) == listed


def test_weights_without_a_list_must_be_finite(model):
    (model / checksums.SUMS).unlink()
    models.read(model)
    flat = weights.flatten(weights.load(model / PARTS[0]))
    first = next(iter(flat))
    flat[first].flat[0] = np.nan
    weights.save(model / PARTS[0], weights.unflatten(flat))
    with pytest.raises(UserError, match=f'NaN or infinite weights .{first}.'):
        models.read(model)
    models.read(model, check=False)


def test_folder_with_weights_that_are_not_finite_is_not_written(written, tmp_path):
    content = models.read(written)
    flat = weights.flatten(content.params)
    first = next(iter(flat))
    flat[first].flat[0] = np.inf
    with pytest.raises(UserError, match=f'NaN or infinite weights .{first}.'):
        folder.write(tmp_path / 'model', content)
    assert not list(tmp_path.iterdir())


def test_digest_ignores_the_list(model):
    before = models.digest(model)
    (model / checksums.SUMS).unlink()
    assert models.digest(model) == before


@pytest.mark.parametrize('name', SHIPPED_MODELS)
def test_shipped_models_have_lists(name):
    assert (folder.find(name) / checksums.SUMS).is_file()
    models.read(name)


def test_shipped_models_stay_small():
    paths = (path for path in shipped_folder(SHIPPED).rglob('*') if path.is_file())
    assert sum(path.stat().st_size for path in paths) <= 20_000_000


def test_damaged_file_is_reported_before_its_change(model):
    path = model / PARTS[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match='damaged or was cut short'):
        models.read(model)
