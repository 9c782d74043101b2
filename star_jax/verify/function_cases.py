"""How are recorded tables, filters and schedules computed? (kinds without weights: `rope`,
`sampling`, `schedule`)"""

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
from star_jax.verify.rules import Rule, given

WAVES = {'cos': np.cos, 'sin': np.sin}


class Rope:
    """Rotary tables of single grids, and their application to queries and keys."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def rules(self) -> tuple[Rule, ...]:
        return (
            given(r'apply\d+_[qk]'),
            Rule(r'table(\d+)_(cos|sin)', TABLES, lambda i, wave: WAVES[wave](self.grid_angles(i))),
            Rule(r'apply(\d+)_(cos|sin)', TABLES, lambda i, wave: WAVES[wave](self.angles(i))),
            Rule(r'apply(\d+)_([qk])_out', TABLES, self.turned),
        )

    def grid_angles(self, index: str) -> np.ndarray:
        table = numbered(self.case, 'tables', 'table', index)
        xy = positions.grid_xy(table['end_y'], table['end_x'], extent(table))
        return positions.rotary_table(xy, table['head_dim'], table['theta'])

    def angles(self, index: str) -> np.ndarray:
        apply = numbered(self.case, 'applies', 'apply', index)
        grids = tuple((side, side) for side in apply['patch_nums'])
        xy = positions.pyramid_xy(grids, extent(apply))
        return positions.rotary_table(xy, apply['head_dim'], apply['theta'])

    def turned(self, index: str, which: str) -> jax.Array:
        x_BNLH = self.case.given(f'apply{index}_{which}')
        return jax.jit(positions.rotate)(x_BNLH.swapaxes(1, 2), self.angles(index)).swapaxes(1, 2)


class Sampling:
    """Filters of logits, and their soft mixtures."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.filtered = functools.cache(self._filtered)

    def rules(self) -> tuple[Rule, ...]:
        return (
            given('logits'),
            given(r'gumbel\d+\.exponential_noise'),
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
        given = numbered(self.case, 'filters', 'filter', index)
        keep = NucleusFilter(top_k=given['top_k'], top_p=given['top_p'] or None)
        return jax.jit(keep)(self.case.given('logits'))

    def mixed(self, index: str) -> jax.Array:
        gumbel = numbered(self.case, 'gumbel', 'gumbel', index)
        noise = -jnp.log(self.case.given(f'gumbel{index}.exponential_noise'))
        return soften(self.case.given('logits'), noise, gumbel['ratio'], gumbel['tau'])


class Schedules:
    """Learning rates and weight decay of a whole run."""

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
        ends = self.case.option('variants')[variant]
        try:
            rate = LearningRate(
                peak=self.peak,
                warmup_steps=self.warmup_steps,
                start=ends['wp0'],
                end=ends['wpe'],
                shape=shape,
            )
        except ValueError as error:
            raise UserError(f'{self.case.folder}: {error}') from error
        return rate.at(self.steps, self.total)

    def decay(self) -> jax.Array:
        first, last = self.case.option('wd'), self.case.option('wd_end')
        return weight_decay_at(self.steps, self.total, first, last)


def numbered(case: Case, section: str, key: str, index: str) -> dict:
    """The entry of a section of the config whose `key` is the number in an array's name."""
    found = [entry for entry in case.option(section) if entry.get(key) == int(index)]
    if not found:
        raise LookupError(f'{section} holds no {key} {index}')
    return found[0]


def extent(entry: dict) -> float | None:
    return None if entry['normalize'] == RAW else entry['normalize']
