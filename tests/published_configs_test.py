"""Do the configs have the published sizes and hyperparameters of every stage?"""

import functools
import math
from pathlib import Path

import jax
import pytest
from flax.core import meta

from star_jax.checkpoint import config
from star_jax.families.var import Var
from star_jax.training.run import Run

CONFIGS = Path(__file__).parents[1] / 'configs'
CLASS_ROWS = 1001  # of the unused class_emb.weight, which counts in STAR's published numbers

# name: parameters (STAR specification 10; those of d20-d30 by the same sum), tokens, peak, batch.
STAGES = {
    'star_d16_256': (274_934_272, 680, 1e-4, 512),
    'star_d30_256': (1_678_731_016, 680, 1e-4, 480),
    'star_d30_256_stage2': (1_678_731_016, 680, 5e-5, 480),
    'star_d30_512': (1_678_731_016, 2240, 5e-5, 192),
    'star_d30_1024': (1_678_738_696, 9451, 2e-5, 64),
    'star_d30_1024_sampler': (1_828_798_562, 9451, 1e-5, 192),
    'var_d16': (310_283_520, 680, 3e-4, 768),
    'var_d20': (600_000_000, 680, 3e-4, 768),
    'var_d24': (1_000_000_000, 680, 2.4e-4, 768),
    'var_d30': (2_000_000_000, 680, 3.2e-4, 1024),
    'var_d36_512': (2_353_893_904, 2240, 2.4e-4, 768),
}
ROUNDED = ('var_d20', 'var_d24', 'var_d30')  # whose exact sizes were not published


@functools.cache
def read(name: str) -> Run:
    return config.load_run(CONFIGS / f'{name}.py', Run)


@pytest.mark.parametrize('name', STAGES)
def test_config_has_published_size_and_hyperparameters(name):
    parameters, tokens, peak, batch = STAGES[name]
    run = read(name)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(meta.unbox(run.model.abstract())))
    count += 0 if isinstance(run.model, Var) else CLASS_ROWS * run.model.width
    assert count == pytest.approx(parameters, rel=0.05 if name in ROUNDED else 0)
    assert run.model.schedule.length == tokens
    assert run.optimizer.learning_rate.peak == pytest.approx(peak)
    assert run.batch == batch
    assert run.model.drop_path == pytest.approx(0.1 * run.model.depth / 24)
    assert run.optimizer.learning_rate.warmup_steps == round(run.pace.steps / 50)


def test_each_stage_warm_starts_from_an_earlier_one():
    stages = list(STAGES)
    for name in stages:
        if init := read(name).init:
            earlier = init.split('/')[1]
            assert stages.index(earlier) < stages.index(name)
            assert read(earlier).model.width == read(name).model.width
