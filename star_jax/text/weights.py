"""How do the tensors of a folder become the parameters of an encoder?

A table of mappings names both sides. Tensors are read one at a time and written into the arrays on
the devices, so that a host holds at most one tensor beside the arrays of its devices.
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
from star_jax.text.encoder_folder import EncoderFolder


class WeightMapping(NamedTuple):
    """A tensor of a folder fills one parameter, or a part of one.

    Attributes:
        tensor: name of the tensor in the folder.
        param: '/'-joined path of the parameter.
        pattern: einops pattern from the tensor to the part.
        index: position of the part along the leading axes of the parameter; None for an axis that
            the part fills.
    """

    tensor: str
    param: str
    pattern: str = 'E -> E'
    index: tuple[int | None, ...] = ()

    def part_shape(self, param_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the part of a parameter of shape `param_shape`."""
        leading = len(self.index)
        filled = (size for size, at in zip(param_shape, self.index, strict=False) if at is None)
        return (*filled, *param_shape[leading:])

    def tensor_shape(self, param_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor that fits a parameter of shape `param_shape`."""
        tensor_axes, part_axes = self.pattern.split('->')
        part = np.broadcast_to(np.float32(0), self.part_shape(param_shape))  # takes no memory
        return einops.rearrange(part, f'{part_axes} -> {tensor_axes}').shape

    def to_part(self, tensor: np.ndarray, param_shape: Sequence[int]) -> np.ndarray:
        """The tensor as a part with as many axes as the parameter."""
        axes = self.pattern.split('->')[1].split()
        sizes = dict(zip(axes, self.part_shape(param_shape), strict=True))
        part = einops.rearrange(tensor, self.pattern, **sizes)
        return np.expand_dims(part, [axis for axis, at in enumerate(self.index) if at is not None])


def affine(
    tensor: str, param: str, pattern: str, kernel: str = 'kernel'
) -> tuple[WeightMapping, WeightMapping]:
    """The mappings of a weight and its bias."""
    return (
        WeightMapping(f'{tensor}.weight', f'{param}/{kernel}', pattern),
        WeightMapping(f'{tensor}.bias', f'{param}/bias'),
    )


def fused(tensors: Sequence[str], param: str) -> list[WeightMapping]:
    """The mappings of query, key and value to one kernel [E, 3, N, H]."""
    return [
        WeightMapping(f'{tensor}.weight', f'{param}/kernel', '(N H) E -> E N H', (None, row))
        for row, tensor in enumerate(tensors)
    ]


def fused_bias(tensors: Sequence[str], param: str) -> list[WeightMapping]:
    """The mappings of their biases to [3, N, H]."""
    return [
        WeightMapping(f'{tensor}.bias', f'{param}/bias', '(N H) -> N H', (row,))
        for row, tensor in enumerate(tensors)
    ]


def stacked(prefix: str, layer: Iterable[WeightMapping], depth: int) -> list[WeightMapping]:
    """The mappings of one layer for all layers.

    Args:
        prefix: the folder names a tensor of layer 3 `prefix`.3.name.
        layer: the mappings of one layer.
        depth: number of layers, the leading axis of the parameters.
    """
    layer = list(layer)
    return [
        WeightMapping(
            f'{prefix}.{row}.{mapping.tensor}',
            f'layers/{mapping.param}',
            mapping.pattern,
            (row, *mapping.index),
        )
        for row in range(depth)
        for mapping in layer
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """The source of an encoder's parameters.

    Attributes:
        folder: the folder that holds the tensors.
        mappings: one per tensor; together they fill every parameter.
        boxed: shapes of the parameters, boxed with logical axes.
    """

    folder: EncoderFolder
    mappings: tuple[WeightMapping, ...]
    boxed: dict

    def check(self) -> None:
        """Raises `UserError` for a missing tensor or a wrong shape; reads no tensor."""
        tensors, params = self.folder.tensors(), _flat(nn.unbox(self.boxed))
        for mapping in self.mappings:
            if mapping.tensor not in tensors:
                raise UserError(
                    f'{self.folder.path} has no tensor {mapping.tensor!r}, which its config.json '
                    f'requires; fetch the whole model again.'
                )
            shape = tensors.shape(mapping.tensor)
            if shape != (expected := mapping.tensor_shape(params[mapping.param].shape)):
                raise UserError(
                    f'{self.folder.path}: {mapping.tensor} has shape {shape}, but its config.json '
                    f'requires {expected}; weights and config do not belong together.'
                )

    def load(self, dtype: str, mesh: Mesh | None) -> dict:
        """The parameters on the default device, or sharded over a mesh by their logical axes.

        Raises `UserError` with the name of the first array that the mesh does not divide.
        """
        tensors, abstract = self.folder.tensors(), _flat(nn.unbox(self.boxed))
        shardings = self._shardings(mesh) if mesh else dict.fromkeys(abstract)
        params: dict[str, jax.Array] = {}
        for mapping in self.mappings:
            shape, sharding = abstract[mapping.param].shape, shardings[mapping.param]
            part = mapping.to_part(tensors[mapping.tensor], shape).astype(jnp.dtype(dtype))
            if not mapping.index:
                params[mapping.param] = _put(part, sharding)
                continue
            if mapping.param not in params:
                params[mapping.param] = jnp.zeros(shape, part.dtype, device=sharding)
            start = [at or 0 for at in mapping.index] + [0] * (len(shape) - len(mapping.index))
            updated = _update(params[mapping.param], _put(part, sharding), start)
            # Without this the host runs ahead of the devices and its memory fills with tensors.
            params[mapping.param] = jax.block_until_ready(updated)
        return traverse_util.unflatten_dict(params, sep='/')

    def _shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        sharded = rules.abstract(self.boxed, mesh, f' of the text encoder {self.folder.path}')
        return {name: leaf.sharding for name, leaf in _flat(sharded).items()}


@functools.partial(jax.jit, donate_argnums=0)
def _update(param: jax.Array, part: jax.Array, start: Sequence[jax.Array]) -> jax.Array:
    return jax.lax.dynamic_update_slice(param, part, start)


def _put(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _flat(tree: dict) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep='/')
