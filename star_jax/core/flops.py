"""How much arithmetic is in a function?

Counted in its jaxpr: multiply-adds of matmuls and convolutions, times two. The body of a scan
counts once per iteration, which the compiler's own analysis misses.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex


def count_flops(function: Callable, *args: Any) -> int:
    """Floating-point operations of `function(*args)`; the arguments may be abstract."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: jex.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: jex.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        left, _ = (v.aval for v in equation.invars)
        contracted = params['dimension_numbers'][0][0]
        inner = math.prod(left.shape[axis] for axis in contracted)
        return 2 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == 'conv_general_dilated':
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * (kernel.size // outputs)
    times = params['length'] if name == 'scan' else 1
    return times * sum(_count(inner) for inner in _inner(params))


def _inner(params: dict) -> list[jex.Jaxpr]:
    """The jaxprs that an equation carries in its parameters."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, jex.Jaxpr):
                found.append(item)
    return found
