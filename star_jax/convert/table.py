"""Which tensors must a state dict have, and how is it converted without loading all of it?"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from star_jax.checkpoint import weights
from star_jax.checkpoint.stored import StreamedArray, Tensors, TensorSpec, is_finite
from star_jax.convert.buffers import Buffers, star_buffers, var_buffers
from star_jax.convert.entries import Entry
from star_jax.convert.star import IGNORED, star_entries, vq_entries
from star_jax.convert.var import var_entries
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.protocols import Family
from star_jax.tokenizers.residual_vq import VQ

BFLOAT16 = jnp.dtype('bfloat16')  # represents all values of the 8 bit floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionTable:
    """The conversion of one state dict.

    Attributes:
        entries: one per published tensor that is a parameter.
        abstract: shapes and types of the parameters, by name.
        buffers: tensors that follow from the sizes, by name.
        ignored: endings of the names of unused tensors.
    """

    entries: Sequence[Entry]
    abstract: Mapping[str, Any]
    buffers: Buffers
    ignored: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Family | VQ, names: Iterable[str]) -> 'ConversionTable':
        """The table of a config; `names` are the tensor names of a file (see `vq_entries`)."""
        abstract = weights.flatten(meta.unbox(config.abstract()))
        if isinstance(config, VQ):
            entries, buffers, ignored = vq_entries(config, names), {}, IGNORED
        elif isinstance(config, Star):
            entries, buffers, ignored = star_entries(config), star_buffers(config), IGNORED
        else:
            entries, buffers, ignored = var_entries(config), var_buffers(config), ()
        return cls(entries=entries, abstract=abstract, buffers=buffers, ignored=ignored)

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape of the published tensor of an entry."""
        shape = self.abstract[entry.param_name].shape
        return entry.torch_shape(shape if entry.row is None else shape[1:])

    def ignored_names(self, names: Iterable[str]) -> list[str]:
        """The names of a file that are ignored."""
        known = {entry.torch_name for entry in self.entries} | set(self.buffers)
        return [name for name in names if name not in known and name.endswith(self.ignored)]

    def check(self, tensors: Tensors, where: str) -> None:
        """Checks names, shapes and types of the tensors, and the values of buffers.

        Raises:
            UserError: names tensors that are missing, unknown or of another shape, or a buffer
                with other values.
        """
        specs = tensors.specs()
        expected = {
            entry.torch_name: TensorSpec(self.shape(entry), np.dtype(np.float32))
            for entry in self.entries
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
        """The types of the tensors that are stored in another one, by published name."""
        specs, flat = tensors.specs(), weights.flatten(params)
        return {
            entry.torch_name: specs[entry.torch_name].dtype.name
            for entry in self.entries
            if specs[entry.torch_name].dtype != flat[entry.param_name].dtype
        }

    def state(self, params: Tensors, types: Mapping[str, str]) -> dict[str, Any]:
        """The published tensors, each read and converted only when it is written.

        Args:
            params: the parameters.
            types: the result of `converted_types`.
        """
        specs = params.specs()
        state: dict[str, Any] = {name: make() for name, make in self.buffers.items()}
        for entry in self.entries:
            name = entry.torch_name
            dtype = jnp.dtype(types.get(name, specs[entry.param_name].dtype))
            parts = _stream_back(params, entry, dtype)
            state[name] = StreamedArray(self.shape(entry), dtype, parts)
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
    params: Tensors, entry: Entry, dtype: np.dtype
) -> Callable[[], Iterable[np.ndarray]]:
    def parts() -> Iterator[np.ndarray]:
        array = entry.to_torch(params.read(entry.param_name, entry.row))
        yield array.astype(dtype, copy=False)

    return parts
