"""Does every mesh compute the same step of an Infinity on flipped bits?"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from infinity_test import BITS, TINY, tokenizer_of

from star_jax.core.condition import TextCondition
from star_jax.core.self_correction import SelfCorrection
from star_jax.core.settings import Settings
from star_jax.parallel import rules
from star_jax.parallel.mesh import AXES, MeshShape
from star_jax.sampling import program
from star_jax.training.program import Frozen, Recipe, StepInputs, TrainingProgram
from star_jax.training.state import TrainState, abstract_state

pytestmark = pytest.mark.usefixtures('compiled_here')

BATCH = 8
OPTIMIZER = tiny.OPTIMIZER.build(100)
GRIDS = ((1, 1), (2, 2), (4, 4))
MODEL = dataclasses.replace(
    TINY, grids=GRIDS, text_width=256, drop_path=0.2
)  # two heads pool the text, which the mesh splits


def text_of(*lengths: int) -> TextCondition:
    """Random texts of these lengths, at most five."""
    states = np.random.default_rng(1).normal(size=(len(lengths), 5, MODEL.text_width))
    mask = np.arange(5) < np.asarray(lengths)[:, None]
    states = np.float32(states) * mask[..., None]
    return TextCondition(states, np.int32(mask), np.float32(states[:, 0]))


def start(params: Any) -> TrainState:
    return TrainState.start(params, OPTIMIZER, ema=False)


def losses(shape: tuple[int, ...]) -> list[list[float]]:
    """Loss and gradient norm of two steps on a mesh; features, texts and keys are the same."""
    sizes = dict(zip(AXES, shape, strict=False))
    mesh = MeshShape(**sizes).build(jax.devices()[: int(np.prod(shape))])
    training = TrainingProgram(
        network=MODEL.build().with_sharding(mesh),
        tokenizer=tokenizer_of(GRIDS).build_training(SelfCorrection(strength=0.5)),
        optimizer=OPTIMIZER,
        recipe=Recipe(condition_drop=0.5, drop_path=MODEL.drop_path, balance=0.5),
    )
    state = start(jax.tree.map(np.asarray, tiny.random_params(MODEL.abstract())))
    abstract = abstract_state(start, MODEL.abstract(), mesh)
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    features = np.random.default_rng(0).normal(size=(BATCH, 4, 4, BITS)).astype(np.float32)
    inputs = StepInputs(encoded=features, prompts=text_of(*(1 + n % 5 for n in range(BATCH))))
    frozen = Frozen(tokenizer=tiny.random_params(tokenizer_of(GRIDS).abstract()), empty=text_of(1))
    inputs = rules.shard_batch(inputs, mesh)
    frozen = jax.device_put(frozen, rules.replicated(mesh))
    train, results = jax.jit(training.train), []
    for step in range(2):
        key = jax.random.fold_in(jax.random.key(7), step)
        state, metrics = train(state, frozen, (inputs,), key[None])
        results.append([float(metrics['loss']), float(metrics['gradient_norm'])])
    return results


def test_every_mesh_flips_the_same_bits_and_computes_the_same_step():
    one = losses((1, 1, 1))
    for shape in ((4, 2, 1), (2, 2, 2)):
        np.testing.assert_allclose(losses(shape), one, rtol=1e-5, err_msg=str(shape))
    assert one[0] != one[1]


def test_no_device_holds_the_rows_of_all_images_where_weights_are_split():
    """A partitioner that splits embedded inputs along channels gathers them to stack the rows."""
    mesh, tokenizer = MeshShape(data=2, fsdp=4).build(), tokenizer_of(GRIDS)
    params = {
        'model': rules.abstract(MODEL.abstract(), mesh),
        'tokenizer': rules.abstract(tokenizer.abstract(), mesh),
    }
    inputs = program.inputs(
        MODEL,
        Settings(guidance=3.0, top_k=0, top_p=0.0),
        keys_B=program.image_keys(range(BATCH)),
        prompted=text_of(*(1 + n % 5 for n in range(BATCH))),
        empty=text_of(1),
    )
    split = (inputs.keys_B, inputs.prompted)
    keys_B, prompted = jax.device_put(split, rules.batch_sharding(mesh))
    network = MODEL.build().with_sharding(mesh)
    compiled = program.compile_program(network, tokenizer.build()).lower(
        params, inputs.replace(keys_B=keys_B, prompted=prompted)
    )
    gathered = re.findall(r'= (\w+\[[\d,]*\])\S* all-gather\(', compiled.compile().as_text())
    rows = re.compile(rf'f32\[{2 * BATCH},\d+,{MODEL.width}\]')
    assert gathered and not list(filter(rows.fullmatch, gathered))
