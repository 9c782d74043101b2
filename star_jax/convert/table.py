"""Which tensors must a state dict have, and how is it converted without loading all of it?"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.core import meta

from star_jax.checkpoint import weights
from star_jax.checkpoint.stored import StreamedArray, Tensors, TensorSpec
from star_jax.convert.buffers import Buffers, star_buffers, var_buffers
from star_jax.convert.entries import Entry
from star_jax.convert.star import IGNORED, star_entries, vq_entries
from star_jax.convert.var import var_entries
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.protocols import Family
from star_jax.tokenizers.residual_vq import VQ


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
            UserError: names tensors that are missing, unknown or of another shape, layers of
                different types, or a buffer with other values.
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
        first_layer: dict[str, str] = {}
        for entry in self.entries:
            name = entry.torch_name
            first = first_layer.setdefault(entry.param_name, name)
            if specs[first].dtype != specs[name].dtype:
                raise UserError(
                    f'{where}: {first} is {specs[first].dtype} and {name} is {specs[name].dtype}, '
                    'but all layers are stored in one type: save them in the same type'
                )
        for name in self.buffers.keys() & specs.keys():
            if not np.array_equal(tensors.read(name), self.buffers[name]()):
                raise UserError(
                    f'{where}: {name} differs from the buffer of a model of these sizes, so the '
                    'file is for another computation than the published one'
                )

    def params(self, tensors: Tensors) -> dict[str, Any]:
        """The parameters, each read and converted only when it is written."""
        specs, entries = tensors.specs(), {}
        for entry in self.entries:
            entries.setdefault(entry.param_name, []).append(entry)
        flat = {
            name: StreamedArray(
                self.abstract[name].shape, specs[rows[0].torch_name].dtype, _stream(tensors, rows)
            )
            for name, rows in entries.items()
        }
        return weights.unflatten(flat)

    def state(self, params: Tensors) -> dict[str, Any]:
        """The published tensors, each read and converted only when it is written."""
        specs = params.specs()
        buffers = {name: make() for name, make in self.buffers.items()}
        return buffers | {
            entry.torch_name: StreamedArray(
                self.shape(entry), specs[entry.param_name].dtype, _stream_back(params, entry)
            )
            for entry in self.entries
        }


def _stream(tensors: Tensors, entries: Sequence[Entry]) -> Callable[[], Iterable[np.ndarray]]:
    ordered = sorted(entries, key=lambda entry: entry.row or 0)
    return lambda: (entry.to_param(tensors.read(entry.torch_name)) for entry in ordered)


def _stream_back(params: Tensors, entry: Entry) -> Callable[[], Iterable[np.ndarray]]:
    return lambda: [entry.to_torch(params.read(entry.param_name, entry.row))]
