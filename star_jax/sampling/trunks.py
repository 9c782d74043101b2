"""How are the layers of a network run in sampling, and how do they keep keys and values?

With many rows in a step matrix products dominate, so `ScannedTrunk` scans one compiled layer, which
takes its kernels from stacked arrays or selects them from one array per layer. With one row reads
of weights, keys and values dominate, so `SplitTrunk` reads everything in place, from arrays of each
layer (`sampling.weight_layout`). A TPU fills up the last axis of an array to a multiple of 128, so
there narrow heads of a `SplitTrunk` lie side by side.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from star_jax.core.cache import KV, join_rows
from star_jax.core.schedule import Group, Step
from star_jax.nn.bind import bind
from star_jax.nn.blocks import Block, PerLayer
from star_jax.nn.kernels import MergedHeads, WriteFirst
from star_jax.nn.transformer import Rows, Transformer
from star_jax.protocols import Kernel
from star_jax.sampling.kv_pieces import Carry, KVPieces, StepFn
from star_jax.sampling.weight_layout import KERNELS, LAYERS, Layer, SplitLayers, switch_kernels

LEAST_ROWS = 512  # rows of a piece of a `ScannedTrunk`, but for the last one
PIECE_ROWS = 64  # rows of a piece of a `SplitTrunk`; a step that has more is a piece
# Layers in the loops over all pieces of a `SplitTrunk`, each of which is compiled: a CPU takes a
# quarter of a second for one of GPT-B. Deeper models and longer images have longer pieces.
MOST_BODIES = 192


class Trunk(Protocol):
    """All layers of a network, with their keys and values."""

    def __call__(
        self, x_RLD: jax.Array, memory: KVPieces, step: Step, mixing: jax.Array | None
    ) -> tuple[jax.Array, KVPieces]:
        """Features [R, L, D] of the rows of a step, and the pieces with their keys and values."""

    def fold(self, run_step: StepFn, carry: Carry, group: Group) -> tuple[Carry, list[Any]]:
        """Folds `run_step` over a group of equal steps, or of one.

        Returns the carry, and the outputs of the steps in order, stacked along a new first axis
        where they share a loop body.

        Args:
            run_step: carry and step -> carry and output.
            carry: the carry before the group.
            group: equal steps that share a loop body.
        """

    def kv(self, memory: KVPieces) -> KV:
        """Keys and values of every layer, [depth, R, K, rows, H]."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScannedTrunk:
    """Layers under one scan; a piece has the keys and values of one step, or of steps in a loop.

    Attributes:
        network: the network.
        params: its parameters.
        condition: the conditions of all rows of the batch.
        uncached_step: the step whose keys and values are not cached; None: all are cached.
        text_kv: keys and values of the text in every layer, or None.
        kernels: the kernels of every layer, if they are apart; None: slices of stacked ones.
    """

    network: Transformer
    params: Any
    condition: Any
    uncached_step: int | None
    text_kv: KV | None
    kernels: Any = None

    @classmethod
    def of(
        cls,
        network: Transformer,
        params: Any,
        condition: Any,
        uncached_step: int | None,
        kernels: Any = None,
    ) -> 'ScannedTrunk':
        """Makes it; keys and values of the text are computed once per image."""
        text_kv = bind(network, params).text_kv(condition)
        return cls(network, params, condition, uncached_step, text_kv, kernels)

    def __call__(
        self, x_RLD: jax.Array, memory: KVPieces, step: Step, mixing: jax.Array | None
    ) -> tuple[jax.Array, KVPieces]:
        schedule = self.network.schedule
        inputs = {
            'text_kv': self.text_kv,
            'condition': self.condition,
            'past': memory.pieces(schedule, step),
            'visibility': memory.visibility(schedule, step),
            'mixing': mixing,
        }
        if self.kernels is None:
            trunk = bind(self.network, self.params).trunk
            features_RLD, new = trunk(x_RLD, schedule.rows(step), **inputs)
        else:
            features_RLD, new = self._in_place(x_RLD, schedule.rows(step), **inputs)
        if memory.current is None and step.index == self.uncached_step:
            return features_RLD, memory
        memory = memory.write(self.network.shard_kv(new), schedule, step)
        if memory.current is not None:
            return features_RLD, memory.start(self.network.shard_kv(memory.current))
        return features_RLD, self._join_small(memory)

    def _in_place(self, x_RLD: jax.Array, rows: Rows, **inputs: Any) -> tuple[jax.Array, KV]:
        """`Transformer.trunk` with kernels that are apart; arguments and results are the same."""
        network = self.network
        per_layer, shared = bind(network, self.params).block_inputs(rows, **inputs)

        def run_layer(x_RLD: jax.Array, layer: tuple[jax.Array, PerLayer]) -> Any:
            number, inputs = layer
            params = switch_kernels(self.params['blocks'], self.kernels, number)
            return bind(Block(network.block), params)(x_RLD, inputs, shared)

        x_RLD = network.sharding(x_RLD.astype(network.dtype), 'batch', 'tokens', None)
        layers = jnp.arange(network.depth), per_layer
        return jax.lax.scan(run_layer, x_RLD, layers, unroll=network.unroll)

    def fold(self, run_step: StepFn, carry: Carry, group: Group) -> tuple[Carry, list[Any]]:
        if group.count == 1:
            return _one_step(run_step, carry, group)
        starts = self.network.schedule.starts
        # Padded steps write as many rows as the last one.
        kept = group.last + 1 if group.padded or self.uncached_step != group.last else group.last
        empty = self.network.empty_cache(len(carry.x_RLD), starts[kept] - starts[group.first])
        carry, outputs = carry.memory.start(empty).fold(run_step, carry, group)
        return carry, [outputs]

    def kv(self, memory: KVPieces) -> KV:
        return join_rows(memory.finished)

    def _join_small(self, memory: KVPieces) -> KVPieces:
        """Joins the last two pieces if the first of them is small: many pieces cost time."""
        if len(memory.finished) < 2 or memory.finished[-2].rows >= LEAST_ROWS:
            return memory
        *others, before, last = memory.finished
        return KVPieces((*others, join_rows((before, last))))


@dataclasses.dataclass(frozen=True, eq=False)
class SplitTrunk:
    """Layers one after the other, each with weights of its own, and a cache in pieces.

    Attributes:
        network: the network.
        params: its parameters, but for those of the layers.
        layers: the parameters of every layer.
        condition: the conditions of all rows of the batch.
        text_kv: keys and values of the text in each layer, or None for each.
        merged: key/value heads that pieces have side by side, as one head.
    """

    network: Transformer
    params: Any
    layers: tuple[Layer, ...]
    condition: Any
    text_kv: tuple[KV | None, ...]
    merged: int

    @classmethod
    def of(
        cls, network: Transformer, params: Any, layers: SplitLayers, condition: Any
    ) -> 'SplitTrunk':
        """Makes it; keys and values of the text are computed once per image."""
        states_BTE, _ = bind(network, params).starter.text(condition)
        text_kv: tuple[KV | None, ...] = (None,) * len(layers.params)
        if states_BTE is not None:
            states_BTE = states_BTE.astype(network.dtype)
            block = Block(network.block)
            text_kv = tuple(
                bind(block, layer).text_kv((), states_BTE)[1] for layer in layers.params
            )
        return cls(
            network=network,
            params=params,
            layers=layers.params,
            condition=condition,
            text_kv=network.shard_kv_pieces(text_kv),
            merged=merged_heads(network, layers.lanes),
        )

    @functools.cached_property
    def _block(self) -> Block:
        def merged(inner: Kernel) -> Kernel:
            return MergedHeads(WriteFirst(inner), self.merged)

        return Block(self.network.block.with_kernel(merged))

    def __call__(
        self, x_RLD: jax.Array, memory: KVPieces, step: Step, mixing: jax.Array | None
    ) -> tuple[jax.Array, KVPieces]:
        network = self.network
        per_layer, shared = bind(network, self.params).block_inputs(
            network.schedule.rows(step),
            text_kv=None,
            condition=self.condition,
            visibility=memory.visibility(network.schedule, step),
            mixing=mixing,
        )
        x_RLD = network.sharding(x_RLD.astype(network.dtype), 'batch', 'tokens', None)
        written, pieces = [], memory.pieces(network.schedule, step)
        for layer, params in enumerate(self.layers):
            inputs = jax.tree.map(lambda x, layer=layer: x[layer], per_layer)._replace(
                past=tuple(piece[layer] for piece in pieces), text_kv=self.text_kv[layer]
            )
            x_RLD, kv = bind(self._block, params)(x_RLD, inputs, shared)
            written.append(self._shard(kv.merge_heads(self.merged)))
        return x_RLD, self._write(memory, tuple(written), step)

    def fold(self, run_step: StepFn, carry: Carry, group: Group) -> tuple[Carry, list[Any]]:
        """A scan per piece. Finished pieces are no part of its carry, which would be copied."""
        if group.padded:
            raise ValueError('layers with arrays of their own sample no padded steps')
        if group.count == 1:
            return _one_step(run_step, carry, group)
        reads, outputs = self.network.schedule.reads[group.first], []
        pieces = max(MOST_BODIES // len(self.layers), 1)
        most = max(PIECE_ROWS // reads, -(-group.count // pieces), 1)
        for first in range(group.first, group.first + group.count, most):
            part = Group(first, min(most, group.first + group.count - first))
            carry, output = self._fold_piece(run_step, carry, part, reads * part.count)
            outputs += output
        return carry, outputs

    def kv(self, memory: KVPieces) -> KV:
        layers = map(join_rows, zip(*memory.finished, strict=True))
        kv = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
        return kv.split_heads(self.merged)

    def _fold_piece(
        self, run_step: StepFn, carry: Carry, group: Group, rows: int
    ) -> tuple[Carry, list[Any]]:
        if group.count == 1:
            return _one_step(run_step, carry, group)
        empty = self.network.empty_cache(len(carry.x_RLD), rows, depth=1)
        piece = self._shard(jax.tree.map(lambda x: x[0], empty).merge_heads(self.merged))
        current = (piece,) * len(self.layers)
        carry, outputs = carry.memory.start(current).fold(run_step, carry, group)
        return carry, [outputs]

    def _write(self, memory: KVPieces, new: tuple[KV, ...], step: Step) -> KVPieces:
        memory = memory.write(new, self.network.schedule, step)
        return memory._replace(current=self.network.shard_kv_pieces(memory.current))

    def _shard(self, kv: KV) -> KV:
        return self.network.shard_kv_pieces(kv)


def choose(network: Transformer, params: Any, condition: Any, uncached_step: int | None) -> Trunk:
    """The trunk that the form of the parameters asks for (`sampling.weight_layout`).

    Args:
        network: the network.
        params: its parameters, as 'model', and perhaps 'layers' or 'kernels'.
        condition: the conditions of all rows of the batch.
        uncached_step: the step whose keys and values nothing reads; None: there is none.
    """
    if LAYERS in params:
        return SplitTrunk.of(network, params['model'], params[LAYERS], condition)
    kernels = params.get(KERNELS)
    return ScannedTrunk.of(network, params['model'], condition, uncached_step, kernels)


def merged_heads(network: Transformer, lanes: int) -> int:
    """How many key/value heads of a network fill so many lanes, as each device has its own."""
    heads = network.empty_cache(1, 1, depth=1).heads
    shards = network.sharding.num_shards('heads')
    each = heads // shards if heads % shards == 0 else heads
    return next(n for n in range(max(lanes // network.head_width, 1), 0, -1) if each % n == 0)


def _one_step(run_step: StepFn, carry: Carry, group: Group) -> tuple[Carry, list[Any]]:
    carry, output = run_step(carry, Step.at(group.first))
    return carry, [jax.tree.map(lambda x: x[None], output)]
