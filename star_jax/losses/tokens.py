"""How well does a transformer predict the codes of images?

Codes of a frozen tokenizer, teacher forcing, cross-entropy (STAR specification 4): what a training
step descends and what every held-out loss reports.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import pixels
from star_jax.core.schedule import Schedule
from star_jax.nn.transformer import Transformer

Scalars = dict[str, jax.Array]


def score(
    model: Transformer,
    tokenizer: nn.Module,
    params: Any,
    frozen: Any,
    codes_BL: jax.Array,
    prompted: Any,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and hit of every token, [B, L], nothing dropped."""
    inputs = teach(tokenizer, frozen, codes_BL)
    return token_losses(model, tokenizer, params, inputs, codes_BL, prompted)


def encode(tokenizer: nn.Module, frozen: Any, images: jax.Array) -> jax.Array:
    """Codes [B, L] int32 of uint8 images [B, H, W, 3].

    A program of its own, so that codes kept on disk are those that training computes.
    """
    return tokenizer.apply({'params': frozen}, pixels.to_signed(images), method='encode')


def teach(tokenizer: nn.Module, frozen: Any, codes_BL: jax.Array) -> jax.Array:
    """The inputs that teacher forcing makes of codes: of all steps but the first."""
    return tokenizer.apply({'params': frozen}, codes_BL, method='inputs')


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
    features_BRD = apply(inputs, conditions, rows, paths, method='features')
    logits_BRV = apply(features_BRD, conditions, method='head')
    # Codes go to the rows that draw them, for rows that are split over devices cannot move cheaply.
    at_L = model.schedule.sampled_rows if rows is None else np.arange(len(rows))
    codes_BL = codes_BL if rows is None else codes_BL[:, rows]
    shape = (*features_BRD.shape[:2], *codes_BL.shape[2:])
    codes_BR = jnp.zeros(shape, codes_BL.dtype).at[:, at_L].set(codes_BL)
    codes = tokenizer.codes
    nll_BR, hit_BR = codes.nll(logits_BRV, codes_BR), codes.hits(logits_BRV, codes_BR)
    return nll_BR[:, at_L], hit_BR[:, at_L]


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
