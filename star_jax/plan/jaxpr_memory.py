"""How much memory and traffic does a function need, by its jaxpr alone?

Every intermediate array of a jaxpr has a size. A compiler fuses many of them away, so live memory
is an upper bound; matrix products read and write their arrays at least once, so traffic is a lower
bound.
"""

import math

import jax
from jax.extend import core as jex

from star_jax.core.flops import inner_jaxprs
from star_jax.plan.workload import Program

# Every compiler fuses these into the operation that uses their result.
FUSED = {
    'broadcast_in_dim',
    'convert_element_type',
    'copy',
    'expand_dims',
    'iota',
    'reshape',
    'sharding_constraint',
    'squeeze',
    'stop_gradient',
}
PRODUCTS = ('dot_general', 'conv_general_dilated')


def peak(program: Program) -> int:
    """The most bytes of intermediate arrays that are live at once."""
    return _peak(jax.make_jaxpr(program.function)(*program.args).jaxpr)


def traffic(program: Program) -> int:
    """Bytes that matrix products and convolutions read and write, in all iterations of loops."""
    return _traffic(jax.make_jaxpr(program.function)(*program.args).jaxpr)


def _peak(jaxpr: jex.Jaxpr) -> int:
    last_use = {}
    for index, equation in enumerate(jaxpr.eqns):
        for var in equation.invars:
            if isinstance(var, jex.Var):
                last_use[var] = index
    last_use |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if isinstance(var, jex.Var)}
    freed_after: dict[int, list[jex.Var]] = {}
    for var, index in last_use.items():
        freed_after.setdefault(index, []).append(var)
    sizes: dict[jex.Var, int] = {}
    live = most = 0
    for index, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        inner = max(map(_peak, inner_jaxprs(equation.params)), default=0)
        results = {
            var: 0 if name in FUSED else _bytes(var) for var in equation.outvars if var in last_use
        }
        # The results of a call are part of its inner peak; a loop stores them beside its body.
        new = sum(results.values())
        most = max(most, live + (new + inner if name == 'scan' else max(new, inner)))
        sizes |= results
        live += new - sum(sizes.pop(var, 0) for var in freed_after.get(index, ()))
    return most


def _traffic(jaxpr: jex.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            total += sum(map(_bytes, (*equation.invars, *equation.outvars)))
        iterations = equation.params['length'] if equation.primitive.name == 'scan' else 1
        total += iterations * sum(map(_traffic, inner_jaxprs(equation.params)))
    return total


def _bytes(var: jex.Var) -> int:
    aval = var.aval
    size = getattr(getattr(aval, 'dtype', None), 'itemsize', 0)
    return math.prod(getattr(aval, 'shape', ())) * size
