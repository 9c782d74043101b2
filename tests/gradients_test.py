"""Gradients of micro-batches and replicas become the mean gradient of an update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from star_jax.losses.refinement import PlainLoss, ReleasedLoss
from star_jax.parallel import gradient_sum_time, links, rules
from star_jax.parallel.chips import CHIPS, chip_of
from star_jax.parallel.mesh import MeshShape
from star_jax.training import summary
from star_jax.training.build import build_replicas
from star_jax.training.gradients import Replicas, accumulate
from star_jax.training.objective import Adversary
from star_jax.training.optimizer import AdamW
from star_jax.training.tokenizer_job import TokenizerJob


@pytest.fixture(scope='module')
def mesh():
    return MeshShape(data=4, fsdp=2).build()


def gradient(x_B2: jax.Array) -> jax.Array:
    """The gradient of a part of a batch: the sum over its images."""
    return x_B2.sum(0)


def test_replicas_have_neighbouring_images_and_sum_their_gradients(mesh):
    x_B2 = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)
    replicas = Replicas(mesh=mesh)
    apart_R2 = jax.jit(lambda x: replicas.map(gradient, x))(x_B2)
    np.testing.assert_allclose(apart_R2, x_B2.reshape(4, 4, 2).sum(1), rtol=1e-6)
    total_2 = jax.jit(lambda x: replicas.sum_gradients(replicas.map(gradient, x)))(x_B2)
    np.testing.assert_allclose(total_2, x_B2.sum(0), rtol=1e-6)
    whole = Replicas()
    np.testing.assert_array_equal(whole.sum_gradients(whole.map(gradient, x_B2)), gradient(x_B2))


def test_gradients_are_summed_in_the_dtype_of_the_run(mesh):
    x_B2 = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)
    replicas = Replicas(mesh=mesh, dtype='bfloat16')
    total_2 = jax.jit(lambda x: replicas.sum_gradients(replicas.map(gradient, x)))(x_B2)
    assert total_2.dtype == jnp.float32
    np.testing.assert_array_equal(total_2, total_2.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(total_2, x_B2.sum(0), rtol=0.02, atol=0.02)


def test_gradients_stay_apart_only_where_that_changes_the_sum(mesh):
    plain = dataclasses.replace(tiny.STAR, gradient_dtype='float32')
    half = dataclasses.replace(plain, dtype='bfloat16')
    twice = dataclasses.replace(tiny.OPTIMIZER, accumulate=2)
    assert build_replicas(plain, mesh).mesh is None
    assert build_replicas(half, mesh).mesh is mesh
    assert build_replicas(dataclasses.replace(half, gradient_dtype='bfloat16'), mesh).mesh is None
    assert build_replicas(dataclasses.replace(plain, optimizer=twice), mesh).mesh is mesh
    one_replica = MeshShape(data=1, fsdp=8).build()
    assert build_replicas(dataclasses.replace(half, optimizer=twice), one_replica).mesh is None


def test_micro_batches_have_their_numbers_and_a_mean_gradient():
    batches = [jnp.full(3, float(x)) for x in (1, 2, 6)]
    step = lambda carried, x, number: (x, number, carried + x[0])  # noqa: E731
    mean, numbers, carried = accumulate(step, batches, jnp.zeros(()))
    assert mean.tolist() == [3, 3, 3] and numbers.tolist() == [0, 1, 2] and carried == 9


@pytest.mark.parametrize('loss', [PlainLoss(), ReleasedLoss()])
def test_losses_of_parts_add_up_to_that_of_the_batch(loss):
    random = np.random.default_rng(0)
    logits_BRV = random.normal(size=(4, 5, 7)).astype(np.float32)
    codes_BR = random.integers(0, 7, (4, 5))
    shown_BR = random.random((4, 5)) < np.array([[1], [0.8], [0.5], [0.1]])

    def share(part: slice) -> float:
        arrays = (x[part] for x in (logits_BRV, codes_BR, shown_BR))
        return float(loss(*arrays, 20) * loss.weight(shown_BR[part]) / loss.weight(shown_BR))

    shares = [share(slice(first, first + 2)) for first in (0, 2)]
    assert sum(shares) == pytest.approx(float(loss(logits_BRV, codes_BR, shown_BR, 20)), rel=1e-6)


def test_a_tokenizer_learns_the_same_from_micro_batches_on_every_mesh():
    optimizer = dataclasses.replace(tiny.OPTIMIZER, accumulate=2)
    run = dataclasses.replace(tiny.TOKENIZER, optimizer=optimizer, plain_steps=0, restart_every=99)
    results = []
    for shape in (MeshShape(data=1, tensor=8), MeshShape(data=4, fsdp=2)):
        job = TokenizerJob(dataclasses.replace(run, mesh=shape))
        batches = next(job.batches(0))
        state, metrics = job.step(0, job.init(), batches)
        assert float(state.usage_KV.sum()) == 2 * run.batch * 21
        results.append(
            [float(x) for x in metrics.values()]
            + [float(state.params['quantiser']['codebook'].sum())]
        )
    np.testing.assert_allclose(*results, rtol=1e-4)


def test_both_dtypes_of_the_sum_are_timed_by_their_links():
    """16 GPUs of two nodes: of 2 x 15/16 x 4 GB, 14/15 stay in the node, and half crosses it."""
    fabric = links.Switches(chip=CHIPS['H100'])
    sizes, gradients = (16, 1, 1, 1), 4 * 10**9
    seconds = gradient_sum_time.replica_sum_seconds(fabric, gradients, sizes, local_chips=8)
    sent = 2 * gradients * 15 / 16
    away = sent * 8 / 15
    assert seconds['float32'] == pytest.approx(max((sent - away / 8) / 450e9, away / 8 / 50e9))
    assert seconds['bfloat16'] == pytest.approx(seconds['float32'] / 2)
    sentence = gradient_sum_time.sum_sentence(seconds, 'bfloat16')
    assert (
        sentence
        == 'lower bounds of 7.78 ms per step in bfloat16 (--gradient-dtype) and 15.6 ms in float32'
    )


def test_devices_are_known_by_what_jax_calls_them():
    assert chip_of('TPU v5 lite').name == 'v5e' and chip_of('NVIDIA H200').name == 'H200'
    assert chip_of('cpu') is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds) >= len(CHIPS)


def test_summary_has_a_line_for_the_sum_over_replicas(mesh):
    params = rules.abstract(tiny.STAR.model.abstract(), mesh)
    (line,) = summary.replica_sum(params, mesh, 'float32').values()
    assert line.endswith('MiB sent by each device, in float32')
    assert summary.replica_sum(params, MeshShape(fsdp=8).build(), 'float32') == {}
    of_tokenizer = summary.device_sum(mesh, 'bfloat16')
    assert of_tokenizer['sum of gradients'].startswith('in bfloat16 (--dtype)')
    assert summary.device_sum(MeshShape(tensor=8, data=1).build(), 'float32') == {}


def test_a_discriminator_has_no_micro_batches_of_its_own():
    with pytest.raises(ValueError, match='adversary.optimizer.accumulate 1, not 2'):
        Adversary(optimizer=AdamW(accumulate=2))
