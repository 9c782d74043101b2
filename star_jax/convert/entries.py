"""How is one published tensor converted to a parameter, and back?

A table is a list of entries. An entry has both names and an einops pattern from the published
(torch) layout to ours; the reversed pattern converts back.
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
    """One published tensor, or some rows of one, and the parameter that it becomes.

    Attributes:
        torch_name: name of the published tensor.
        param_name: '/'-joined name of the parameter.
        pattern: einops pattern from the published layout to ours.
        row: row of the parameter, if layers are stacked; None if the tensor is all of it.
        lengths: (axis, length) pairs that the pattern needs to split an axis.
        rows: the rows, from and up to, of the published tensor that it reads; None: all of them.
            The entries of a tensor are in the order of its rows.
    """

    torch_name: str
    param_name: str
    pattern: str
    row: int | None = None
    lengths: tuple[tuple[str, int], ...] = ()
    rows: tuple[int, int] | None = None

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the published rows, from that of the parameter (or of its row)."""
        torch_axes, param_axes = self.pattern.split('->')
        lengths = dict(zip(param_axes.split(), shape, strict=True)) | {'1': 1}
        groups = re.findall(r'\([^)]*\)|\S+', torch_axes)
        return tuple(math.prod(lengths[axis] for axis in g.strip('()').split()) for g in groups)

    def to_param(self, array: np.ndarray) -> np.ndarray:
        """The parameter, or its row, of the whole published tensor."""
        if self.rows:
            array = array[slice(*self.rows)]
        return einops.rearrange(array, self.pattern, **dict(self.lengths))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The published rows of the parameter, or of its row."""
        torch_axes, param_axes = self.pattern.split('->')
        return einops.rearrange(array, f'{param_axes} -> {torch_axes}', **dict(self.lengths))


Rule = tuple[str, str, str]  # torch name, parameter name, pattern


def layer_entries(
    rules: Iterable[Rule],
    torch_prefix: str,
    param_prefix: str,
    layers: int,
    lengths: Mapping[str, int],
) -> list[Entry]:
    """The table of stacked layers.

    Args:
        rules: the rules of one layer.
        torch_prefix: `prefix.0`, `prefix.1`, ... are the published layers.
        param_prefix: prefix of the stacked parameters, whose row i is layer i.
        layers: number of layers.
        lengths: length of every axis that a pattern may split.
    """
    entries = []
    for layer in range(layers):
        for torch_name, param_name, pattern in rules:
            axes = [item for item in lengths.items() if re.search(rf'\b{item[0]}\b', pattern)]
            entries.append(
                Entry(
                    torch_name=f'{torch_prefix}.{layer}.{torch_name}',
                    param_name=f'{param_prefix}/{param_name}',
                    pattern=pattern,
                    row=layer,
                    lengths=tuple(axes) if '(' in pattern else (),
                )
            )
    return entries


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of `to_params`.

    Attributes:
        params: nested parameters; empty if tensors are missing.
        missing: tensors of the table that the state dict lacks.
        unknown: tensors of the state dict that the table lacks.
    """

    params: dict
    missing: tuple[str, ...]
    unknown: tuple[str, ...]


def to_params(
    entries: Sequence[Entry], state: Mapping[str, np.ndarray], ignored: Iterable[str] = ()
) -> Conversion:
    """Converts a published state dict; names with an ending in `ignored` are skipped."""
    missing = tuple(entry.torch_name for entry in entries if entry.torch_name not in state)
    known = {entry.torch_name for entry in entries}
    endings = tuple(ignored)
    unknown = tuple(name for name in state if name not in known and not name.endswith(endings))
    if missing:
        return Conversion({}, missing, unknown)
    rows: dict[str, list[np.ndarray]] = {}
    flat: dict[str, np.ndarray] = {}
    for entry in entries:
        array = entry.to_param(np.asarray(state[entry.torch_name]))
        if entry.row is None:
            flat[entry.param_name] = array
        else:
            rows.setdefault(entry.param_name, []).append(array)
    flat |= {name: np.stack(arrays) for name, arrays in rows.items()}
    return Conversion(weights.unflatten(flat), missing, unknown)


def to_state(entries: Sequence[Entry], params: Mapping) -> dict[str, np.ndarray]:
    """The published state dict of nested parameters."""
    flat = weights.flatten(params)
    parts: dict[str, list[np.ndarray]] = {}
    for entry in entries:
        array = flat[entry.param_name]
        part = entry.to_torch(array if entry.row is None else array[entry.row])
        parts.setdefault(entry.torch_name, []).append(part)
    return {
        name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        for name, arrays in parts.items()
    }
