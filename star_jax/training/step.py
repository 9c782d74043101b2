"""What does one training step of any transformer do?

Codes of a frozen tokenizer, teacher forcing, cross-entropy (STAR specification 4). A family comes
in as its network, its tokenizer and its conditions: arrays with one row per image.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from star_jax.core import condition
from star_jax.core.schedule import Schedule
from star_jax.losses.tokens import Scalars, scales, teach, token_losses
from star_jax.nn.blocks import drop_paths
from star_jax.nn.transformer import Transformer
from star_jax.training.optimizer import gradient_norm
from star_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What training does besides predicting.

    `condition_drop`: probability of the unprompted condition. `drop_path`: rate of the deepest
    layer. `keep_tokens`: tokens kept in training, the others dropped from the last scale (0: all).
    `balance`: 0 where every token counts alike in the loss, 1 where every scale does, however few
    its tokens. `loss_scale`: what the loss is multiplied by before gradients are clipped.
    `ema`: decay of the averaged parameters.
    """

    condition_drop: float = 0.0
    drop_path: float = 0.0
    keep_tokens: int = 0
    balance: float = 0.0
    loss_scale: float = 1.0
    ema: float = 0.0


def train(
    model: Transformer,
    tokenizer: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    state: TrainState,
    frozen: Any,
    codes_BL: jax.Array,
    prompted: Any,
    unprompted: Any,
    key: jax.Array,
) -> tuple[TrainState, Scalars]:
    """One update from the codes of images and their conditions.

    `frozen` are the tokenizer's parameters; `unprompted` holds one row. Returns the scalars of
    `scales` and the gradient norm before clipping (0 where updates are still accumulated).
    """
    drop_key, path_key, thin_key = jax.random.split(key, 3)
    batch = len(codes_BL)
    drop_B = jax.random.bernoulli(drop_key, recipe.condition_drop, (batch,))
    rows = model.schedule.thin(thin_key, recipe.keep_tokens) if recipe.keep_tokens else None
    paths = None
    if recipe.drop_path:
        paths = drop_paths(path_key, model.depth, batch, recipe.drop_path)
    losses = functools.partial(
        token_losses,
        model,
        tokenizer,
        inputs=teach(tokenizer, frozen, codes_BL),
        codes_BL=codes_BL,
        conditions=condition.choose(drop_B, prompted, unprompted),
        rows=rows,
        paths=paths,
    )

    def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        nll_BL, hit_BL = losses(params)
        weights_L = token_weights(model.schedule, nll_BL.shape[1], recipe.balance)
        mean = recipe.loss_scale * (weights_L * nll_BL).mean()
        return mean, (nll_BL.mean(0), hit_BL.mean(0))

    gradients, (nll_L, hit_L) = jax.grad(loss, has_aux=True)(state.params)
    state = state.update(gradients, optimizer, recipe.ema)
    return state, scales(model.schedule, nll_L, hit_L) | {'gradient_norm': gradient_norm(state.opt)}


def token_weights(schedule: Schedule, count: int, balance: float) -> np.ndarray:
    """[count] float32 weights of the first tokens of a schedule in the loss; their mean is 1.

    Token dropping drops tokens of the last scale, so the first `count` tell the scales of all.
    """
    scale_L = schedule.scale_of_token[:count]
    weights_L = np.bincount(scale_L)[scale_L].astype(np.float32) ** -balance
    return weights_L / weights_L.mean()
