"""Do the configs have the published sizes and hyperparameters of every stage?"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import pytest
from flax.core import meta

from star_jax.checkpoint import config, weights
from star_jax.convert.buffers import CLASS_ROWS
from star_jax.data.resizing import HalvedBicubic, Lanczos, LanczosCover
from star_jax.families.var import Var
from star_jax.training.run import Run, TokenizerRun, resolve

CONFIGS = Path(__file__).parents[1] / 'configs'

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
ROUNDED = ('var_d20', 'var_d24', 'var_d30')  # their exact sizes were not published


@functools.cache
def read(name: str) -> Run:
    return config.load_run(CONFIGS / f'{name}.py', Run)


@pytest.mark.parametrize('name', STAGES)
def test_config_has_published_size_and_hyperparameters(name):
    parameters, tokens, peak, batch = STAGES[name]
    run = read(name)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(meta.unbox(run.model.abstract())))
    # STAR's published numbers count the unused class_emb.weight.
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


TABLE = Path(__file__).parents[1] / 'docs/specification/tables/infinity_model_sizes.json'
# Names of the config and of the table, and the tokens of an image.
INFINITY = {
    'infinity_125m': ('infinity_layer12 (125M)', 521),
    'infinity_361m': ('infinity_layer16 (361M)', 521),
    'infinity_940m': ('infinity_layer24 (940M)', 521),
    'infinity_2_2b': ('infinity_layer32 (2.2B)', 521),
    'infinity_4_7b': ('infinity_layer40 (4.7B)', 521),
    'infinity_2b': ('infinity_2b', 10521),
    'infinity_8b': ('infinity_8b', 10521),
    'infinity_20b': ('infinity_20b', 10521),
}


@pytest.mark.parametrize('name', INFINITY)
def test_infinity_has_the_published_size_and_recipe(name):
    run, (listed, tokens) = read(name), INFINITY[name]
    sizes = json.loads(TABLE.read_text())['sizes'][listed]
    model = run.model
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(meta.unbox(model.abstract())))
    assert count == sizes['parameters_total'] and model.hidden == sizes['ffn_hidden']
    assert model.pool_heads == sizes['pool_heads'] and model.head_width == sizes['head_dim']
    assert model.drop_path == sizes['drop_path_rate'] and model.schedule.length == tokens
    tokenizer = model.default_tokenizer()
    assert tokenizer.bits == sizes['tokenizer_bits']
    assert tokenizer.patchify == bool(sizes['apply_spatial_patchify'])
    assert tokenizer.resolution == ((256, 256) if tokens == 521 else (1024, 1024))
    optimizer = run.optimizer.for_batch(run.batch)
    assert float(optimizer.learning_rate.at(0, run.pace.steps)) == pytest.approx(6e-3)
    assert (optimizer.beta2, optimizer.clip, optimizer.weight_decay) == (0.97, 5.0, 0.005)
    assert run.correction.strength == 0.3 and run.balance == 0.5 and run.caption_drop == 0.1
    assert run.data.resizing == run.validation.resizing == LanczosCover()


@pytest.mark.parametrize(
    ('name', 'parameters', 'resolution'),
    [
        ('tokenizer_llamagen', 71_883_403, (256, 256)),
        ('tokenizer_var', 108_948_355, (256, 256)),
        ('tokenizer_infinity', 110_118_051, (256, 256)),
    ],
)
def test_presets_of_tokenizers(name, parameters, resolution):
    run = config.load_run(CONFIGS / f'{name}.py', TokenizerRun)
    model, adversary = run.model, run.objective.adversary
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(meta.unbox(model.abstract())))
    assert count == parameters and model.resolution == resolution
    assert (adversary.weight, adversary.start, run.batch) == (0.5, 20_000, 128)
    rate = run.optimizer.learning_rate
    assert float(rate.at(0, run.pace.steps)) == pytest.approx(1e-4)
    assert float(rate.at(run.pace.steps - 1, run.pace.steps)) == pytest.approx(1e-4)
    assert adversary.optimizer == run.optimizer
    resizing = HalvedBicubic() if name == 'tokenizer_llamagen' else Lanczos()
    assert run.data.resizing == run.validation.resizing == resizing
    assert resolve(run).validation.resizing == resizing


# Parameters (LlamaGen specification 2.1) and tokens of an image.
LLAMAGEN = {
    'llamagen_b': (110_888_448, 576),
    'llamagen_l': (342_910_976, 576),
    'llamagen_xl': (774_699_520, 576),
    'llamagen_xxl': (1_410_972_672, 576),
    'llamagen_3b': (3_096_659_200, 576),
    'llamagen_xxxl': (3_893_027_840, 576),
    'llamagen_1b': (1_199_616_000, 576),
    'llamagen_7b': (6_614_589_440, 576),
    'llamagen_text_256': (777_678_080, 256),
    'llamagen_text_512': (777_678_080, 1024),
}


@pytest.mark.parametrize('name', LLAMAGEN)
def test_llamagen_has_the_published_size_and_recipe(name):
    run, (parameters, tokens) = read(name), LLAMAGEN[name]
    model, rate = run.model, run.optimizer.learning_rate
    leaves = weights.flatten(meta.unbox(model.abstract()))
    count = sum(math.prod(x.shape) for n, x in leaves.items() if n not in model.constants)
    assert count == parameters and model.schedule.length == tokens
    assert model.default_tokenizer().resolution == (16 * model.grid[0],) * 2
    assert float(rate.at(0, run.pace.steps)) == float(rate.at(run.pace.steps - 1, run.pace.steps))
    assert rate.peak == 1e-4 and run.batch == 256 and run.caption_drop == 0.1
    optimizer = run.optimizer
    assert (optimizer.weight_decay, optimizer.clip, optimizer.beta2) == (0.05, 1.0, 0.95)
    assert model.dropout == model.row_dropout == 0.1
    assert run.data.resizing == run.validation.resizing == HalvedBicubic()


def test_llamagen_by_text_has_two_stages():
    first, second = read('llamagen_text_256'), read('llamagen_text_512')
    assert second.init == 'runs/llamagen_text_256/model'
    assert dataclasses.replace(second.model, grid=first.model.grid) == first.model
    assert second.captions.first == 0.3
