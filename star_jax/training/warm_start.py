"""How does a run start with the parameters of an earlier model?

A model of more scales starts with one of fewer (STAR specification 7): level embeddings and learned
positions keep their first rows, everything else is the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.checkpoint import weights
from star_jax.parallel import rules
from star_jax.training.state import TrainState

LEVELS, POSITIONS = 'levels', 'table/table'  # [scales or tokens, D]
OF_LEVELS = 'modulator/pair/kernel'  # exists where level embeddings modulate the blocks


def fit(params: Any, state: TrainState, source: str) -> Any:
    """Parameters with the names and dtypes of a state; levels and positions may lack last rows.

    Args:
        params: the parameters of the earlier model.
        state: the state that starts with them, which may be abstract.
        source: the folder that they come from, for the error.

    Raises:
        UserError: names or shapes do not fit; it names them.
    """
    flat, expected = weights.flatten(params), weights.flatten(state.params)
    for name in (LEVELS, POSITIONS):
        if name in flat and name in expected and len(flat[name]) < len(expected[name]):
            shape = (len(flat[name]), *expected[name].shape[1:])
            expected[name] = jax.ShapeDtypeStruct(shape, expected[name].dtype)
    return weights.unflatten(weights.fit(flat, weights.unflatten(expected), source))


def start(state: TrainState, params: Any) -> TrainState:
    """A fresh state with other parameters, as for `fit`, also in its average, on the same devices.

    Missing rows are those of the fresh state; missing level embeddings that modulate the blocks
    repeat the last one.
    """
    flat, fresh = weights.flatten(params), weights.flatten(state.params)
    for name in (LEVELS, POSITIONS):
        if name in flat and len(flat[name]) < len(fresh[name]):
            repeat = name == LEVELS and OF_LEVELS in flat
            flat[name] = _extend(fresh[name], np.asarray(flat[name]), repeat)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    params = rules.shard(weights.unflatten(flat), shardings)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


def _extend(fresh_RD: jax.Array, rows_rD: np.ndarray, repeat: bool) -> jax.Array:
    """The rows, followed by copies of the last one, or by those of `fresh_RD`."""

    def extend(fresh_RD: jax.Array, rows_rD: jax.Array) -> jax.Array:
        rest_RD = jnp.broadcast_to(rows_rD[-1], fresh_RD.shape) if repeat else fresh_RD
        return jnp.concatenate([rows_rD, rest_RD[len(rows_rD) :]])

    return jax.jit(extend, out_shardings=fresh_RD.sharding)(fresh_RD, rows_rD)
