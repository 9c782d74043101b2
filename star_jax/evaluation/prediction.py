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

Predict = Callable[[Source], Iterable['Prediction']]


class Prediction(NamedTuple):
    """How well the tokens of N images were predicted.

    Attributes:
        nll_NL: negative log-likelihood in nats.
        hit_NL: 1 where the most probable code is the right one.
    """

    nll_NL: np.ndarray
    hit_NL: np.ndarray


def compile_prediction(
    model: StoredModel, encoder: TextEncoder, *, dtype: str, batch: int
) -> Predict:
    """A function that predicts the images of a source, all with one compiled program.

    Captions are encoded through the cache that training uses, so the held-out loss of training is
    the same.

    Args:
        model: transformer and tokenizer with their parameters.
        encoder: the text encoder of the model.
        dtype: dtype of the activations.
        batch: images per call of the program.
    """
    network = model.config.build(dtype)
    tokenizer = model.tokenizer.config.at(model.config.schedule).build()
    params, frozen = jax.device_put((model.params, model.tokenizer.params))
    features = FeatureCache(encoder)

    @jax.jit
    def program(params: Any, frozen: Any, images: jax.Array, text: TextCondition) -> Prediction:
        encoded = tokens.encode(tokenizer, frozen, images)
        targets = tokens.teacher_forcing(tokenizer, frozen, encoded, jax.random.key(0))
        losses = tokens.token_losses(network, tokenizer.codes, params, targets, text)
        return Prediction(losses.nll_BL, losses.hit_BL)

    def predict(source: Source) -> Iterable[Prediction]:
        for padded, real in pipeline.padded_batches(source, batch):
            text = features.features(padded['caption'])
            prediction = program(params, frozen, padded['image'], text)
            yield Prediction(*(np.asarray(x_BL)[:real] for x_BL in prediction))

    return predict


def concatenate(predictions: Iterable[Prediction]) -> Prediction:
    """The predictions of all images."""
    return Prediction(*(np.concatenate(arrays) for arrays in zip(*predictions, strict=True)))


def scores(prediction: Prediction, schedule: Schedule, seed: int) -> dict[str, Any]:
    """Loss (nats per token) and accuracy, over all tokens and per scale.

    Args:
        prediction: losses and hits of all images, [N, L].
        schedule: gives the scale of each token.
        seed: seed of the resamples.
    """
    scale_L = schedule.scale_of_token
    return {
        'count': len(prediction.nll_NL),
        **_means(prediction, np.ones(len(scale_L), bool), seed),
        'scales': [
            {'tokens': int(count), **_means(prediction, scale_L == scale, seed)}
            for scale, count in enumerate(np.bincount(scale_L))
        ],
    }


def _means(prediction: Prediction, mask_L: np.ndarray, seed: int) -> dict[str, bootstrap.Score]:
    return {
        'loss': bootstrap.mean(prediction.nll_NL[:, mask_L].mean(1), seed),
        'accuracy': bootstrap.mean(prediction.hit_NL[:, mask_L].mean(1), seed),
    }
