"""How are recorded functions of LlamaGen computed? (kinds `rope2d`, `sampling`, `postprocess`)

These kinds have no weights.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from star_jax.core import pixels, positions, resize
from star_jax.core.filters import SortedFilter
from star_jax.core.guidance import guide
from star_jax.core.settings import Settings
from star_jax.families.llamagen import LlamaGen
from star_jax.verify.cases import Case
from star_jax.verify.comparison import FUNCTIONS, INTEGERS, TABLES
from star_jax.verify.rules import Rule, inputs


class RasterTables:
    """Rotary tables of rasters after a prefix, and rotated queries and keys."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs(r'apply_\d+_x'),
            Rule(r'table_(\d+)', TABLES, lambda index: self.table(int(index))),
            Rule(r'apply_(\d+)_out', TABLES, self.rotated),
        )

    def table(self, index: int) -> np.ndarray:
        """[prefix + tokens, P, 2]."""
        table = self.case.option('tables')[index]
        side = table['grid_size']
        return positions.raster_rotation(
            side, side, table['cls_token_num'], table['head_dim'], table['rope_base']
        )

    def rotated(self, index: str) -> jax.Array:
        apply = self.case.option('apply')[int(index)]
        rows_LP2 = self.table(apply['table'])[apply['start'] :][: apply['length']]
        return jax.jit(positions.rotate)(self.case.input(f'apply_{index}_x'), rows_LP2)


class RasterFilters:
    """Filtered distributions over codes, and guided logits."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.filtered = functools.cache(self._filtered)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('logits|(?:un)?cond_logits'),
            Rule(r'filtered_(\d+)', FUNCTIONS, lambda i: self.filtered(i)),
            Rule(r'probs_(\d+)', FUNCTIONS, lambda i: jax.nn.softmax(self.filtered(i))),
            Rule(r'argmax_(\d+)', INTEGERS, lambda i: self.filtered(i).argmax(-1)[:, None]),
            Rule(r'cfg_mixed_([\d.]+)', FUNCTIONS, self.guided),
        )

    def _filtered(self, index: str) -> jax.Array:
        options = self.case.option('settings')[int(index)]
        temperature = float(LlamaGen().temperatures(options['temperature'])[0])
        return jax.jit(recorded_filter(options))(self.case.input('logits'), temperature)

    def guided(self, scale: str) -> jax.Array:
        if float(scale) not in self.case.option('cfg_scales'):
            raise LookupError(f'cfg_scales lacks {scale}')
        rows = [self.case.input(f'{name}_logits') for name in ('cond', 'uncond')]
        # The formula alone; its callers turn guidance off at a scale of 1 or less.
        return guide(np.concatenate(rows), len(rows[0]), np.float32(float(scale) - 1))


class Postprocessing:
    """Decoded images at the sizes of an evaluation, as floats and as bytes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.resized = functools.cache(self._resized)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('samples'),
            Rule(r'resized_(\d+)', FUNCTIONS, lambda size: np.moveaxis(self.resized(size), -1, 1)),
            Rule(r'uint8_(\d+)', INTEGERS, self.to_bytes),
        )

    def to_bytes(self, size: str) -> jax.Array:
        return pixels.to_nearest_uint8(self.resized(size))

    def _resized(self, size: str) -> jax.Array:
        """[B, size, size, 3], resized before anything is clamped."""
        side = int(size)
        if side not in self.case.option('sizes'):
            raise LookupError(f'sizes lacks {side}')
        images_BHWc = np.moveaxis(self.case.input('samples'), 1, -1)
        return jax.jit(lambda x: resize.bicubic(x, side, side))(images_BHWc)


def recorded_filter(options: Mapping[str, Any]) -> SortedFilter:
    """The filter of recorded options, where a top-p of 0 leaves the most probable code alone.

    As a setting of a user it leaves all codes.
    """
    settings = Settings(top_k=options['top_k'], top_p=options['top_p'])
    keep = LlamaGen().filter(settings)
    return keep if settings.top_p else keep.replace(top_p=0.0)
