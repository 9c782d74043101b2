"""How well does a transformer predict the codes of images?

Codes of a frozen tokenizer, teacher forcing, cross-entropy (STAR specification 4): what a training
step descends and what every held-out loss reports.
"""

import functools
from typing import Any

import jax
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
