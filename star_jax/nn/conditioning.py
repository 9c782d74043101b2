"""How does the condition enter a network?"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core import condition
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.visibility import pack
from star_jax.nn import layers


class TextStart(nn.Module):
    """The rows of the first step: the projected pooled text plus learned start positions.

    `text` gives cross-attention its states and lengths.
    """

    width: int
    text_width: int
    rows: int
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, text: TextCondition) -> jax.Array:
        """[B, rows, D] float32."""
        project = layers.Linear(
            self.text_width, self.width, (None, 'embed'), self.kernel_init, name='pooled'
        )
        place = layers.Table(
            self.rows, self.width, (None, 'embed'), self.kernel_init, name='position'
        )
        pooled_BE = text.pooled_BE.astype(jnp.float32)
        return project(pooled_BE)[:, None, :] + place(jnp.arange(self.rows))

    def text(self, text: TextCondition) -> tuple[jax.Array, jax.Array]:
        """Token states [B, T, E], visible ones first, and how many are visible, [B] int32."""
        return pack(text.states_BTE, text.mask_BT)

    def padding(self, text: TextCondition) -> None:
        """No rows are padding."""

    def summary(self, text: TextCondition) -> None:
        """Text modulates nothing."""

    def unprompted(self, text: TextCondition, empty: TextCondition) -> TextCondition:
        """The empty caption for every image."""
        return condition.repeat(empty, like=text)


class LabelStart(nn.Module):
    """The rows of the first step: the vector of a class plus learned start positions.

    The vector of no class lies behind those of the `count` classes.
    """

    width: int
    count: int
    rows: int
    kernel_init: layers.Initializer

    def setup(self) -> None:
        axes = (None, 'embed')
        self.classes = layers.Table(self.count + 1, self.width, axes, self.kernel_init)
        self.position = layers.Table(self.rows, self.width, axes, self.kernel_init)

    def __call__(self, labels: LabelCondition) -> jax.Array:
        """[B, rows, D] float32."""
        return self.summary(labels)[:, None, :] + self.position(jnp.arange(self.rows))

    def text(self, labels: LabelCondition) -> tuple[None, None]:
        """No text."""
        return None, None

    def padding(self, labels: LabelCondition) -> None:
        """No rows are padding."""

    def summary(self, labels: LabelCondition) -> jax.Array:
        """[B, D] float32: the vector of each image's class."""
        return self.classes(labels.ids_B)

    def unprompted(self, labels: LabelCondition, empty: LabelCondition) -> LabelCondition:
        """No class for every image."""
        return condition.repeat(empty, like=labels)


class LevelModulation(nn.Module):
    """AdaLN signals of the level embeddings alone, for all layers (STAR specification 3.4)."""

    width: int
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(
        self, summary_BD: jax.Array | None, steps_L: jax.Array, levels_SD: jax.Array
    ) -> jax.Array:
        """[1, L, 6, D] float32, in the order gate, gate, scale, scale, shift, shift."""
        last_SD = jnp.broadcast_to(levels_SD[-1], levels_SD.shape)
        pairs = jnp.concatenate([levels_SD, last_SD], axis=-1)
        axes = (None, 'embed')
        u_SD = layers.Linear(2 * self.width, self.width, axes, self.kernel_init, name='pair')(pairs)
        w = layers.Linear(self.width, 6 * self.width, axes, self.kernel_init, name='signal')(
            nn.silu(u_SD)
        )
        return w.reshape(-1, 6, self.width)[steps_L][None]


class VectorModulation(nn.Module):
    """AdaLN signals from the vector of each image: a layer's own, or shared by all layers."""

    width: int
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, summary_BD: jax.Array, *_: jax.Array) -> jax.Array:
        """[B, 1, 6, D] float32, in the order gate, gate, scale, scale, shift, shift."""
        axes = ('embed', 'mlp')
        project = layers.Linear(self.width, 6 * self.width, axes, self.kernel_init, name='vector')
        return project(nn.silu(summary_BD)).reshape(-1, 1, 6, self.width)


class ModulationOffset(nn.Module):
    """A layer's own addition to a shared signal."""

    width: int
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, signal_BL6D: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(self.kernel_init, (None, 'embed'))
        return signal_BL6D + self.param('offset', init, (6, self.width))
