"""How do captions become numbers?

A frozen pretrained encoder (`encoder.load`), read from a Hugging Face folder (`encoder_folder`),
and a cache of its features on disk (`cache`).
"""

from star_jax.text.cache import FeatureCache
from star_jax.text.encoder import TextEncoder, load
from star_jax.text.encoder_folder import DEFAULT

__all__ = ['DEFAULT', 'FeatureCache', 'TextEncoder', 'load']
