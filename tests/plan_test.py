"""A plan bounds what a program moves, stores and computes, and says what to change."""

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
from star_jax.checkpoint import config, folder
from star_jax.core.cache import KV
from star_jax.core.flops import count_flops, count_kinds
from star_jax.core.settings import Remat, Settings
from star_jax.core.visibility import StaticVisibility, Visibility
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.nn.attention_dispatch import named
from star_jax.parallel import links, rules
from star_jax.parallel.chips import CHIPS, GIB
from star_jax.parallel.collectives import Collective
from star_jax.parallel.mesh import MeshShape
from star_jax.plan import (
    analytic,
    estimate,
    fused,
    hlo,
    jaxpr_memory,
    plan_report,
    planning,
    search,
    topologies,
    workload,
)
from star_jax.plan.plan_report import compute_roof
from star_jax.training.run import Run

CONFIGS = Path(__file__).parents[1] / 'configs'
LIBTPU = Path(__file__).parents[1] / '.cache' / 'libtpu'  # where launch/test.sh puts it
needs_libtpu = pytest.mark.skipif(
    not (LIBTPU.exists() or importlib.util.find_spec('libtpu')),
    reason="libtpu compiles for TPUs: launch/test.sh fetches it, or pip install -e '.[plan]'",
)

# Written as compilers do: a loop of 30 iterations, in which one collective overlaps two fusions.
HLO = (Path(__file__).parent / 'plan_hlo.txt').read_text()


def test_collectives_count_once_per_iteration_and_once_if_they_overlap():
    text = hlo.HloText(HLO, devices=4, slices=2)
    assert text.executions == {'main': 1, 'body': 30}
    matrix = 4 * 1024 * 256
    sent = {
        (item.kind, item.group_size, item.local_size, item.count): item.bytes
        for item in text.collectives()
    }
    assert sent == {
        ('all-reduce', 2, 1, 2): 2 * matrix,  # each 2 (g - 1) / g of it, one written as send
        ('collective-permute', 2, 2, 1): matrix,
        ('all-gather', 2, 2, 30): 30 * 2 * 4 * 128 // 2,
        ('reduce-scatter', 4, 2, 30): 30 * 4 * 16 * 8 * 3 // 4,
    }


@pytest.mark.parametrize(
    'settings, rows',
    [
        (Settings(guidance=2.0), 2 * 14),
        (Settings(guidance=0.0), 14),
        (Settings(guidance=0.0, guidance_per_step=(0.0, 0.0, 2.0)), 2 * 14),
        (Settings(guidance=2.0, stop=2), 2 * 5),
        (Settings(guidance=2.0, guided_steps=1), 14),
        (Settings(guidance=2.0, stop=1), 1),
    ],
)
def test_collectives_of_sampling_are_those_of_its_rows(settings, rows):
    run = Run(model=Star(depth=3, width=16, heads=2, sides=(1, 2, 3)), sampling=settings)
    batch = workload.Workload(
        images=4,
        programs={},
        resident={'parameters': {}},
        trained=None,
        counted_programs={},
        needed_programs={},
        notes=(),
    )
    (sums,) = analytic.collectives(run, batch, (1, 1, 2, 1), topologies.parse_topology('2xH100'))
    assert sums.bytes == 4 * rows * analytic.SUMS_PER_LAYER * 3 * 16 * 4


def test_traffic_counts_main_memory_alone():
    """Prefetches, collectives and one layer's slice per iteration, but no forwarded operands."""
    matrix, layer = 4 * 1024 * 256, 2 * 4 * 64
    collectives = matrix + 2 * matrix  # the operand of the first is on the chip
    assert hlo.HloText(HLO, 4).traffic() == matrix + collectives + 30 * (layer + 4)


@pytest.mark.parametrize(
    'details, expected',
    [
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ('replica_groups=[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ('replica_groups={{0,5},{1,4}}, to_apply', [[0, 5], [1, 4]]),
        ('replica_groups={{0,5},{1,4,2}}, to_apply', [[0, 5]]),
        ('replica_groups={}, to_apply', [list(range(8))]),
    ],
)
def test_parse_groups_reads_every_notation(details, expected):
    np.testing.assert_array_equal(hlo.parse_groups(details, 8), expected)


def test_hlo_text_parses_a_program_compiled_here():
    def five_products(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=5)[0]

    mesh = MeshShape(fsdp=8).build()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
    compiled = jax.jit(five_products, out_shardings=sharding).lower(x).compile()
    text = hlo.HloText(compiled.as_text(), 8)
    sent = collections.Counter()
    for item in text.collectives():
        sent[item.kind] += item.bytes
    assert set(sent) == {'all-gather'}
    assert sent['all-gather'] == 5 * 4 * 64 * 64 * 7 // 8
    assert text.traffic() > 5 * 4 * 64 * 64


def test_count_kinds_separates_products_by_precision():
    x, half = jnp.ones((4, 8)), jnp.ones((4, 8), jnp.bfloat16)

    def products(x: jax.Array, half: jax.Array) -> Any:
        exact = jnp.dot(x, x.T, precision='highest')
        looped = jax.lax.map(lambda row: jnp.dot(row, row, precision='default'), x)
        return exact, looped, half @ half.T

    assert count_kinds(products, x, half) == {'exact': 256, 'float32': 64, 'bfloat16': 256}
    assert count_flops(products, x, half) == 576


def test_jaxpr_memory_counts_live_arrays_and_traffic_of_products():
    def chain(x: jax.Array) -> jax.Array:
        y = x @ x
        return (y @ y).sum()

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    assert jaxpr_memory.measure(workload.Program(chain, (x,))).live == 2 * 4 * 16 * 16
    assert jaxpr_memory.measure(workload.Program(chain, (x,))).traffic == 2 * 3 * 4 * 16 * 16

    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ x, x), x, length=6)[1]

    assert jaxpr_memory.measure(workload.Program(looped, (x,))).live == 7 * 4 * 16 * 16
    assert jaxpr_memory.measure(workload.Program(looped, (x,))).traffic == 6 * 3 * 4 * 16 * 16


def test_weights_count_each_time_that_a_product_reads_them():
    weights = {'layers': jax.ShapeDtypeStruct((5, 16, 16), jnp.float32), 'bias': jnp.ones(16)}
    x = jax.ShapeDtypeStruct((2, 16), jnp.bfloat16)

    def run(weights: dict, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return x @ kernel.T.astype(x.dtype), None

        return jax.lax.scan(layer, x, weights['layers'])[0] + weights['bias'].astype(x.dtype)

    def train(weights: dict, x: jax.Array) -> dict:
        return jax.grad(lambda weights: run(weights, x).sum().astype(jnp.float32))(weights)

    assert jaxpr_memory.weights_read(run, weights, x) == 5 * 2 * 16 * 16

    def chosen(weights: dict, x: jax.Array) -> jax.Array:
        branches = [lambda x, k=k: x @ weights['layers'][k].astype(x.dtype) for k in range(5)]
        return jax.lax.scan(lambda x, k: (jax.lax.switch(k, branches, x), None), x, np.arange(5))[0]

    assert jaxpr_memory.weights_read(chosen, weights, x) == 5 * 2 * 16 * 16
    assert count_flops(chosen, weights, x) == 5 * 2 * 2 * 16 * 16
    # The gradient reads all of them again, to pass it on to the layer below.
    assert jaxpr_memory.weights_read(train, weights, x) == 2 * 5 * 2 * 16 * 16


@pytest.mark.parametrize(
    'dtype, platform, splits_rows, fused_there',
    [
        ('bfloat16', 'gpu', False, True),
        ('bfloat16', 'tpu', False, True),
        ('float32', 'tpu', False, True),
        ('float32', 'gpu', False, False),  # cuDNN computes half precision alone
        ('bfloat16', 'gpu', True, False),  # and takes no bounds that differ between rows
        ('bfloat16', 'cpu', False, False),
    ],
)
def test_scores_are_traffic_only_where_no_fused_kernel_computes_them(
    dtype, platform, splits_rows, fused_there
):
    q_BLNH, k_BKMH = (
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 256, 2, 16), (1, 2, 256, 16))
    )
    kernel = fused.Counted(named('automatic', platform), splits_rows)
    bounds = StaticVisibility.of(np.repeat([128, 256], 128))

    def attend(q_BLNH: jax.Array, *kv: jax.Array) -> jax.Array:
        return kernel(q_BLNH, (), KV(*kv), Visibility(bounds=bounds))

    def gradient(*args: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda args: attend(*args).astype(jnp.float32).sum())(args)

    args, size = (q_BLNH, k_BKMH, k_BKMH), 256 * 2 * 16 * jnp.dtype(dtype).itemsize
    forward, both = (
        jaxpr_memory.measure(workload.Program(program, args)).traffic
        for program in (attend, gradient)
    )
    # Queries, keys, values and the result; with the gradient, these and the gradients of each.
    expected = 4 * size, (4 + 8) * size
    assert ((forward, both) == expected) is fused_there
    assert forward >= expected[0] and both >= expected[1]


def test_gpus_are_not_bound_by_scores_that_are_never_written():
    run = config.load_run(CONFIGS / 'star_d16_256.py', Run)
    model = dataclasses.replace(run.model, depth=2)
    run = dataclasses.replace(run, model=model, cache='somewhere', text_features='cached')

    def traffic(**changes: Any) -> int:
        changed = dataclasses.replace(run, **changes)
        return analytic.program_needs(changed, 8, workload.training)['training step'].traffic

    rows, heads = model.schedule.length, model.heads
    scores = 8 * model.depth * heads * int(np.sum(model.schedule.visible_rows)) * 4
    assert traffic(attention='by_scale') - traffic() > 2 * scores > 0.2 * traffic()
    assert rows == 680


@pytest.mark.parametrize(
    'name, chip, chips, local_chips',
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
def test_parse_topology_reads_every_kind_of_name(name, chip, chips, local_chips):
    pod = topologies.parse_topology(name)
    assert (pod.chip.name, pod.chips, pod.local_chips) == (chip, chips, local_chips)
    assert pod.platform == ('tpu' if chip.startswith('v') else 'gpu')


@pytest.mark.parametrize(
    'name, message',
    [
        ('v9-128', 'unknown topology'),
        ('8xA100', 'unknown topology'),
        ('0xH100', 'has 0 chips'),
        ('1000000xH100', 'has 1,000,000 chips, expected 1 to'),
        ('v5p-127', 'names count TensorCores'),
        ('v5e-100', 'names count chips, expected 1, 4'),
        ('v5p:4x4', '3 sides, such as v5p:4x4x4'),
    ],
)
def test_parse_topology_refuses_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        topologies.parse_topology(name)


def test_roof_is_the_largest_of_its_bounds():
    chip = dataclasses.replace(CHIPS['H100'], links=1e9, network=1e8)
    within = {'kind': 'all-gather', 'group_size': 8, 'local_size': 8, 'axes': ('tensor',)}
    across = {'kind': 'all-reduce', 'group_size': 16, 'local_size': 8, 'axes': ('data',)}
    collectives = [Collective(count=1, bytes=10**9, **item) for item in (within, across)]
    flops = {'bfloat16': int(chip.bfloat16), 'exact': 0}
    roof = compute_roof(
        links.Switches(chip=chip),
        sizes=(1, 1, 4, 1),
        flops=flops,
        traffic=0,
        collectives=collectives,
    )
    # The 8 devices of a node send 8/15 of the sum together: each an eighth of it.
    away = 8 / 15 / 8
    assert (roof.compute, roof.memory) == (0.25, 0.0)
    assert roof.links == pytest.approx(1 + (1 - away))
    assert roof.network == pytest.approx(10 * away)
    assert roof.axes == pytest.approx({'data': 1 - away, 'tensor': 1.0})
    assert (roof.seconds, roof.limit) == (roof.links, 'links')
    assert dataclasses.replace(roof, network=3.0).limit == 'network'


def test_choose_mesh_splits_heads_and_tokens_where_the_batch_does_not_divide():
    run = config.load_run(CONFIGS / 'star_d30_256.py', Run)
    for name in ('v5e-256', 'v5p-128', '64xH100'):
        pod = topologies.parse_topology(name)
        shape = search.choose_mesh(run, pod, trains=True)
        data, fsdp, tensor, sequence = shape.sizes(pod.chips)
        assert (data * fsdp, tensor) == (32, 2)
        assert data * fsdp * tensor * sequence == pod.chips
        assert f'--mesh.fsdp {fsdp}' in search.mesh_options(shape) or fsdp == 1


def test_workload_of_a_published_stage_needs_no_local_files():
    run = config.load_run(CONFIGS / 'star_d16_256.py', Run)
    work = workload.training(run, MeshShape(fsdp=8).abstract_mesh(64), 'cpu')
    size = {name: rules.device_bytes(tree) for name, tree in work.resident.items()}
    count = 274_934_272 - 1001 * 1024  # as in tests/published_configs_test.py
    assert size['parameters'] == pytest.approx(4 * count / 8, rel=0.01)
    assert size['optimizer'] == pytest.approx(2 * size['parameters'], rel=1e-4)
    assert size['text encoder'] == pytest.approx(4 * 340e6 / 8, rel=0.01)
    assert size['tokenizer'] == pytest.approx(4 * 109e6, rel=0.01)
    assert len(work.notes) == 2 and 'clip' in work.notes[1]


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Run:
    path = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')
    return dataclasses.replace(tiny.STAR, tokenizer=path, batch=16, text_features='inside', ema=0.9)


def plan(run: Run, name: str, memory: float | None = None, **options: Any) -> Any:
    """The plan for a topology, whose chips may have another amount of memory."""
    pod = topologies.parse_topology(name)
    if memory:
        pod = dataclasses.replace(pod, chip=dataclasses.replace(pod.chip, memory=memory))
    return planning.plan(run, pod, config='tiny', **options)


def test_plan_counts_memory_and_collectives_of_gpus(run):
    run = dataclasses.replace(run, mesh=MeshShape(fsdp=2))
    report = plan(dataclasses.replace(run, attention='flash'), '8xA100-80G', price=2.0)
    on_one_chip = workload.training(run, MeshShape().abstract_mesh(1), 'cpu').resident
    memory = report.memory
    for name, size in memory.resident.items():
        ways = {'tokenizer': 1, 'batch': 8}.get(name, 2)
        assert size == pytest.approx(rules.device_bytes(on_one_chip[name]) / ways, rel=0.03)
    assert memory.fits and memory.total == sum(memory.resident.values()) + (
        memory.activations + memory.temporaries
    )
    assert memory.temporaries >= memory.resident['parameters']  # their gradients
    assert report.largest_batch > 1000 and not report.compiled
    assert not report.largest_batch_compiled
    kinds = {(item.kind, item.group_size) for item in report.collectives}
    assert kinds == {('all-gather', 2), ('reduce-scatter', 2), ('all-reduce', 4)}
    assert report.images_per_second == pytest.approx(run.batch / report.seconds)
    assert 0 < report.mfu < 1 and report.flops == report.needed_flops
    assert report.to_json()['bounds']['hours'] == report.hours
    assert len(plan_report.tables(report)) == 4
    text = ' '.join(plan_report.sentences(report))
    assert text.startswith('it fits') and 'lower bound of a step' in text
    assert set(report.replica_sum) == {'float32', 'bfloat16'}
    (sent,) = (item.bytes for item in report.collectives if item.kind == 'all-reduce')
    assert report.replica_sum['float32'] == pytest.approx(sent / 300e9)
    assert 'sum of gradients over data: lower bounds of' in text
    assert 'upper bounds: ' in text and 'at least' not in text and 'predict' not in text
    checkpoint = sum(memory.resident[name] for name in workload.STATE)
    assert report.checkpoint == pytest.approx(2 * checkpoint, rel=0.03)  # fsdp splits it in two
    assert report.checkpoint_copy == report.checkpoint and 'a checkpoint has' in text
    remats = [item.name for item in report.alternatives]
    assert remats == ['this run', '--remat dots', '--remat full']
    own, dots, full = report.alternatives
    assert own.seconds == pytest.approx(report.seconds) and own.total == memory.total
    assert full.flops > dots.flops > own.flops == report.flops
    assert full.temporaries < dots.temporaries < own.temporaries
    error = {'config': 'a', 'topology': 'b', 'error': 'c'}
    rows = plan_report.markdown([report.to_json(), error])
    assert len({line.count('|') for line in rows.splitlines()}) == 1


def test_plan_advises_changes_where_a_run_does_not_fit(run):
    run = dataclasses.replace(run, cache='somewhere', mesh=MeshShape(data=8))
    report = plan(run, '8xA100-80G', memory=1.5e6)
    assert not report.memory.fits and report.largest_batch < run.batch
    text = ' '.join(plan_report.sentences(report))
    assert 'does not fit' in text and f'--batch {report.largest_batch}' in text
    assert '--remat' in text and '--mesh.fsdp' in text and 'keep-tokens' in text


def test_remat_lowers_live_memory():
    model = Star(depth=6, width=32, heads=2, sides=(1, 2, 4), text_width=384)
    run = Run(model=model, cache='somewhere', tokenizer='nowhere')

    def live(remat: Remat) -> int:
        changed = dataclasses.replace(run, remat=remat)
        needs = analytic.program_needs(changed, 8, workload.training)
        return needs['training step'].live

    assert live('full') < 0.75 * live('none')
    assert live('full') < live('dots') < live('none')


def make_estimator(run: Run, name: str, **chip: Any) -> estimate.Estimator:
    """The estimator of a training run on a topology, whose chips may have other rates."""
    pod = topologies.parse_topology(name)
    pod = dataclasses.replace(pod, chip=dataclasses.replace(pod.chip, **chip))
    shape = search.choose_mesh(run, pod, trains=True)
    return estimate.Estimator(
        run=run,
        pod=pod,
        make_workload=workload.training,
        shape=shape,
        devices=(),
        compiles=False,
        on_progress=lambda _: None,
    )


def test_a_batch_is_compared_with_neighbours_that_need_no_other_axes(run):
    """24 images split over 8 of 16 chips; 16 and 32 split over all."""
    estimator = make_estimator(dataclasses.replace(run, batch=24), '16xH100')
    assert estimator.sizes == (8, 1, 2, 1)
    flops = {'training step': {'bfloat16': 24 * 10**9}, 'tokenizer': {}}
    smaller, larger = planning.other_batches(estimator, trains=True, flops=flops)
    assert [item.batch for item in (smaller, larger)] == [16, 32]
    assert [item.flops for item in (smaller, larger)] == [16 * 10**9, 32 * 10**9]
    assert all(item.mesh | {'tensor': 1, 'sequence': 1} == item.mesh for item in (smaller, larger))
    assert larger.name == '--batch 32 --mesh.fsdp 1'
    even = make_estimator(dataclasses.replace(run, batch=32), '16xH100')
    assert not list(planning.other_batches(even, trains=True, flops=flops))


def test_advice_names_a_batch_without_other_axes_that_is_faster_and_fits():
    fields = {'mesh': {}, 'temporaries': 0, 'total': 0, 'flops': 0}
    own, remat, slow, fast, larger = (
        plan_report.Alternative(
            name=name, batch=batch, images=batch, seconds=seconds, fits=fits, **fields
        )
        for name, batch, seconds, fits in (
            ('this run', 480, 1.0, True),
            ('--remat none', 480, 0.5, True),
            ('--batch 256', 256, 0.6, True),
            ('--batch 512 --mesh.fsdp 4', 512, 0.9, True),
            ('--batch 1024', 1024, 0.9, False),
        )
    )
    (text,) = planning.advise_batch([own, remat, slow, fast, larger])
    assert text.startswith('--batch 512 --mesh.fsdp 4 splits') and '569 images/s' in text
    assert 'instead of 480' in text
    assert not planning.advise_batch([own, remat, slow, larger])
    assert not planning.advise_batch([])


def test_estimates_contain_a_sample_grid(run):
    """A grid needs copies of the weights, and two images on each of eight devices."""
    estimator = make_estimator(run, '8xH100')
    estimated = estimator.count(run.batch)
    resident = {
        name: rules.device_bytes(tree) for name, tree in estimated.workload.resident.items()
    }
    assert estimated.grid > resident['parameters']
    sizes = dataclasses.replace(estimated, grid=10**12)
    assert sizes.total == 10**12 + sum(resident.values()) and not estimator.fits(sizes)
    assert search.largest_batch(estimator, estimated).batch > 0
    assert search.largest_batch(estimator, sizes).batch == 0
    images = dataclasses.replace(run.pace, images=0)
    without = dataclasses.replace(estimator, run=dataclasses.replace(run, pace=images))
    assert not without.count(run.batch).grid


@pytest.mark.parametrize(
    'changes, words, absent',
    [
        ({}, ['text encoder', 'tokenizer', '--cache FOLDER --text-features cached'], 'FOLDER`'),
        (
            {'cache': 'x'},
            ['text encoder', '--cache x --text-features cached'],
            'the tokenizer takes',
        ),
        (
            {'text_features': 'cached'},
            ['the tokenizer takes', '--cache FOLDER`'],
            '--text-features',
        ),
    ],
)
def test_advice_names_the_options_that_remove_frozen_models(run, changes, words, absent):
    """A cache of codes alone leaves a text encoder inside the training program."""
    estimator = make_estimator(dataclasses.replace(run, **changes), '8xH100')
    flops = {'training step': {'bfloat16': 10**15, 'exact': 10**15}}
    if 'cache' not in changes:
        flops['tokenizer'] = {'float32': 10**15, 'exact': 10**16}
    (text,) = planning.advise_cache(estimator, flops)
    assert all(word in text for word in words) and absent not in text
    assert not planning.advise_cache(estimator, {'training step': {'bfloat16': 1}})


def test_plan_of_sampling_holds_parameters_and_tokenizer(run):
    run = dataclasses.replace(run, mesh=MeshShape(fsdp=2))
    report = plan(run, '2xH100', samples=True, buckets=((0, 1),), search=False)
    assert set(report.memory.resident) == {'parameters', 'tokenizer'}
    assert {item.kind for item in report.collectives} == {'all-gather'}


@pytest.mark.parametrize(
    'words, message',
    [
        (['--topology', 'v7-8'], "unknown topology 'v7-8'"),
        ([], 'no --topology is given'),
        (['--topology', '8xH100', '--mesh.fsdp', '3'], 'choose sizes whose product is 8'),
        (['--topology', '8xH100', '--batch', '12', '--mesh.fsdp', '8'], 'multiple of 8'),
        (['--topology', '8xH100', '--price', '-1'], 'not negative'),
        (['--topology', '8xH100', '--price', 'nan'], 'must be a number'),
        (['--topology', '8xH100', '--attention', 'splash'], 'splash is a kernel of TPUs'),
        (['--topology', '8xH100', '--buckets', '0', '1'], 'add --sample'),
        (['--topology', 'v5e-4'], 'pip install'),
    ],
)
def test_plan_reports_mistakes_in_one_sentence(words, message, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'libtpu' else find(name)
    )
    assert cli.main(['plan', str(CONFIGS / 'star_d16_256.py'), *words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    'message, temporaries',
    [
        ('HLO temporaries (75.50G) exceeds available HBM (15.75G).', 75.5 * GIB),
        ('Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.', 19 * GIB),
    ],
)
def test_compile_for_reads_needed_memory_from_the_compilers_error(message, temporaries):
    class TooLarge:
        def lower(self) -> 'TooLarge':
            return self

        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {message}')

    program = workload.Program(TooLarge(), ())
    compiled = estimate.compile_for(program, arguments=GIB, devices=1, slices=1)
    assert (compiled.temporaries, compiled.text) == (temporaries, None)


@needs_libtpu
def test_plan_of_a_tpu_slice_can_be_counted(run, monkeypatch):
    monkeypatch.syspath_prepend(LIBTPU)
    report = plan(dataclasses.replace(run, mesh=MeshShape(fsdp=2)), 'v5e:2x2', compiles=False)
    assert not report.compiled and report.largest_batch and not report.largest_batch_compiled
    assert report.roofs['training step'].links > 0


@needs_libtpu
def test_plan_compiles_for_a_tpu_slice(run, compiled_here, monkeypatch):
    """The program's arguments are the resident arrays; gradients are summed over the slice."""
    monkeypatch.syspath_prepend(LIBTPU)
    run = dataclasses.replace(run, cache='somewhere', mesh=MeshShape(fsdp=1))
    report = plan(run, 'v5e:2x2', search=False)
    memory = report.memory
    assert report.compiled and report.complete and memory.fits
    summed = sum(item.bytes for item in report.collectives if item.kind == 'all-reduce')
    assert summed == pytest.approx(1.5 * memory.resident['parameters'], rel=0.2)
    roof = report.roofs['training step']
    assert roof.memory > 0 and set(roof.axes) == {'data'} and roof.links == roof.axes['data'] > 0


@needs_libtpu
@pytest.mark.slow
def test_kernels_of_a_tpu_compile_for_replicas_that_sum_late(
    run, compiled_here, monkeypatch, tmp_path
):
    """Float32 gradients are summed once over `data`, after both micro-batches."""
    monkeypatch.syspath_prepend(LIBTPU)
    model = dataclasses.replace(run.model, sides=(1, 2, 4, 12))  # so many rows have a kernel
    tokenizer = dataclasses.replace(tiny.TOKENIZER.model, grids=model.schedule.grids)
    params = tiny.random_params(tokenizer.abstract())
    folder.write(tmp_path, folder.StoredTokenizer(config=tokenizer, params=params))
    optimizer = dataclasses.replace(run.optimizer, accumulate=2)
    run = dataclasses.replace(
        run,
        model=model,
        tokenizer=str(tmp_path),
        optimizer=optimizer,
        cache='somewhere',
        dtype='bfloat16',
        attention='splash',
        mesh=MeshShape(fsdp=2),
    )
    with jax.default_matmul_precision('default'):  # the kernel has none for all bits of bfloat16
        report = plan(run, 'v5e:2x2', search=False)
    assert report.compiled and report.complete
    (sent,) = (item.bytes for item in report.collectives if item.axes == ('data',))
    held = report.memory.resident['parameters']
    assert held < sent < 1.05 * held  # and the metrics, which are no small part here
