"""How are recorded rotary tables and filters of Infinity computed? (kinds `rope2d`, `sampling`)

These kinds have no weights.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from star_jax.core import positions, templates
from star_jax.core.filters import BitFilter
from star_jax.core.schedule import Grids, Pyramid
from star_jax.errors import UserError
from star_jax.nn.positions import ReferenceRotary
from star_jax.verify.cases import Case
from star_jax.verify.comparison import INTEGERS, LATENTS, TABLES
from star_jax.verify.rules import Rule, inputs

MODES = {0: 'cells', 1: 'interpolated', 2: 'rounded'}  # `rope2d_normalized_by_hw`
WAVES = {'cos': 0, 'sin': 1}
FULL = '1M'  # the resolution whose last grid is the reference of every resolution


class RotaryTables:
    """Rotary tables of published templates, and rotated queries and keys."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.table = functools.cache(self._table)

    def rules(self) -> tuple[Rule, ...]:
        table = r'out/table/mode(\d)/ratio([\d.]+)/([\d.]+M)/(cos|sin)'
        return (
            inputs('in/apply/.+'),
            Rule(table, TABLES, lambda *names: self.table(*names[:3])[..., WAVES[names[3]]]),
            Rule(r'out/apply/s(\d+)/([qk])', TABLES, self.rotated),
        )

    def rotation(self, options: Mapping[str, Any]) -> np.ndarray:
        """[rows, P, 2] of a table or an application, padded with zero rows."""
        option = self.case.option
        grids = images(options['schedule'], self.case)
        table = options.get('published_table', self.case.optional('published_table'))
        ratio = table[0] if isinstance(table, list) else options['ratio']
        reference = templates.PUBLISHED.by_name[str(float(ratio))][-1]
        rotary = rotary_of(self.case, options['mode'])
        rotation_LP2 = rotary.rotation(Pyramid(grids, reference), option('head_dim'))
        padding = -len(rotation_LP2) % max(option('pad_to_multiplier'), 1)
        return np.pad(rotation_LP2, ((0, padding), (0, 0), (0, 0)))

    def _table(self, mode: str, ratio: str, resolution: str) -> np.ndarray:
        wanted = (int(mode), float(ratio), resolution)
        for entry in self.case.option('tables'):
            if (entry['mode'], entry['ratio'], entry['pn']) == wanted:
                return self.rotation(entry)
        raise LookupError(f'tables holds no entry for {wanted}')

    def rotated(self, scale: str, which: str) -> np.ndarray:
        """The rows of one scale, or of the whole schedule for scale 0."""
        apply, step = self.case.option('apply'), int(scale)
        if step not in apply['scale_inds']:
            raise LookupError(f'scale_inds lacks {step}')
        x_BNLH = self.case.input(f'in/apply/s{step}/{which}')
        first = Pyramid(images(apply['schedule'], self.case)).starts[step]
        rows_LP2 = self.rotation(apply)[first : first + x_BNLH.shape[2]]
        return jax.jit(positions.rotate)(x_BNLH.swapaxes(1, 2), rows_LP2).swapaxes(1, 2)


class BitFilters:
    """Filtered distributions over the values of a bit, and over any other number of values."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.filtered = functools.cache(self._filtered)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('.+/in/logits'),
            Rule('(.+)/out/kept', INTEGERS, lambda name: np.isfinite(self.filtered(name))),
            Rule('(.+)/out/probs', LATENTS, lambda name: jax.nn.softmax(self.filtered(name))),
        )

    def _filtered(self, name: str) -> jax.Array:
        options = named(self.case, 'combos', 'id', name)
        keep = BitFilter(top_k=options['top_k'], top_p=options['top_p'] or None)
        return jax.jit(keep)(self.case.input(f'{name}/in/logits'))


def rotary_of(case: Case, mode: int) -> ReferenceRotary:
    """The rotary positions of an original mode."""
    if mode not in MODES:
        raise UserError(f'{case.path}: rotary mode {mode!r} is unknown, expected 0, 1 or 2')
    return ReferenceRotary(mode=MODES[mode])


def images(schedule: list[list[int]], case: Case) -> Grids:
    """The grids (height, width) of a schedule (1, height, width) of images.

    Raises UserError for a schedule with a time axis.
    """
    if any(time != 1 for time, _, _ in schedule):
        raise UserError(f'{case.path}: the schedule {schedule} has a time axis, expected images')
    return tuple((height, width) for _, height, width in schedule)


def named(case: Case, section: str, key: str, name: str) -> Mapping[str, Any]:
    """The entry of a list of the config whose `key` is the name from an array's name."""
    for entry in case.option(section):
        if entry.get(key) == name:
            return entry
    raise LookupError(f'{section} holds no {key} {name}')
