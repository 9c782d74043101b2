"""What predicts the tokens of a step from all earlier ones?

One network for every family; a family is the set of parts passed in. Sampling and training walk
the same weights differently, so the network is five methods: `start`, `embed`, `text_kv`, `trunk`
and `head`. Suffixes: B batch, L rows, M cached rows, D width, N heads, H head width, P = H/2
rotation planes, F hidden width, V logits, S steps, T text tokens, E text width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.core.schedule import Schedule
from star_jax.core.visibility import StaticVisibility
from star_jax.nn import layers
from star_jax.nn.kernels import KV, Visibility
from star_jax.nn.positions import Positions
from star_jax.parallel.rules import ActivationSharding

Rows = np.ndarray | jax.Array
PLAIN = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)  # gates, scales and shifts of an unmodulated block


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    width: int
    hidden: int
    kernel_init: layers.Initializer
    out_init: layers.Initializer
    sharding: ActivationSharding = ActivationSharding()

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h = layers.Linear(self.width, self.hidden, ('embed', 'mlp'), self.kernel_init, name='fc1')(
            x_BLD
        )
        h = nn.gelu(self.sharding(h, 'batch', 'tokens', 'mlp'), approximate=True)
        return layers.Linear(self.hidden, self.width, ('mlp', 'embed'), self.out_init, name='fc2')(
            h
        )


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a block is made of; each makes a module, None leaves it out.

    `layout` says where the block's rows lie.
    """

    self_attention: Callable[[], nn.Module]
    mlp: Callable[[], nn.Module]
    cross_attention: Callable[[], nn.Module] | None = None
    modulation: Callable[[], nn.Module] | None = None
    sharding: ActivationSharding = ActivationSharding()

    def with_sharding(self, sharding: ActivationSharding) -> 'Parts':
        """The same parts, which place what they compute by `layout`."""
        placed = {
            name: functools.partial(part, sharding=sharding)
            for name in ('self_attention', 'mlp', 'cross_attention')
            if (part := getattr(self, name))
        }
        return dataclasses.replace(self, sharding=sharding, **placed)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP, each added to what came in (STAR specification 3.4)."""

    parts: Parts

    def setup(self) -> None:
        parts = self.parts
        self.attn = parts.self_attention()
        self.cross = parts.cross_attention() if parts.cross_attention else None
        self.ffn = parts.mlp()
        self.modulate = parts.modulation() if parts.modulation else None

    def text_kv(self, carry: tuple, text: Any) -> tuple[tuple, KV | None]:
        return carry, self.cross.text_kv(text) if self.cross else None

    def __call__(
        self,
        x_BLD: jax.Array,
        own: tuple[KV | None, KV | None, jax.Array | None],
        shared: tuple[jax.Array | None, Visibility, jax.Array | None, jax.Array | None],
    ) -> tuple[jax.Array, KV]:
        """`own`: past, text keys and values, path scales of this layer. `shared`: angles, what is
        seen, text mask, modulation of all layers. Returns the rows, their keys and values."""
        past, text_kv, paths_2B = own
        angles_LP, visibility, text_mask_BT, signal = shared
        changes = PLAIN if self.modulate is None else self._changes(signal, x_BLD.dtype)
        gate1, gate2, scale1, scale2, shift1, shift2 = changes
        path1, path2 = (1.0, 1.0)
        if paths_2B is not None:
            path1, path2 = paths_2B[:, :, None, None].astype(x_BLD.dtype)
        h, kv = self.attn(
            layers.layer_norm(x_BLD) * (1 + scale1) + shift1, angles_LP, past, visibility
        )
        x_BLD = x_BLD + path1 * (gate1 * h)
        if self.cross:
            x_BLD = x_BLD + self.cross(layers.layer_norm(x_BLD), text_kv, text_mask_BT)
        h = self.ffn(layers.layer_norm(x_BLD) * (1 + scale2) + shift2)
        x_BLD = x_BLD + path2 * (gate2 * h)
        return self.parts.sharding(x_BLD, 'batch', 'tokens', None), kv

    def _changes(self, signal: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
        return list(jnp.moveaxis(self.modulate(signal).astype(dtype), -2, 0))


def stack_blocks(parts: Parts, depth: int, unroll: int, remat: bool) -> nn.Module:
    """`depth` blocks under one scan, called with the rows, what each has of its own and shares."""
    block = nn.remat(Block, prevent_cse=False) if remat else Block
    stacked = {
        'variable_axes': {'params': 0},
        'split_rngs': {'params': True},
        'length': depth,
        'unroll': unroll,
        'metadata_params': {nn.PARTITION_NAME: 'layers'},
    }
    methods = {
        '__call__': {'in_axes': (0, nn.broadcast), **stacked},
        'text_kv': {'in_axes': nn.broadcast, **stacked},
    }
    return nn.scan(block, methods=methods)(parts)


class Head(nn.Module):
    """Float32 logits of features, normalised first unless `norm` is off.

    What a condition says in one vector is given to every head; this one needs none.
    """

    width: int
    num_logits: int
    kernel_init: layers.Initializer
    norm: bool = True

    @nn.compact
    def __call__(self, features_BLD: jax.Array, summary_BD: jax.Array | None = None) -> jax.Array:
        x_BLD = layers.layer_norm(features_BLD) if self.norm else features_BLD
        return _logits(self.width, self.num_logits, self.kernel_init)(x_BLD)


class ModulatedHead(nn.Module):
    """Float32 logits of normalised features that each image's vector scales and shifts."""

    width: int
    num_logits: int
    kernel_init: layers.Initializer
    modulation_init: layers.Initializer

    @nn.compact
    def __call__(self, features_BLD: jax.Array, summary_BD: jax.Array) -> jax.Array:
        axes = ('embed', 'mlp')
        modulate = layers.Linear(
            self.width, 2 * self.width, axes, self.modulation_init, name='modulation'
        )
        changes_B1D = jnp.split(modulate(nn.silu(summary_BD))[:, None], 2, axis=-1)
        scale_B1D, shift_B1D = (change.astype(features_BLD.dtype) for change in changes_B1D)
        x_BLD = layers.layer_norm(features_BLD) * (1 + scale_B1D) + shift_B1D
        return _logits(self.width, self.num_logits, self.kernel_init)(x_BLD)


def _logits(width: int, num_logits: int, kernel_init: layers.Initializer) -> layers.Linear:
    axes = ('embed', 'vocab')
    return layers.Linear(width, num_logits, axes, kernel_init, jnp.float32, name='logits')


class Transformer(nn.Module):
    """The network. `condition` is whatever `starter` understands.

    `starter` makes the first rows, hands out the text, if there is any, and sums the condition up
    in one vector for modulation, or None; `embedder` turns the tokenizer's inputs into rows;
    `modulator` makes the signal that every block is modulated by (None: that vector).
    `refiner` is the head of stable sampling, where a model has one.
    `unroll` layers are compiled side by side in each round of the scan over layers. `mixes_rows`
    says that a row's logits depend on the other rows of its batch. `layout` says where the arrays
    lie that it computes.
    """

    schedule: Schedule
    width: int
    depth: int
    heads: int
    starter: nn.Module
    embedder: nn.Module
    positions: Positions
    block: Parts
    to_logits: nn.Module
    init_rows: layers.Initializer
    level_embedding: bool = True
    modulator: nn.Module | None = None
    refiner: nn.Module | None = None
    remat: bool = False
    unroll: int = 1
    dtype: str = 'float32'
    mixes_rows: bool = False
    sharding: ActivationSharding = ActivationSharding()

    def setup(self) -> None:
        shape = (self.schedule.steps, self.width)
        if self.level_embedding or self.modulator:
            init = nn.with_logical_partitioning(self.init_rows, (None, 'embed'))
            self.levels = self.param('levels', init, shape)
        self.table = self.positions.table(self.schedule, self.width, self.init_rows)
        self.blocks = stack_blocks(self.block, self.depth, self.unroll, self.remat)

    def __call__(self, inputs: jax.Array, condition: Any) -> jax.Array:
        """Teacher-forced logits [B, L, V] of all rows."""
        features_BLD = self.features(inputs, condition)[:, : self.schedule.starts[-1]]
        if self.refiner and self.is_initializing():
            first = self.schedule.starts[1]
            rows = np.arange(first, self.schedule.starts[-1])
            self.refine(inputs, features_BLD[:, first:], rows, condition)
        return self.head(features_BLD, condition)

    def features(
        self,
        inputs: jax.Array,
        condition: Any,
        rows: Rows | None = None,
        paths: jax.Array | None = None,
    ) -> jax.Array:
        """Teacher-forced features [B, L, D] of `rows` (all by default), and of as many more behind
        them, which mean nothing, as it takes until the layout divides L.

        `inputs` are the inputs of every step but the first; `paths` [depth, 2, B] scales the two
        branches of each layer (`drop_paths`). Traced `rows` are those of a schedule's `thin`.
        """
        later = np.arange(self.schedule.starts[1], self.schedule.starts[-1])
        inputs = self.sharding.constrain_batch(
            inputs
        )  # or the tokenizer's canvases would be split too
        x_BLD = jnp.concatenate([self.start(condition), self.embed(inputs, later)], axis=1)
        if rows is None:
            rows = np.arange(self.schedule.starts[-1])
        else:
            x_BLD = x_BLD[:, rows]
        x_BLD, rows, visibility = self._fill(x_BLD, rows, self.schedule.visibility(rows))
        return self.trunk(x_BLD, rows, self.text_kv(condition), condition, None, visibility, paths)[
            0
        ]

    def start(self, condition: Any) -> jax.Array:
        """[B, rows of step 0, D] float32."""
        return self._place(self.starter(condition), np.arange(self.schedule.starts[1]))

    def embed(self, inputs: jax.Array, rows: Rows) -> jax.Array:
        """[B, L, D] float32: what the tokenizer gives for `rows`, embedded and placed."""
        return self._place(self.embedder(inputs), rows)

    def text_kv(self, condition: Any) -> KV | None:
        """Cross-attention keys and values of every layer, [depth, B, T, N, H]; once per image."""
        states_BTE, _ = self.starter.text(condition)
        states_BTE = jax.tree.map(lambda x: x.astype(self.dtype), states_BTE)
        return self.place(self.blocks.text_kv((), states_BTE)[1])

    def trunk(
        self,
        x_BLD: jax.Array,
        rows: Rows,
        text_kv: KV | None,
        condition: Any,
        past: KV | None = None,
        visibility: Visibility = None,
        paths: jax.Array | None = None,
    ) -> tuple[jax.Array, KV]:
        """Features before the last norm, and the new keys and values of every layer.

        `past` holds earlier rows, [depth, B, M, N, H]; `seen` says which of both, the past first,
        a row sees.
        """
        angles = self.positions.angles(self.schedule, self.width // self.heads)
        angles_LP = None if angles is None else jnp.asarray(angles)[rows]
        steps_L = jnp.asarray(self.schedule.step_of_row)[rows]
        signal = self.starter.summary(condition)
        if self.modulator:
            signal = self.modulator(signal, steps_L, self.levels)
        shared = (angles_LP, visibility, self.starter.text(condition)[1], signal)
        x_BLD = self.sharding(x_BLD.astype(self.dtype), 'batch', 'tokens', None)
        return self.blocks(x_BLD, (past, text_kv, paths), shared)

    def head(self, features_BLD: jax.Array, condition: Any) -> jax.Array:
        """[B, L, V] float32 logits. No device holds more than its part of them."""
        logits_BLV = self.to_logits(features_BLD, self.starter.summary(condition))
        return self.sharding(logits_BLV, 'batch', 'tokens', 'vocab')

    def refine(
        self, vectors: jax.Array, features_BLD: jax.Array, rows: Rows, condition: Any
    ) -> jax.Array:
        """[B, L, V] float32 logits of the refinement head, for the tokens at `rows` of whole steps.

        `vectors` are the tokenizer's of the tokens that are fixed, zero for the others.
        """
        logits_BLV = self.refiner(vectors, features_BLD, rows, condition)
        return self.sharding(logits_BLV, 'batch', 'tokens', 'vocab')

    def place(self, kv: KV) -> KV:
        """Keys and values [depth, B, M, N, H], where the layout says."""
        return jax.tree.map(lambda x: self.sharding(x, 'layers', 'batch', None, 'heads', None), kv)

    def with_sharding(self, mesh: Mesh | None) -> 'Transformer':
        """The same network on the devices of a mesh, where all it computes lies as the rules say;
        None: where the compiler wants it."""
        sharding, refiner = ActivationSharding(mesh), self.refiner
        if refiner:
            refiner = refiner.clone(block=refiner.block.with_sharding(sharding))
        return self.clone(
            sharding=sharding, block=self.block.with_sharding(sharding), refiner=refiner
        )

    def with_batch_groups(self, groups: int) -> 'Transformer':
        """The same network where rows mix within `groups` equal parts of a batch alone."""
        if not self.mixes_rows:
            return self
        cross = functools.partial(self.block.cross_attention, groups=groups)
        return self.clone(block=dataclasses.replace(self.block, cross_attention=cross))

    def _fill(
        self, x_BLD: jax.Array, rows: Rows, visibility: StaticVisibility
    ) -> tuple[jax.Array, Rows, StaticVisibility]:
        """The same rows, and behind them, where none of them looks, as many more as it takes."""
        more = (0, self.sharding.padded_length(len(rows)) - len(rows))
        if not any(more):
            return x_BLD, rows, visibility
        pad = np.pad if isinstance(rows, np.ndarray) else jnp.pad
        visibility = StaticVisibility.of(np.pad(visibility.keys_L, more, mode='edge'))
        return jnp.pad(x_BLD, ((0, 0), more, (0, 0))), pad(rows, more, mode='edge'), visibility

    def _place(self, x_BLD: jax.Array, rows: Rows) -> jax.Array:
        if self.level_embedding:
            x_BLD = x_BLD + self.levels[jnp.asarray(self.schedule.step_of_row)[rows]]
        return x_BLD if self.table is None else x_BLD + self.table(rows)


def drop_paths(key: jax.Array, depth: int, batch: int, rate: float) -> jax.Array:
    """[depth, 2, B] float32 scales of stochastic depth: 0, or 1 / (1 - rate of the layer).

    The rate rises linearly from 0 to `rate` over the layers (STAR specification 3.4).
    """
    keep = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    return jax.random.bernoulli(key, keep, (depth, 2, batch)) / keep
