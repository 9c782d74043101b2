"""Scales that share one body of the program draw the same images as scales with their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import star_jax
from star_jax.commands import arguments, bench
from star_jax.commands.sample import Sample
from star_jax.core import buckets, padding, resize
from star_jax.core.codes import Index
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.schedule import Group, Pyramid, Raster, Step
from star_jax.core.settings import Settings, Stable
from star_jax.errors import UserError
from star_jax.families.star import Refinement, Star
from star_jax.families.var import Var
from star_jax.nn.positions import Learned
from star_jax.sampling import methods, program, stable
from star_jax.sampling.sampler import sample

SIDES = (1, 2, 3, 4)
SIZES = (1, 4, 9, 16)
ONE, TWO = ((0, 3),), ((0, 1), (2, 3))
STAR = dataclasses.replace(tiny.STAR.model, sides=SIDES)
SMALL = dataclasses.replace(STAR, depth=1, sides=(1, 2, 3))
VQ = dataclasses.replace(tiny.TOKENIZER.model, sides=SIDES)
LED = Settings(guidance=2.0, top_k=20, top_p=0.9)
B = 2


def texts(rows: int) -> TextCondition:
    rng = np.random.default_rng(1)
    return TextCondition(
        rng.normal(size=(rows, 3, STAR.text_width)).astype(np.float32),
        np.ones((rows, 3), np.int32),
        rng.normal(size=(rows, STAR.text_width)).astype(np.float32),
    )


def labels(rows: int) -> LabelCondition:
    return LabelCondition(np.arange(rows, dtype=np.int32))


@functools.cache
def params_of(model) -> dict:
    """Those of a model and of the tokenizer."""
    vq = dataclasses.replace(VQ, sides=model.sides)
    random = {'model': model.abstract(), 'tokenizer': vq.abstract()}
    return {name: tiny.random_params(abstract) for name, abstract in random.items()}


def drawing(model, shared, dtype='float32', how=LED, trace=False) -> tuple:
    """What draws B images, and its arguments."""
    network, vq = model.build(dtype), dataclasses.replace(VQ, sides=model.sides)
    rows = (texts if isinstance(model, Star) else labels)(2 * B)
    run = functools.partial(sample, network, vq.build(), trace=trace, buckets=shared)
    parts = stable.arguments(how, network, Index(model.codes))
    return run, (params_of(model), program.image_keys([3, 5]), rows, *parts)


def traced(shared):
    """B images, and what lies behind them."""
    run, given = drawing(SMALL, shared, trace=True)
    return jax.device_get(jax.jit(run)(*given))


def steps(traces, field: str) -> list:
    """One field of every step's trace."""
    found = (getattr(trace, field) for trace in traces)
    return [step for group in found if group is not None for step in group]


def test_images_do_not_depend_on_buckets():
    alone, together = traced(()), traced(((0, 1),))
    assert len({code for image in alone.codes_BL for code in image}) > 4
    np.testing.assert_array_equal(together.codes_BL, alone.codes_BL)
    np.testing.assert_allclose(together.images, alone.images, atol=1e-5)
    for field in ('logits_BLV', 'canvas', 'inputs'):
        expected = steps(alone.traces, field)
        assert len(expected) == (2 if field == 'inputs' else 3)
        for ours, theirs in zip(steps(together.traces, field), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


OTHER = {'positions': Learned(), 'shared_adaln': True, 'cross_attention': False}
CASES = {
    'learned positions, modulated, bfloat16': (
        dataclasses.replace(SMALL, **OTHER),
        ((0, 2),),
        {'dtype': 'bfloat16'},
    ),
    'classes, equal sides, mixtures': (
        Var(depth=1, width=32, heads=2, sides=(2, 2, 3), codes=32, channels=4, classes=5),
        ((0, 1),),
        {'how': dataclasses.replace(LED, smooth=True)},
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_every_kind_of_model_and_draw_knows_buckets(case):
    model, shared, how = CASES[case]
    codes = []
    for choice in ((), shared):
        run, given = drawing(model, choice, **how)
        codes.append(jax.jit(lambda *given, run=run: run(*given).codes_BL)(*given))
    np.testing.assert_array_equal(*codes)


def test_refined_scales_stand_beside_a_bucket():
    star = dataclasses.replace(SMALL, sides=(1, 2, 4), refinement=Refinement(first=2, blocks=1))
    stably = {'how': dataclasses.replace(LED, stable=Stable(version='new'))}
    run, given = drawing(star, ((0, 1),), **stably)
    assert jax.eval_shape(run, *given).codes_BL.shape == (B, 21)
    run, given = drawing(star, ((0, 2),), **stably)
    with pytest.raises(UserError, match='leave the scales that it refines out'):
        jax.eval_shape(run, *given)


def test_padding_changes_no_noise():
    """Noise belongs to the token: it does not depend on how many are drawn behind it."""
    keys_B = program.image_keys([1, 2])
    logits_BLV = jnp.zeros((B, 16, 32))
    padded, alone = Index.sample(keys_B, logits_BLV), Index.sample(keys_B, logits_BLV[:, :9])
    np.testing.assert_array_equal(padded[:, :9], alone)
    padded, alone = (methods.gumbel_noise(keys_B, (size, 32)) for size in (16, 9))
    np.testing.assert_array_equal(padded[:, :9], alone)
    rank, step = stable.RandomRanking(), Step.at(2)
    padded, alone = (rank(keys_B, step, jnp.int32(0), size) for size in (16, 9))
    np.testing.assert_array_equal(padded[:, :9], alone)


def test_padded_maps_are_resized_as_alone():
    grids = ((1, 2), (3, 2), (4, 5))
    rng = np.random.default_rng(0)
    tokens, canvas = (jnp.float32(rng.normal(size=(2, *of, 3))) for of in ((20,), (6, 5)))

    @jax.jit
    def padded(index):
        small = padding.shrink(canvas, grids, index)
        return padding.enlarge(tokens, grids, index, 6, 5), small

    @jax.jit
    def alone():
        of_scale = [tokens[:, : h * w].reshape(2, h, w, 3) for h, w in grids]
        large = [resize.bicubic(one, 6, 5) for one in of_scale]
        small = [resize.area(canvas, h, w).reshape(2, h * w, 3) for h, w in grids]
        return list(zip(large, small, strict=True))

    for index, (large, small) in enumerate(alone()):
        found = padded(index)
        np.testing.assert_allclose(found[0], large, atol=1e-5)
        np.testing.assert_allclose(found[1][:, : small.shape[1]], small, atol=1e-5)
    np.testing.assert_array_equal(padded(3)[1], padded(2)[1])  # nothing comes behind the last


def test_a_bucket_is_one_group_of_steps():
    schedule = Pyramid.square((1, 2, 2, 2, 4))
    assert schedule.groups(shared=((0, 2),)) == (Group(0, 3, True), Group(3, 1), Group(4, 1))
    assert schedule.groups(shared=((0, 0), (4, 4)))[1] == Group(1, 2)
    padded = Step(jnp.int32(3), 4, padded=True)
    assert padded.next().like == 4 and padded.next().padded
    rows = schedule.rows(padded.next().next())
    assert rows.tolist() == [28] * 16  # behind the last step


def test_one_body_serves_all_scales_of_a_bucket():
    bodies = []
    for shared in ((), ((1, 2),), ((0, 2),)):
        run, given = drawing(SMALL, shared)
        bodies.append(str(jax.make_jaxpr(run)(*given)).count('top_k['))
    assert bodies == [3, 2, 1]


def test_scales_are_divided_where_padding_costs_least():
    assert buckets.divide(SIZES, 0) == () == buckets.divide(SIZES, 4)
    assert buckets.divide(SIZES, 1) == ONE
    assert buckets.divide(SIZES, 2) == TWO
    assert buckets.divide(SIZES, 3) == ((0, 1),)
    assert buckets.divide(SIZES, 99) == ()
    assert buckets.padding(SIZES, ((0, 1), (2, 3))) == (2 * 4 + 2 * 16) / 30
    assert buckets.padding(SIZES, ()) == 1
    assert buckets.choose(None, SIZES, 'cpu') == ()


@pytest.mark.parametrize(
    'shared',
    [((0, 4),), ((2, 1),), ((-1, 2),), ((0, 1), (1, 2)), ((2, 3), (0, 1))],
)
def test_buckets_lie_in_order_within_the_scales(shared):
    with pytest.raises(UserError, match='scales in order below 4'):
        program.compile_program(STAR.build(), VQ.build(), shared)


@pytest.mark.parametrize('wanted', [((0, 1, 2),), (3,), 3, (('a', 'b'),)])
def test_buckets_are_pairs(wanted):
    with pytest.raises(UserError, match='pairs of the first and the last scale'):
        buckets.choose(wanted, SIZES, 'cpu')


def test_a_raster_needs_no_buckets():
    with pytest.raises(UserError, match='share one body as they are'):
        Raster(2, 2).groups(shared=((0, 1),))


def test_a_user_chooses_buckets(tmp_path):
    """Here with rows that mix, so that each image is drawn alone."""
    load = functools.partial(star_jax.load, tiny.write_model(tmp_path / 'model'))
    alone, together = (
        load(cross_attention='released', buckets=shared) for shared in (None, [[0, 2]])
    )
    how = {'guidance': 2.0, 'top_k': 8, 'top_p': 0.0}
    np.testing.assert_array_equal(alone(['a', 'b'], **how), together(['a', 'b'], **how))
    with pytest.raises(UserError, match='scales in order below 3'):
        load(buckets=((0, 3),))


def test_pairs_are_given_as_words():
    given = arguments.parse(Sample, ['a', '--buckets', '0', '2', '5', '6'], 'sample')
    assert given.buckets == ((0, 2), (5, 6))
    assert arguments.parse(Sample, ['a'], 'sample').buckets is None


def test_a_sweep_over_buckets_has_each_choice():
    sides = ['--sides', *map(str, SIDES)]
    expanded = bench.expand([bench.sweep_of_buckets(SIZES)])
    jobs = [bench.read_sampling('', [*sides, *words])[1] for _, words in expanded]
    assert [job.buckets for job in jobs] == [((0, 0),), ((0, 1),), ONE]
