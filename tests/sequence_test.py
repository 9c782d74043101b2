"""Is the loss of an image the same when its rows are split over devices, as are the logits?"""

import functools
import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from star_jax.core.codes import Index, Targets
from star_jax.core.condition import TextCondition
from star_jax.families.star import Star
from star_jax.losses import tokens
from star_jax.nn.transformer import Transformer
from star_jax.parallel import rules
from star_jax.parallel.mesh import MeshShape

pytestmark = pytest.mark.usefixtures('compiled_here')

SIDES = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)  # 1024 px: 9,451 rows
SIZES = {'depth': 1, 'width': 8, 'heads': 1, 'channels': 4, 'text_width': 8}
TOKENS = 4


def arguments(star: Star, batch: int) -> tuple[Any, jax.Array, jax.Array, TextCondition]:
    """Random parameters, inputs, codes and captions."""
    random, length = np.random.default_rng(0), star.schedule.length

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    params = jax.tree.map(lambda leaf: normal(*leaf.shape) / 2, nn.unbox(star.abstract()))
    inputs = normal(batch, length - 1, star.channels)
    codes = random.integers(0, star.codes, (batch, length), dtype=np.int32)
    width = star.text_width
    real = np.ones((batch, TOKENS), np.int32)
    return (
        params,
        inputs,
        codes,
        TextCondition(normal(batch, TOKENS, width), real, normal(batch, width)),
    )


def loss(model: Transformer, params: Any, *batch: Any) -> tuple[jax.Array, jax.Array]:
    """The mean loss, and that of every token."""
    inputs, codes, condition = batch
    index, targets = Index(model.to_logits.num_logits), Targets(inputs, codes)
    losses = tokens.token_losses(model, index, params, targets, condition)
    return losses.trained_BL.mean(), (losses.nll_BL, losses.hit_BL.mean())


def test_eight_devices_compute_the_loss_of_1024_px_that_one_computes():
    star = Star(sides=SIDES, codes=32, **SIZES)
    args = arguments(star, 1)
    models = [star.build().with_sharding(mesh) for mesh in (None, MeshShape(sequence=8).build())]
    alone, split = (jax.jit(functools.partial(loss, model))(*args) for model in models)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), split, alone)


def test_no_device_holds_all_logits():
    batch, star = 4, Star(sides=(1, 2, 4), codes=4096, **SIZES | {'heads': 2})
    mesh = MeshShape(data=2, tensor=2, sequence=2).build()
    model = star.build().with_sharding(mesh)
    params, *args = jax.eval_shape(lambda: arguments(star, batch))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, rules.abstract(star.abstract(), mesh))
    gradient = jax.grad(functools.partial(loss, model), has_aux=True)
    program = jax.jit(gradient, in_shardings=(shardings, *[rules.batch_sharding(mesh)] * len(args)))
    hlo = program.lower(params, *args).compile().as_text()
    sizes = [math.prod(map(int, shape.split(','))) for shape in re.findall(r'\w\[([\d,]+)\]', hlo)]
    rows = model.sharding.padded_length(star.schedule.length)
    assert max(sizes) == batch * rows * star.codes // mesh.size


def test_batch_groups_give_the_same_loss_on_any_mesh():
    star = Star(sides=(1, 2, 4), codes=32, released_cross_attention=True, **SIZES | {'heads': 2})
    args = arguments(star, 8)
    model = star.build().with_batch_groups(4)
    split = model.with_sharding(MeshShape(data=2, tensor=2, sequence=2).build())
    alone, split = (jax.jit(functools.partial(loss, network))(*args) for network in (model, split))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), split, alone)
