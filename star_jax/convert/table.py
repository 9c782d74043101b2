"""What must a model's state dict hold, and how does it become ours, and come back, in pieces?"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.core import meta

from star_jax.checkpoint import weights
from star_jax.checkpoint.stored import Form, Streamed, Tensors
from star_jax.convert import buffers
from star_jax.convert.entries import Entry
from star_jax.convert.star import IGNORED, star_entries, vq_entries
from star_jax.convert.var import var_entries
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.protocols import Family
from star_jax.tokenizers.residual_vq import VQ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """One state dict: its entries, the shapes of our arrays, and what else it may hold.

    `made` are tensors that follow from the sizes, `ignored` endings of names that nothing needs.
    """

    entries: Sequence[Entry]
    abstract: Mapping[str, Any]
    made: buffers.Buffers
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, config: Family | VQ, names: Iterable[str]) -> 'Table':
        """The table of a model; a file's `names` tell how it calls a tokenizer's phis."""
        abstract = weights.flatten(meta.unbox(config.abstract()))
        if isinstance(config, VQ):
            entries, made, ignored = vq_entries(config, names), {}, IGNORED
        elif isinstance(config, Star):
            entries, made, ignored = star_entries(config), buffers.of_star(config), IGNORED
        else:
            entries, made, ignored = var_entries(config), buffers.of_var(config), ()
        return cls(entries=entries, abstract=abstract, made=made, ignored=ignored)

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape of an entry's published tensor."""
        ours = self.abstract[entry.ours].shape
        return entry.their_shape(ours if entry.row is None else ours[1:])

    def left_over(self, names: Iterable[str]) -> list[str]:
        """Those of a file's names that are ignored."""
        known = {entry.theirs for entry in self.entries} | set(self.made)
        return [name for name in names if name not in known and name.endswith(self.ignored)]

    def check(self, tensors: Tensors, where: str) -> None:
        """Raises UserError naming what is missing, unknown, misshapen, or no buffer of its name.

        And where the layers of a model, which are one array of ours, are of several types.
        """
        forms = tensors.forms()
        wanted = {
            entry.theirs: Form(self.shape(entry), np.dtype(np.float32)) for entry in self.entries
        }
        skipped = {*self.left_over(forms), *self.made}
        given = {name: form for name, form in forms.items() if name not in skipped}
        if flaws := weights.mismatches(given, wanted, weights.fits):
            raise UserError(f'{where}: the tensors are not those of such a model: {flaws}')
        first: dict[str, str] = {}
        for entry in self.entries:
            one, other = first.setdefault(entry.ours, entry.theirs), entry.theirs
            if forms[one].dtype != forms[other].dtype:
                raise UserError(
                    f'{where}: {one} is {forms[one].dtype} and {other} is {forms[other].dtype}, '
                    'but layers are kept in one type: save them all in the same'
                )
        for name in self.made.keys() & forms.keys():
            if not np.array_equal(tensors.read(name), self.made[name]()):
                raise UserError(
                    f'{where}: {name} is not what it is in a model of these sizes, so the file '
                    'computes something else than any published one'
                )

    def params(self, tensors: Tensors) -> dict[str, Any]:
        """Our parameters, each made of a file's tensors when it is written."""
        forms, rows = tensors.forms(), {}
        for entry in self.entries:
            rows.setdefault(entry.ours, []).append(entry)
        flat = {
            ours: Streamed(
                self.abstract[ours].shape, forms[found[0].theirs].dtype, _stream(tensors, found)
            )
            for ours, found in rows.items()
        }
        return weights.unflatten(flat)

    def state(self, params: Tensors) -> dict[str, Any]:
        """The published tensors, each made of a folder's arrays when it is written."""
        forms = params.forms()
        made = {name: make() for name, make in self.made.items()}
        return made | {
            entry.theirs: Streamed(
                self.shape(entry), forms[entry.ours].dtype, _stream_back(params, entry)
            )
            for entry in self.entries
        }


def _stream(tensors: Tensors, entries: Sequence[Entry]) -> Callable[[], Iterable[np.ndarray]]:
    ordered = sorted(entries, key=lambda entry: entry.row or 0)
    return lambda: (entry.to_ours(tensors.read(entry.theirs)) for entry in ordered)


def _stream_back(params: Tensors, entry: Entry) -> Callable[[], Iterable[np.ndarray]]:
    return lambda: [entry.to_theirs(params.read(entry.ours, entry.row))]
