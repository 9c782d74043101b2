"""What a plan says is what the program would do."""

import collections
import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from star_jax import cli
from star_jax.checkpoint import config
from star_jax.core.flops import count_flops, count_kinds
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.parallel.mesh import MeshShape
from star_jax.plan import (
    analytic,
    compiled,
    groups,
    hlo,
    jaxpr_memory,
    meshes,
    plan_tables,
    planning,
    topologies,
    workload,
)
from star_jax.plan.chips import CHIPS, GIB
from star_jax.plan.plan_report import Roof, roof
from star_jax.training.run import Run

CONFIGS = Path(__file__).parents[1] / 'configs'
LIBTPU = Path(__file__).parents[1] / '.cache' / 'libtpu'  # where launch/test.sh puts it
needs_libtpu = pytest.mark.skipif(
    not (LIBTPU.exists() or importlib.util.find_spec('libtpu')),
    reason="libtpu compiles for TPUs: launch/test.sh fetches it, or pip install -e '.[plan]'",
)

# As compilers write: a loop of 30, in which an exchange runs beside two fusions, and more of them.
PROGRAM = (Path(__file__).parent / 'plan_hlo.txt').read_text()


def test_exchanges_of_a_loop_count_once_per_iteration_and_beside_other_work_once():
    text = hlo.Text(PROGRAM, devices=4, slices=2)
    assert text.executed == {'main': 1, 'body': 30}
    matrix = 4 * 1024 * 256
    found = text.collectives()
    assert {(one.kind, one.group, one.near, one.times): one.bytes for one in found} == {
        ('all-reduce', 2, 1, 2): 2 * matrix,  # each 2 (g - 1) / g of it, one as slices do
        ('collective-permute', 2, 2, 1): matrix,
        ('all-gather', 2, 2, 30): 30 * 2 * 4 * 128 // 2,
        ('reduce-scatter', 4, 2, 30): 30 * 4 * 16 * 8 * 3 // 4,
    }


def test_traffic_is_what_main_memory_sees():
    """Prefetch and exchange, of a loop the slice of its layer; not what is near or handed on."""
    matrix, layer = 4 * 1024 * 256, 2 * 4 * 64
    exchanges = matrix + 2 * matrix  # the first reads what is near
    assert hlo.Text(PROGRAM, 4).traffic() == matrix + exchanges + 30 * (layer + 4)


@pytest.mark.parametrize(
    'words, wanted',
    [
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ('replica_groups=[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ('replica_groups={{0,5},{1,4}}, to_apply', [[0, 5]]),
        ('replica_groups={}, to_apply', [list(range(8))]),
    ],
)
def test_groups_of_devices_in_every_way_of_writing(words, wanted):
    np.testing.assert_array_equal(groups.read(words, 8), wanted)


def test_the_compiler_of_this_machine_writes_what_is_read():
    def many(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=5)[0]

    mesh = MeshShape(fsdp=8).build()
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=where)
    text = hlo.Text(jax.jit(many, out_shardings=where).lower(x).compile().as_text(), 8)
    sent = collections.Counter()
    for one in text.collectives():
        sent[one.kind] += one.bytes
    assert set(sent) == {'all-gather'}
    assert sent['all-gather'] == 5 * 4 * 64 * 64 * 7 // 8
    assert text.traffic() > 5 * 4 * 64 * 64


def test_products_by_how_they_are_computed():
    x, half = jnp.ones((4, 8)), jnp.ones((4, 8), jnp.bfloat16)

    def products(x: jax.Array, half: jax.Array) -> Any:
        exact = jnp.dot(x, x.T, precision='highest')
        looped = jax.lax.map(lambda row: jnp.dot(row, row, precision='default'), x)
        return exact, looped, half @ half.T

    assert count_kinds(products, x, half) == {'exact': 256, 'float32': 64, 'bfloat16': 256}
    assert count_flops(products, x, half) == 576


def test_what_lives_at_once_and_what_products_move():
    def chain(x: jax.Array) -> jax.Array:
        y = x @ x
        return (y @ y).sum()

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    assert jaxpr_memory.peak(workload.Piece(chain, (x,))) == 2 * 4 * 16 * 16
    assert jaxpr_memory.traffic(workload.Piece(chain, (x,))) == 2 * 3 * 4 * 16 * 16

    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ x, x), x, length=6)[1]

    assert jaxpr_memory.peak(workload.Piece(looped, (x,))) == 7 * 4 * 16 * 16
    assert jaxpr_memory.traffic(workload.Piece(looped, (x,))) == 6 * 3 * 4 * 16 * 16


@pytest.mark.parametrize(
    'name, chip, chips, near',
    [
        ('v5p:4x4x4', 'v5p', 64, 64),
        ('v5p-128', 'v5p', 64, 64),
        ('v5e-256', 'v5e', 256, 256),
        ('v5litepod-16', 'v5e', 16, 16),
        ('v6e:16x16', 'v6e', 256, 256),
        ('2xv5e-256', 'v5e', 512, 256),
        ('8xA100-80G', 'A100-80G', 8, 8),
        ('a100-40gb', 'A100-40G', 1, 1),
        ('64xH100', 'H100', 64, 8),
        ('4xH200', 'H200', 4, 4),
    ],
)
def test_a_name_means_machines(name, chip, chips, near):
    pod = topologies.read(name)
    assert (pod.chip.name, pod.chips, pod.near) == (chip, chips, near)
    assert pod.platform == ('tpu' if chip.startswith('v') else 'gpu')


@pytest.mark.parametrize(
    'name, says',
    [
        ('v9-128', 'there is no topology'),
        ('8xA100', 'there is no topology'),
        ('0xH100', 'has 0 chips'),
        ('1000000xH100', 'has 1,000,000 chips, expected 1 to'),
        ('v5p-127', 'counts TensorCores'),
        ('v5e-100', 'counts chips, expected 1, 4'),
        ('v5p:4x4', '3 sides, such as v5p:4x4x4'),
    ],
)
def test_a_name_that_means_none_is_refused(name, says):
    with pytest.raises(UserError, match=says):
        topologies.read(name)


def test_a_program_takes_the_longest_of_what_it_asks():
    chip = dataclasses.replace(CHIPS['H100'], links=1e9, network=1e8)
    near = hlo.Collective('all-gather', group=8, near=8, times=1, bytes=10**9)
    far = hlo.Collective('all-reduce', group=16, near=8, times=1, bytes=10**9)
    asked = roof(chip, 4, {'bfloat16': int(chip.bfloat16), 'exact': 0}, 0, [near, far])
    assert asked == Roof(compute=0.25, memory=0.0, links=2.0, network=1.25)
    assert (asked.seconds, asked.limit) == (2.0, 'links')


def test_a_mesh_for_a_batch_that_the_chips_do_not_divide():
    run = config.load_run(CONFIGS / 'star_d30_256.py', Run)
    for name in ('v5e-256', 'v5p-128', '64xH100'):
        pod = topologies.read(name)
        shape = meshes.choose(run, pod, trains=True)
        data, fsdp, tensor, sequence = shape.sizes(pod.chips)
        assert (data * fsdp, tensor) == (32, 2)
        assert data * fsdp * tensor * sequence == pod.chips
        assert f'--mesh.fsdp {fsdp}' in meshes.options(shape) or fsdp == 1


def test_a_published_stage_is_planned_without_its_places():
    run = config.load_run(CONFIGS / 'star_d16_256.py', Run)
    done = workload.training(run, MeshShape(fsdp=8).abstract_mesh(64), 'cpu')
    size = {name: workload.share(tree) for name, tree in done.resident.items()}
    count = 274_934_272 - 1001 * 1024  # of tests/published_configs_test.py
    assert size['parameters'] == pytest.approx(4 * count / 8, rel=0.01)
    assert size['optimizer'] == pytest.approx(2 * size['parameters'], rel=1e-4)
    assert size['text encoder'] == pytest.approx(4 * 340e6 / 8, rel=0.01)
    assert size['tokenizer'] == pytest.approx(4 * 109e6, rel=0.01)
    assert len(done.notes) == 2 and 'clip' in done.notes[1]


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Run:
    place = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')
    return dataclasses.replace(tiny.STAR, tokenizer=place, batch=16, features='inside', ema=0.9)


def planned(run: Run, name: str, memory: float | None = None, **options: Any) -> Any:
    """The plan on machines whose memory may be another."""
    pod = topologies.read(name)
    if memory:
        pod = dataclasses.replace(pod, chip=dataclasses.replace(pod.chip, memory=memory))
    return planning.plan(run, pod, config='tiny', **options)


def test_a_plan_counts_what_gpus_hold(run):
    run = dataclasses.replace(run, mesh=MeshShape(fsdp=2))
    made = planned(dataclasses.replace(run, attention='flash'), '8xA100-80G', price=2.0)
    whole = workload.training(run, MeshShape().abstract_mesh(1), 'cpu')
    memory = made.memory
    for name, size in memory.resident.items():
        ways = {'tokenizer': 1, 'batch': 8}.get(name, 2)
        assert size == pytest.approx(workload.share(whole.resident[name]) / ways, rel=0.03)
    assert memory.fits and memory.total == sum(memory.resident.values()) + (
        memory.activations + memory.temporaries
    )
    assert memory.temporaries >= memory.resident['parameters']  # their gradients
    assert made.largest > 1000 and not made.compiled and not made.checked
    kinds = {(one.kind, one.group) for one in made.exchanges}
    assert kinds == {('all-gather', 2), ('reduce-scatter', 2), ('all-reduce', 4)}
    assert made.images_per_second == pytest.approx(run.batch / made.seconds)
    assert 0 < made.mfu < 1 and made.flops == made.needed
    assert made.to_json()['predicted']['hours'] == made.hours
    assert plan_tables.tables(made) and 'it fits' in plan_tables.sentences(made)[0]
    rows = plan_tables.markdown([made.to_json(), {'config': 'a', 'topology': 'b', 'error': 'c'}])
    assert len({line.count('|') for line in rows.splitlines()}) == 1


def test_a_plan_that_does_not_fit_says_what_to_change(run):
    run = dataclasses.replace(run, cache='somewhere', mesh=MeshShape(data=8))
    made = planned(run, '8xA100-80G', memory=1.5e6)
    assert not made.memory.fits and made.largest < run.batch
    said = ' '.join(plan_tables.sentences(made))
    assert 'does not fit' in said and f'--batch {made.largest}' in said
    assert '--remat' in said and '--mesh.fsdp' in said and 'keep-tokens' in said


def test_activations_computed_again_are_not_kept():
    model = Star(depth=6, width=32, heads=2, sides=(1, 2, 4), text_width=384)
    run = Run(model=model, cache='somewhere', tokenizer='nowhere')

    def lives(remat: bool) -> int:
        changed = dataclasses.replace(run, remat=remat)
        return analytic.local(changed, 8, workload.training)['training step'].live

    assert lives(remat=True) < 0.75 * lives(remat=False)


def test_a_plan_of_sampling(run):
    run = dataclasses.replace(run, mesh=MeshShape(fsdp=2))
    made = planned(run, '2xH100', samples=True, buckets=((0, 1),), search=False)
    assert set(made.memory.resident) == {'parameters', 'tokenizer'}
    assert {one.kind for one in made.exchanges} == {'all-gather'}


@pytest.mark.parametrize(
    'words, says',
    [
        (['--topology', 'v7-8'], "there is no topology 'v7-8'"),
        ([], 'where\\? give --topology'),
        (['--topology', '8xH100', '--mesh.fsdp', '3'], 'choose sizes whose product is 8'),
        (['--topology', '8xH100', '--batch', '12', '--mesh.fsdp', '8'], 'multiple of 8'),
        (['--topology', '8xH100', '--price', '-1'], 'not negative'),
        (['--topology', '8xH100', '--price', 'nan'], 'must be a number'),
        (['--topology', '8xH100', '--attention', 'splash'], 'splash is a kernel of TPUs'),
        (['--topology', '8xH100', '--buckets', '0', '1'], 'add --sample'),
        (['--topology', 'v5e-4'], 'pip install'),
    ],
)
def test_mistakes_end_in_a_sentence(words, says, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'libtpu' else find(name)
    )
    assert cli.main(['plan', str(CONFIGS / 'star_d16_256.py'), *words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(says, error)


@pytest.mark.parametrize(
    'said, temporaries',
    [
        ('HLO temporaries (75.50G) exceeds available HBM (15.75G).', 75.5 * GIB),
        ('Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.', 19 * GIB),
    ],
)
def test_what_is_too_large_is_told_by_the_compiler(said, temporaries):
    class Refused:
        def lower(self) -> 'Refused':
            return self

        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {said}')

    built = compiled.build(workload.Piece(Refused(), ()), GIB, 1, 1)
    assert (built.temporaries, built.text) == (temporaries, None)


@needs_libtpu
def test_a_plan_is_compiled_for_a_slice(run, compiled_here, monkeypatch):
    """Its arguments are what is resident, and the gradients are summed over the slice."""
    monkeypatch.syspath_prepend(LIBTPU)
    run = dataclasses.replace(run, cache='somewhere', mesh=MeshShape(fsdp=1))
    made = planned(run, 'v5e:2x2', search=False)
    memory = made.memory
    assert made.compiled and made.known and memory.fits
    summed = sum(one.bytes for one in made.exchanges if one.kind == 'all-reduce')
    assert summed == pytest.approx(1.5 * memory.resident['parameters'], rel=0.2)
    assert made.roofs['training step'].memory > 0
