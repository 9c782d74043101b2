"""Does a model of more scales start with the parameters of one of fewer?"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from star_jax.checkpoint.weights import flatten
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.nn.positions import Learned
from star_jax.parallel.mesh import MeshShape
from star_jax.training import warm_start
from star_jax.training.state import TrainState
from star_jax.training.transformer_job import TransformerJob

SMALL = dataclasses.replace(tiny.STAR.model, sides=(1, 2, 4))
SIDES = (1, 2, 3, 4)


@pytest.fixture(scope='module')
def sources(tmp_path_factory) -> tuple[str, str]:
    """A model folder, and the folder of its tokenizer."""
    root = tmp_path_factory.mktemp('small')
    return tiny.write_model(root / 'model'), tiny.write_tokenizer(root / 'tokenizer')


def state_of(star: Star, seed: int) -> TrainState:
    """A state in which all numbers are random."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32)),
        tiny.random_params(star.abstract()),
    )
    return TrainState(step=0, params=params, ema=params, opt=None)


@pytest.mark.parametrize('adaln', [False, True])
def test_warm_start_keeps_the_first_rows(adaln):
    small = dataclasses.replace(SMALL, positions=Learned(), shared_adaln=adaln)
    large = dataclasses.replace(small, sides=SIDES)
    old, fresh = state_of(small, 0), state_of(large, 1)
    started = warm_start.start(fresh, warm_start.fit(old.params, fresh, 'it'))
    for kept in (started.params, started.ema):
        before, after, other = map(flatten, (old.params, kept, fresh.params))
        for name, array in after.items():
            if name not in ('levels', 'table/table'):
                np.testing.assert_array_equal(array, before[name])
        np.testing.assert_array_equal(after['levels'][:3], before['levels'])
        last = before['levels'][2] if adaln else other['levels'][3]
        np.testing.assert_array_equal(after['levels'][3], last)
        np.testing.assert_array_equal(after['table/table'][:21], before['table/table'])
        np.testing.assert_array_equal(after['table/table'][21:], other['table/table'][21:])


def test_warm_start_refuses_other_shapes():
    small, large = state_of(SMALL, 0), state_of(dataclasses.replace(SMALL, sides=SIDES), 1)
    with pytest.raises(UserError, match='levels'):
        warm_start.fit(large.params, small, 'it')  # the source has more scales
    wide = state_of(dataclasses.replace(SMALL, sides=SIDES, width=64), 1)
    with pytest.raises(UserError, match='22 of another shape or type'):
        warm_start.fit(small.params, wide, 'it')


def test_run_starts_from_a_model_of_fewer_scales_on_a_mesh(sources):
    init, tokenizer = sources
    star = dataclasses.replace(SMALL, sides=SIDES, keep_tokens=24)
    mesh = MeshShape(data=2, fsdp=4)
    run = dataclasses.replace(tiny.STAR, init=init, tokenizer=tokenizer, model=star, mesh=mesh)
    started = flatten(jax.device_get(TransformerJob(run).init().params))
    rows_SD = flatten(tiny.random_params(SMALL.abstract()))['levels']
    np.testing.assert_array_equal(started['levels'][:3], rows_SD)
    assert 0.5 * star.std < started['levels'][3].std() < 2 * star.std
