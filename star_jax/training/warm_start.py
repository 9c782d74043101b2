"""How does a model of more scales begin with the weights of one of fewer? (STAR specification 7)

Level embeddings and learned positions keep their first rows; everything else is the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.checkpoint import weights
from star_jax.training.state import TrainState, go_on_from

LEVELS, POSITIONS = 'levels', 'table/table'  # [scales or tokens, D]
OF_LEVELS = 'modulator/pair/kernel'  # there where blocks are modulated by the level embeddings


def fitted(given: Any, state: TrainState, where: str) -> Any:
    """Parameters that a larger model can begin with, which may be abstract.

    Raises UserError naming the arrays of `where` that are not those of the model, but for the rows
    that it has more.
    """
    flat, wanted = weights.flatten(given), weights.flatten(state.params)
    for name in (LEVELS, POSITIONS):
        if name in flat and name in wanted and len(flat[name]) < len(wanted[name]):
            shape = (len(flat[name]), *wanted[name].shape[1:])
            wanted[name] = jax.ShapeDtypeStruct(shape, wanted[name].dtype)
    return weights.unflatten(weights.fit(flat, weights.unflatten(wanted), where))


def begin(state: TrainState, params: Any) -> TrainState:
    """A fresh state with fitted parameters, averages included, on the same devices.

    Rows that they lack are those of the fresh state; level embeddings that modulate the blocks go
    on as the last one.
    """
    flat, fresh = weights.flatten(params), weights.flatten(state.params)
    for name in (LEVELS, POSITIONS):
        if name in flat and len(flat[name]) < len(fresh[name]):
            repeat = name == LEVELS and OF_LEVELS in flat
            flat[name] = _extend(fresh[name], np.asarray(flat[name]), repeat)
    return go_on_from(state, weights.unflatten(flat))


def _extend(fresh_RD: jax.Array, rows_rD: np.ndarray, repeat: bool) -> jax.Array:
    """The rows, and behind them the last one again and again, or those of `fresh_RD`."""

    def extend(fresh_RD: jax.Array, rows_rD: jax.Array) -> jax.Array:
        rest_RD = jnp.broadcast_to(rows_rD[-1], fresh_RD.shape) if repeat else fresh_RD
        return jnp.concatenate([rows_rD, rest_RD[len(rows_rD) :]])

    return jax.jit(extend, out_shardings=fresh_RD.sharding)(fresh_RD, rows_rD)
