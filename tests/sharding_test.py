"""Does every mesh compute the same training step, and how is the state sharded?"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from star_jax.core.condition import TextCondition
from star_jax.errors import UserError
from star_jax.nn.transformer import Transformer
from star_jax.parallel import rules
from star_jax.parallel.collectives import mesh_axes
from star_jax.parallel.mesh import AXES, MeshShape
from star_jax.parallel.rules import device_bytes
from star_jax.plan.hlo import HloText
from star_jax.training.build import init_params
from star_jax.training.gradients import Replicas
from star_jax.training.program import Frozen, Recipe, StepInputs, TrainingProgram, step_keys
from star_jax.training.state import TrainState, abstract_state, init_sharded
from star_jax.training.transformer_job import TransformerJob

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


def batch(seed: int = 0) -> StepInputs:
    """Codes [B, L] and the conditions of captions."""
    random = np.random.default_rng(seed)
    shape = (BATCH, SHAPE.schedule.length)
    codes_BL = random.integers(0, SHAPE.codes, shape, dtype=np.int32)
    return StepInputs(encoded=codes_BL, prompts=text_condition(random, BATCH))


def text_condition(random: np.random.Generator, rows: int) -> TextCondition:
    width = SHAPE.text_width
    return TextCondition(
        states_BTE=random.normal(size=(rows, TOKENS, width)).astype(np.float32),
        mask_BT=np.ones((rows, TOKENS), np.int32),
        pooled_BE=random.normal(size=(rows, width)).astype(np.float32),
    )


def init(key: jax.Array) -> Any:
    """The boxed parameters of the tiny STAR."""
    return init_params(tiny.STAR, key)


def start(params: Any, ema: bool = False) -> TrainState:
    """The state that starts with them."""
    return TrainState.start(params, OPTIMIZER, ema=ema)


@pytest.fixture(scope='module')
def single_device_state() -> TrainState:
    return jax.device_get(init_sharded(start, init, build_mesh(1, 1, 1), jax.random.key(0)))


def with_dropout(network: Transformer) -> Transformer:
    """The network, with dropout of rows and in blocks."""
    block = dataclasses.replace(network.block, dropout=0.1)
    return network.clone(row_dropout=0.2, block=block)


class Steps:
    """Training steps on a mesh, from a given state.

    Args:
        shape: the sizes of the mesh.
        state: the state before the first step.
        accumulate: micro-batches of a step.
        apart: whether the gradients of replicas are kept apart.
    """

    def __init__(
        self, shape: tuple[int, ...], state: TrainState, accumulate: int = 1, apart: bool = False
    ) -> None:
        self.mesh = build_mesh(*shape)
        self.accumulate = accumulate
        program = TrainingProgram(
            network=with_dropout(SHAPE.build()).with_sharding(self.mesh),
            tokenizer=VQ.build(),
            optimizer=OPTIMIZER,
            recipe=Recipe(condition_drop=0.2, drop_path=0.1),
            replicas=Replicas(mesh=self.mesh if apart else None),
        )
        abstract = abstract_state(start, SHAPE.abstract(), self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self.state = jax.device_put(state, shardings)
        empty = text_condition(np.random.default_rng(2), 1)
        frozen = Frozen(tokenizer=tiny.tokenizer_params(), empty=empty)
        frozen = jax.device_put(frozen, rules.replicated(self.mesh))
        self.batches = tuple(
            rules.shard_batch(batch(seed), self.mesh) for seed in range(accumulate)
        )
        self.others = frozen, self.batches
        # The state is not donated: a donated array from the host may share the host's memory.
        train = jax.jit(program.train, out_shardings=(shardings, None))
        self.train = train.lower(self.state, *self.others, self.keys(0)).compile()

    def keys(self, step: int) -> jax.Array:
        keys_A = step_keys(jax.random.key(7), step, self.accumulate)
        return jax.device_put(keys_A, rules.replicated(self.mesh))

    def run(self, count: int) -> list[list[float]]:
        """Loss and gradient norm of so many steps."""
        state, results = self.state, []
        for step in range(count):
            state, metrics = self.train(state, *self.others, self.keys(step))
            results.append([float(metrics['loss']), float(metrics['gradient_norm'])])
        return results

    def sent_along_data(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """Bytes that a device sends to other replicas in a step, by collective and mesh axes."""
        text, sent = HloText(self.train.as_text(), self.mesh.size, 1), {}
        for item in text.collectives():
            axes = mesh_axes(item, tuple(self.mesh.shape.values()))
            if 'data' in axes:
                sent[item.kind, axes] = sent.get((item.kind, axes), 0) + item.bytes
        return sent


def losses(shape: tuple[int, ...], state: TrainState) -> list[list[float]]:
    """Loss and gradient norm of three training steps on a mesh, from a given state."""
    return Steps(shape, state).run(3)


@pytest.fixture(scope='module')
def single_device_losses(single_device_state) -> list[list[float]]:
    return losses((1, 1, 1), single_device_state)


@pytest.mark.parametrize('shape', [(8, 1, 1), (4, 2, 1), (2, 2, 2), (2, 1, 2, 2)])
def test_every_mesh_computes_the_same_step(shape, single_device_state, single_device_losses):
    np.testing.assert_allclose(losses(shape, single_device_state), single_device_losses, rtol=1e-5)


@pytest.fixture(scope='module')
def accumulated_losses(single_device_state) -> list[list[float]]:
    return Steps((1, 1, 1), single_device_state, accumulate=2).run(3)


@pytest.mark.parametrize('shape', [(4, 2, 1), (2, 2, 2)])
def test_replicas_sum_their_gradients_once_per_update(
    shape, single_device_state, accumulated_losses
):
    steps = Steps(shape, single_device_state, accumulate=2, apart=True)
    np.testing.assert_allclose(steps.run(3), accumulated_losses, rtol=1e-5)
    held, data = device_bytes(steps.state.params), steps.mesh.shape['data']
    ((name, sent),) = steps.sent_along_data().items()
    assert name == ('all-reduce', ('data',))
    assert sent == pytest.approx(2 * held * (data - 1) / data, rel=0.02)  # and the metrics


def test_init_sharded_gives_the_same_state_on_every_mesh(single_device_state):
    state = jax.device_get(init_sharded(start, init, build_mesh(2, 2, 2), jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, state, single_device_state)


def test_moments_and_averages_have_the_shardings_of_their_parameters():
    with_ema = functools.partial(start, ema=True)
    state = abstract_state(with_ema, SHAPE.abstract(), build_mesh(2, 2, 2))
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
