"""In which form do the parameters of layers lie for sampling?

A step of one row reads every weight once, in place only where each layer has arrays of its own: a
slice of stacked ones would be copied. A CPU packs the right operand of a product, so there a weight
matrix is stored [out, in] and stands on the left (`layers.times_outputs_first`). In a
scan over layers, `lax.switch` selects the kernel of the current layer from one array per layer
(`layers.SwitchedKernel`); on one CPU device these are views of the stacked array.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from star_jax.core.schedule import Schedule
from star_jax.nn.layers import OUTPUTS_FIRST, SWITCHED, SwitchedKernel

LAYERS = 'layers'  # the parameters of layers that are apart from each other
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
LARGE = 2**26  # bytes of all layers from which on copies of their slices cost time
KERNELS = 'kernels'  # the kernels of every layer of a scan, an array each
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
    if 2 * single <= schedule.steps:
        return params
    params = split(params)
    if platform in PACKING:
        params = outputs_first(params)
    layers = params[LAYERS].replace(lanes=LANES.get(platform, 1))
    return params | {LAYERS: layers}


def arrange_on_devices(params: dict[str, Any], schedule: Schedule, platform: str) -> dict[str, Any]:
    """`arrange` of arrays on devices, which stay split in the same way; arguments as there."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    arranged = arrange(abstract, schedule, platform)
    if arranged is abstract:
        return params
    shardings = jax.tree.map(lambda x: x.sharding, arranged)
    return jax.jit(arrange, static_argnums=(1, 2), out_shardings=shardings)(
        params, schedule, platform
    )


def with_switched_kernels(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, and as 'kernels' a view of the kernels of each layer.

    Only a model of at least LARGE bytes in stacked layers on one CPU device gains by that; other
    parameters are returned as they are, the same object.

    Args:
        params: 'model' and 'tokenizer', on their devices.
    """
    stacked = params['model'].get('blocks', {})
    leaves = jax.tree.leaves(stacked)
    if sum(leaf.nbytes for leaf in leaves) < LARGE or not all(map(_on_one_cpu, leaves)):
        return params
    views = {
        path: tuple(_view_of_layer(x, layer) for layer in range(len(x)))
        for path, x in flatten_dict(stacked).items()
        if path[-1] == 'kernel'
    }
    return params | {KERNELS: unflatten_dict(views)}


def switch_kernels(stacked: Any, kernels: Any, layer: jax.Array) -> Any:
    """The parameters of a layer, with a `SwitchedKernel` beside each kernel that is in `kernels`.

    A module that does not know `SwitchedKernel` uses the slice; the slices that no module uses are
    no part of the compiled program.

    Args:
        stacked: the parameters of all layers.
        kernels: the kernels of every layer, from `with_switched_kernels`.
        layer: number of the layer, an int32 scalar.
    """
    params = {path: x[layer] for path, x in flatten_dict(stacked).items()}
    for path, of_layers in flatten_dict(kernels).items():
        params[*path[:-1], SWITCHED] = SwitchedKernel(of_layers, layer)
    return unflatten_dict(params)


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


def _view_of_layer(x: jax.Array, layer: int) -> jax.Array:
    """A layer of an array on one CPU, which JAX does not copy if it is aligned."""
    return jax.device_put(np.asarray(x)[layer], _sharding_of_layer(x.sharding))


def _on_one_cpu(x: jax.Array) -> bool:
    return [device.platform for device in x.devices()] == ['cpu']


def _of_layer(x: Any, layer: int) -> Any:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[layer]
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_sharding_of_layer(x.sharding))


def _sharding_of_layer(sharding: Any) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
