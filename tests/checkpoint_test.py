"""Does a run restore its last complete state, bit for bit, after any kind of stop?"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from star_jax.checkpoint import config, training
from star_jax.errors import UserError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    ema: Any
    opt: Any


def make_mesh(*sizes: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: np.prod(sizes)]
    return jax.make_mesh(sizes, ('data', 'model'), (AxisType.Auto,) * 2, devices=devices)


def shardings(state: State, mesh: jax.sharding.Mesh) -> State:
    """Shards matrices over both axes, and replicates all other arrays."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, P('data', 'model') if leaf.ndim == 2 else P()), state
    )


def make_state(mesh: jax.sharding.Mesh, ema: bool = True, seed: int = 0) -> State:
    """A small state with every type of array, and an optimizer with masks and empty parts."""
    key = jax.random.key(seed)
    params = {
        'dense': {'kernel': jax.random.normal(key, (16, 8)), 'bias': jnp.full((8,), jnp.nan)},
        'half': jax.random.normal(key, (8, 4), jnp.bfloat16),
        'counts': jnp.array([-(2**31), 7], jnp.int32),
        'bits': jnp.array([2**32 - 1, 0], jnp.uint32),
    }
    trained = {'dense': True, 'half': True, 'counts': False, 'bits': False}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(optax.constant_schedule(1e-3)), trained),
    )
    state = State(
        step=jnp.int32(seed),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        opt=optimizer.init(params),
    )
    return jax.device_put(state, shardings(state, mesh))


def abstract(state: State, shardings: State) -> State:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def assert_same(a: State, b: State) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for leaf_a, leaf_b in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (leaf_a.dtype, leaf_a.shape) == (leaf_b.dtype, leaf_b.shape)
        assert np.asarray(leaf_a).tobytes() == np.asarray(leaf_b).tobytes()


@pytest.fixture
def opened():
    """Opens checkpoints, and closes them when the test ends."""
    everything = []

    def open_folder(*args, **kwargs) -> training.Checkpoints:
        everything.append(training.Checkpoints(*args, **kwargs))
        return everything[-1]

    yield open_folder
    for checkpoints in everything:
        checkpoints.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with the complete steps 1 and 2, and the state of step 1."""
    folder = tmp_path_factory.mktemp('saved')
    with training.Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(make_mesh(1, 1), seed=step))
    return folder, make_state(make_mesh(1, 1), seed=1)


@pytest.fixture
def two_steps(tmp_path, saved):
    """A copy of it, which tests may damage."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, saved[1]


@pytest.mark.parametrize('ema', [True, False])
@pytest.mark.parametrize('sizes', [(4, 2), (2, 1), None])
def test_state_is_restored_bit_for_bit_on_any_mesh(tmp_path, opened, capfd, ema, sizes):
    state = make_state(make_mesh(4, 2), ema)
    targets = (
        shardings(state, make_mesh(*sizes))
        if sizes
        else jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[3]), state)
    )
    checkpoints = opened(tmp_path)
    checkpoints.save(5, state)
    checkpoints.close()
    step, restored = opened(tmp_path).restore(abstract(state, targets))
    assert step == 5
    assert_same(restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == targets
    assert capfd.readouterr() == ('', '')


def test_restored_state_is_independent_of_the_saved_arrays(tmp_path, opened):
    state = make_state(make_mesh(4, 2))
    truth = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0 + 1, s), donate_argnums=0)
    checkpoints = opened(tmp_path)
    checkpoints.save(1, state)
    for _ in range(5):
        state = overwrite(state)
    assert_same(checkpoints.restore(state)[1], truth)


def test_save_keeps_the_newest_steps_and_saves_a_step_once(tmp_path, opened):
    checkpoints = opened(tmp_path, keep=2)
    assert checkpoints.latest() is None
    states = {step: make_state(make_mesh(1, 1), seed=step) for step in (1, 2, 3)}
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.save(3, states[1])
    checkpoints.wait()
    assert checkpoints.latest() == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['2', '3']
    step, restored = checkpoints.restore(states[1])
    assert step == 3
    assert_same(restored, states[3])


def test_restore_returns_none_for_an_empty_folder(tmp_path, opened):
    state = make_state(make_mesh(1, 1))
    assert opened(tmp_path / 'new').restore(state) is None
    reader = opened(tmp_path / 'missing', read_only=True)
    assert reader.restore(state) is None
    assert reader.latest() is None
    assert not (tmp_path / 'missing').exists()


def tear_missing(step):
    next((step / 'state').rglob('d/*')).unlink()


def tear_cut(step):
    largest = max(step.rglob('d/*'), key=lambda entry: entry.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def tear_flip(step):
    """One bit of the arrays."""
    largest = max(step.rglob('d/*'), key=lambda entry: entry.stat().st_size)
    flip(largest, largest.stat().st_size // 2)


def tear_notes(step):
    flip(step / 'notes.json', 0)


def tear_manifest(step):
    os.truncate(step / 'manifest.json', 10)


def tear_sizes(step):
    manifest = json.loads((step / 'manifest.json').read_text())
    (step / 'manifest.json').write_text(json.dumps(dict.fromkeys(manifest)))


def tear_metadata(step):
    metadata = step / 'state' / '_METADATA'
    metadata.write_text(metadata.read_text().replace('{', '[', 1))


def tear_everything(step):
    shutil.rmtree(step)
    step.mkdir()


def flip(path, offset):
    """Flips one bit of the byte at an offset."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    'tear, message',
    [
        (tear_missing, 'is missing'),
        (tear_cut, 'bytes, expected'),
        (tear_flip, 'another checksum'),
        (tear_notes, 'notes.json has another checksum'),
        (tear_manifest, 'list of files'),
        (tear_sizes, 'list of files holds no size of'),
        (tear_metadata, 'state/_METADATA has another checksum'),
        (tear_everything, 'list of files'),
    ],
)
def test_restore_skips_a_damaged_step_with_a_warning(
    two_steps, opened, caplog, capfd, tear, message
):
    folder, first = two_steps
    tear(folder / '2')
    checkpoints = opened(folder)
    step, restored = checkpoints.restore(first)
    assert step == 1
    assert_same(restored, first)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert 'step 2 is torn' in record.message
    assert message in record.message
    checkpoints.save(2, first)
    checkpoints.wait()
    assert_same(checkpoints.restore(first)[1], first)
    assert sorted(entry.name for entry in folder.iterdir()) == ['1', '2', 'torn-2']
    assert capfd.readouterr() == ('', '')


def test_flipped_bit_never_changes_the_restored_state(two_steps, opened):
    """The manifest lacks files that Orbax writes later, which contain no part of the state."""
    folder, first = two_steps
    second = make_state(make_mesh(1, 1), seed=2)
    step = folder / '2'
    random = np.random.default_rng(0)
    for path in sorted(path for path in step.rglob('*') if path.is_file()):
        content = path.read_bytes()
        if not content:
            continue
        flip(path, random.integers(len(content)))
        number, restored = opened(folder, read_only=True).restore(first)
        assert_same(restored, {1: first, 2: second}[number])
        if 'state' in path.parts or path.name == 'notes.json':
            assert number == 1, path
        path.write_bytes(content)
    assert opened(folder, read_only=True).restore(first)[0] == 2


def test_notes_are_restored_with_their_step(tmp_path, opened):
    state = make_state(make_mesh(1, 1))
    checkpoints = opened(tmp_path)
    checkpoints.save(1, state, notes=[{'loss': 0.1}])
    checkpoints.save(2, state)
    checkpoints.wait()
    assert [checkpoints.notes(step) for step in (1, 2, 3)] == [[{'loss': 0.1}], None, None]
    assert training.newest_complete_step(tmp_path) == 2


def test_manifest_without_checksums_is_read(two_steps, opened):
    """The manifest then has one size per file."""
    folder, first = two_steps
    for step in ('1', '2'):
        item = folder / step / 'state'
        sizes = {
            path.relative_to(item).as_posix(): path.stat().st_size
            for path in item.rglob('*')
            if path.is_file()
        }
        config.write_json(folder / step / 'manifest.json', sizes)
        (folder / step / 'notes.json').unlink()
    tear_cut(folder / '2')
    checkpoints = opened(folder)
    assert checkpoints.restore(first)[0] == 1
    assert checkpoints.notes(1) is None


def test_read_only_folder_stays_unchanged(two_steps, opened):
    folder, first = two_steps
    (folder / '3.orbax-checkpoint-tmp').mkdir()
    tear_cut(folder / '2')
    before = sorted(folder.rglob('*'))
    assert opened(folder, read_only=True).restore(first)[0] == 1
    assert sorted(folder.rglob('*')) == before


def test_restore_refuses_another_state_by_name(two_steps, opened):
    folder, first = two_steps
    params = dict(first.params)
    params['other'] = params.pop('half')
    params['bits'] = jnp.zeros((3,), jnp.uint32)
    params['counts'] = params['counts'].astype(jnp.float32)
    with pytest.raises(UserError) as caught:
        opened(folder).restore(dataclasses.replace(first, params=params))
    for message in (
        'step 2: has another state',
        '1 missing (params/other)',
        '1 unknown (params/half)',
        'params/bits is uint32[2], expected uint32[3]',
        'params/counts is int32[2], expected float32[2]',
    ):
        assert message in str(caught.value)
    assert sorted(entry.name for entry in folder.iterdir()) == ['1', '2']


def test_check_raises_the_error_of_a_failed_save(tmp_path, opened, monkeypatch):
    def fail(*_):
        raise OSError('no space left')

    monkeypatch.setattr(training.config, 'write_json', fail)
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(1, make_state(make_mesh(1, 1)))
    with pytest.raises(OSError, match='no space left'):
        while True:
            checkpoints.check()
    monkeypatch.undo()
    assert opened(tmp_path).restore(make_state(make_mesh(1, 1))) is None


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from star_jax.checkpoint.training import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = lambda step: {'x': jnp.full((4_000_000,), step, jnp.float32)}
for step in (1, 2):
    checkpoints.save(step, state(step))
checkpoints.wait()
checkpoints.save(3, state(3))
while not any('tmp' in name for name in os.listdir(sys.argv[1])):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_during_a_save_keeps_the_earlier_steps(tmp_path, opened, caplog):
    run = subprocess.run([sys.executable, '-c', KILLED, tmp_path], check=False)
    assert run.returncode == -signal.SIGKILL
    step, restored = opened(tmp_path).restore({'x': jnp.zeros((4_000_000,))})
    assert step == 2
    assert jnp.all(restored['x'] == 2)
    assert ['step 3 was not finished' in record.message for record in caplog.records] == [True]
