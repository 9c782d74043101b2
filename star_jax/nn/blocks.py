"""Which parts make one layer of a network?

A block is made of parts: attention, MLP, norms and modulation. Layers are stacked under one scan.
Suffixes: B batch, L rows, D width, N heads, P = H/2 rotation planes, F hidden width, V logits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core.cache import KV
from star_jax.core.guidance import mix_rows
from star_jax.core.positions import learned_rotation
from star_jax.core.settings import Remat
from star_jax.core.visibility import ALL, Visibility
from star_jax.nn import layers
from star_jax.parallel.rules import ActivationSharding
from star_jax.protocols import Kernel

# Values of a block that `jax.checkpoint` keeps for the backward pass, beside its input. Products
# without batch dimensions are the products with weights; keeping the products of attention, too,
# would store scores that its kernels never hold at once.
SAVED = {'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable, 'full': None}
PLAIN = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)  # gates, scales and shifts of an unmodulated block


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), Linear: [B, L, D] -> [B, L, D].

    Attributes:
        width: channels D of a row.
        hidden: channels F between the two layers.
        kernel_init: initializer of the first kernel.
        out_init: initializer of the second kernel.
        sharding: how the arrays are split over devices.
    """

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


class SwiGlu(nn.Module):
    """(SiLU(x W1) * (x W3)) W2, without biases (LlamaGen specification 2.2).

    Attributes:
        width: channels D of a row.
        hidden: channels F of both products.
        kernel_init: initializer of W1 and W3.
        out_init: initializer of W2.
        sharding: how the arrays are split over devices.
    """

    width: int
    hidden: int
    kernel_init: layers.Initializer
    out_init: layers.Initializer
    sharding: ActivationSharding = ActivationSharding()

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        shape, axes = (self.width, self.hidden), ('embed', 'mlp')
        gate = layers.Einsum('BLD,DF->BLF', shape, axes, self.kernel_init, name='gate')(x_BLD)
        value = layers.Einsum('BLD,DF->BLF', shape, axes, self.kernel_init, name='value')(x_BLD)
        h_BLF = self.sharding(nn.silu(gate) * value, 'batch', 'tokens', 'mlp')
        shape, axes = (self.hidden, self.width), ('mlp', 'embed')
        return layers.Einsum('BLF,FD->BLD', shape, axes, self.out_init, name='out')(h_BLF)


@dataclasses.dataclass(frozen=True)
class BlockParts:
    """The parts of a block; each is a function that makes a module.

    Attributes:
        self_attention: attention to the rows so far.
        mlp: the feed-forward part.
        norm: the norm before self-attention and before the MLP.
        cross_attention: attention to the text, between the two (None: none).
        cross_norm: the norm before cross-attention.
        cross_scale: scales the output of cross-attention (None: not scaled).
        modulation: scales, shifts and gates of the norms (None: none).
        dropout: rate of dropout after self-attention and after the MLP, in training.
        sharding: how the rows of a block are sharded.
    """

    self_attention: Callable[[], nn.Module]
    mlp: Callable[[], nn.Module]
    norm: Callable[[], nn.Module] = layers.LayerNorm
    cross_attention: Callable[[], nn.Module] | None = None
    cross_norm: Callable[[], nn.Module] = layers.LayerNorm
    cross_scale: Callable[[], nn.Module] | None = None
    modulation: Callable[[], nn.Module] | None = None
    dropout: float = 0.0
    sharding: ActivationSharding = ActivationSharding()

    def with_sharding(self, sharding: ActivationSharding) -> 'BlockParts':
        """The same parts, whose arrays are sharded by `sharding`."""
        sharded = {
            name: functools.partial(part, sharding=sharding)
            for name in ('self_attention', 'mlp', 'cross_attention')
            if (part := getattr(self, name))
        }
        return dataclasses.replace(self, sharding=sharding, **sharded)

    def with_kernel(self, change: Callable[[Kernel], Kernel]) -> 'BlockParts':
        """The same parts, with the kernel of self-attention replaced by `change(kernel)`."""
        attend = self.self_attention(parent=None).attend
        attention = functools.partial(self.self_attention, attend=change(attend))
        return dataclasses.replace(self, self_attention=attention)


class PerLayer(NamedTuple):
    """The inputs of one block; outside of the scan the first axis of every array is the layer.

    Attributes:
        past: cached keys and values, in pieces.
        text_kv: keys and values of the text, or None.
        paths_2B: per image, scales of the residual branches of self-attention and MLP, or None.
        frequencies_NP2: learned rotary frequencies, or None.
        adds_levels: 1 where the level embedding is added before the block, 0 elsewhere, or None.
        mixing_22: how the prompted and the unprompted rows after the block are combined from both
            (`core.guidance.mix_rows`), or None.
        noise_B: the key of dropout of each image, or None: nothing is dropped.
    """

    past: tuple[KV, ...] = ()
    text_kv: KV | None = None
    paths_2B: jax.Array | None = None
    frequencies_NP2: jax.Array | None = None
    adds_levels: jax.Array | None = None
    mixing_22: jax.Array | None = None
    noise_B: jax.Array | None = None


class Shared(NamedTuple):
    """The inputs that all blocks share.

    Attributes:
        rotation_LP2: cosines and sines of every row, or None.
        xy_L2: coordinates of every row for learned frequencies, or None.
        visibility: which keys each row may attend to.
        text_length_B: how many text tokens each image has, or None.
        signal: the modulation signal, or None.
        levels_LD: the level embedding of every row, if blocks add it, or None.
    """

    rotation_LP2: jax.Array | None = None
    xy_L2: jax.Array | None = None
    visibility: Visibility = ALL
    text_length_B: jax.Array | None = None
    signal: jax.Array | None = None
    levels_LD: jax.Array | None = None


class Block(nn.Module):
    """Self-attention, cross-attention, MLP, each added to its input (STAR specification 3.4).

    Attributes:
        parts: makes its modules.
    """

    parts: BlockParts

    def setup(self) -> None:
        parts = self.parts
        self.norm1, self.norm2 = parts.norm(), parts.norm()
        self.attn = parts.self_attention()
        self.cross = parts.cross_attention() if parts.cross_attention else None
        self.cross_norm = parts.cross_norm() if parts.cross_attention else None
        self.cross_scale = parts.cross_scale() if parts.cross_scale else None
        self.ffn = parts.mlp()
        self.modulate = parts.modulation() if parts.modulation else None

    def text_kv(self, carry: tuple, text: Any) -> tuple[tuple, KV | None]:
        """Keys and values of the text; the empty carry is what a scan over layers requires."""
        return carry, self.cross.text_kv(text) if self.cross else None

    def __call__(self, x_BLD: jax.Array, layer: PerLayer, shared: Shared) -> tuple[jax.Array, KV]:
        """Returns the rows [B, L, D], and their keys and values."""
        changes = PLAIN
        if self.modulate is not None:
            changes = jnp.moveaxis(self.modulate(shared.signal).astype(x_BLD.dtype), -2, 0)
        gate1, gate2, scale1, scale2, shift1, shift2 = changes
        path1, path2 = (1.0, 1.0)
        if layer.paths_2B is not None:
            path1, path2 = layer.paths_2B[:, :, None, None].astype(x_BLD.dtype)
        rotation = shared.rotation_LP2
        if layer.frequencies_NP2 is not None:
            rotation = learned_rotation(shared.xy_L2, layer.frequencies_NP2)
        if shared.levels_LD is not None:
            x_BLD = x_BLD + (layer.adds_levels * shared.levels_LD).astype(x_BLD.dtype)
        h = self.norm1(x_BLD) * (1 + scale1) + shift1
        h, kv = self.attn(h, rotation, layer.past, shared.visibility)
        h = self._drop(h, layer, 0)
        x_BLD = x_BLD + path1 * (gate1 * h)
        if self.cross:
            h = self.cross(self.cross_norm(x_BLD), layer.text_kv, shared.text_length_B)
            x_BLD = x_BLD + (self.cross_scale(h) if self.cross_scale else h)
        h = self._drop(self.ffn(self.norm2(x_BLD) * (1 + scale2) + shift2), layer, 1)
        x_BLD = x_BLD + path2 * (gate2 * h)
        if layer.mixing_22 is not None:
            x_BLD = mix_rows(x_BLD, layer.mixing_22)
        return self.parts.sharding(x_BLD, 'batch', 'tokens', None), kv

    def _drop(self, x_BLD: jax.Array, layer: PerLayer, branch: int) -> jax.Array:
        """The rows of a branch after dropout, if there is any."""
        if layer.noise_B is None or not self.parts.dropout:
            return x_BLD
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(layer.noise_B, branch)
        return layers.dropout(keys_B, x_BLD, self.parts.dropout)


def stack_blocks(parts: BlockParts, depth: int, unroll: int, remat: Remat) -> nn.Module:
    """Blocks under one scan, called with the rows, a `PerLayer` and a `Shared`.

    Args:
        parts: the parts of every block.
        depth: number of blocks, the first axis of every array of the `PerLayer`.
        unroll: blocks compiled per iteration of the scan.
        remat: activations that the backward pass recomputes.
    """
    block = Block
    if remat != 'none':
        block = nn.remat(Block, prevent_cse=False, policy=SAVED[remat])
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


def drop_paths(key: jax.Array, depth: int, batch: int, rate: float) -> jax.Array:
    """Random scales of stochastic depth: 0, or 1 / (1 - rate of the layer).

    Args:
        key: chooses the dropped branches.
        depth: layers.
        batch: images B.
        rate: rate of the last layer; it rises linearly from 0 (STAR specification 3.4).

    Returns:
        [depth, 2, B] float32, for self-attention and MLP of each layer.
    """
    keep = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    return jax.random.bernoulli(key, keep, (depth, 2, batch)) / keep
