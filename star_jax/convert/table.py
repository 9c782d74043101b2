"""Which tensors must a state dict have, and how is it converted without loading all of it?"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from star_jax.checkpoint import weights
from star_jax.checkpoint.stored import NAMES, StreamedArray, Tensors, TensorSpec, is_finite
from star_jax.convert.buffers import Buffers
from star_jax.convert.entries import Entry
from star_jax.convert.layouts import Layout, layout
from star_jax.errors import UserError
from star_jax.protocols import Family, TokenizerConfig

BFLOAT16 = jnp.dtype('bfloat16')  # represents all values of the 8 bit floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionTable:
    """The conversion of one state dict.

    Attributes:
        layout: the published tensors.
        abstract: shapes and types of the parameters, by name.
    """

    layout: Layout
    abstract: Mapping[str, Any]

    @classmethod
    def from_config(
        cls, config: Family | TokenizerConfig, names: Iterable[str]
    ) -> 'ConversionTable':
        """The table of a config; `names` as for `layouts.layout`."""
        abstract = weights.flatten(meta.unbox(config.abstract()))
        return cls(layout=layout(config, names), abstract=abstract)

    @property
    def entries(self) -> Sequence[Entry]:
        """One per published tensor that is a parameter."""
        return self.layout.entries

    @property
    def buffers(self) -> Buffers:
        """The tensors that follow from the sizes, by name."""
        return self.layout.buffers

    @functools.cached_property
    def by_tensor(self) -> Mapping[str, Sequence[Entry]]:
        """The entries of each published tensor, in the order of its rows."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.torch_name, []).append(entry)
        return found

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each published tensor that is a parameter, or several."""
        found = {}
        for name, entries in self.by_tensor.items():
            (first, *rest), *others = [self.shape(entry) for entry in entries]
            found[name] = (first + sum(shape[0] for shape in others), *rest)
        return found

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape of the published rows of an entry."""
        shape = self.abstract[entry.param_name].shape
        return entry.torch_shape(shape if entry.row is None else shape[1:])

    def ignored_names(self, names: Iterable[str]) -> list[str]:
        """The names of a file that are ignored."""
        known = {entry.torch_name for entry in self.entries} | set(self.buffers)
        return [name for name in names if name not in known and name.endswith(self.layout.ignored)]

    def check(self, tensors: Tensors, where: str) -> None:
        """Checks names, shapes and types of the tensors, and the values of buffers.

        Raises:
            UserError: names tensors that are missing, unknown or of another shape, or a buffer
                with other values.
        """
        specs = tensors.specs()
        expected = {
            name: TensorSpec(shape, np.dtype(np.float32)) for name, shape in self.shapes.items()
        }
        skipped = {*self.ignored_names(specs), *self.buffers}
        parameters = {name: spec for name, spec in specs.items() if name not in skipped}
        if flaws := weights.mismatches(parameters, expected, weights.fits):
            raise UserError(f'{where}: the tensors do not fit the inferred config: {flaws}')
        for name in self.buffers.keys() & specs.keys():
            if not np.array_equal(tensors.read(name), self.buffers[name]()):
                raise UserError(
                    f'{where}: {name} differs from the buffer of a model of these sizes, so the '
                    'file is for another computation than the published one'
                )

    def params(self, tensors: Tensors, not_finite: list[str]) -> dict[str, Any]:
        """The parameters, each read and converted only when it is written.

        The layers of a parameter are stored in one type, which represents all values of theirs.

        Args:
            tensors: the published tensors.
            not_finite: to this list, names of tensors with NaN or infinite values are appended
                while they are read.
        """
        specs, entries = tensors.specs(), {}
        for entry in self.entries:
            entries.setdefault(entry.param_name, []).append(entry)
        flat = {}
        for name, rows in entries.items():
            dtype = _common_dtype({specs[entry.torch_name].dtype for entry in rows})
            parts = _stream(tensors, rows, dtype, not_finite)
            flat[name] = StreamedArray(self.abstract[name].shape, dtype, parts)
        return weights.unflatten(flat)

    def converted_types(self, tensors: Tensors, params: Mapping[str, Any]) -> dict[str, str]:
        """The types of tensors that are stored or computed in another one, by published name.

        Types that the safetensors format lacks are left out: their tensors keep the wider type.
        """
        specs, flat = tensors.specs(), weights.flatten(params)
        written = {entry.torch_name: flat[entry.param_name].dtype for entry in self.entries}
        written |= {name: make().dtype for name, make in self.buffers.items() if name in specs}
        return {
            name: specs[name].dtype.name
            for name, dtype in written.items()
            if specs[name].dtype != dtype and specs[name].dtype.name in NAMES
        }

    def state(self, params: Tensors, types: Mapping[str, str]) -> dict[str, Any]:
        """The published tensors, each read and converted only when it is written.

        Idle tensors have values for a model that has none of its own.

        Args:
            params: the parameters.
            types: the result of `converted_types`.
        """
        specs = params.specs()
        state: dict[str, Any] = {name: make() for name, make in self.layout.idle.items()}
        for name, make in self.buffers.items():
            array = make()
            state[name] = array.astype(jnp.dtype(types.get(name, array.dtype)), copy=False)
        for name, entries in self.by_tensor.items():
            dtype = jnp.dtype(types.get(name, specs[entries[0].param_name].dtype))
            parts = _stream_back(params, entries, dtype)
            state[name] = StreamedArray(self.shapes[name], dtype, parts)
        return state


def _common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest type beside the 8 bit ones that represents all values of `dtypes`."""
    wide = [BFLOAT16 if dtype.itemsize == 1 else dtype for dtype in dtypes]
    return functools.reduce(jnp.promote_types, wide)


def _stream(
    tensors: Tensors, entries: Sequence[Entry], dtype: np.dtype, not_finite: list[str]
) -> Callable[[], Iterable[np.ndarray]]:
    ordered = sorted(entries, key=lambda entry: entry.row or 0)

    def parts() -> Iterator[np.ndarray]:
        for entry in ordered:
            array = tensors.read(entry.torch_name)
            if not is_finite(array):
                not_finite.append(entry.torch_name)
            yield entry.to_param(array).astype(dtype, copy=False)

    return parts


def _stream_back(
    params: Tensors, entries: Sequence[Entry], dtype: np.dtype
) -> Callable[[], Iterable[np.ndarray]]:
    def parts() -> Iterator[np.ndarray]:
        for entry in entries:
            array = entry.to_torch(params.read(entry.param_name, entry.row))
            yield array.astype(dtype, copy=False)

    return parts
