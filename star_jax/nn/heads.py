"""How do features become logits?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.nn import layers


class Head(nn.Module):
    """Float32 logits [B, L, V] of features [B, L, D].

    Every head receives the condition's summary vector; this one does not use it.

    Attributes:
        width: channels D of a feature.
        num_logits: number of logits V.
        kernel_init: initializer of the projection to logits.
        norm: normalises the features first (None: they are not normalised).
        inner_init: initializer of a layer with GELU before the logits (None: no such layer).
    """

    width: int
    num_logits: int
    kernel_init: layers.Initializer
    norm: nn.Module | None = None
    inner_init: layers.Initializer | None = None

    @nn.compact
    def __call__(self, features_BLD: jax.Array, summary_BD: jax.Array | None = None) -> jax.Array:
        x_BLD = self.norm(features_BLD) if self.norm else features_BLD
        return _logits(self.width, self.num_logits, self.kernel_init, self.inner_init)(x_BLD)


class PlainHead(nn.Module):
    """Float32 logits [B, L, V] of normalised features [B, L, D], without a bias.

    Attributes:
        width: channels D of a feature.
        num_logits: number of logits V.
        kernel_init: initializer of the projection to logits.
        norm: normalises the features.
    """

    width: int
    num_logits: int
    kernel_init: layers.Initializer
    norm: nn.Module

    @nn.compact
    def __call__(self, features_BLD: jax.Array, summary_BD: jax.Array | None = None) -> jax.Array:
        shape, axes = (self.width, self.num_logits), ('embed', 'vocab')
        project = layers.Einsum(
            'BLD,DV->BLV', shape, axes, self.kernel_init, jnp.float32, name='logits'
        )
        return project(self.norm(features_BLD))


class ModulatedHead(nn.Module):
    """Float32 logits [B, L, V] of normalised features that each image's vector scales and shifts.

    Attributes:
        width: channels D of a feature.
        num_logits: number of logits V.
        kernel_init: initializer of the projection to logits.
        modulation_init: initializer of the projection from the vector to scales and shifts.
        norm: the norm, which has no parameters.
        inner_init: initializer of a layer with GELU before the logits (None: no such layer).
    """

    width: int
    num_logits: int
    kernel_init: layers.Initializer
    modulation_init: layers.Initializer
    norm: Callable[[jax.Array], jax.Array] = layers.layer_norm
    inner_init: layers.Initializer | None = None

    @nn.compact
    def __call__(self, features_BLD: jax.Array, summary_BD: jax.Array) -> jax.Array:
        axes = ('embed', 'mlp')
        modulate = layers.Linear(
            self.width, 2 * self.width, axes, self.modulation_init, name='modulation'
        )
        changes_B1D = jnp.split(modulate(nn.silu(summary_BD))[:, None], 2, axis=-1)
        scale_B1D, shift_B1D = (change.astype(features_BLD.dtype) for change in changes_B1D)
        x_BLD = self.norm(features_BLD) * (1 + scale_B1D) + shift_B1D
        return _logits(self.width, self.num_logits, self.kernel_init, self.inner_init)(x_BLD)


def _logits(
    width: int,
    num_logits: int,
    kernel_init: layers.Initializer,
    inner_init: layers.Initializer | None,
) -> Callable[[jax.Array], jax.Array]:
    """The projection to logits; made inside of a compact method, it belongs to that module."""
    axes = ('embed', 'vocab')
    project = layers.Linear(width, num_logits, axes, kernel_init, jnp.float32, name='logits')
    if inner_init is None:
        return project
    inner = layers.Linear(width, width, ('embed', 'mlp'), inner_init, name='inner')
    return lambda x_BLD: project(nn.gelu(inner(x_BLD), approximate=True))
