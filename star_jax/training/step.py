"""What does one training step of any transformer do?

Codes of a frozen tokenizer, teacher forcing, cross-entropy (STAR specification 4). A family comes
in as its network, its tokenizer and its conditions: arrays with one row per image.
"""

import dataclasses
import functools
from typing import Any

import jax
import optax
from flax import linen as nn

from star_jax.core import condition, pixels
from star_jax.core.schedule import Schedule
from star_jax.nn.transformer import Transformer, drop_paths
from star_jax.training.optimizer import gradient_norm
from star_jax.training.state import TrainState

Scalars = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What training does besides predicting.

    `condition_drop`: probability of the unprompted condition. `drop_path`: rate of the deepest
    layer. `keep_tokens`: tokens kept in training, the others dropped from the last scale (0: all).
    `ema`: decay of the averaged parameters.
    """

    condition_drop: float = 0.0
    drop_path: float = 0.0
    keep_tokens: int = 0
    ema: float = 0.0


def train(
    model: Transformer,
    tokenizer: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    state: TrainState,
    frozen: Any,
    images: jax.Array,
    prompted: Any,
    unprompted: Any,
    key: jax.Array,
) -> tuple[TrainState, Scalars]:
    """One update from uint8 `images` [B, H, W, 3] and their conditions.

    `frozen` are the tokenizer's parameters; `unprompted` holds one row. Returns the scalars of
    `scales` and the gradient norm before clipping (0 where updates are still accumulated).
    """
    drop_key, path_key, thin_key = jax.random.split(key, 3)
    codes_BL, inputs = teach(tokenizer, frozen, images)
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
        inputs=inputs,
        codes_BL=codes_BL,
        conditions=condition.choose(drop_B, prompted, unprompted),
        rows=rows,
        paths=paths,
    )

    def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        nll_BL, hit_BL = losses(params)
        return nll_BL.mean(), (nll_BL.mean(0), hit_BL.mean(0))

    gradients, (nll_L, hit_L) = jax.grad(loss, has_aux=True)(state.params)
    state = state.update(gradients, optimizer, recipe.ema)
    return state, scales(model.schedule, nll_L, hit_L) | {'gradient_norm': gradient_norm(state.opt)}


def score(
    model: Transformer,
    tokenizer: nn.Module,
    params: Any,
    frozen: Any,
    images: jax.Array,
    prompted: Any,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and hit of every token of images, [B, L], nothing dropped."""
    codes_BL, inputs = teach(tokenizer, frozen, images)
    return token_losses(model, tokenizer, params, inputs, codes_BL, prompted)


def teach(tokenizer: nn.Module, frozen: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes [B, L] of uint8 images, and the inputs that teacher forcing makes of them."""
    apply = functools.partial(tokenizer.apply, {'params': frozen})
    codes_BL = apply(pixels.to_signed(images), method='encode')
    return codes_BL, apply(codes_BL, method='inputs')


def token_losses(
    model: Transformer,
    tokenizer: nn.Module,
    params: Any,
    inputs: jax.Array,
    codes_BL: jax.Array,
    conditions: Any,
    rows: jax.Array | None = None,
    paths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and hit of every token that is kept, [B, L] float32.

    `rows` are those that token dropping keeps (None: all), `paths` scales of stochastic depth.
    """
    apply = functools.partial(model.apply, {'params': params})
    features_BLD = apply(inputs, conditions, rows, paths, method='features')
    if rows is None:
        features_BLD = features_BLD[:, model.schedule.drawing_rows]
    else:
        codes_BL = codes_BL[:, rows]
    logits_BLV = apply(features_BLD, conditions, method='head')
    codes = tokenizer.codes
    return codes.nll(logits_BLV, codes_BL), codes.hits(logits_BLV, codes_BL)


def scales(schedule: Schedule, nll_L: jax.Array, hit_L: jax.Array) -> Scalars:
    """Means over all tokens and over those of each scale.

    Dropped tokens are of the last scale, so the first L of the schedule's tokens tell the scale.
    """
    scalars = {'loss': nll_L.mean(), 'accuracy': hit_L.mean()}
    scale_L = schedule.scale_of_token[: len(nll_L)]
    count = int(scale_L.max()) + 1
    for scale in range(count if count > 1 else 0):
        here = scale_L == scale
        scalars |= {f'loss/{scale}': nll_L[here].mean(), f'accuracy/{scale}': hit_L[here].mean()}
    return scalars
