"""Which tokens does a scale have, given the tokens that are already fixed?

The refinement head of causal-driven stable sampling (STAR specification 9) is a small network. Its
inputs are the transformer's features and the code vectors of the fixed tokens of one scale, and the
pooled text, which is a row before the tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.condition import TextCondition
from star_jax.core.schedule import Schedule
from star_jax.core.settings import Remat
from star_jax.core.visibility import Visibility
from star_jax.nn import layers
from star_jax.nn.blocks import BlockParts, PerLayer, Shared, stack_blocks
from star_jax.nn.positions import Positions
from star_jax.nn.transformer import Rows


class Refiner(nn.Module):
    """The refinement head.

    Attributes:
        schedule: the schedule of the transformer.
        first: the first step that the head refines.
        width: channels D of a row.
        depth: layers.
        heads: attention heads.
        starter: module from the condition to the text's row.
        embedder: module from code vectors to rows.
        merge: module from a token's row and feature, concatenated, to one row.
        positions: rotation of queries and keys.
        block: parts of a layer.
        to_logits: the projection to logits.
        init_rows: initializer of the level embeddings.
        remat: activations that the backward pass recomputes (`core.settings`).
        unroll: layers compiled side by side.
        dtype: dtype of activations.
    """

    schedule: Schedule
    first: int
    width: int
    depth: int
    heads: int
    starter: nn.Module
    embedder: nn.Module
    merge: nn.Module
    positions: Positions
    block: BlockParts
    to_logits: nn.Module
    init_rows: layers.Initializer
    remat: Remat = 'none'
    unroll: int = 1
    dtype: str = 'float32'

    def setup(self) -> None:
        init = nn.with_logical_partitioning(self.init_rows, (None, 'embed'))
        self.levels = self.param('levels', init, (self.schedule.steps, self.width))
        self.blocks = stack_blocks(self.block, self.depth, self.unroll, self.remat)

    def __call__(
        self, vectors_BLC: jax.Array, features_BLD: jax.Array, rows: Rows, text: TextCondition
    ) -> jax.Array:
        """[B, L, V] float32 logits.

        Args:
            vectors_BLC: code vectors of fixed tokens, zero for the others.
            features_BLD: features of the transformer before its last norm.
            rows: rows of the tokens, all rows of whole steps.
            text: the condition.
        """
        steps_L = jnp.asarray(self.schedule.step_of_row)[rows]
        start_B1D = self.starter(text)
        tokens = jnp.concatenate([start_B1D, self.embedder(vectors_BLC) + self.levels[steps_L]], 1)
        features = jnp.concatenate(
            [start_B1D.astype(self.dtype), features_BLD.astype(self.dtype)], 1
        )
        x_BLD = self.merge(jnp.concatenate([tokens.astype(self.dtype), features], -1))
        visibility = Visibility(mask=self._mask(rows))
        shared = Shared(rotation_LP2=self._rotation(rows), visibility=visibility)
        x_BLD, _ = self.blocks(x_BLD, PerLayer(), shared)
        return self.to_logits(x_BLD[:, 1:])

    def _rotation(self, rows: Rows) -> jax.Array:
        """[1 + L, P, 2]: the text's row is rotated as the first row of all is."""
        rotation = jnp.asarray(self.positions.rotation(self.schedule, self.width // self.heads))
        return jnp.concatenate([rotation[:1], rotation[rows]])

    def _mask(self, rows: Rows) -> jax.Array | None:
        """A token attends to its step and the text's row; the text's row attends to all rows."""
        if not isinstance(rows, np.ndarray):  # the rows of one traced step
            return None
        steps_L = self.schedule.step_of_row[rows]
        mask = np.pad(steps_L[:, None] == steps_L, (1, 0), constant_values=True)
        return None if mask.all() else jnp.asarray(mask)
