"""How does the condition enter a network?"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core import condition
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.visibility import pack
from star_jax.errors import UserError
from star_jax.nn import layers
from star_jax.nn.attention import OutputProjection


class TextStart(nn.Module):
    """The rows of the first step: the projected pooled text plus learned start positions.

    `text` gives cross-attention its states and lengths.

    Attributes:
        width: channels D of a row.
        text_width: channels E of a text token.
        rows: rows of the first step.
        kernel_init: initializer of the projection and of the start positions.
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


class PooledStart(nn.Module):
    """The row of the first step: the text pooled by attention, plus a learned start position.

    Without a prompt, the text is replaced by as many learned rows; the pooled vector is the
    summary. Everything is float32 (Infinity specification 5.1).

    Attributes:
        width: channels D of a row.
        text_width: channels E of a text token.
        heads: heads of the pooling attention, a divisor of the width.
        text_rows: learned rows that stand for a text without a prompt: the most tokens of a prompt.
        kernel_init: initializer of all weights but these rows.
        unprompted_init: initializer of these rows.
    """

    width: int
    text_width: int
    heads: int
    text_rows: int
    kernel_init: layers.Initializer
    unprompted_init: layers.Initializer

    def setup(self) -> None:
        init, shape = self.kernel_init, (self.heads, self.width // self.heads)
        rows_init = nn.with_logical_partitioning(self.unprompted_init, (None, 'embed'))
        self.rows = self.param('rows', rows_init, (self.text_rows, self.text_width))
        self.norm = layers.RMSNorm(self.text_width, eps=1e-6)
        self.pool = AttentionPool(self.text_width, shape, init)
        self.position = layers.Table(1, self.width, (None, 'embed'), init)
        self.fc1 = layers.Linear(self.text_width, self.width, ('embed', 'mlp'), init)
        self.fc2 = layers.Linear(self.width, self.width, ('mlp', 'embed'), init)

    def __call__(self, text: TextCondition) -> jax.Array:
        """[B, 1, D] float32."""
        return self.summary(text)[:, None, :] + self.position(jnp.arange(1))

    def text(self, text: TextCondition) -> tuple[jax.Array, jax.Array]:
        """Projected token states [B, T, D], visible ones first, and how many, [B] int32."""
        states_BTE, length_B = self.normalised(text)
        return self.fc2(nn.gelu(self.fc1(states_BTE), approximate=True)), length_B

    def normalised(self, text: TextCondition) -> tuple[jax.Array, jax.Array]:
        """Normalised states [B, T, E], visible ones first, and how many are visible, [B] int32."""
        states_BTE, length_B = pack(text.states_BTE.astype(jnp.float32), text.mask_BT)
        return self.norm(states_BTE), length_B

    def padding(self, text: TextCondition) -> None:
        """No rows are padding."""

    def summary(self, text: TextCondition) -> jax.Array:
        """[B, D] float32: the pooled text."""
        return self.pool(*self.normalised(text))

    def unprompted(self, text: TextCondition, empty: TextCondition) -> TextCondition:
        """The first of the learned rows, as many as each prompt has tokens.

        Raises UserError for prompts of more tokens than there are rows.
        """
        batch, count = text.mask_BT.shape
        if count > self.text_rows:
            raise UserError(
                f'the model replaces at most {self.text_rows} tokens of a prompt, not {count}: '
                f'encode prompts to at most {self.text_rows} tokens '
                f'(text.encoder.load(most={self.text_rows}))'
            )
        length_B1 = (text.mask_BT > 0).sum(1, keepdims=True)
        shape = (batch, count, self.text_width)
        return text.replace(
            states_BTE=jnp.broadcast_to(self.rows[:count], shape),
            mask_BT=(jnp.arange(count) < length_B1).astype(text.mask_BT.dtype),
        )


class AttentionPool(nn.Module):
    """Attention of one learned query per head to a text (Infinity specification 5.1).

    Attributes:
        text_width: channels E of a text token.
        shape: heads and their width.
        kernel_init: initializer of all weights.
    """

    text_width: int
    shape: tuple[int, int]
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, states_BTE: jax.Array, length_B: jax.Array) -> jax.Array:
        """[B, D] float32 from the first `length_B` states of each text."""
        axes = ('embed', None, 'heads', None)
        init = nn.with_logical_partitioning(self.kernel_init, ('heads', None))
        query_NH = self.param('query', init, self.shape)
        kernel = (self.text_width, 2, *self.shape)
        project = layers.Einsum('BTE,ESNH->BTSNH', kernel, axes, self.kernel_init, name='text')
        keys_BTNH, values_BTNH = jnp.unstack(project(states_BTE), axis=2)
        values_BTNH = layers.Bias(self.shape, ('heads', None), name='v_bias')(values_BTNH)
        scores_BNT = jnp.einsum('NH,BTNH->BNT', query_NH * self.shape[1] ** -0.5, keys_BTNH)
        visible_B1T = jnp.arange(states_BTE.shape[1]) < length_B[:, None, None]
        weights_BNT = nn.softmax(jnp.where(visible_B1T, scores_BNT, -jnp.inf))
        pooled_BNH = jnp.einsum('BNT,BTNH->BNH', weights_BNT, values_BTNH)
        width = self.shape[0] * self.shape[1]
        gather = OutputProjection(width, self.shape, self.kernel_init, name='proj')
        return gather(pooled_BNH[:, None])[:, 0]


class LabelStart(nn.Module):
    """The rows of the first step: the vector of a class plus learned start positions.

    The vector of no class lies behind those of the classes.

    Attributes:
        width: channels D of a row.
        count: number of classes.
        rows: rows of the first step.
        kernel_init: initializer of the class vectors and of the start positions.
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


class LabelPrefix(nn.Module):
    """The row of the first step: the vector of a class, or of no class, the last one.

    Attributes:
        width: channels D of a row.
        count: number of classes.
        kernel_init: initializer of the class vectors.
    """

    width: int
    count: int
    kernel_init: layers.Initializer

    def setup(self) -> None:
        axes = (None, 'embed')
        self.classes = layers.Table(self.count + 1, self.width, axes, self.kernel_init)

    def __call__(self, labels: LabelCondition) -> jax.Array:
        """[B, 1, D] float32."""
        return self.classes(labels.ids_B)[:, None, :]

    def text(self, labels: LabelCondition) -> tuple[None, None]:
        """No text."""
        return None, None

    def padding(self, labels: LabelCondition) -> None:
        """No rows are padding."""

    def summary(self, labels: LabelCondition) -> None:
        """Classes modulate nothing."""

    def unprompted(self, labels: LabelCondition, empty: LabelCondition) -> LabelCondition:
        """No class for every image."""
        return condition.repeat(empty, like=labels)


class TextPrefix(nn.Module):
    """The rows of the first step: projected token states at the end of a prefix.

    Without a prompt, the states are constant rows, of which as many are visible as the prompt has
    tokens (LlamaGen specification 2.5).

    Attributes:
        width: channels D of a row.
        text_width: channels E of a text token.
        rows: rows of the prefix; a longer text is cut to its first tokens.
        kernel_init: initializer of the projections.
        empty_init: initializer of the constant rows.
    """

    width: int
    text_width: int
    rows: int
    kernel_init: layers.Initializer
    empty_init: layers.Initializer

    def setup(self) -> None:
        init = self.kernel_init
        shape, axes = (self.text_width, self.width), ('embed', 'mlp')
        self.fc1 = layers.Einsum('BTE,EF->BTF', shape, axes, init)
        self.fc2 = layers.Einsum('BTF,FD->BTD', (self.width, self.width), axes[::-1], init)
        empty_init = nn.with_logical_partitioning(self.empty_init, (None, None))
        self.empty = self.param('empty', empty_init, (self.rows, self.text_width))

    def __call__(self, text: TextCondition) -> jax.Array:
        """[B, rows, D] float32."""
        return self.fc2(nn.gelu(self.fc1(self.states(text)), approximate=True))

    def states(self, text: TextCondition) -> jax.Array:
        """[B, rows, E] float32: token states at the end of the prefix."""
        missing = max(self.rows - text.mask_BT.shape[1], 0)
        states_BTE = jnp.pad(text.states_BTE.astype(jnp.float32), ((0, 0), (0, missing), (0, 0)))
        order_BT = jnp.argsort(jnp.pad(self._visible(text), ((0, 0), (0, missing))), stable=True)
        last_BT = order_BT[:, -self.rows :]
        return jnp.take_along_axis(states_BTE, last_BT[..., None], axis=1)

    def text(self, text: TextCondition) -> tuple[None, None]:
        """No cross-attention."""
        return None, None

    def padding(self, text: TextCondition) -> jax.Array:
        """[B] int32: rows before the first token of each text."""
        return self.rows - self._visible(text).sum(1, dtype=jnp.int32)

    def summary(self, text: TextCondition) -> None:
        """Text modulates nothing."""

    def unprompted(self, text: TextCondition, empty: TextCondition) -> TextCondition:
        """The constant rows in place of the tokens of each text, with its own mask."""
        visible_BT = self._visible(text)
        first_B1 = self.rows - visible_BT.sum(1, keepdims=True)
        row_BT = jnp.where(
            visible_BT,
            first_B1 + jnp.cumsum(visible_BT, axis=1) - 1,
            jnp.minimum(jnp.cumsum(~visible_BT, axis=1) - 1, self.rows - 1),
        )
        return text.replace(states_BTE=self.empty[row_BT], mask_BT=visible_BT.astype(jnp.int32))

    def _visible(self, text: TextCondition) -> jax.Array:
        """[B, T] bool: the tokens that the prefix holds."""
        visible_BT = text.mask_BT > 0
        return visible_BT & (jnp.cumsum(visible_BT, axis=1) <= self.rows)


class LevelModulation(nn.Module):
    """AdaLN signals of the level embeddings alone, for all layers (STAR specification 3.4).

    Attributes:
        width: channels D of a row.
        kernel_init: initializer of both projections.
    """

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
    """AdaLN signals from the vector of each image: for one layer, or shared by all layers.

    Attributes:
        width: channels D of a row.
        kernel_init: initializer of the projection.
    """

    width: int
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, summary_BD: jax.Array, *_: jax.Array) -> jax.Array:
        """[B, 1, 6, D] float32, in the order gate, gate, scale, scale, shift, shift."""
        axes = ('embed', 'mlp')
        project = layers.Linear(self.width, 6 * self.width, axes, self.kernel_init, name='vector')
        return project(nn.silu(summary_BD)).reshape(-1, 1, 6, self.width)


class ModulationOffset(nn.Module):
    """A learned offset that one layer adds to the shared signal [B, L, 6, D].

    Attributes:
        width: channels D of a row.
        kernel_init: initializer of the offset.
    """

    width: int
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, signal_BL6D: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(self.kernel_init, (None, 'embed'))
        return signal_BL6D + self.param('offset', init, (6, self.width))
