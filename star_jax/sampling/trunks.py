"""How are the layers of a network run in sampling, and how do they keep keys and values?

With many rows in a step matrix products dominate, so `ScannedTrunk` scans one compiled layer. With
one row reads of weights, keys and values dominate, so `SplitTrunk` has the parameters of each layer
apart: a slice of stacked parameters would be copied before it is used. On a CPU its weight matrices
are stored [out, in] (`layers.times_outputs_first`).

Both keep keys and values in pieces. The finished ones are never written again, and are constants of
a loop over steps, in which only the current one is written: no step copies those before it. On a
TPU, which fills up the last axis of an array to a multiple of 128, narrow heads of a `SplitTrunk`
lie side by side.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from star_jax.core.cache import KV, join_rows
from star_jax.core.schedule import Group, Schedule, Step
from star_jax.core.visibility import StaticVisibility, TracedVisibility, Visibility
from star_jax.nn.bind import bind
from star_jax.nn.blocks import Block
from star_jax.nn.kernels import MergedHeads, WriteFirst
from star_jax.nn.layers import OUTPUTS_FIRST
from star_jax.nn.transformer import Transformer
from star_jax.protocols import Kernel

LAYERS = 'layers'  # the parameters of layers that are apart from each other
LEAST_ROWS = 512  # rows of a piece of a `ScannedTrunk`, but for the last one
PIECE_ROWS = 64  # rows of a piece of a `SplitTrunk`; a step that has more is a piece
# Platforms on which a step of one row reads arrays in place only where each layer has its own.
SPLIT = ('cpu', 'gpu', 'tpu')
# Platforms on which few rows are multiplied fastest by kernels with their outputs first, because a
# product packs its right operand.
PACKING = ('cpu',)
# The products whose kernels are stored so, and how many axes of each kernel are summed.
SUMMED_AXES = {
    'qkv': 1,
    'q': 1,
    'kv': 1,
    'proj': 2,
    'gate': 1,
    'value': 1,
    'out': 1,
    'fc1': 1,
    'fc2': 1,
    'logits': 1,
}
LANES = {'tpu': 128}  # the least width that a platform stores an array with
Layer = dict[str, Any]  # the parameters of one layer


@flax.struct.dataclass
class SplitLayers:
    """Layers that are apart from each other.

    Attributes:
        params: the parameters of every layer.
        lanes: heads narrower than this are stored side by side (static).
    """

    params: tuple[Layer, ...]
    lanes: int = flax.struct.field(pytree_node=False, default=1)


StepFn = Callable[[Any, Step], tuple[Any, Any]]  # (carry, step) -> carry, output


class Carry(NamedTuple):
    """The state between two steps of sampling.

    Attributes:
        x_RLD: the embedded rows of the next step.
        memory: keys and values, as the trunk keeps them.
        canvas: the tokenizer's canvas.
    """

    x_RLD: jax.Array
    memory: Any
    canvas: Any


class Trunk(Protocol):
    """All layers of a network, with their keys and values."""

    def __call__(
        self, x_RLD: jax.Array, memory: Any, step: Step, mixing: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """Features [R, L, D] of the rows of a step, and the memory with their keys and values."""

    def fold(self, run_step: StepFn, carry: Carry, group: Group) -> tuple[Carry, list[Any]]:
        """Folds `run_step` over a group of equal steps, or of one.

        Returns the carry, and the outputs of the steps in order, stacked along a new first axis
        where they share a loop body.

        Args:
            run_step: carry and step -> carry and output.
            carry: the carry before the group.
            group: equal steps that share a loop body.
        """

    def kv(self, memory: Any) -> KV:
        """Keys and values of every layer, [depth, R, K, rows, H]."""


class KVPieces(NamedTuple):
    """Keys and values of the rows so far, as a trunk keeps them.

    A piece has those of every layer: one `KV`, stacked, or a tuple of one per layer.

    Attributes:
        finished: pieces that are full, in row order.
        current: the piece that is written, if steps share a loop body; None otherwise.
    """

    finished: tuple[Any, ...] = ()
    current: Any = None

    @property
    def rows(self) -> int:
        """Rows of the finished pieces."""
        return sum(map(_rows, self.finished))

    def start(self, current: Any) -> 'KVPieces':
        """The same with an empty piece that the next steps write."""
        return self._replace(current=current)

    def finish(self, piece: Any) -> 'KVPieces':
        """The finished pieces and one more."""
        return KVPieces((*self.finished, piece))

    def fold(self, run_step: StepFn, carry: Carry, group: Group) -> tuple[Carry, Any]:
        """Scans `run_step` over a group that writes the current piece, and finishes it.

        Finished pieces are no part of the scan's carry, which would be copied.
        """

        def in_piece(inner: Carry, step: Step) -> tuple[Carry, Any]:
            after, output = run_step(inner._replace(memory=self.start(inner.memory)), step)
            return after._replace(memory=after.memory.current), output

        carry, outputs = scan_group(in_piece, carry._replace(memory=self.current), group)
        return carry._replace(memory=self.finish(carry.memory)), outputs

    def pieces(self, schedule: Schedule, step: Step) -> tuple[Any, ...]:
        """The pieces that the rows of a step read, in row order."""
        if self.current is None:
            return self.finished
        read = self.current
        if step.padded:  # no row of the group attends to the current piece behind this row
            read = _map_kv(lambda kv: kv.part(0, schedule.starts[step.like] - self.rows), read)
        return (*self.finished, read)

    def visibility(self, schedule: Schedule, step: Step) -> Visibility:
        """The keys that the rows of a step attend to, among the pieces and themselves."""
        first, end = schedule.starts[step.like : step.like + 2]
        bound_L = schedule.visible_rows[first:end]
        if self.current is None:
            return Visibility(bounds=StaticVisibility.of(bound_L))
        rows, bounds = schedule.rows(step), None
        if step.padded or (bound_L != end).any():
            visible_L = jnp.asarray(schedule.visible_rows, jnp.int32)[rows]
            equal = (bound_L == bound_L[0]).all()
            bounds = TracedVisibility(visible_L[:1] if equal else visible_L)
        return Visibility(bounds=bounds, written=rows[0])

    def write(self, new: Any, schedule: Schedule, step: Step) -> 'KVPieces':
        """The pieces with the keys and values of a step.

        Raises ValueError for a traced step without a current piece, and for a padded one that could
        end behind it: such a write would be moved over earlier rows.
        """
        if self.current is None:
            if not isinstance(step.index, int):
                raise ValueError('a loop over steps has no current piece')
            return self.finish(new)
        rows, end = _rows(self.current), schedule.starts[step.like + 1] - self.rows
        if step.padded and end > rows:
            raise ValueError(
                f'a piece of {rows} rows cannot hold a step that ends with its row {end}'
            )
        place = schedule.rows(step)[0] - self.rows
        return self.start(_map_kv(lambda kv, new: kv.write(new, place), self.current, new))


def _is_kv(x: Any) -> bool:
    return isinstance(x, KV)


def _map_kv(change: Callable[..., KV], *pieces: Any) -> Any:
    """Applies `change` to the keys and values of each layer, or of all."""
    return jax.tree.map(change, *pieces, is_leaf=_is_kv)


def _rows(piece: Any) -> int:
    return jax.tree.leaves(piece, is_leaf=_is_kv)[0].rows


@dataclasses.dataclass(frozen=True, eq=False)
class ScannedTrunk:
    """Layers under one scan; a piece has the keys and values of one step, or of steps in a loop.

    Attributes:
        network: the network.
        params: its parameters.
        condition: the conditions of all rows of the batch.
        uncached_step: the step whose keys and values are not cached; None: all are cached.
        text_kv: keys and values of the text in every layer, or None.
    """

    network: Transformer
    params: Any
    condition: Any
    uncached_step: int | None
    text_kv: KV | None

    @classmethod
    def of(
        cls, network: Transformer, params: Any, condition: Any, uncached_step: int | None
    ) -> 'ScannedTrunk':
        """Makes it; keys and values of the text are computed once per image."""
        text_kv = bind(network, params).text_kv(condition)
        return cls(network, params, condition, uncached_step, text_kv)

    def __call__(
        self, x_RLD: jax.Array, memory: KVPieces, step: Step, mixing: jax.Array | None
    ) -> tuple[jax.Array, KVPieces]:
        schedule = self.network.schedule
        features_RLD, new = bind(self.network, self.params).trunk(
            x_RLD,
            schedule.rows(step),
            text_kv=self.text_kv,
            condition=self.condition,
            past=memory.pieces(schedule, step),
            visibility=memory.visibility(schedule, step),
            mixing=mixing,
        )
        if memory.current is None and step.index == self.uncached_step:
            return features_RLD, memory
        memory = memory.write(self.network.shard_kv(new), schedule, step)
        if memory.current is not None:
            return features_RLD, memory.start(self.network.shard_kv(memory.current))
        return features_RLD, self._join_small(memory)

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
        most = max(PIECE_ROWS // reads, 1)
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


def merged_heads(network: Transformer, lanes: int) -> int:
    """How many key/value heads of a network fill so many lanes, as each device has its own."""
    heads = network.empty_cache(1, 1, depth=1).heads
    shards = network.sharding.num_shards('heads')
    each = heads // shards if heads % shards == 0 else heads
    return next(n for n in range(max(lanes // network.head_width, 1), 0, -1) if each % n == 0)


def arrange(params: dict[str, Any], schedule: Schedule, platform: str) -> dict[str, Any]:
    """The parameters as sampling on a platform reads them best, which is done once, before it.

    If most steps have one row, the arrays of each layer are apart (`split`). Where a platform is
    faster for it, the kernels of layers and head have their outputs first.

    Args:
        params: 'model' and 'tokenizer'. Arrays of numpy are not copied; abstract arrays and their
            shardings are changed in the same way.
        schedule: the steps of sampling.
        platform: cpu, gpu or tpu.
    """
    single = sum(reads == 1 for reads in schedule.reads)
    if platform not in SPLIT or 2 * single <= schedule.steps:
        return params
    params = split(params)
    if platform in PACKING:
        params = outputs_first(params)
    layers = params[LAYERS].replace(lanes=LANES.get(platform, 1))
    return params | {LAYERS: layers}


def split(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with those of each layer apart, as 'layers'; arguments as for `arrange`."""
    model = dict(params['model'])
    stacked = model.pop('blocks')
    depth = jax.tree.leaves(stacked)[0].shape[0]
    layers = tuple(
        jax.tree.map(functools.partial(_of_layer, layer=layer), stacked) for layer in range(depth)
    )
    return params | {'model': model, LAYERS: SplitLayers(layers)}


def outputs_first(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters that `split` makes, with kernels that have their outputs first."""
    model = dict(params['model'])
    model['to_logits'] = _outputs_first(model['to_logits'])
    layers = tuple(map(_outputs_first, params[LAYERS].params))
    return params | {'model': model, LAYERS: SplitLayers(layers)}


def _outputs_first(params: Any, name: str = '') -> Any:
    if not isinstance(params, Mapping):
        return params
    if name not in SUMMED_AXES or 'kernel' not in params:
        return {key: _outputs_first(part, key) for key, part in params.items()}
    others = {key: part for key, part in params.items() if key != 'kernel'}
    kernel, summed = params['kernel'], SUMMED_AXES[name]
    order = (*range(summed, kernel.ndim), *range(summed))
    return others | {OUTPUTS_FIRST: _transposed(kernel, order)}


def _transposed(x: Any, order: tuple[int, ...]) -> Any:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x.transpose(order)
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in order)))
    shape = tuple(x.shape[axis] for axis in order)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)


def _of_layer(x: Any, layer: int) -> Any:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[layer]
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)


def scan_group(run_step: StepFn, carry: Any, group: Group) -> tuple[Any, Any]:
    """Folds `run_step` over the steps of a group in one scanned loop body."""
    like = group.members[-1 if group.padded else 0]

    def body(carry: Any, index: jax.Array) -> tuple[Any, Any]:
        return run_step(carry, Step(index, like, group.padded))

    return jax.lax.scan(body, carry, jnp.asarray(group.members))


def _one_step(run_step: StepFn, carry: Carry, group: Group) -> tuple[Carry, list[Any]]:
    carry, output = run_step(carry, Step.at(group.first))
    return carry, [jax.tree.map(lambda x: x[None], output)]
