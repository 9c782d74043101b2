"""How well does a transformer predict the tokens of images?

Teacher forcing and cross-entropy (STAR specification 4): training minimises these losses, and
evaluation reports them for held-out images. Suffixes: B batch, L tokens, R rows (tokens, and the
padding that a mesh needs), D width, V logits.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import pixels
from star_jax.core.codes import Codes, Targets
from star_jax.core.schedule import Schedule
from star_jax.nn.bind import bind
from star_jax.nn.positions import PositionTables
from star_jax.nn.transformer import Transformer

Metrics = dict[str, jax.Array]
BitReduction = Literal['mean', 'sum']

# Folded into the key of a step for its inputs and labels; `jax.random.split` has the keys below.
TARGETS = 3


class TokenLosses(NamedTuple):
    """The losses of every token, [B, L] float32 each.

    Attributes:
        trained_BL: negative log-likelihood in nats, with label smoothing: training minimises it.
        nll_BL: negative log-likelihood in nats.
        hit_BL: share of a token's code that the most probable one gets right.
        right_BL: 1 where all numbers of the code are right (None: it has one, `hit_BL` says it).
    """

    trained_BL: jax.Array
    nll_BL: jax.Array
    hit_BL: jax.Array
    right_BL: jax.Array | None


def encode(tokenizer: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    """The tokenizer's encoding of uint8 images [B, H, W, 3]: codes, or features.

    Compile it as a separate program: then a cache on disk holds exactly what training computes.

    Args:
        tokenizer: the module.
        params: its parameters.
        images: [B, H, W, 3] uint8.

    Returns:
        Codes [B, L, *codes.shape], or float32 features.
    """
    return bind(tokenizer, params).encode(pixels.to_signed(images))


def teacher_forcing(
    tokenizer: nn.Module, params: Any, encoded: jax.Array, key: jax.Array
) -> Targets:
    """Inputs and labels of encoded images, with a key of their own that is folded from `key`.

    Held-out losses compare only if all of them use the same key.

    Args:
        tokenizer: the module.
        params: its parameters.
        encoded: what `encode` returned of B images.
        key: the key of the micro-batch.
    """
    return bind(tokenizer, params).training_targets(encoded, jax.random.fold_in(key, TARGETS))


def token_losses(
    network: Transformer,
    codes: Codes,
    params: Any,
    targets: Targets,
    condition: Any,
    *,
    rows: jax.Array | None = None,
    paths: jax.Array | None = None,
    smoothing: float = 0.0,
    of_bits: BitReduction = 'mean',
    tables: PositionTables | None = None,
    noise_B: jax.Array | None = None,
) -> TokenLosses:
    """The losses of every token that is kept.

    Args:
        network: the transformer.
        codes: how its logits are parsed.
        params: its parameters.
        targets: inputs and labels.
        condition: one row per image.
        rows: the rows that token dropping keeps (None: all).
        paths: scales of stochastic depth, as from `drop_paths` (None: 1).
        smoothing: label smoothing e; the trained loss of a token is (1 - e) times its cross-entropy
            plus e times the mean of -log p over all codes.
        of_bits: whether the trained loss of a token is the mean or the sum over its bits.
        tables: positions of the rows (None: those of the network's schedule).
        noise_B: the key of dropout of each image (None: nothing is dropped).

    Returns:
        Arrays [B, L], or [B, R] of the R kept rows.
    """
    network = bind(network, params)
    features_BRD = network.features(
        targets.inputs_BLC,
        condition,
        rows=rows,
        paths=paths,
        tables=tables,
        noise_B=noise_B,
    )
    logits = codes.parse(network.head(features_BRD, condition))
    # Labels move to the rows that predict them: rows that are sharded cannot move cheaply. Only
    # pyramids drop tokens, and a row of a pyramid is a token.
    row_of_token_L = network.schedule.sampled_rows if rows is None else np.arange(len(rows))
    labels = targets.codes_BL if rows is None else targets.codes_BL[:, rows]
    shape = (*features_BRD.shape[:2], *labels.shape[2:])
    labels = jnp.zeros(shape, labels.dtype).at[:, row_of_token_L].set(labels)
    nll_BR = codes.nll(logits, labels)
    trained_BR = codes.nll(logits, labels, smoothing) if smoothing else nll_BR
    if of_bits == 'sum':
        trained_BR = trained_BR * math.prod(codes.shape)
    hit_BR = codes.hits(logits, labels)
    right_BR = (hit_BR == 1).astype(jnp.float32) if codes.shape else None
    losses = TokenLosses(trained_BR, nll_BR, hit_BR, right_BR)
    return jax.tree.map(lambda loss_BR: loss_BR[:, row_of_token_L], losses)


def sum_of_images(losses: TokenLosses, count: int) -> np.ndarray:
    """Sums over the first images of what `mean_per_scale` takes means of, [2, L]; [3, L] of bits.

    Args:
        losses: the losses of a batch.
        count: how many images of it are real ones.
    """
    _, *unsmoothed = jax.tree.leaves(losses)
    return np.stack([np.asarray(x_BL)[:count].sum(0) for x_BL in unsmoothed])


def mean_per_scale(
    schedule: Schedule, nll_L: jax.Array, hit_L: jax.Array, right_L: jax.Array | None = None
) -> Metrics:
    """Loss and accuracy, averaged over all tokens and over those of each scale.

    Token dropping drops tokens of the last scale, so the first tokens of the schedule are kept.

    Args:
        schedule: gives the scale of each token.
        nll_L: negative log-likelihood of each token, in nats, a mean over images.
        hit_L: accuracy of each token, a mean over images; of bits, the share of right ones.
        right_L: share of the images in which all bits of a token are right (None: no bits).

    Returns:
        `loss` and `accuracy`, of bits `token_accuracy`, and each of every scale S, as `loss/S`.
    """
    arrays = {'loss': nll_L, 'accuracy': hit_L}
    if right_L is not None:
        arrays['token_accuracy'] = right_L
    metrics = {name: x_L.mean() for name, x_L in arrays.items()}
    scale_L = schedule.scale_of_token[: len(nll_L)]
    count = int(scale_L.max()) + 1
    for scale in range(count if count > 1 else 0):
        in_scale_L = scale_L == scale
        metrics |= {f'{name}/{scale}': x_L[in_scale_L].mean() for name, x_L in arrays.items()}
    return metrics


def token_weights(schedule: Schedule, count: int, balance: float) -> np.ndarray:
    """[count] float32 weights of the first tokens of a schedule in the loss; their mean is 1.

    Args:
        schedule: gives the scale of each token.
        count: tokens that are kept; token dropping drops tokens of the last scale.
        balance: 0 weights all tokens equally, 1 weights all scales equally.
    """
    scale_L = schedule.scale_of_token[:count]
    weights_L = np.bincount(scale_L)[scale_L].astype(np.float32) ** -balance
    return weights_L / weights_L.mean()
