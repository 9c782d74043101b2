"""How does the network predict the tokens of a step from all earlier ones?

One network for every family; a family is the set of parts passed in. Training calls `features` and
`head`; sampling calls `start`, `text_kv` and `empty_cache` once, then `trunk`, `head` and `embed`
in every step; both call `unprompted`. Suffixes: B batch, L rows, M cached rows, D width, N heads,
H head width, P = H/2 rotation planes, V logits, S steps, T text tokens, E text width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.core.cache import AXES, KV
from star_jax.core.schedule import Schedule
from star_jax.core.settings import Remat
from star_jax.core.visibility import ALL, StaticVisibility, Visibility
from star_jax.nn import layers
from star_jax.nn.blocks import BlockParts, PerLayer, Shared, stack_blocks
from star_jax.nn.positions import Positions, PositionTables
from star_jax.parallel.mesh import REPLICAS
from star_jax.parallel.rules import ActivationSharding

Rows = np.ndarray | jax.Array


class Transformer(nn.Module):
    """The network. A condition is any pytree that `starter` reads.

    Attributes:
        schedule: steps, and the rows that each of them reads.
        width: channels D of a row.
        depth: layers.
        heads: attention heads of queries.
        starter: a `protocols.Starter`: first rows, text and summary of a condition.
        embedder: module from the tokenizer's inputs to rows.
        positions: rotation and additive table.
        block: parts of a layer.
        to_logits: the head, from features and the condition's summary to flat logits.
        init_rows: initializer of level embeddings and learned positions.
        level_embedding: whether a learned vector per step is added to the rows.
        levels_count: rows of the level embedding (0: one per step; a family may have more).
        levels_every: add the level embedding before every so many layers, from the first on (0:
            once, to the embedded rows).
        modulator: makes the signal that modulates every block (None: the condition's summary).
        refiner: the head of stable sampling, if the model has one.
        remat: activations that the backward pass recomputes (`core.settings`).
        unroll: layers that are compiled side by side in each round of the scan over layers.
        dtype: dtype of activations.
        mixes_rows: whether the logits of a row depend on the other rows of its batch.
        sharding: how arrays inside the program are sharded.
        row_multiple: teacher forcing pads the rows to a multiple of this number.
        row_dropout: rate of dropout of the embedded rows, in training.
    """

    schedule: Schedule
    width: int
    depth: int
    heads: int
    starter: nn.Module
    embedder: nn.Module
    positions: Positions
    block: BlockParts
    to_logits: nn.Module
    init_rows: layers.Initializer
    level_embedding: bool = True
    levels_count: int = 0
    levels_every: int = 0
    modulator: nn.Module | None = None
    refiner: nn.Module | None = None
    remat: Remat = 'none'
    unroll: int = 1
    dtype: str = 'float32'
    mixes_rows: bool = False
    sharding: ActivationSharding = ActivationSharding()
    row_multiple: int = 1
    row_dropout: float = 0.0

    def setup(self) -> None:
        shape = (self.levels_count or self.schedule.steps, self.width)
        if self.level_embedding or self.modulator:
            init = nn.with_logical_partitioning(self.init_rows, (None, 'embed'))
            self.levels = self.param('levels', init, shape)
        self.table = self.positions.table(self.schedule, self.width, self.init_rows)
        self.frequencies = self.positions.frequencies(self.depth, self.heads, self.head_width)
        self.blocks = stack_blocks(self.block, self.depth, self.unroll, self.remat)

    @property
    def head_width(self) -> int:
        """Channels H of an attention head."""
        return self.width // self.heads

    @property
    def drops(self) -> bool:
        """Whether anything is dropped out in training."""
        return bool(self.row_dropout or self.block.dropout)

    @property
    def position_tables(self) -> PositionTables:
        """Positions of the rows of the schedule, as numpy arrays."""
        return PositionTables(
            rotation_LP2=self.positions.rotation(self.schedule, self.head_width),
            xy_L2=self.positions.coordinates(self.schedule),
        )

    def __call__(self, inputs: jax.Array, condition: Any) -> jax.Array:
        """Teacher-forced flat logits [B, rows, V] of all rows."""
        features_BLD = self.features(inputs, condition)[:, : self.schedule.starts[-1]]
        if self.refiner and self.is_initializing():  # creates the parameters of the head
            first = self.schedule.starts[1]
            rows = np.arange(first, self.schedule.starts[-1])
            self.refine(inputs, features_BLD[:, first:], rows, condition)
        if self.is_initializing():  # creates the parameters of a learned unconditional row
            self.unprompted(condition, jax.tree.map(lambda x: x[:1], condition))
        return self.head(features_BLD, condition)

    def features(
        self,
        inputs: jax.Array,
        condition: Any,
        rows: Rows | None = None,
        paths: jax.Array | None = None,
        tables: PositionTables | None = None,
        noise_B: jax.Array | None = None,
    ) -> jax.Array:
        """Teacher-forced features of rows.

        Args:
            inputs: [B, L, C], the inputs of every step but the first.
            condition: a pytree with one row per image.
            rows: the rows to keep (None: all); traced ones are those of a schedule's `thin`.
            paths: [depth, 2, B] scales of the branches of self-attention and MLP (`drop_paths`).
            tables: positions of the rows (None: those of the schedule).
            noise_B: the key of dropout of each image (None: nothing is dropped).

        Returns:
            [B, R, D]: features of the rows, and after them padding up to a multiple of
            `row_multiple` that the mesh divides.
        """
        later = np.arange(self.schedule.starts[1], self.schedule.starts[-1])
        inputs = self.sharding.constrain_batch(inputs)  # else the tokenizer's canvases are split
        x_BLD = jnp.concatenate([self.start(condition), self.embed(inputs, later)], axis=1)
        if noise_B is not None:
            noise_B, row_keys_B = layers.split_keys(noise_B, 2)
            x_BLD = layers.dropout(row_keys_B, x_BLD, self.row_dropout)
        if rows is None:
            rows = np.arange(self.schedule.starts[-1])
        else:
            x_BLD = x_BLD[:, rows]
        x_BLD, rows, visibility = self._pad(x_BLD, rows, self.schedule.visibility(rows))
        features_BLD, _ = self.trunk(
            x_BLD,
            rows,
            text_kv=self.text_kv(condition),
            condition=condition,
            visibility=Visibility(bounds=visibility),
            paths=paths,
            tables=tables,
            noise_B=noise_B,
        )
        return features_BLD

    def start(self, condition: Any) -> jax.Array:
        """[B, rows of step 0, D] float32.

        Args:
            condition: a pytree with one row per image.
        """
        return self._add_positions(self.starter(condition), np.arange(self.schedule.starts[1]))

    def embed(self, inputs: jax.Array, rows: Rows) -> jax.Array:
        """[B, L, D] float32: the tokenizer's inputs of `rows`, embedded, with their positions.

        Args:
            inputs: [B, L, C] float32, or codes [B, L] of a raster.
            rows: [L] numbers of the rows in the schedule.
        """
        return self._add_positions(self.embedder(inputs), rows)

    def unprompted(self, condition: Any, empty: Any) -> Any:
        """The condition of as many images without a prompt; it may depend on parameters.

        Args:
            condition: the condition of the prompted images.
            empty: the encoded empty prompt, one row.
        """
        return self.starter.unprompted(condition, empty)

    def text_kv(self, condition: Any) -> KV | None:
        """Cross-attention keys and values of every layer; they are computed once per image."""
        states_BTE, _ = self.starter.text(condition)
        states_BTE = jax.tree.map(lambda x: x.astype(self.dtype), states_BTE)
        return self.shard_kv(self.blocks.text_kv((), states_BTE)[1])

    def trunk(
        self,
        x_BLD: jax.Array,
        rows: Rows,
        *,
        text_kv: KV | None,
        condition: Any,
        past: tuple[KV, ...] = (),
        visibility: Visibility = ALL,
        paths: jax.Array | None = None,
        mixing: jax.Array | None = None,
        tables: PositionTables | None = None,
        noise_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KV]:
        """All layers.

        Args:
            x_BLD: embedded rows.
            rows: their numbers.
            text_kv: from `text_kv`.
            condition: a pytree with one row per image.
            past: cached keys and values of earlier rows, in pieces.
            visibility: which keys, the past first, each row may attend to; the padding of a
                prefix is added here.
            paths: [depth, 2, B] scales of residual branches.
            mixing: [depth, 2, 2], for guidance after layers (`core.guidance.mix_rows`).
            tables: positions of all rows of the schedule (None: computed from it).
            noise_B: the key of dropout of each image (None: nothing is dropped).

        Returns:
            Features [B, L, D] before the last norm, and the new keys and values of every layer.
        """
        per_layer, shared = self.block_inputs(
            rows,
            text_kv=text_kv,
            condition=condition,
            past=past,
            visibility=visibility,
            paths=paths,
            mixing=mixing,
            tables=tables,
            noise_B=noise_B,
        )
        x_BLD = self.sharding(x_BLD.astype(self.dtype), 'batch', 'tokens', None)
        return self.blocks(x_BLD, per_layer, shared)

    def block_inputs(
        self,
        rows: Rows,
        *,
        text_kv: KV | None,
        condition: Any,
        past: tuple[KV, ...] = (),
        visibility: Visibility = ALL,
        paths: jax.Array | None = None,
        mixing: jax.Array | None = None,
        tables: PositionTables | None = None,
        noise_B: jax.Array | None = None,
    ) -> tuple[PerLayer, Shared]:
        """The inputs of the layers beside the rows; arguments as for `trunk`."""
        tables = jax.tree.map(
            lambda table: jnp.asarray(table)[rows], tables or self.position_tables
        )
        steps_L = jnp.asarray(self.schedule.step_of_row)[rows]
        signal = self.starter.summary(condition)
        if self.modulator:
            signal = self.modulator(signal, steps_L, self.levels)
        shared = Shared(
            rotation_LP2=tables.rotation_LP2,
            xy_L2=tables.xy_L2,
            visibility=visibility.replace(first_B=self.starter.padding(condition)),
            text_length_B=self.starter.text(condition)[1],
            signal=signal,
            levels_LD=self.levels[steps_L] if self.levels_every else None,
        )
        per_layer = PerLayer(
            past=past,
            text_kv=text_kv,
            paths_2B=paths,
            frequencies_NP2=self.frequencies() if self.frequencies else None,
            adds_levels=self._adds_levels() if self.levels_every else None,
            mixing_22=mixing,
            noise_B=None if noise_B is None else layers.split_keys(noise_B, self.depth),
        )
        return per_layer, shared

    def head(self, features_BLD: jax.Array, condition: Any) -> jax.Array:
        """[B, L, V] float32 flat logits, sharded over the vocabulary."""
        logits_BLV = self.to_logits(features_BLD, self.starter.summary(condition))
        return self.sharding(logits_BLV, 'batch', 'tokens', 'vocab')

    def refine(
        self, vectors: jax.Array, features_BLD: jax.Array, rows: Rows, condition: Any
    ) -> jax.Array:
        """[B, L, V] float32 logits of the refinement head.

        Args:
            vectors: [B, L, C] code vectors of the tokens that are fixed, zero for the others.
            features_BLD: features of the same tokens.
            rows: their rows, all of whole steps.
            condition: a pytree with one row per image.
        """
        logits_BLV = self.refiner(vectors, features_BLD, rows, condition)
        return self.sharding(logits_BLV, 'batch', 'tokens', 'vocab')

    def shard_kv(self, kv: KV | None) -> KV | None:
        """Keys and values of every layer, sharded over images and heads."""
        return jax.tree.map(lambda x: self.sharding(x, 'layers', *AXES), kv)

    def shard_kv_pieces(self, pieces: Any) -> Any:
        """A pytree of keys and values of one layer each, sharded over images and heads."""
        return jax.tree.map(lambda x: self.sharding(x, *AXES), pieces)

    def empty_cache(self, batch: int, rows: int, depth: int = 0) -> KV:
        """Zeros for the keys and values of layers, [depth, R, K, rows, H].

        Args:
            batch: R rows of the batch: its images, prompted and unprompted.
            rows: rows of each image that the cache holds.
            depth: layers (0: all).
        """
        attention = self.block.self_attention(parent=None)
        heads = attention.kv_heads or attention.heads
        shape = (depth or self.depth, batch, heads, rows, self.width // self.heads)
        return self.shard_kv(KV(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)))

    def with_sharding(self, mesh: Mesh | None) -> 'Transformer':
        """The same network whose arrays are sharded over a mesh by the rules (None: not at all)."""
        return self._with_sharding(ActivationSharding(mesh))

    def within_replica(self) -> 'Transformer':
        """The same network for the part of a batch that one index of the mesh axis `data` has.

        It is to be mapped over that axis.
        """
        return self._with_sharding(dataclasses.replace(self.sharding, mapped=(REPLICAS,)))

    def with_batch_groups(self, groups: int) -> 'Transformer':
        """The same network, whose rows mix only within each of `groups` equal parts of a batch."""
        if not self.mixes_rows:
            return self
        cross = functools.partial(self.block.cross_attention, groups=groups)
        return self.clone(block=dataclasses.replace(self.block, cross_attention=cross))

    def _with_sharding(self, sharding: ActivationSharding) -> 'Transformer':
        block, refiner = self.block.with_sharding(sharding), self.refiner
        if refiner:
            refiner = refiner.clone(block=refiner.block.with_sharding(sharding))
        return self.clone(sharding=sharding, block=block, refiner=refiner)

    def _pad(
        self, x_BLD: jax.Array, rows: Rows, visibility: StaticVisibility
    ) -> tuple[jax.Array, Rows, StaticVisibility]:
        """The same rows and as much padding after them as is needed; no row attends to it."""
        more = (0, self.sharding.padded_length(len(rows), self.row_multiple) - len(rows))
        if not any(more):
            return x_BLD, rows, visibility
        pad = np.pad if isinstance(rows, np.ndarray) else jnp.pad
        visibility = StaticVisibility.of(np.pad(visibility.bound_L, more, mode='edge'))
        return jnp.pad(x_BLD, ((0, 0), more, (0, 0))), pad(rows, more, mode='edge'), visibility

    def _add_positions(self, x_BLD: jax.Array, rows: Rows) -> jax.Array:
        if self.level_embedding and not self.levels_every:
            x_BLD = x_BLD + self.levels[jnp.asarray(self.schedule.step_of_row)[rows]]
        return x_BLD if self.table is None else x_BLD + self.table(rows)

    def _adds_levels(self) -> jax.Array:
        """[depth] float32: 1 for layers before which the level embedding is added."""
        return jnp.asarray(np.arange(self.depth) % self.levels_every == 0, jnp.float32)
