"""How is an image decoded from its first scales alone?

A tokenizer that is sometimes trained so puts what matters most into the coarse scales.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


def drop_scales(quantised: Any, key: jax.Array, probability: float) -> Any:
    """The result of a quantiser whose last canvas is an earlier one for some images.

    Args:
        quantised: the result, with a canvas per scale.
        key: chooses the images, and for each of them how many scales stay, all equally likely.
        probability: probability that an image loses scales.
    """
    canvases = jnp.stack(quantised.canvases)
    scales, batch = canvases.shape[:2]
    drop_key, count_key = jax.random.split(key)
    drops_B = jax.random.bernoulli(drop_key, probability, (batch,))
    last_B = jnp.where(drops_B, jax.random.randint(count_key, (batch,), 0, scales), scales - 1)
    last = canvases[last_B, jnp.arange(batch)]
    return dataclasses.replace(quantised, canvases=(*quantised.canvases[:-1], last))
