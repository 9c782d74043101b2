"""Does every mesh compute the same training step, and how is the state sharded?"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from star_jax.core.condition import TextCondition
from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.parallel.mesh import AXES, MeshShape
from star_jax.training import step as steps
from star_jax.training.state import TrainState, abstract_sharded, build_state, init_sharded
from star_jax.training.transformer import TransformerJob

pytestmark = pytest.mark.usefixtures('compiled_here')

BATCH, TOKENS = 8, 4
MOMENTS = ('mu', 'nu')
SHAPE = tiny.STAR.model
VQ = tiny.TOKENIZER.model
OPTIMIZER = tiny.OPTIMIZER.build(100)


def build_mesh(*sizes: int) -> jax.sharding.Mesh:
    """A mesh of these sizes along the first axes, over the first devices."""
    shape = dict(zip(AXES, sizes, strict=False))
    return MeshShape(**shape).build(jax.devices()[: int(np.prod(sizes))])


def batch() -> tuple[np.ndarray, TextCondition]:
    """Codes [B, L] and the conditions of captions."""
    random = np.random.default_rng(0)
    shape = (BATCH, SHAPE.schedule.length)
    return random.integers(0, SHAPE.codes, shape, dtype=np.int32), text_condition(random, BATCH)


def text_condition(random: np.random.Generator, rows: int) -> TextCondition:
    width = SHAPE.text_width
    return TextCondition(
        states_BTE=random.normal(size=(rows, TOKENS, width)).astype(np.float32),
        mask_BT=np.ones((rows, TOKENS), np.int32),
        pooled_BE=random.normal(size=(rows, width)).astype(np.float32),
    )


def init(key: jax.Array, ema: bool = False) -> TrainState:
    """The boxed state of the tiny STAR."""
    model = SHAPE.build()
    inputs = np.zeros((1, model.schedule.length - 1, SHAPE.channels), np.float32)
    condition = text_condition(np.random.default_rng(1), 1)
    return build_state(
        lambda key: model.init(key, inputs, condition)['params'], OPTIMIZER, ema, key
    )


@pytest.fixture(scope='module')
def single_device_state() -> TrainState:
    return jax.device_get(init_sharded(init, build_mesh(1, 1, 1), jax.random.key(0)))


def losses(shape: tuple[int, ...], state: TrainState) -> list[list[float]]:
    """Loss and gradient norm of three training steps on a mesh, from a given state."""
    mesh = build_mesh(*shape)
    recipe = steps.Recipe(condition_drop=0.2)
    model = SHAPE.build().with_sharding(mesh)
    train = functools.partial(steps.train, model, VQ.build(), OPTIMIZER, recipe)
    # The state is not donated: a donated array from the host may share the host's memory.
    train = jax.jit(train)
    shardings = rules.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = jax.device_put(state, shardings)
    codes, prompted = rules.shard_batch(batch(), mesh)
    frozen = tiny.tokenizer_params(), text_condition(np.random.default_rng(2), 1)
    frozen, empty = jax.device_put(frozen, rules.replicated(mesh))
    results = []
    for step in range(3):
        key = jax.random.fold_in(jax.random.key(7), step)
        state, metrics = train(state, frozen, codes, prompted, empty, key)
        results.append([float(metrics['loss']), float(metrics['gradient_norm'])])
    return results


@pytest.fixture(scope='module')
def single_device_losses(single_device_state) -> list[list[float]]:
    return losses((1, 1, 1), single_device_state)


@pytest.mark.parametrize('shape', [(8, 1, 1), (4, 2, 1), (2, 2, 2), (2, 1, 2, 2)])
def test_every_mesh_computes_the_same_step(shape, single_device_state, single_device_losses):
    np.testing.assert_allclose(losses(shape, single_device_state), single_device_losses, rtol=1e-5)


def test_init_sharded_gives_the_same_state_on_every_mesh(single_device_state):
    state = jax.device_get(init_sharded(init, build_mesh(2, 2, 2), jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, state, single_device_state)


def test_moments_and_averages_have_the_shardings_of_their_parameters():
    state = abstract_sharded(functools.partial(init, ema=True), build_mesh(2, 2, 2))
    shardings = [
        jax.tree.map(lambda leaf: leaf.sharding, tree)
        for tree in (state.params, state.ema, *(optax.tree.get(state.opt, m) for m in MOMENTS))
    ]
    assert shardings[0]['blocks']['ffn']['fc1']['kernel'].spec == PartitionSpec(
        None, 'fsdp', 'tensor'
    )
    assert shardings[1:] == [shardings[0]] * 3


def test_job_refuses_a_mesh_that_does_not_divide_the_heads(tmp_path):
    tokenizer = tiny.write_tokenizer(tmp_path / 'tokenizer')
    model = dataclasses.replace(tiny.STAR.model, heads=1)
    mesh = MeshShape(data=4, tensor=2)
    job = TransformerJob(
        dataclasses.replace(tiny.STAR, model=model, tokenizer=tokenizer, mesh=mesh)
    )
    with pytest.raises(UserError, match=r'log_scale of shape \(2, 1\).*tensor=2.*that fit are 1$'):
        job.abstract()
