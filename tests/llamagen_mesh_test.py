"""Does every mesh compute the same step of a LlamaGen, and sample the same images?"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh
from llamagen_test import CODES, SQUARE, TEXT, text_of

from star_jax.core.condition import LabelCondition
from star_jax.core.settings import Settings
from star_jax.parallel import rules
from star_jax.parallel.mesh import AXES, MeshShape
from star_jax.sampling import trunks
from star_jax.training.program import Frozen, Recipe, StepInputs, TrainingProgram
from star_jax.training.sample_grid import SampleGrid
from star_jax.training.state import TrainState, abstract_state

pytestmark = pytest.mark.usefixtures('compiled_here')

BATCH = 8
CHANGED = {'codes': 12, 'row_dropout': 0.2, 'dropout': 0.2}  # 12 are split in two
TOKENIZER = dataclasses.replace(CODES, codes=12)
LENGTHS = tuple(1 + n % 3 for n in range(BATCH))
CASES = {
    'class': (
        dataclasses.replace(SQUARE, drop_path=0.2, **CHANGED),
        LabelCondition(np.arange(BATCH, dtype=np.int32) % SQUARE.classes),
        LabelCondition(np.int32([SQUARE.classes])),
    ),
    'text': (
        dataclasses.replace(TEXT, text_rows=4, grid=(4, 4), **CHANGED),
        text_of(*LENGTHS, padded=5),
        text_of(1, padded=5),
    ),
}
CASES['shared heads'] = (dataclasses.replace(CASES['class'][0], kv_heads=2), *CASES['class'][1:])


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    sizes = dict(zip(AXES, shape, strict=False))
    return MeshShape(**sizes).build(jax.devices()[: int(np.prod(shape))])


def losses(name: str, shape: tuple[int, ...]) -> list[list[float]]:
    """Loss and gradient norm of two steps on a mesh; codes, conditions and keys are the same."""
    model, prompts, empty = CASES[name]
    mesh = mesh_of(shape)
    optimizer = tiny.OPTIMIZER.build(100, constants=model.constants)
    program = TrainingProgram(
        network=model.build().with_sharding(mesh),
        tokenizer=TOKENIZER.build(),
        optimizer=optimizer,
        recipe=Recipe(condition_drop=0.5, drop_path=model.drop_path, constants=model.constants),
    )

    def start(params) -> TrainState:
        return TrainState.start(params, optimizer, ema=False)

    state = start(jax.tree.map(np.asarray, tiny.random_params(model.abstract())))
    abstract = abstract_state(start, model.abstract(), mesh)
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    codes = np.random.default_rng(0).integers(0, model.codes, (BATCH, 16)).astype(np.int32)
    inputs = rules.shard_batch(StepInputs(encoded=codes, prompts=prompts), mesh)
    frozen = Frozen(tokenizer=tiny.random_params(TOKENIZER.abstract()), empty=empty)
    frozen = jax.device_put(frozen, rules.replicated(mesh))
    train, results = jax.jit(program.train), []
    for step in range(2):
        key = jax.random.fold_in(jax.random.key(7), step)
        state, metrics = train(state, frozen, (inputs,), key[None])
        results.append([float(metrics['loss']), float(metrics['gradient_norm'])])
    return results


@pytest.mark.parametrize('name', CASES)
def test_every_mesh_computes_the_same_step(name):
    one = losses(name, (1, 1, 1))
    for shape in ((4, 2, 1), (2, 2, 2)):
        np.testing.assert_allclose(losses(name, shape), one, rtol=1e-5, err_msg=str(shape))
    assert one[0] != one[1]


def sampled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Four images of a sample grid on a mesh, from the layers of which each has its own arrays."""
    model, prompts, empty = CASES[name]
    mesh, made = mesh_of(shape), []
    params = {'model': model.abstract(), 'tokenizer': TOKENIZER.abstract()}
    shardings = {name: rules.shardings(part, mesh, '') for name, part in params.items()}
    params = jax.device_put(jax.tree.map(np.asarray, tiny.random_params(params)), shardings)
    grid = SampleGrid(
        config=model,
        settings=Settings(guidance=3.0, top_k=7, top_p=0.9),
        images=4,
        network=model.build().with_sharding(mesh),
        tokenizer=TOKENIZER.build('float32'),
        mesh=mesh,
        dtype='float32',
    )

    def run(params, inputs):
        made.append(params['layers'].params)
        return grid.program(params, inputs)

    four = jax.tree.map(lambda x: x[:4], prompts)
    empty = rules.shard(empty, rules.replicated(mesh))
    images = grid.sample(run, params, lambda _: four, [''] * 4, empty)
    (layers,) = made
    kernel = layers[0]['ffn']['out']['outputs_first']
    tensor = mesh.shape['tensor']
    assert kernel.sharding.shard_shape(kernel.shape)[1] * tensor == kernel.shape[1]
    return images


@pytest.mark.parametrize('name', CASES)
def test_every_mesh_samples_the_same_images(name, monkeypatch):
    monkeypatch.setattr(trunks, 'PIECE_ROWS', 8)
    one = sampled(name, (1, 1, 1))
    assert (one[0] != one[1]).any()
    assert np.abs(sampled(name, (2, 2, 2)).astype(int) - one).max() <= 1
