"""The parameterised operations that every model is built from.

Every parameter has logical axes; `parallel/rules.py` maps them to the axes of a mesh.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

Initializer = nn.initializers.Initializer
# The name of a kernel that is stored with the axes of its outputs first, [*out, *in], in the place
# of 'kernel': `sampling.weight_layout.arrange` stores it so where sampling reads it fastest.
OUTPUTS_FIRST = 'outputs_first'
# The name of a `SwitchedKernel` in the place of 'kernel'.
SWITCHED = 'switched_kernel'

Product = Callable[[jax.Array, jax.Array], jax.Array]  # rows and a kernel -> rows


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums: float32, or float64 in a program of float64."""
    return jnp.promote_types(dtype, jnp.float32)


def activations(x: jax.Array, dtype: str) -> jax.Array:
    """x in the dtype of a network's activations; float32 means at least that."""
    wide = at_least_float32(x.dtype) if dtype == 'float32' else dtype
    return x.astype(wide)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """LayerNorm over the last axis without scale or shift; dtype of x out.

    Statistics are at least float32.
    """
    centred = x.astype(at_least_float32(x.dtype))
    centred -= centred.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / rms(x) over the last axis; statistics at least float32, dtype of x out."""
    wide = x.astype(at_least_float32(x.dtype))
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return wide.astype(x.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` as a part."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x)


class AffineLayerNorm(nn.Module):
    """`layer_norm` times a learned scale plus a learned shift.

    Attributes:
        width: channels.
        eps: added to the variance.
        axis: logical axis of scale and shift.
    """

    width: int
    eps: float = 1e-6
    axis: str | None = 'embed'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', _along(self.axis, nn.initializers.ones), (self.width,))
        bias = self.param('bias', _along(self.axis, nn.initializers.zeros), (self.width,))
        return layer_norm(x, self.eps) * scale.astype(x.dtype) + bias.astype(x.dtype)


class PlainRMSNorm(nn.Module):
    """`rms_norm` as a part."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x)


class RMSNorm(nn.Module):
    """`rms_norm` times a learned scale.

    Attributes:
        width: channels.
        eps: added to the mean square.
        axis: logical axis of the scale.
    """

    width: int
    eps: float = 1e-5
    axis: str | None = 'embed'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', _along(self.axis, nn.initializers.ones), (self.width,))
        return rms_norm(x, self.eps) * scale.astype(x.dtype)


class LayerScale(nn.Module):
    """x times a learned scale per channel.

    Attributes:
        width: channels.
        start: initial value of every scale.
    """

    width: int
    start: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = _along('embed', nn.initializers.constant(self.start))
        return x * self.param('scale', init, (self.width,)).astype(x.dtype)


def dropout(keys_B: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """x with elements set to 0 with probability `rate`, and the others divided by 1 - rate.

    Args:
        keys_B: the key of each image, so that it loses the same in every part of a batch.
        x: [B, ...].
        rate: the probability.
    """
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    return jnp.where(kept, x / (1 - rate), 0)


def split_keys(keys_B: jax.Array, count: int) -> jax.Array:
    """[count, B] new keys from the key of each image."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys_B)


def _along(axis: str | None, init: Initializer) -> Initializer:
    return nn.with_logical_partitioning(init, (axis,))


def unit(x: jax.Array) -> jax.Array:
    """x / max(norm, 1e-12) over the last axis, at least float32."""
    x = x.astype(at_least_float32(x.dtype))
    # The bound lies under the root: the root's own gradient is infinite at zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def times_outputs_first(x: jax.Array, kernel: jax.Array, out: jnp.dtype | None = None) -> jax.Array:
    """x [..., in] times a kernel [*out, in], which is cast to the dtype of x: [..., *out].

    The kernel is the left operand. On a CPU the right one is packed at each product, which for few
    rows takes longer than their arithmetic. Without the barrier, the compiler would remove the
    transposition of the result by an exchange of both.

    Args:
        x: rows.
        kernel: the kernel.
        out: dtype of the sums and the output (None: that of x).
    """
    *outputs, width = kernel.shape
    matrix = kernel.reshape(-1, width).astype(x.dtype)
    columns = jax.lax.dot_general(
        matrix,
        x.reshape(-1, width),
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=out,
    )
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], *outputs)


@flax.struct.dataclass
class SwitchedKernel:
    """The kernel of the current layer of a scan over layers, which is read in place.

    A slice of stacked kernels would be copied before the product.

    Attributes:
        kernels: the kernel [*in, *out] of every layer.
        layer: number of the current layer, an int32 scalar.
    """

    kernels: tuple[jax.Array, ...]
    layer: jax.Array

    def times(self, x: jax.Array, product: Product) -> jax.Array:
        """`product` of x and the kernel of the current layer."""
        branches = [lambda x, kernel=kernel: product(x, kernel) for kernel in self.kernels]
        return jax.lax.switch(self.layer, branches, x)


def multiply(module: nn.Module, product: Product, x: jax.Array, summed: int = 1) -> jax.Array:
    """x [..., in] times the kernel of a module, in whichever form it is stored: [..., *out].

    Args:
        module: has the `shape` [*in, *out], `axes` and `kernel_init` of its kernel, and the dtype
            `out` of the product.
        product: multiplies x by a kernel of that shape.
        x: the rows, whose last axis is summed.
        summed: axes *in of the kernel, as many as x has in its last one.
    """
    if module.has_variable('params', OUTPUTS_FIRST):
        kernel = module.get_variable('params', OUTPUTS_FIRST)
        kernel = kernel.reshape(*kernel.shape[:-summed], -1)
        return times_outputs_first(x, kernel, module.out)
    if module.has_variable('params', SWITCHED):
        return module.get_variable('params', SWITCHED).times(x, product)
    init = nn.with_logical_partitioning(module.kernel_init, module.axes)
    return product(x, module.param('kernel', init, module.shape))


class Einsum(nn.Module):
    """A named-axis matmul: `Einsum('BLD,DNH->BLNH', (D, N, H), ('embed', 'heads', None))`.

    The kernel is cast to the dtype of the input; its first axis is summed.

    Attributes:
        equation: einsum letters of the input, the kernel and the output.
        shape: shape of the kernel.
        axes: logical axes of the kernel.
        kernel_init: initializer of the kernel.
        out: dtype of the sums and the output (None: that of the input).
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Initializer
    out: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            kernel = kernel.astype(x.dtype)
            return jnp.einsum(self.equation, x, kernel, preferred_element_type=self.out)

        return multiply(self, product, x)


class Bias(nn.Module):
    """Adds a learned array that starts at zero.

    Attributes:
        shape: shape of the array, the last axes of the input.
        axes: its logical axes.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes)
        return x + self.param('bias', init, self.shape).astype(x.dtype)


class Linear(nn.Module):
    """y = x W + b over the last axis.

    Attributes:
        width_in: channels of the input.
        width_out: channels of the output.
        axes: logical axes (input, output) of the kernel.
        kernel_init: initializer of the kernel; the bias starts at zero.
        out: dtype of the sums and the output (None: that of the input).
    """

    width_in: int
    width_out: int
    axes: tuple[str | None, str | None]
    kernel_init: Initializer
    out: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=self.out)

        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
        bias = self.param('bias', bias_init, (self.width_out,))
        y = multiply(self, product, x)
        return y + bias.astype(y.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the kernel."""
        return self.width_in, self.width_out


class CodeEmbedding(nn.Module):
    """Codes [B, L] -> their rows [B, L, D] of a table, stored as the kernel of a linear layer.

    Attributes:
        codes: number of codes.
        width: channels D of a row.
        kernel_init: initializer of the table.
    """

    codes: int
    width: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self, codes_BL: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(self.kernel_init, (None, 'embed'))
        return self.param('kernel', init, (self.codes, self.width))[codes_BL]


class NormedLinear(nn.Module):
    """A norm, then a linear layer.

    Attributes:
        norm: the norm.
        linear: the layer.
    """

    norm: nn.Module
    linear: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.norm(x))


class Table(nn.Module):
    """Learned vectors, selected by index.

    Attributes:
        rows: number of vectors.
        width: channels of a vector.
        axes: logical axes (rows, channels).
        kernel_init: initializer of the table.
    """

    rows: int
    width: int
    axes: tuple[str | None, str | None]
    kernel_init: Initializer

    @nn.compact
    def __call__(self, index: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        return self.param('table', init, (self.rows, self.width))[index]


def conv(
    channels: int,
    size: int = 3,
    init: Initializer | None = None,
    name: str | None = None,
    strides: int = 1,
    padding: tuple[int, int] | None = None,
) -> nn.Conv:
    """A convolution of NHWC maps; with the default padding and stride it keeps their sides.

    Args:
        channels: channels of the output.
        size: side of the kernel.
        init: initializer of the kernel (None: LeCun normal).
        name: name of the module.
        strides: stride along both axes.
        padding: zeros (before, after) along both axes (None: half of the kernel's side).
    """
    init = nn.initializers.lecun_normal() if init is None else init
    return nn.Conv(
        channels,
        (size, size),
        strides=strides,
        padding=size // 2 if padding is None else (padding, padding),
        kernel_init=nn.with_logical_partitioning(init, (None, None, None, 'channels')),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('channels',)),
        name=name,
    )


def group_norm(groups: int, name: str | None = None) -> nn.GroupNorm:
    """GroupNorm, eps 1e-6, affine, with the two-pass variance of the published models."""
    return nn.GroupNorm(
        groups,
        epsilon=1e-6,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('channels',)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('channels',)),
        name=name,
    )
