"""Which metrics and arrays of a run are not finite?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SHOWN = 3  # names in one message


def first_flaw(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The index of the first step with a non-finite metric, and the metric, as 'loss is nan'."""
    for index, step_metrics in enumerate(metrics):
        flaws = [
            f'{name} is {value}' for name, value in step_metrics.items() if not math.isfinite(value)
        ]
        if flaws:
            return index, _shorten(flaws)
    return None


def state_flaw(state: Any) -> str | None:
    """The arrays of a state that are not finite, or None."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator='/')
        for path, leaf in jax.tree.leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    finite = jax.device_get(_are_finite(state))
    flaws = [path for path, is_finite in zip(paths, finite, strict=True) if not is_finite]
    return f'{_shorten(flaws)} not finite after it' if flaws else None


@jax.jit
def _are_finite(state: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(state)
    return [jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _shorten(names: list[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more
