"""How well does a model predict the codes of held-out images from their captions?"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from star_jax.checkpoint.folder import StoredModel
from star_jax.core.condition import TextCondition
from star_jax.core.schedule import Schedule
from star_jax.data import pipeline
from star_jax.data.pipeline import Source
from star_jax.evaluation import bootstrap
from star_jax.losses import tokens
from star_jax.text.cache import FeatureCache
from star_jax.text.encoder import TextEncoder

Predict = Callable[[Source], Iterable['Predicted']]


class Predicted(NamedTuple):
    """Of every token of some images, [N, L]: -log p in nats, and whether the most probable code
    is the right one."""

    nll_NL: np.ndarray
    hit_NL: np.ndarray


def compile_model(model: StoredModel, encoder: TextEncoder, dtype: str, batch: int) -> Predict:
    """What predicts a source, `batch` images at a time, all through one program.

    Captions are read through the cache that training uses, so a validation loss is the same here.
    """
    network = model.config.build(dtype)
    tokenizer = model.tokenizer.config.at(model.config.schedule).build()
    params, frozen = jax.device_put((model.params, model.tokenizer.params))
    texts = FeatureCache(encoder)

    @jax.jit
    def program(params: Any, frozen: Any, images: jax.Array, text: TextCondition) -> Predicted:
        encoded = tokens.encode(tokenizer, frozen, images)
        targets = tokens.held_out_targets(tokenizer, frozen, encoded)
        losses = tokens.token_losses(network, tokenizer.codes, params, targets, text)
        return Predicted(losses.nll_BL, losses.hit_BL)

    def predict(source: Source) -> Iterable[Predicted]:
        for some in pipeline.sequential(source, batch):
            filled, real = pipeline.pad(some, batch)
            text = texts.features(filled['caption'])
            found = program(params, frozen, filled['image'], text)
            yield Predicted(*(np.asarray(x_BL)[:real] for x_BL in found))

    return predict


def join(parts: Iterable[Predicted]) -> Predicted:
    """All of them as one."""
    return Predicted(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def scores(found: Predicted, schedule: Schedule, seed: int) -> dict[str, Any]:
    """Loss (nats per token) and accuracy, over all tokens and per scale."""
    scale_L = schedule.scale_of_token
    return {
        'images': len(found.nll_NL),
        **_means(found, np.ones(len(scale_L), bool), seed),
        'scales': [
            {'tokens': int(tokens), **_means(found, scale_L == scale, seed)}
            for scale, tokens in enumerate(np.bincount(scale_L))
        ],
    }


def _means(found: Predicted, here_L: np.ndarray, seed: int) -> dict[str, bootstrap.Score]:
    return {
        'loss': bootstrap.mean(found.nll_NL[:, here_L].mean(1), seed),
        'accuracy': bootstrap.mean(found.hit_NL[:, here_L].mean(1), seed),
    }
