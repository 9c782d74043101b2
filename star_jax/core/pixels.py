"""How do uint8 images become the numbers of a network?"""

import jax
import jax.numpy as jnp


def to_signed(images: jax.Array) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [-1, 1], or float64 where that is the default."""
    return images.astype(float) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8, truncated as the published code does (STAR specification 8)."""
    return ((images.astype(jnp.float32) + 1) / 2 * 255).clip(0, 255).astype(jnp.uint8)


def to_nearest_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8: 127.5 x + 128, clamped and truncated (LlamaGen specification 1.8)."""
    return (127.5 * images.astype(jnp.float32) + 128).clip(0, 255).astype(jnp.uint8)
