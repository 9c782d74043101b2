"""What does attention read and write where a fused kernel computes it?

Fused kernels of GPUs (`nn.flash`) and TPUs (`nn.splash`) never write scores to main memory, and
cannot be traced where their platform is missing. For counting, opaque operations with the same
arguments and results stand for them: they can be traced, but not run.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from star_jax.core.cache import KV, join
from star_jax.core.visibility import ALL, StaticVisibility, TracedVisibility, Visibility
from star_jax.nn.attention_dispatch import Automatic
from star_jax.nn.flash import Flash
from star_jax.protocols import Kernel

forward_p = jex.Primitive('fused_attention')
backward_p = jex.Primitive('fused_attention_gradient')
backward_p.multiple_results = True
NAMES = (forward_p.name, backward_p.name)


@forward_p.def_abstract_eval
def _forward(q: jax.core.ShapedArray, *_: jax.core.ShapedArray) -> jax.core.ShapedArray:
    return q


@backward_p.def_abstract_eval
def _backward(*args: jax.core.ShapedArray) -> tuple[jax.core.ShapedArray, ...]:
    return args[:3]


@jax.custom_vjp
def attend(q_BLNH: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """[B, L, N, H]: reads queries, keys and values, and writes the output of attention."""
    return forward_p.bind(q_BLNH, keys, values)


def _attend_forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    result = attend(*args)
    return result, (*args, result)


def _attend_backward(
    residuals: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    """Reads the arguments, the result and its gradient; writes the gradients of the arguments."""
    return tuple(backward_p.bind(*residuals, gradient))


attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class Counted:
    """The kernel that a run uses on its platform, for counting arrays anywhere.

    Attributes:
        kernel: the kernel, as `nn.attention_dispatch.named` returns it.
        splits_rows: whether a mesh splits the rows of an image, whose bounds are then traced.
    """

    kernel: Kernel
    splits_rows: bool = False

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        kernel, bounds = self.kernel, visibility.bounds
        if isinstance(kernel, Automatic):
            kernel = kernel.choose(q_BLNH, past, new)
        otherwise = getattr(kernel, 'otherwise', None)
        if otherwise is None:  # not fused
            return kernel(q_BLNH, past, new, visibility)
        keys = sum(kv.rows for kv in (*past, new))
        if self.splits_rows and isinstance(bounds, StaticVisibility) and not bounds.sees_all(keys):
            bounds = TracedVisibility(jnp.asarray(bounds.bound_L))
        split = visibility.replace(bounds=bounds)
        fuses = visibility.mask is None
        if isinstance(kernel, Flash):
            fuses = kernel.fuses(q_BLNH, split)
        if not fuses:
            return otherwise(q_BLNH, past, new, visibility)
        kv, _ = join(past, new, visibility)
        return attend(q_BLNH, kv.keys, kv.values)
