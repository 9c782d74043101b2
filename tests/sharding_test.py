"""Is a training step the same on every mesh, and where does each parameter lie?"""

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
    """A mesh of these sizes along the first axes, over as many of the devices."""
    shape = dict(zip(AXES, sizes, strict=False))
    return MeshShape(**shape).build(jax.devices()[: int(np.prod(sizes))])


def batch() -> tuple[np.ndarray, TextCondition]:
    """Codes [B, L] and captions."""
    random = np.random.default_rng(0)
    shape = (BATCH, SHAPE.schedule.length)
    return random.integers(0, SHAPE.codes, shape, dtype=np.int32), text(random, BATCH)


def text(random: np.random.Generator, rows: int) -> TextCondition:
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
    some = text(np.random.default_rng(1), 1)
    return build_state(lambda key: model.init(key, inputs, some)['params'], OPTIMIZER, ema, key)


@pytest.fixture(scope='module')
def born_alone() -> TrainState:
    return jax.device_get(init_sharded(init, build_mesh(1, 1, 1), jax.random.key(0)))


def losses(shape: tuple[int, ...], state: TrainState) -> list[list[float]]:
    """Loss and gradient norm of three training steps from a state, on a mesh."""
    mesh = build_mesh(*shape)
    recipe = steps.Recipe(condition_drop=0.2)
    model = SHAPE.build().with_sharding(mesh)
    train = functools.partial(steps.train, model, VQ.build(), OPTIMIZER, recipe)
    # Donating what was put from the host could write into the host's copy.
    train = jax.jit(train)
    where = rules.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = jax.device_put(state, where)
    codes, prompted = rules.shard_batch(batch(), mesh)
    frozen = tiny.tokenizer_params(), text(np.random.default_rng(2), 1)
    frozen, empty = jax.device_put(frozen, rules.replicated(mesh))
    seen = []
    for step in range(3):
        key = jax.random.fold_in(jax.random.key(7), step)
        state, metrics = train(state, frozen, codes, prompted, empty, key)
        seen.append([float(metrics['loss']), float(metrics['gradient_norm'])])
    return seen


@pytest.fixture(scope='module')
def alone(born_alone) -> list[list[float]]:
    return losses((1, 1, 1), born_alone)


@pytest.mark.parametrize('shape', [(8, 1, 1), (4, 2, 1), (2, 2, 2), (2, 1, 2, 2)])
def test_every_mesh_computes_the_same_step(shape, born_alone, alone):
    np.testing.assert_allclose(losses(shape, born_alone), alone, rtol=1e-5)


def test_a_state_is_born_the_same_on_every_mesh(born_alone):
    split = jax.device_get(init_sharded(init, build_mesh(2, 2, 2), jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, split, born_alone)


def test_moments_and_averages_lie_where_their_parameters_do():
    placed = abstract_sharded(functools.partial(init, ema=True), build_mesh(2, 2, 2))
    where = [
        jax.tree.map(lambda leaf: leaf.sharding, tree)
        for tree in (placed.params, placed.ema, *(optax.tree.get(placed.opt, m) for m in MOMENTS))
    ]
    assert where[0]['blocks']['ffn']['fc1']['kernel'].spec == PartitionSpec(None, 'fsdp', 'tensor')
    assert where[1:] == [where[0]] * 3


def test_a_mesh_that_does_not_divide_the_heads_is_told(tmp_path):
    place = tiny.write_tokenizer(tmp_path / 'tokenizer')
    odd = dataclasses.replace(tiny.STAR.model, heads=1)
    mesh = MeshShape(data=4, tensor=2)
    job = TransformerJob(dataclasses.replace(tiny.STAR, model=odd, tokenizer=place, mesh=mesh))
    with pytest.raises(UserError, match=r'log_scale of shape \(2, 1\).*tensor=2.*that fit are 1$'):
        job.abstract()
