"""How does a model that was trained at one size start at a larger one?

The larger schedule has the same grids and a further one. The level embedding of the new scale is a
copy of the last one's. Learned positions of the new grid are those of the last grid, interpolated
bilinearly. All other parameters do not depend on the schedule.
"""

from typing import Any

import jax
import numpy as np

from star_jax.checkpoint import weights
from star_jax.core.schedule import Pyramid
from star_jax.errors import UserError
from star_jax.training.warm_start import LEVELS, POSITIONS


def extend(params: Any, schedule: Pyramid, larger: Pyramid) -> Any:
    """The parameters of a model at a larger schedule.

    Args:
        params: parameters at `schedule`.
        schedule: the schedule of the training.
        larger: its grids and one more.

    Raises:
        UserError: `larger` is another schedule.
    """
    if larger.grids[:-1] != schedule.grids:
        raise UserError(
            f'a model of the grids {schedule.grids} is carried to {larger.grids}: expected the '
            'same grids and one more'
        )
    flat = weights.flatten(params)
    if LEVELS in flat:
        flat[LEVELS] = np.concatenate([flat[LEVELS], flat[LEVELS][-1:]])
    if POSITIONS in flat:
        (height, width), grid = schedule.grids[-1], larger.grids[-1]
        table_LD = np.asarray(flat[POSITIONS])
        last_hwD = table_LD[-height * width :].reshape(height, width, -1)
        grown = jax.image.resize(last_hwD, (*grid, table_LD.shape[-1]), 'linear')
        new_RD = np.asarray(grown).reshape(-1, table_LD.shape[-1])
        flat[POSITIONS] = np.concatenate([table_LD, new_RD])
    return weights.unflatten(flat)
