"""How many floating-point operations does a function take?

They are counted in its jaxpr: two per multiply-add of matrix products and convolutions. The body of
a scan counts once per iteration (the compiler's own analysis counts it once), the body of a
shard_map once per device of its mesh, and of the branches of a condition the one with the most.
"""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

EXACT = jax.lax.Precision.HIGHEST


def count_flops(function: Callable, *args: Any) -> int:
    """Floating-point operations of `function(*args)`; the arguments may be abstract."""
    return count_kinds(function, *args).total()


def count_kinds(function: Callable, *args: Any) -> collections.Counter[str]:
    """Floating-point operations of `function(*args)`, by kind of arithmetic.

    Returns:
        Operations of each kind that occurs: 'bfloat16' (operands below 32 bits), 'float32' (at
        JAX's default precision) and 'exact' (float32 at the highest precision).
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def inner_jaxprs(params: dict) -> list[jex.Jaxpr]:
    """The jaxprs that an equation carries in its parameters."""
    jaxprs = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                jaxprs.append(item.jaxpr)
            elif isinstance(item, jex.Jaxpr):
                jaxprs.append(item)
    return jaxprs


def _count(jaxpr: jex.Jaxpr) -> collections.Counter[str]:
    return sum(map(_count_equation, jaxpr.eqns), collections.Counter())


def _count_equation(equation: jex.JaxprEqn) -> collections.Counter[str]:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        left, _ = (v.aval for v in equation.invars)
        contracted = params['dimension_numbers'][0][0]
        inner = math.prod(left.shape[axis] for axis in contracted)
        return _products(equation, inner)
    if name == 'conv_general_dilated':
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
        return _products(equation, kernel.size // outputs)
    counts = list(map(_count, inner_jaxprs(params)))
    if name == 'cond':
        return max(counts, key=lambda count: count.total())
    inside = sum(counts, collections.Counter())
    times = params['length'] if name == 'scan' else 1
    if name == 'shard_map':
        times = params['mesh'].size
    return collections.Counter({kind: times * count for kind, count in inside.items()})


def _products(equation: jex.JaxprEqn, inner: int) -> collections.Counter[str]:
    """The operations of an equation, each of whose outputs is a sum of `inner` products."""
    flops = 2 * inner * math.prod(equation.outvars[0].aval.shape)
    if min(v.aval.dtype.itemsize for v in equation.invars) < 4:
        return collections.Counter(bfloat16=flops)
    precision = equation.params['precision']
    exact = precision is not None and EXACT in tuple(precision)
    return collections.Counter({'exact' if exact else 'float32': flops})
