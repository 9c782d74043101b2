"""Which positions does a network know about?

Every answer is a part of a model's config: rotary angles for self-attention, a table added to the
rows, both or none. Coordinates come from `core/positions.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import positions
from star_jax.core.schedule import Pyramid
from star_jax.nn import layers


def _check(theta: float, extent: float = 0.0) -> None:
    """Raises ValueError for what gives no angles."""
    if theta <= 0 or extent < 0:
        raise ValueError(
            f'theta must be positive and extent not negative, not {theta} and {extent}'
        )


class Positions:
    """No positions; what a kind of positions does not say stays so."""

    def angles(self, schedule: Pyramid, head_dim: int) -> np.ndarray | None:
        """[rows, head_dim / 2] rotary angles."""
        return None

    def table(self, schedule: Pyramid, width: int, init: layers.Initializer) -> nn.Module | None:
        """A module from row indices to [L, width] vectors that are added to the rows."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositions(Positions):
    """None at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedRotary(Positions):
    """Rotary positions whose coordinates span [0, extent] at every scale; STAR's choice.

    Attributes:
        theta: base of the rotary frequencies.
        extent: coordinate of the last cell of every scale, along both axes.
    """

    theta: float = 10000.0
    extent: float = 64.0

    def __post_init__(self) -> None:
        _check(self.theta, self.extent)

    def angles(self, schedule: Pyramid, head_dim: int) -> np.ndarray:
        xy_L2 = positions.pyramid_xy(schedule.grids, self.extent)
        return positions.rotary_table(xy_L2, head_dim, self.theta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawRotary(Positions):
    """Rotary positions whose coordinates count the cells of each scale.

    Attributes:
        theta: base of the rotary frequencies.
    """

    theta: float = 10000.0

    def __post_init__(self) -> None:
        _check(self.theta)

    def angles(self, schedule: Pyramid, head_dim: int) -> np.ndarray:
        return positions.rotary_table(positions.pyramid_xy(schedule.grids), head_dim, self.theta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(Positions):
    """One learned vector per row; VAR's choice."""

    def table(self, schedule: Pyramid, width: int, init: layers.Initializer) -> nn.Module:
        return layers.Table(schedule.starts[-1], width, (None, 'embed'), init)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinCos(Positions):
    """A fixed table of sines and cosines over coordinates that span [0, extent] at every scale.

    Attributes:
        theta: base of the frequencies.
        extent: coordinate of the last cell of every scale, along both axes.
    """

    theta: float = 10000.0
    extent: float = 64.0

    def __post_init__(self) -> None:
        _check(self.theta, self.extent)

    def table(self, schedule: Pyramid, width: int, init: layers.Initializer) -> nn.Module:
        xy_L2 = positions.pyramid_xy(schedule.grids, self.extent)
        return FixedTable(width, self.theta, tuple(map(tuple, xy_L2)))


class FixedTable(nn.Module):
    """Sines and cosines of given coordinates, taken by row."""

    width: int
    theta: float
    xy: tuple[tuple[float, float], ...]

    def __call__(self, rows_L: jax.Array) -> jax.Array:
        table = positions.sincos_table(np.asarray(self.xy), self.width, self.theta)
        return jnp.asarray(table)[rows_L]
