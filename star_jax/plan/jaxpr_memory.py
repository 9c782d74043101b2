"""How much memory, and how much traffic, does a function ask for before any compiler saw it?

Read from its jaxpr, where every intermediate array has a size. A compiler fuses many of them away,
so what lives is an upper bound; and products read and write at least their arrays.
"""

import math

import jax
from jax.extend import core as jex

from star_jax.core.flops import inner_jaxprs
from star_jax.plan.workload import Piece

# Made where they are used, by any compiler.
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


def peak(piece: Piece) -> int:
    """The most bytes of intermediate arrays that live at once."""
    return _peak(jax.make_jaxpr(piece.function)(*piece.args).jaxpr)


def traffic(piece: Piece) -> int:
    """Bytes that the products of a function read and write, every iteration of a loop counted."""
    return _traffic(jax.make_jaxpr(piece.function)(*piece.args).jaxpr)


def _peak(jaxpr: jex.Jaxpr) -> int:
    last = {}
    for place, equation in enumerate(jaxpr.eqns):
        for var in equation.invars:
            if isinstance(var, jex.Var):
                last[var] = place
    last |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if isinstance(var, jex.Var)}
    ends: dict[int, list[jex.Var]] = {}
    for var, place in last.items():
        ends.setdefault(place, []).append(var)
    sizes: dict[jex.Var, int] = {}
    live = most = 0
    for place, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        inside = max(map(_peak, inner_jaxprs(equation.params)), default=0)
        made = {var: 0 if name in FUSED else _bytes(var) for var in equation.outvars if var in last}
        # What a call leaves is among what lives in it; a loop keeps its results beside its body.
        beside = sum(made.values())
        most = max(most, live + (beside + inside if name == 'scan' else max(beside, inside)))
        sizes |= made
        live += beside - sum(sizes.pop(var, 0) for var in ends.get(place, ()))
    return most


def _traffic(jaxpr: jex.Jaxpr) -> int:
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            found += sum(map(_bytes, (*equation.invars, *equation.outvars)))
        times = equation.params['length'] if equation.primitive.name == 'scan' else 1
        found += times * sum(map(_traffic, inner_jaxprs(equation.params)))
    return found


def _bytes(var: jex.Var) -> int:
    aval = var.aval
    size = getattr(getattr(aval, 'dtype', None), 'itemsize', 0)
    return math.prod(getattr(aval, 'shape', ())) * size
