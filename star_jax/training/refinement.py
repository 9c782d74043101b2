"""How is a refinement head taught?

Tokens of the refined scales are shown at random, and the head guesses the hidden ones from them and
from the features of the base model, which is frozen (STAR specification 9.1).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from star_jax.core import condition
from star_jax.core.codes import Index
from star_jax.core.schedule import Schedule
from star_jax.core.unmasking import Mode, share
from star_jax.losses.tokens import Scalars, teach
from star_jax.nn.blocks import drop_paths
from star_jax.nn.transformer import Transformer
from star_jax.training.optimizer import gradient_norm
from star_jax.training.state import TrainState
from star_jax.training.step import Recipe

SURE = 10.0  # the published logit of the extra class where a token is shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainLoss:
    """The mean cross-entropy of all hidden tokens."""

    def __call__(
        self, logits_BLV: jax.Array, codes_BL: jax.Array, shown_BL: jax.Array, length: int
    ) -> jax.Array:
        nll_BL = Index(logits_BLV.shape[-1]).nll(logits_BLV, codes_BL)
        return jnp.where(shown_BL, 0, nll_BL).sum() / jnp.maximum((~shown_BL).sum(), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedLoss:
    """The published one, over the codes and one class more, for tokens that are shown.

    A shown token adds a constant, a hidden one has a logit of 0 for that class; their sum is
    divided by all tokens of an image, whatever is refined or hidden.
    """

    def __call__(
        self, logits_BLV: jax.Array, codes_BL: jax.Array, shown_BL: jax.Array, length: int
    ) -> jax.Array:
        size = logits_BLV.shape[-1]
        logits_BLV = jnp.where(shown_BL[..., None], 0, logits_BLV)
        extra_BL1 = jnp.where(shown_BL, SURE, 0)[..., None]
        targets_BL = jnp.where(shown_BL, size, codes_BL)
        nll_BL = Index(size + 1).nll(jnp.concatenate([logits_BLV, extra_BL1], -1), targets_BL)
        return nll_BL.sum(1).mean() / length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unmasking:
    """How a refinement head is trained to predict hidden tokens from shown ones.

    Attributes:
        mode: distribution of the share of shown tokens: uniform (linear), mostly small (root), or
            mostly large (arccos, square, cosine).
        loss: mean cross-entropy of hidden tokens, or the published loss.
        decay_all: apply weight decay to biases and tables too, as published.
        noisy_base: apply stochastic depth to the frozen model, as published.
    """

    mode: Mode = 'arccos'
    loss: PlainLoss | ReleasedLoss = PlainLoss()
    decay_all: bool = True
    noisy_base: bool = False

    def shown(self, r_B: jax.Array, u_BL: jax.Array) -> jax.Array:
        """[B, L] bool: which tokens are shown, given uniform numbers of images and of tokens."""
        return u_BL < share(self.mode, r_B)[:, None]

    def draw(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """[B, L] bool: which tokens are shown."""
        image_key, token_key = jax.random.split(key)
        r_B, u_BL = jax.random.uniform(image_key, shape[:1]), jax.random.uniform(token_key, shape)
        return self.shown(r_B, u_BL)


def refined_rows(model: Transformer) -> np.ndarray:
    """The rows, which are the tokens, of the scales that the head refines."""
    first, end = model.schedule.starts[model.refiner.first], model.schedule.starts[-1]
    return np.arange(first, end)


def guess(
    model: Transformer,
    params: Any,
    inputs: jax.Array,
    vectors_BLC: jax.Array,
    conditions: Any,
    paths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Features [B, R, D] of the frozen model and logits [B, R, V] of the head, of refined tokens.

    `inputs` are those of teacher forcing, `vectors_BLC` [B, R, C] those of the tokens shown, zero
    for the hidden; `paths` are scales of stochastic depth of the base model.
    """
    apply, rows = functools.partial(model.apply, {'params': params}), refined_rows(model)
    features_BLD = apply(inputs, conditions, None, paths, method='features')[:, rows]
    features_BLD = jax.lax.stop_gradient(features_BLD)
    return features_BLD, apply(vectors_BLC, features_BLD, rows, conditions, method='refine')


def score(
    model: Transformer,
    tokenizer: nn.Module,
    params: Any,
    frozen: Any,
    codes_BL: jax.Array,
    shown_BL: jax.Array,
    conditions: Any,
    paths: jax.Array | None = None,
) -> jax.Array:
    """The head's logits [B, R, V] where `shown_BL` [B, R] of the refined codes are shown."""
    codes_BR = codes_BL[:, refined_rows(model)]
    vectors_BRC = tokenizer.apply({'params': frozen}, codes_BR, method='embed')
    vectors_BRC = vectors_BRC * shown_BL[..., None]
    inputs = teach(tokenizer, frozen, codes_BL)
    return guess(model, params, inputs, vectors_BRC, conditions, paths)[1]


def train(
    model: Transformer,
    tokenizer: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    unmasking: Unmasking,
    state: TrainState,
    frozen: Any,
    base: Any,
    codes_BL: jax.Array,
    prompted: Any,
    unprompted: Any,
    key: jax.Array,
) -> tuple[TrainState, Scalars]:
    """One update of the head, whose parameters alone are those of the state.

    `frozen` are the tokenizer's parameters and `base` those of the model without its head. Returns
    the loss, scores of the hidden tokens as of `scales`, and the gradient norm before clipping.
    """
    drop_key, path_key, show_key = jax.random.split(key, 3)
    batch, rows = len(codes_BL), refined_rows(model)
    drop_B = jax.random.bernoulli(drop_key, recipe.condition_drop, (batch,))
    conditions = condition.choose(drop_B, prompted, unprompted)
    shown_BL = unmasking.draw(show_key, (batch, len(rows)))
    paths = None
    if unmasking.noisy_base and recipe.drop_path:
        paths = drop_paths(path_key, model.depth, batch, recipe.drop_path)

    def loss(head: Any) -> tuple[jax.Array, jax.Array]:
        params = base | {'refiner': head}
        logits_BLV = score(model, tokenizer, params, frozen, codes_BL, shown_BL, conditions, paths)
        codes_BR = codes_BL[:, rows]
        value = unmasking.loss(logits_BLV, codes_BR, shown_BL, model.schedule.length)
        return value, hidden_sums(logits_BLV, codes_BR, shown_BL).sum(1)

    (value, sums_3L), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = state.update(gradients, optimizer, recipe.ema)
    told = scales(model.schedule, rows, sums_3L)
    return state, told | {'loss': value, 'gradient_norm': gradient_norm(state.opt)}


def hidden_sums(logits_BLV: jax.Array, codes_BL: jax.Array, shown_BL: jax.Array) -> jax.Array:
    """[3, B, L]: negative log-likelihood, hit and 1 of every hidden token, 0 of those shown."""
    codes = Index(logits_BLV.shape[-1])
    told = (codes.nll(logits_BLV, codes_BL), codes.hits(logits_BLV, codes_BL))
    return jnp.stack([*told, jnp.ones_like(told[0])]) * ~shown_BL


def scales(schedule: Schedule, rows: np.ndarray, sums_3L: Any) -> Scalars:
    """Means over all hidden tokens and over those of each scale, from sums as of `hidden_sums`."""
    scale_L = schedule.scale_of_token[rows]
    parts = {'': np.ones(len(rows), bool)}
    parts |= {f'/{scale}': scale_L == scale for scale in np.unique(scale_L)}
    told = {}
    for name, here in parts.items():
        nll, hits, count = (sums_L[here].sum() for sums_L in sums_3L)
        count = count.clip(1)
        told |= {f'loss{name}': nll / count, f'accuracy{name}': hits / count}
    return told
