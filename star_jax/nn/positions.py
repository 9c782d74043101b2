"""How does a network encode the positions of its rows?

Each kind is a part of a model's config. A kind gives a rotation of queries and keys, a table that
is added to the rows, both or neither. A rotation is either fixed, cosines and sines of every row,
or learned: coordinates that all layers share, and frequencies of each layer and head. Coordinates
come from `core/positions.py`.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import positions
from star_jax.core.argument_types import check_types
from star_jax.core.schedule import Pyramid, Raster, Schedule
from star_jax.errors import UserError
from star_jax.nn import layers

INTERPOLATED = 128  # cells of the longer side whose cosines and sines are interpolated


def _check(theta: float, extent: float = 0.0) -> None:
    """Raises UserError for numbers that give no angles."""
    if theta <= 0 or extent < 0:
        raise UserError(f'theta must be positive and extent not negative, not {theta} and {extent}')


@flax.struct.dataclass
class PositionTables:
    """Positions of the rows of a schedule, as arrays: grids of equal sizes share one program.

    Attributes:
        rotation_LP2: cosine and sine of each plane; None without a fixed rotation.
        xy_L2: coordinates for learned frequencies; None without them.
    """

    rotation_LP2: np.ndarray | jax.Array | None
    xy_L2: np.ndarray | jax.Array | None


class Positions:
    """No positions; the base class of all kinds, whose union is `AnyPositions`.

    Attributes:
        rotary: whether queries and keys are rotated.
    """

    rotary: ClassVar[bool] = False

    def check(self, width: int, head_width: int) -> None:
        """Raises UserError where the kind does not fit these widths in channels."""
        if self.rotary and head_width % 4:
            raise UserError(f'rotary positions need a head width divisible by 4, not {head_width}')

    def rotation(self, schedule: Schedule, head_width: int) -> np.ndarray | None:
        """[rows, P, 2] float32: cosine and sine of each plane; None without a fixed rotation."""
        return None

    def coordinates(self, schedule: Schedule) -> np.ndarray | None:
        """[rows, 2] float32 coordinates (x, y) for learned frequencies; None without them."""
        return None

    def frequencies(self, depth: int, heads: int, head_width: int) -> nn.Module | None:
        """A module that gives learned frequencies [depth, N, P, 2]; None without them.

        Args:
            depth: number of blocks.
            heads: heads of a block, N.
            head_width: channels of a head, 2 P.
        """
        return None

    def table(self, schedule: Schedule, width: int, init: layers.Initializer) -> nn.Module | None:
        """A module from row indices to [L, width] vectors that are added to the rows.

        Args:
            schedule: the steps of an image.
            width: channels of a row.
            init: initialiser of a learned table.
        """
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositions(Positions):
    """No positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedRotary(Positions):
    """Rotary positions whose coordinates span [0, extent] at every scale; STAR's choice.

    Attributes:
        theta: base of the rotary frequencies.
        extent: coordinate of the last cell of every scale, along both axes.
    """

    rotary = True

    theta: float = 10000.0
    extent: float = 64.0

    def __post_init__(self) -> None:
        check_types(self)
        _check(self.theta, self.extent)

    def rotation(self, schedule: Pyramid, head_width: int) -> np.ndarray:
        xy_L2 = positions.pyramid_xy(schedule.grids, self.extent)
        return positions.rotation(positions.rotary_angles(xy_L2, head_width, self.theta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawRotary(Positions):
    """Rotary positions that count the cells of each scale.

    Attributes:
        theta: base of the rotary frequencies.
    """

    rotary = True

    theta: float = 10000.0

    def __post_init__(self) -> None:
        check_types(self)
        _check(self.theta)

    def rotation(self, schedule: Pyramid, head_width: int) -> np.ndarray:
        xy_L2 = positions.pyramid_xy(schedule.grids)
        return positions.rotation(positions.rotary_angles(xy_L2, head_width, self.theta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedRotary(Positions):
    """Rotary positions on a reference grid, to which every scale is stretched and rounded.

    Source: Infinity specification 5.4, mode 2; Infinity's choice.

    Attributes:
        theta: base of the rotary frequencies.
        reference: (height, width) of the reference grid (0 0: that of the schedule).
    """

    rotary = True

    theta: float = 10000.0
    reference: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_types(self)
        _check(self.theta)
        if min(self.reference) < 0:
            raise UserError(f'a reference grid has no negative sides, unlike {self.reference}')

    def rotation(self, schedule: Pyramid, head_width: int) -> np.ndarray:
        grid = self.reference if all(self.reference) else schedule.reference_grid
        xy_L2 = positions.rounded_xy(schedule.grids, grid)
        return positions.rotation(positions.rotary_angles(xy_L2, head_width, self.theta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceRotary(Positions):
    """Rotary positions on the reference grid of a schedule; Infinity's choice.

    Half of the planes rotate with the row, then half with the column, unlike in the other kinds
    (Infinity specification 5.4).

    Attributes:
        theta: base of the rotary frequencies.
        mode: 'rounded': every scale is stretched to the reference grid and rounded (published);
            'cells': the cells of each scale are counted; 'interpolated': every scale spans a grid
            of 128 cells along its longer side, and cosines and sines are interpolated.
    """

    rotary = True

    theta: float = 10000.0
    mode: Literal['rounded', 'cells', 'interpolated'] = 'rounded'

    def __post_init__(self) -> None:
        check_types(self)
        _check(self.theta)

    def rotation(self, schedule: Pyramid, head_width: int) -> np.ndarray:
        if self.mode == 'interpolated':
            high, wide = schedule.reference_grid
            # The shorter side is truncated after two roundings, as in the original.
            extents = (INTERPOLATED, int(INTERPOLATED / high * wide))
            if high < wide:
                extents = (int(INTERPOLATED / wide * high), INTERPOLATED)
            return positions.interpolated_rotation(schedule.grids, extents, head_width, self.theta)
        xy_L2 = positions.pyramid_xy(schedule.grids)
        if self.mode == 'rounded':
            xy_L2 = positions.rounded_xy(schedule.grids, schedule.reference_grid)
        yx_L2 = xy_L2[:, ::-1]
        return positions.rotation(positions.rotary_angles(yx_L2, head_width, self.theta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RasterRotary(Positions):
    """Rotary positions that count the cells of a raster; LlamaGen's choice.

    A prefix has no positions: its queries and keys vanish (LlamaGen specification 2.3).

    Attributes:
        theta: base of the rotary frequencies.
    """

    rotary = True

    theta: float = 10000.0

    def __post_init__(self) -> None:
        check_types(self)
        _check(self.theta)

    def rotation(self, schedule: Raster, head_width: int) -> np.ndarray:
        table_LP2 = positions.raster_rotation(
            schedule.height, schedule.width, schedule.prefix, head_width, self.theta
        )
        return table_LP2[: schedule.starts[-1]]  # no row reads the last token


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedRotary(Positions):
    """Rotary positions with learned frequencies, angle = fx x + fy y (RoPE-Mixed).

    Source: arXiv 2403.13298. Coordinates span [0, extent] at every scale, as in `NormalisedRotary`;
    the paper counts cells and uses theta 10. Every layer and head has frequencies of its own.

    Attributes:
        theta: base of the frequencies before training.
        extent: coordinate of the last cell of every scale, along both axes.
    """

    rotary = True

    theta: float = 100.0
    extent: float = 32.0

    def __post_init__(self) -> None:
        check_types(self)
        _check(self.theta, self.extent)

    def coordinates(self, schedule: Pyramid) -> np.ndarray:
        return positions.pyramid_xy(schedule.grids, self.extent).astype(np.float32)

    def frequencies(self, depth: int, heads: int, head_width: int) -> nn.Module:
        return MixedFrequencies(depth, heads, head_width, self.theta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(Positions):
    """One learned vector per row; VAR's choice."""

    def table(self, schedule: Schedule, width: int, init: layers.Initializer) -> nn.Module:
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
        check_types(self)
        _check(self.theta, self.extent)

    def check(self, width: int, head_width: int) -> None:
        if width % 4:
            raise UserError(f'sin-cos positions need a width divisible by 4, not {width}')

    def table(self, schedule: Pyramid, width: int, init: layers.Initializer) -> nn.Module:
        xy_L2 = positions.pyramid_xy(schedule.grids, self.extent)
        return FixedTable(width, self.theta, tuple(map(tuple, xy_L2)))


AnyPositions = (
    NormalisedRotary
    | RawRotary
    | RoundedRotary
    | ReferenceRotary
    | MixedRotary
    | Learned
    | SinCos
    | NoPositions
)
RasterPositions = RasterRotary | Learned | NoPositions  # the kinds of a raster


class FixedTable(nn.Module):
    """Sines and cosines of given coordinates, selected by row.

    Attributes:
        width: channels of a row, a multiple of 4.
        theta: base of the frequencies.
        xy: coordinates of every row.
    """

    width: int
    theta: float
    xy: tuple[tuple[float, float], ...]

    def __call__(self, rows_L: jax.Array) -> jax.Array:
        table = positions.sincos_table(np.asarray(self.xy), self.width, self.theta)
        return jnp.asarray(table)[rows_L]


class MixedFrequencies(nn.Module):
    """Frequencies [depth, N, P, 2] that start in two perpendicular directions per head.

    Magnitudes are theta^(-4 i / H) for i < H / 4, once in a direction a and once in a + 90 degrees;
    a is uniform per layer and head.

    Attributes:
        depth: layers.
        heads: heads N of a layer.
        head_width: channels H of a head.
        theta: base of the frequencies.
    """

    depth: int
    heads: int
    head_width: int
    theta: float

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(self._init, ('layers', 'heads', None, None))
        shape = (self.depth, self.heads, self.head_width // 2, 2)
        return self.param('frequencies', init, shape)

    def _init(self, key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        magnitudes_F = self.theta ** -(jnp.arange(0, self.head_width, 4) / self.head_width)
        a_DN1 = jax.random.uniform(key, (*shape[:2], 1), dtype, maxval=2 * np.pi)
        a_DNP = jnp.concatenate(
            [jnp.broadcast_to(a, (*shape[:2], shape[2] // 2)) for a in (a_DN1, a_DN1 + np.pi / 2)],
            axis=-1,
        )
        direction_DNP2 = jnp.stack([jnp.cos(a_DNP), jnp.sin(a_DNP)], axis=-1)
        return (jnp.tile(magnitudes_F, 2)[:, None] * direction_DNP2).astype(dtype)
