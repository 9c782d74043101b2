"""How do the tensors of a folder become the parameters of a tower?

A table of pieces names both sides. Tensors are read one by one and written into the arrays on the
devices, so that a host never holds more than one of them beside what lies on its devices.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.text.folder import Folder


class Piece(NamedTuple):
    """The tensor `theirs` of a folder is our array `ours` ('/'-joined path), or a part of it.

    `pattern`: einops, from theirs to ours. `at`: where the part lies along the leading axes of our
    array; None for an axis that it fills.
    """

    theirs: str
    ours: str
    pattern: str = 'E -> E'
    at: tuple[int | None, ...] = ()

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of the part of an array of shape `whole`."""
        fixed = len(self.at)
        filled = (size for size, at in zip(whole, self.at, strict=False) if at is None)
        return (*filled, *whole[fixed:])

    def expected(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor that fits into an array of shape `whole`."""
        theirs, ours = self.pattern.split('->')
        part = np.broadcast_to(np.float32(0), self.shape(whole))  # takes no memory
        return einops.rearrange(part, f'{ours} -> {theirs}').shape

    def arrange(self, tensor: np.ndarray, whole: Sequence[int]) -> np.ndarray:
        """The tensor as our part, with as many axes as our array."""
        axes = self.pattern.split('->')[1].split()
        part = einops.rearrange(
            tensor, self.pattern, **dict(zip(axes, self.shape(whole), strict=True))
        )
        return np.expand_dims(part, [axis for axis, at in enumerate(self.at) if at is not None])


def affine(theirs: str, ours: str, pattern: str, kernel: str = 'kernel') -> tuple[Piece, Piece]:
    """The pieces of a weight and its bias."""
    return Piece(f'{theirs}.weight', f'{ours}/{kernel}', pattern), Piece(
        f'{theirs}.bias', f'{ours}/bias'
    )


def fused(names: Sequence[str], ours: str) -> list[Piece]:
    """The pieces of query, key and value as one kernel [E, 3, N, H]."""
    return [
        Piece(f'{name}.weight', f'{ours}/kernel', '(N H) E -> E N H', (None, place))
        for place, name in enumerate(names)
    ]


def fused_bias(names: Sequence[str], ours: str) -> list[Piece]:
    """The pieces of their biases [3, N, H]."""
    return [
        Piece(f'{name}.bias', f'{ours}/bias', '(N H) -> N H', (place,))
        for place, name in enumerate(names)
    ]


def layered(prefix: str, layer: Iterable[Piece], depth: int) -> list[Piece]:
    """The pieces of one layer for all layers: theirs numbered after `prefix`, ours stacked."""
    layer = list(layer)
    return [
        Piece(f'{prefix}.{row}.{one.theirs}', f'layers/{one.ours}', one.pattern, (row, *one.at))
        for row in range(depth)
        for one in layer
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What a tower's parameters are made from. `boxed`: abstract arrays with logical axes."""

    folder: Folder
    pieces: tuple[Piece, ...]
    boxed: dict

    def check(self) -> None:
        """Raises `UserError` for a tensor that is missing or misshapen; reads no tensor."""
        tensors, flat = self.folder.tensors(), _flat(nn.unbox(self.boxed))
        for piece in self.pieces:
            if piece.theirs not in tensors:
                raise UserError(
                    f'{self.folder.path} has no tensor {piece.theirs!r}, which its config.json '
                    f'asks for; fetch the whole model again.'
                )
            shape = tensors.shape(piece.theirs)
            if shape != (expected := piece.expected(flat[piece.ours].shape)):
                raise UserError(
                    f'{self.folder.path}: {piece.theirs} has shape {shape}, but its config.json '
                    f'asks for {expected}; weights and config do not belong together.'
                )

    def read(self, dtype: str, mesh: Mesh | None) -> dict:
        """The parameters on the default device, or split over a mesh as their axes say.

        Raises `UserError` naming the first array that the mesh does not divide.
        """
        tensors, flat = self.folder.tensors(), _flat(nn.unbox(self.boxed))
        where = self._shardings(mesh) if mesh else dict.fromkeys(flat)
        ready: dict[str, jax.Array] = {}
        for piece in self.pieces:
            shape, sharding = flat[piece.ours].shape, where[piece.ours]
            part = piece.arrange(tensors[piece.theirs], shape).astype(jnp.dtype(dtype))
            if not piece.at:
                ready[piece.ours] = _put(part, sharding)
                continue
            if piece.ours not in ready:
                ready[piece.ours] = jnp.zeros(shape, part.dtype, device=sharding)
            start = [place or 0 for place in piece.at] + [0] * (len(shape) - len(piece.at))
            written = _write(ready[piece.ours], _put(part, sharding), start)
            # Or the host would run ahead of the devices, with tensors that wait in its memory.
            ready[piece.ours] = jax.block_until_ready(written)
        return traverse_util.unflatten_dict(ready, sep='/')

    def _shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        placed = rules.abstract(self.boxed, mesh, f' of the text encoder {self.folder.path}')
        return {name: leaf.sharding for name, leaf in _flat(placed).items()}


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, part: jax.Array, start: Sequence[jax.Array]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part, start)


def _put(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _flat(tree: dict) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep='/')
