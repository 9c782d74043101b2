"""How does one published tensor become one of ours, and back?

A table is a list of entries; an entry names both sides and an einops pattern from theirs to ours,
which read backwards is the way from ours to theirs.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import einops
import numpy as np

from star_jax.checkpoint import weights


@dataclasses.dataclass(frozen=True)
class Entry:
    """Their tensor `theirs` is our array `ours` ('/'-joined), or row `row` of a stacked one.

    `lengths` are the axis lengths that the pattern needs for splitting an axis.
    """

    theirs: str
    ours: str
    pattern: str
    row: int | None = None
    lengths: tuple[tuple[str, int], ...] = ()

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor, from that of our array (or of one row of it)."""
        left, right = self.pattern.split('->')
        lengths = dict(zip(right.split(), ours, strict=True)) | {'1': 1}
        groups = re.findall(r'\([^)]*\)|\S+', left)
        return tuple(math.prod(lengths[axis] for axis in g.strip('()').split()) for g in groups)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return einops.rearrange(array, self.pattern, **dict(self.lengths))

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        theirs, ours = self.pattern.split('->')
        return einops.rearrange(array, f'{ours} -> {theirs}', **dict(self.lengths))


Rule = tuple[str, str, str]  # theirs, ours, pattern


def layer_entries(
    rules: Iterable[Rule], theirs: str, ours: str, layers: int, lengths: Mapping[str, int]
) -> list[Entry]:
    """The table of stacked layers: `theirs`.0, `theirs`.1, ... are the rows of `ours`.

    `lengths` are those of the axes that a pattern may split.
    """
    entries = []
    for layer in range(layers):
        for name, leaf, pattern in rules:
            needed = [item for item in lengths.items() if re.search(rf'\b{item[0]}\b', pattern)]
            split = tuple(needed) if '(' in pattern else ()
            entries.append(
                Entry(f'{theirs}.{layer}.{name}', f'{ours}/{leaf}', pattern, layer, split)
            )
    return entries


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Our parameters, and the tensors that the table misses and those it does not know."""

    params: dict
    missing: tuple[str, ...]
    unknown: tuple[str, ...]


def to_params(
    entries: Sequence[Entry], state: Mapping[str, np.ndarray], ignored: Iterable[str] = ()
) -> Conversion:
    """Nested parameters from their state dict. `ignored` names end with one of these words."""
    missing = tuple(entry.theirs for entry in entries if entry.theirs not in state)
    known = {entry.theirs for entry in entries}
    endings = tuple(ignored)
    unknown = tuple(name for name in state if name not in known and not name.endswith(endings))
    if missing:
        return Conversion({}, missing, unknown)
    rows: dict[str, list[np.ndarray]] = {}
    flat: dict[str, np.ndarray] = {}
    for entry in entries:
        array = entry.to_ours(np.asarray(state[entry.theirs]))
        if entry.row is None:
            flat[entry.ours] = array
        else:
            rows.setdefault(entry.ours, []).append(array)
    flat |= {name: np.stack(arrays) for name, arrays in rows.items()}
    return Conversion(weights.unflatten(flat), missing, unknown)


def to_state(entries: Sequence[Entry], params: Mapping) -> dict[str, np.ndarray]:
    """Their state dict from our nested parameters."""
    flat = weights.flatten(params)
    state = {}
    for entry in entries:
        array = flat[entry.ours]
        state[entry.theirs] = entry.to_theirs(array if entry.row is None else array[entry.row])
    return state
