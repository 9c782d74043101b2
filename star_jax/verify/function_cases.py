"""How are recorded tables, filters and schedules computed? (kinds `rope`, `sampling`, `schedule`)

These kinds have no weights.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core import positions
from star_jax.core.filters import NucleusFilter
from star_jax.errors import UserError
from star_jax.sampling.methods import soften
from star_jax.training.schedules import LearningRate, weight_decay_at
from star_jax.verify.cases import RAW, Case
from star_jax.verify.comparison import INTEGERS, LATENTS, SCHEDULES, TABLES
from star_jax.verify.rules import Rule, inputs

WAVES = {'cos': np.cos, 'sin': np.sin}


class Rope:
    """Rotary tables of grids and pyramids, and rotated queries and keys."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs(r'apply\d+_[qk]'),
            Rule(r'table(\d+)_(cos|sin)', TABLES, lambda i, wave: WAVES[wave](self.grid_angles(i))),
            Rule(r'apply(\d+)_(cos|sin)', TABLES, lambda i, wave: WAVES[wave](self.angles(i))),
            Rule(r'apply(\d+)_([qk])_out', TABLES, self.rotated),
        )

    def grid_angles(self, index: str) -> np.ndarray:
        table = numbered(self.case, 'tables', 'table', index)
        xy = positions.grid_xy(table['end_y'], table['end_x'], extent(table))
        return positions.rotary_angles(xy, table['head_dim'], table['theta'])

    def angles(self, index: str) -> np.ndarray:
        apply = numbered(self.case, 'applies', 'apply', index)
        grids = tuple((side, side) for side in apply['patch_nums'])
        xy = positions.pyramid_xy(grids, extent(apply))
        return positions.rotary_angles(xy, apply['head_dim'], apply['theta'])

    def rotated(self, index: str, which: str) -> jax.Array:
        x_BNLH = self.case.input(f'apply{index}_{which}')
        rotation = positions.rotation(self.angles(index))
        return jax.jit(positions.rotate)(x_BNLH.swapaxes(1, 2), rotation).swapaxes(1, 2)


class Sampling:
    """Filtered logits, and the soft mixtures of smooth sampling."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.filtered = functools.cache(self._filtered)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('logits'),
            inputs(r'gumbel\d+\.exponential_noise'),
            Rule(r'filter(\d+)\.kept', INTEGERS, lambda i: np.isfinite(self.filtered(i))),
            Rule(r'filter(\d+)\.probs', LATENTS, lambda i: jax.nn.softmax(self.filtered(i))),
            Rule(r'filter(\d+)\.argmax_idx', INTEGERS, lambda i: self.filtered(i).argmax(-1)),
            Rule(
                r'filter(\d+)\.argmax_conf',
                LATENTS,
                lambda i: jax.nn.softmax(self.filtered(i)).max(-1),
            ),
            Rule(r'gumbel(\d+)\.probs', LATENTS, self.mixed),
        )

    def _filtered(self, index: str) -> jax.Array:
        options = numbered(self.case, 'filters', 'filter', index)
        keep = NucleusFilter(top_k=options['top_k'], top_p=options['top_p'] or None)
        return jax.jit(keep)(self.case.input('logits'))

    def mixed(self, index: str) -> jax.Array:
        gumbel = numbered(self.case, 'gumbel', 'gumbel', index)
        noise = -jnp.log(self.case.input(f'gumbel{index}.exponential_noise'))
        return soften(self.case.input('logits'), noise, gumbel['ratio'], gumbel['tau'])


class Schedules:
    """Learning rates and weight decay of every step of a run."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.total = case.option('max_it')
        self.steps = np.arange(self.total)
        self.peak = case.option('peak_lr')
        self.warmup_steps = round(case.option('wp_it'))
        case.check('wp_it_rounded', self.warmup_steps)

    def rules(self) -> tuple[Rule, ...]:
        return (
            Rule(r'lr\.(.+)\.(\w+)', SCHEDULES, self.rate, self.peak),
            Rule('weight_decay', SCHEDULES, self.decay),
        )

    def rate(self, shape: str, variant: str) -> jax.Array:
        shares = self.case.option('variants')[variant]
        try:
            rate = LearningRate(
                peak=self.peak,
                warmup_steps=self.warmup_steps,
                start=shares['wp0'],
                end=shares['wpe'],
                shape=shape,
            )
        except ValueError as error:
            raise UserError(f'{self.case.folder}: {error}') from error
        return rate.at(self.steps, self.total)

    def decay(self) -> jax.Array:
        first, last = self.case.option('wd'), self.case.option('wd_end')
        return weight_decay_at(self.steps, self.total, first, last)


def numbered(case: Case, section: str, key: str, index: str) -> dict:
    """The entry of a list of the config in which `key` is the number from an array's name."""
    entries = [entry for entry in case.option(section) if entry.get(key) == int(index)]
    if not entries:
        raise LookupError(f'{section} holds no {key} {index}')
    return entries[0]


def extent(entry: dict) -> float | None:
    return None if entry['normalize'] == RAW else entry['normalize']
