"""How are keys and values kept from step to step of sampling?

In pieces. The finished ones are never written again, and are constants of a loop over steps, in
which only the current one is written: no step copies those before it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from star_jax.core.cache import KV
from star_jax.core.schedule import Group, Schedule, Step
from star_jax.core.visibility import StaticVisibility, TracedVisibility, Visibility

StepFn = Callable[[Any, Step], tuple[Any, Any]]  # (carry, step) -> carry, output


class Carry(NamedTuple):
    """The state between two steps of sampling.

    Attributes:
        x_RLD: the embedded rows of the next step.
        memory: `KVPieces`; inside of a loop over steps the current piece alone.
        canvas: the tokenizer's canvas.
    """

    x_RLD: jax.Array
    memory: Any
    canvas: Any


class KVPieces(NamedTuple):
    """Keys and values of the rows so far, as a trunk keeps them.

    A piece has those of every layer: one `KV`, stacked, or a tuple of one per layer.

    Attributes:
        finished: pieces that are full, in row order.
        current: the piece that is written, if steps share a loop body; None otherwise.
    """

    finished: tuple[Any, ...] = ()
    current: Any = None

    @property
    def rows(self) -> int:
        """Rows of the finished pieces."""
        return sum(map(_rows, self.finished))

    def start(self, current: Any) -> 'KVPieces':
        """The same with an empty piece that the next steps write."""
        return self._replace(current=current)

    def finish(self, piece: Any) -> 'KVPieces':
        """The finished pieces and one more."""
        return KVPieces((*self.finished, piece))

    def fold(self, run_step: StepFn, carry: Carry, group: Group) -> tuple[Carry, Any]:
        """Scans `run_step` over a group that writes the current piece, and finishes it.

        Finished pieces are no part of the scan's carry, which would be copied.
        """

        def in_piece(inner: Carry, step: Step) -> tuple[Carry, Any]:
            after, output = run_step(inner._replace(memory=self.start(inner.memory)), step)
            return after._replace(memory=after.memory.current), output

        carry, outputs = _scan(in_piece, carry._replace(memory=self.current), group)
        return carry._replace(memory=self.finish(carry.memory)), outputs

    def pieces(self, schedule: Schedule, step: Step) -> tuple[Any, ...]:
        """The pieces that the rows of a step read, in row order."""
        if self.current is None:
            return self.finished
        read = self.current
        if step.padded:  # no row of the group attends to the current piece behind this row
            read = _map_kv(lambda kv: kv.part(0, schedule.starts[step.like] - self.rows), read)
        return (*self.finished, read)

    def visibility(self, schedule: Schedule, step: Step) -> Visibility:
        """The keys that the rows of a step attend to, among the pieces and themselves."""
        first, end = schedule.starts[step.like : step.like + 2]
        bound_L = schedule.visible_rows[first:end]
        if self.current is None:
            return Visibility(bounds=StaticVisibility.of(bound_L))
        rows, bounds = schedule.rows(step), None
        if step.padded or (bound_L != end).any():
            visible_L = jnp.asarray(schedule.visible_rows, jnp.int32)[rows]
            equal = (bound_L == bound_L[0]).all()
            bounds = TracedVisibility(visible_L[:1] if equal else visible_L)
        return Visibility(bounds=bounds, written=rows[0])

    def write(self, new: Any, schedule: Schedule, step: Step) -> 'KVPieces':
        """The pieces with the keys and values of a step.

        Raises ValueError for a traced step without a current piece, and for a padded one that could
        end behind it: such a write would be moved over earlier rows.
        """
        if self.current is None:
            if not isinstance(step.index, int):
                raise ValueError('a loop over steps has no current piece')
            return self.finish(new)
        rows, end = _rows(self.current), schedule.starts[step.like + 1] - self.rows
        if step.padded and end > rows:
            raise ValueError(
                f'a piece of {rows} rows cannot hold a step that ends with its row {end}'
            )
        place = schedule.rows(step)[0] - self.rows
        return self.start(_map_kv(lambda kv, new: kv.write(new, place), self.current, new))


def _is_kv(x: Any) -> bool:
    return isinstance(x, KV)


def _map_kv(change: Callable[..., KV], *pieces: Any) -> Any:
    """Applies `change` to the keys and values of each layer, or of all."""
    return jax.tree.map(change, *pieces, is_leaf=_is_kv)


def _rows(piece: Any) -> int:
    return jax.tree.leaves(piece, is_leaf=_is_kv)[0].rows


def _scan(run_step: StepFn, carry: Any, group: Group) -> tuple[Any, Any]:
    """Folds `run_step` over the steps of a group in one scanned loop body."""
    like = group.members[-1 if group.padded else 0]

    def body(carry: Any, index: jax.Array) -> tuple[Any, Any]:
        return run_step(carry, Step(index, like, group.padded))

    return jax.lax.scan(body, carry, jnp.asarray(group.members))
