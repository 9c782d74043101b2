"""How well does a refinement head predict the hidden tokens of an image?

Random tokens of the refined scales are shown; the head predicts the hidden ones from the shown ones
and from the features of the frozen base model (STAR specification 9.1). Suffix R: refined tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.argument_types import check_types
from star_jax.core.codes import Index
from star_jax.core.schedule import Schedule
from star_jax.core.unmasking import Mode, share
from star_jax.losses.tokens import Metrics
from star_jax.nn.bind import bind
from star_jax.nn.transformer import Transformer

SHOWN_LOGIT = 10.0  # the published logit of the extra class where a token is shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainLoss:
    """The mean cross-entropy of all hidden tokens."""

    def __call__(
        self, logits_BRV: jax.Array, codes_BR: jax.Array, shown_BR: jax.Array, length: int
    ) -> jax.Array:
        nll_BR = Index(logits_BRV.shape[-1]).nll(logits_BRV, codes_BR)
        return jnp.where(shown_BR, 0, nll_BR).sum() / self.weight(shown_BR)

    def weight(self, shown_BR: jax.Array) -> jax.Array:
        """The weight of images beside other images: the number of their hidden tokens."""
        return jnp.maximum((~shown_BR).sum(), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedLoss:
    """The published loss, over the codes and one more class, which stands for a shown token.

    A shown token adds a constant, a hidden token has a logit of 0 for the extra class. The sum over
    the tokens of an image is divided by its `length`, however many are refined or hidden.
    """

    def __call__(
        self, logits_BRV: jax.Array, codes_BR: jax.Array, shown_BR: jax.Array, length: int
    ) -> jax.Array:
        size = logits_BRV.shape[-1]
        logits_BRV = jnp.where(shown_BR[..., None], 0, logits_BRV)
        extra_BR1 = jnp.where(shown_BR, SHOWN_LOGIT, 0)[..., None]
        labels_BR = jnp.where(shown_BR, size, codes_BR)
        nll_BR = Index(size + 1).nll(jnp.concatenate([logits_BRV, extra_BR1], -1), labels_BR)
        return nll_BR.sum(1).mean() / length

    def weight(self, shown_BR: jax.Array) -> int:
        """The weight of images beside other images: their number."""
        return len(shown_BR)


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

    def __post_init__(self) -> None:
        check_types(self)

    def shown(self, r_B: jax.Array, u_BR: jax.Array) -> jax.Array:
        """[B, R] bool: which tokens are shown, given uniform numbers of images and of tokens."""
        return u_BR < share(self.mode, r_B)[:, None]

    def sample(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """[B, R] bool: which tokens are shown, at random."""
        image_key, token_key = jax.random.split(key)
        r_B, u_BR = jax.random.uniform(image_key, shape[:1]), jax.random.uniform(token_key, shape)
        return self.shown(r_B, u_BR)


def refined_rows(network: Transformer) -> np.ndarray:
    """[R]: the rows, which are the tokens, of the scales that the head refines."""
    first, end = network.schedule.starts[network.refiner.first], network.schedule.starts[-1]
    return np.arange(first, end)


def shown_vectors(
    tokenizer: nn.Module, params: Any, codes_BR: jax.Array, shown_BR: jax.Array
) -> jax.Array:
    """[B, R, C]: the tokenizer's vectors of shown codes, zero for the hidden ones."""
    return bind(tokenizer, params).embed(codes_BR) * shown_BR[..., None]


def refine(
    network: Transformer,
    params: Any,
    inputs: jax.Array,
    vectors_BRC: jax.Array,
    condition: Any,
    *,
    paths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Features [B, R, D] of the frozen base model and logits [B, R, V] of its head.

    Args:
        network: the transformer.
        params: its parameters.
        inputs: the inputs of teacher forcing, [B, L - n_0, C].
        vectors_BRC: as for `shown_vectors`.
        condition: one row per image.
        paths: scales of stochastic depth of the base model (None: 1).
    """
    network, rows = bind(network, params), refined_rows(network)
    features_BRD = network.features(inputs, condition, None, paths)[:, rows]
    features_BRD = jax.lax.stop_gradient(features_BRD)
    return features_BRD, network.refine(vectors_BRC, features_BRD, rows, condition)


def hidden_sums(logits_BRV: jax.Array, codes_BR: jax.Array, shown_BR: jax.Array) -> jax.Array:
    """[3, B, R]: negative log-likelihood, hit and 1 of every hidden token, 0 of a shown one."""
    codes = Index(logits_BRV.shape[-1])
    losses = (codes.nll(logits_BRV, codes_BR), codes.hits(logits_BRV, codes_BR))
    return jnp.stack([*losses, jnp.ones_like(losses[0])]) * ~shown_BR


def mean_per_scale(schedule: Schedule, rows: np.ndarray, sums_3R: Any) -> Metrics:
    """Loss and accuracy, averaged over all hidden tokens and over those of each scale.

    Args:
        schedule: gives the scale of each token.
        rows: as for `refined_rows`.
        sums_3R: `hidden_sums`, summed over images.
    """
    scale_R = schedule.scale_of_token[rows]
    masks = {'': np.ones(len(rows), bool)}
    masks |= {f'/{scale}': scale_R == scale for scale in np.unique(scale_R)}
    metrics = {}
    for name, mask_R in masks.items():
        nll, hits, count = (sums_R[mask_R].sum() for sums_R in sums_3R)
        count = count.clip(1)
        metrics |= {f'loss{name}': nll / count, f'accuracy{name}': hits / count}
    return metrics
