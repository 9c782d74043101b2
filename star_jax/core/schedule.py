"""In what order are the tokens of an image predicted, and which mask follows (block-causal)?

A schedule splits L tokens into S steps; the tokens of one step are sampled together, from every
earlier step. Next-scale prediction (`Pyramid`) and next-token prediction (`Raster`) differ in
nothing else. A network *reads* rows and *samples* tokens: a raster with a prefix of T rows reads
T rows in its first step and samples one token from the last of them.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core import buckets
from star_jax.core.buckets import Buckets
from star_jax.core.sizes import check_sizes
from star_jax.core.visibility import StaticVisibility
from star_jax.errors import UserError

MOST_TOKENS = 2**20  # tokens of an image: a hundred times as many as at 1024 px
MOST_SCALES = 128  # scales of a pyramid, each traced on its own: ten times as many as at 1024 px

Grids = tuple[tuple[int, int], ...]  # (height, width) of every scale, in tokens


def square_grids(sides: tuple[int, ...]) -> Grids:
    """Square grids of these sides."""
    return tuple((side, side) for side in sides)


def show_grids(grids: Grids) -> str:
    """Grids in a sentence, as height x width: '1x1 2x2 3x4'."""
    return ' '.join(f'{height}x{width}' for height, width in grids)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a schedule, perhaps inside a scan.

    Attributes:
        index: the step; traced inside a scan.
        like: the step whose shapes it has; equal to `index` outside a scan.
        padded: the step and the next one are padded to the shapes of `like`; rows and tokens after
            their own are ignored.
    """

    index: int | jax.Array
    like: int
    padded: bool = False

    @classmethod
    def at(cls, index: int) -> 'Step':
        return cls(index, index)

    def next(self) -> 'Step':
        return Step(self.index + 1, self.like if self.padded else self.like + 1, self.padded)


@dataclasses.dataclass(frozen=True)
class Group:
    """Neighbouring steps that share a loop body.

    Attributes:
        first: the first step.
        count: how many steps.
        padded: all are padded to the last, the widest; otherwise their shapes are equal.
    """

    first: int
    count: int
    padded: bool = False

    @property
    def members(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    def before(self, stop: int) -> 'Group':
        """The part of the group before the step `stop`, which is after its first step."""
        count = min(self.count, stop - self.first)
        return Group(self.first, count, self.padded and count > 1)


class Schedule:
    """Arithmetic of all schedules; subclasses define the attributes.

    Attributes:
        sizes: tokens sampled by each step.
        reads: rows read by each step.
        visible_rows: [rows], how many rows, from row 0 on, each row attends to.
    """

    sizes: tuple[int, ...]
    reads: tuple[int, ...]
    visible_rows: np.ndarray

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """[S + 1]: the token at which each step starts, and L."""
        return tuple(itertools.accumulate(self.sizes, initial=0))

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """[S + 1]: the row at which each step starts, and the number of rows."""
        return tuple(itertools.accumulate(self.reads, initial=0))

    @property
    def steps(self) -> int:
        return len(self.sizes)

    @property
    def length(self) -> int:
        """L, the tokens of one image."""
        return self.offsets[-1]

    @functools.cached_property
    def step_of_row(self) -> np.ndarray:
        """[rows] int32: the step that reads each row."""
        return np.repeat(np.arange(self.steps, dtype=np.int32), self.reads)

    @functools.cached_property
    def step_of_token(self) -> np.ndarray:
        """[L] int32: the step that samples each token."""
        return np.repeat(np.arange(self.steps, dtype=np.int32), self.sizes)

    @property
    def scale_of_token(self) -> np.ndarray:
        """[L] int32: the scale to whose metrics a token counts."""
        return self.step_of_token

    @functools.cached_property
    def sampled_rows(self) -> np.ndarray:
        """[L] int32: the row whose features predict each token (the last rows of its step)."""
        ends = zip(self.starts[1:], self.sizes, strict=True)
        return np.concatenate([np.arange(end - n, end, dtype=np.int32) for end, n in ends])

    def rows(self, step: Step) -> np.ndarray | jax.Array:
        """[reads] int32: the rows that `step` reads; a numpy array unless the step is traced.

        Padding takes the rows of later steps; after the last row, that row repeats.
        """
        local = np.arange(self.reads[step.like], dtype=np.int32)
        if isinstance(step.index, int):
            return self.starts[step.index] + local
        rows = jnp.asarray(self.starts, jnp.int32)[step.index] + local
        return jnp.minimum(rows, self.starts[-1] - 1) if step.padded else rows

    def mask(self, rows: np.ndarray | jax.Array | None = None) -> np.ndarray | jax.Array:
        """[query, key] bool over `rows` (None: all): the mask of teacher forcing, for
        conversion and tests (attention uses `visibility`)."""
        rows = np.arange(self.starts[-1]) if rows is None else rows
        visible_rows = (
            self.visible_rows if isinstance(rows, np.ndarray) else jnp.asarray(self.visible_rows)
        )
        return rows[None, :] < visible_rows[rows][:, None]

    def visibility(self, rows: np.ndarray | jax.Array | None = None) -> StaticVisibility:
        """How many of `rows` (None: all), from the first on, each of them attends to.

        Traced rows are those of `thin`: only rows of the last step, to which no earlier row
        attends, may be missing. Raises ValueError for known rows that don't rise.
        """
        if rows is None:
            return StaticVisibility.of(self.visible_rows)
        if not isinstance(rows, np.ndarray):
            return StaticVisibility.of(np.minimum(self.visible_rows[: len(rows)], len(rows)))
        if (np.diff(rows) <= 0).any():
            raise ValueError('rows must rise, each of them once, to attend to earlier ones')
        return StaticVisibility.of(np.searchsorted(rows, self.visible_rows[rows]))

    def groups(self, kinds: tuple | None = None, shared: Buckets = ()) -> tuple[Group, ...]:
        """The steps, grouped by loop body.

        A body also computes the inputs of the next step. So neighbours share one if they read as
        many rows, sample as many tokens and are followed by as many rows, and are of one kind; or
        if one bucket contains them.

        Args:
            kinds: how each step is sampled (None: all alike).
            shared: the buckets.

        Raises:
            UserError: as for `check_buckets`.
        """
        kinds = kinds or (None,) * self.steps
        self.check_buckets(shared, kinds)
        followers = (*self.reads[1:], 0)
        keys = list(zip(self.reads, self.sizes, followers, kinds, strict=True))
        for first, last in shared:
            keys[first : last + 1] = [(first, last)] * (last + 1 - first)
        runs = itertools.groupby(range(self.steps), key=keys.__getitem__)
        members = ((list(run), key in shared) for key, run in runs)
        return tuple(Group(run[0], len(run), pad and len(run) > 1) for run, pad in members)

    def thin(self, key: jax.Array, keep: int) -> jax.Array:
        """[keep] int32 rows that a training step keeps; UserError for schedules that keep all."""
        raise UserError(
            f'{type(self).__name__} cannot drop tokens in training: set model.keep_tokens to 0'
        )

    def first_steps(self, parts: int) -> int:
        """How many steps sample the first so many scales, or rows of tokens, of an image.

        UserError for more than it has.
        """
        raise NotImplementedError

    def leading_rows(self, scales: int) -> np.ndarray:
        """int32 rows of the first scales, which are tokens; UserError for a single scale."""
        raise UserError(
            f'{type(self).__name__} has one scale, which training needs: set trained_scales to 0'
        )

    def check_buckets(self, shared: Buckets, kinds: tuple) -> None:
        """Raises UserError for buckets that are invalid for steps of these kinds."""
        if shared:
            raise UserError(
                'buckets are for scales, and the steps of this model are single tokens: they '
                'share one body as they are, leave the buckets out'
            )


@dataclasses.dataclass(frozen=True)
class Pyramid(Schedule):
    """Next-scale prediction: each step samples a whole grid, coarse to fine.

    Attributes:
        grids: (height, width) of every step, in tokens.
        reference: the grid that positions refer to ((0, 0): the last one).
    """

    grids: Grids
    reference: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if len(self.grids) > MOST_SCALES:
            raise UserError(
                f'a pyramid of {len(self.grids):,} scales is too long, expected at most '
                f'{MOST_SCALES}: give fewer sides'
            )
        empty = tuple(grid for grid in self.grids if min(grid) < 1)
        if empty or not self.grids:
            raise UserError(
                f'a pyramid needs grids of at least 1x1, not {show_grids(empty) or "none"}'
            )
        for (h, w), (next_h, next_w) in itertools.pairwise(self.grids):
            if next_h < h or next_w < w:
                raise UserError(
                    f'the sides of a pyramid must not shrink, but {next_h}x{next_w} follows '
                    f'{h}x{w}: give them from coarse to fine'
                )
        if self.length > MOST_TOKENS:
            raise UserError(
                f'a pyramid of {self.length:,} tokens is too long, expected at most '
                f'{MOST_TOKENS:,}: give smaller sides than {show_grids(self.grids[-1:])}'
            )

    @classmethod
    def square(cls, sides: tuple[int, ...]) -> 'Pyramid':
        return cls(square_grids(sides))

    @property
    def reference_grid(self) -> tuple[int, int]:
        """The grid that positions of all scales refer to: `reference`, or the last grid."""
        return self.reference if all(self.reference) else self.grids[-1]

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(h * w for h, w in self.grids)

    @property
    def reads(self) -> tuple[int, ...]:
        return self.sizes

    @functools.cached_property
    def visible_rows(self) -> np.ndarray:
        """A row attends to its own step and all earlier ones."""
        return np.repeat(np.asarray(self.starts[1:]), self.reads)

    def first_steps(self, parts: int) -> int:
        """The same number: a step samples one scale."""
        return _check_parts(parts, self.steps, 'scales')

    def leading_rows(self, scales: int) -> np.ndarray:
        """int32 rows of the first scales."""
        return np.arange(self.starts[scales], dtype=np.int32)

    def check_buckets(self, shared: Buckets, kinds: tuple) -> None:
        """Raises UserError for buckets after the last scale, or of scales of different kinds."""
        buckets.check(shared, kinds)

    def thin(self, key: jax.Array, keep: int) -> jax.Array:
        """[keep] int32 rows, in order: all but some rows of the last step, which are dropped
        uniformly at random (token dropping, STAR specification 4.1)."""
        first, end = self.starts[-2:]
        kept = jax.random.permutation(key, jnp.arange(first, end))[: keep - first]
        return jnp.concatenate([jnp.arange(first), jnp.sort(kept)]).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Raster(Schedule):
    """Next-token prediction over a grid, row by row.

    Attributes:
        height: tokens along the height.
        width: tokens along the width.
        prefix: rows of the condition before the first token.
    """

    height: int
    width: int
    prefix: int = 1

    def __post_init__(self) -> None:
        check_sizes(height=self.height, width=self.width, prefix=self.prefix)
        if self.height * self.width + self.prefix > MOST_TOKENS:
            raise UserError(
                f'a raster of {self.height:,} x {self.width:,} tokens after {self.prefix:,} rows '
                f'is too long, expected at most {MOST_TOKENS:,}'
            )

    @property
    def grids(self) -> Grids:
        """The grid of the only scale."""
        return ((self.height, self.width),)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        return (1,) * (self.height * self.width)

    @functools.cached_property
    def reads(self) -> tuple[int, ...]:
        return (self.prefix,) + (1,) * (self.height * self.width - 1)

    @functools.cached_property
    def visible_rows(self) -> np.ndarray:
        """Causal, in the prefix, too."""
        return np.arange(1, self.starts[-1] + 1)

    @property
    def scale_of_token(self) -> np.ndarray:
        """[L]: zeros, for a raster has one scale."""
        return np.zeros(self.length, np.int32)

    def first_steps(self, parts: int) -> int:
        """The tokens of the first rows of the grid."""
        return self.width * _check_parts(parts, self.height, 'rows of tokens')


def _check_parts(parts: int, most: int, name: str) -> int:
    """The number of parts; UserError unless an image has so many."""
    if 0 <= parts <= most:
        return parts
    raise UserError(
        f'keep is {parts}, but an image of this model has {most} {name}: choose 0 to {most}'
    )
