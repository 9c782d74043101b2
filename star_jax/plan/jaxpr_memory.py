"""How much memory and traffic does a function need, by its jaxpr alone?

Every intermediate array of a jaxpr has a size. A compiler fuses many of them away, so live memory
is an upper bound; matrix products and fused attention read and write their arrays at least once, so
traffic is a lower bound.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from star_jax.core.flops import inner_jaxprs
from star_jax.plan import fused
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
# The results of these are their first argument in another layout.
LAYOUT = FUSED | {'dynamic_slice', 'optimization_barrier', 'rev', 'slice', 'transpose'}
PRODUCTS = ('dot_general', 'conv_general_dilated', *fused.NAMES)


class Needs(NamedTuple):
    """Memory and traffic of a program on one device, in bytes.

    Attributes:
        live: the most intermediate arrays that are live at once.
        traffic: bytes that matrix products, convolutions and fused attention read and write per
            step; the body of a loop counts once per iteration.
    """

    live: int
    traffic: int


def measure(program: Program) -> Needs:
    """The needs of a program."""
    jaxpr = jax.make_jaxpr(program.function)(*program.args).jaxpr
    return Needs(live=_peak(jaxpr), traffic=program.runs * _traffic(jaxpr))


def weights_read(function: Callable, *args: Any) -> int:
    """Bytes that products read of the arrays in the first argument, in all iterations of loops.

    An array counts each time that a product reads it, in the dtype in which it does; of the
    branches of a condition the one that reads most counts.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    count = len(jax.tree.leaves(args[0]))
    return _reads(jaxpr, [index < count for index in range(len(jaxpr.invars))])[0]


def _reads(jaxpr: jex.Jaxpr, weights: Sequence[bool]) -> tuple[int, list[bool]]:
    """Bytes of weights that products read, and which results are weights.

    Args:
        jaxpr: the program.
        weights: which of its arguments are weights.
    """
    known = {var for var, is_weight in zip(jaxpr.invars, weights, strict=True) if is_weight}
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        used = [isinstance(var, jex.Var) and var in known for var in equation.invars]
        if not any(used):
            continue
        if name in PRODUCTS:
            operands = zip(equation.invars, used, strict=True)
            total += sum(_bytes(var) for var, is_weight in operands if is_weight)
        elif name in LAYOUT:
            known.update(equation.outvars if used[0] else ())
        sizes = [0]
        for inner in inner_jaxprs(equation.params):
            if len(inner.invars) > len(used):  # the arguments of a loop's condition are apart
                continue
            size, results = _reads(inner, used[len(used) - len(inner.invars) :])
            sizes.append(size * (equation.params['length'] if name == 'scan' else 1))
            pairs = zip(equation.outvars, results, strict=False)
            known.update(var for var, is_weight in pairs if is_weight)
        total += max(sizes) if name == 'cond' else sum(sizes)
    return total, [isinstance(var, jex.Var) and var in known for var in jaxpr.outvars]


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
        inside = [0, *map(_traffic, inner_jaxprs(equation.params))]
        if equation.primitive.name == 'cond':
            total += max(inside)
        else:
            total += sum(inside) * equation.params.get('length', 1)
    return total


def _bytes(var: jex.Var) -> int:
    aval = var.aval
    size = getattr(getattr(aval, 'dtype', None), 'itemsize', 0)
    return math.prod(getattr(aval, 'shape', ())) * size
