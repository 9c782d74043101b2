"""Do scales that share one body of the program give the same images as scales with their own?"""

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
from star_jax.core.cache import KV
from star_jax.core.codes import Index
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.schedule import Group, Pyramid, Raster, Step
from star_jax.core.settings import Settings, StableSettings
from star_jax.errors import UserError
from star_jax.families.star import Refinement, Star
from star_jax.families.var import Var
from star_jax.nn.positions import Learned
from star_jax.sampling import methods, program, stable
from star_jax.sampling.kv_pieces import KVPieces
from star_jax.sampling.sampler import GivenCodes, sample

SIDES = (1, 2, 3, 4)
SIZES = (1, 4, 9, 16)
ONE, TWO = ((0, 3),), ((0, 1), (2, 3))
STAR = dataclasses.replace(tiny.STAR.model, sides=SIDES)
SMALL = dataclasses.replace(STAR, depth=1, sides=(1, 2, 3))
VQ = tiny.TOKENIZER.model.at(STAR.schedule)
GUIDED = Settings(guidance=2.0, top_k=20, top_p=0.9)
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
    """The parameters of a model and of the tokenizer."""
    vq = VQ.at(model.schedule)
    random = {'model': model.abstract(), 'tokenizer': vq.abstract()}
    return {name: tiny.random_params(abstract) for name, abstract in random.items()}


def sampling(model, shared, dtype='float32', settings=GUIDED, trace=False) -> tuple:
    """A function that samples B images, and its arguments."""
    network, vq = model.build(dtype), VQ.at(model.schedule)
    run = functools.partial(sample, network, vq.build(), trace=trace, buckets=shared)
    inputs = {
        'keys_B': program.image_keys([3, 5]),
        'condition': (texts if isinstance(model, Star) else labels)(2 * B),
        'settings': program.step_settings(model, settings),
        'method': program.sampling_method(model, settings),
    }
    return lambda params, inputs: run(params, **inputs), (params_of(model), inputs)


@functools.cache
def sample_traced(shared):
    """B images and their trace."""
    run, args = sampling(SMALL, shared, trace=True)
    return jax.device_get(jax.jit(run)(*args))


@functools.cache
def compile_given(shared):
    """A jitted function of given codes and keys, and its other arguments."""
    run, (params, inputs) = sampling(SMALL, shared, trace=True)
    return jax.jit(run), params, inputs


def sample_given(shared, given: GivenCodes, seeds=(3, 5)):
    run, params, inputs = compile_given(shared)
    inputs = inputs | {'given': given, 'keys_B': program.image_keys(seeds)}
    return jax.device_get(run(params, inputs))


def test_images_do_not_depend_on_buckets():
    alone, together = sample_traced(()), sample_traced(((0, 1),))
    assert len({code for image in alone.codes for code in image}) > 4
    np.testing.assert_array_equal(together.codes, alone.codes)
    np.testing.assert_allclose(together.images, alone.images, atol=1e-5)
    np.testing.assert_array_equal(together.trace.start, alone.trace.start)
    steps = list(zip(together.trace.steps(), alone.trace.steps(), strict=True))
    assert len(steps) == 3
    for ours, theirs in steps:
        np.testing.assert_array_equal(ours.sampled, theirs.sampled)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), ours, theirs)
    assert [step.inputs is None for step, _ in steps] == [False, False, True]


def test_given_codes_are_fed_back_in_any_buckets():
    """Two of three steps are given; the codes that the method samples there stay in the trace."""
    free = sample_traced(())
    steps = {0: np.array([[3], [4]]), 1: np.array([[5, 6, 7, 8], [8, 7, 6, 5]])}
    given = GivenCodes.of_steps(steps, SMALL.schedule, Index(SMALL.codes))
    alone, together = (sample_given(shared, given) for shared in ((), ((0, 2),)))
    np.testing.assert_array_equal(together.codes, alone.codes)
    np.testing.assert_allclose(together.images, alone.images, atol=1e-5)
    np.testing.assert_array_equal(alone.codes[:, :5], np.concatenate([*steps.values()], 1))
    first, _, last = alone.trace.steps()
    np.testing.assert_array_equal(first.sampled, free.codes[:, :1])
    assert np.abs(last.method.logits - free.trace.steps()[2].method.logits).max() > 1e-3
    np.testing.assert_array_equal(last.sampled, alone.codes[:, 5:])


def test_codes_that_are_fed_back_give_the_image_they_came_from():
    """The keys differ, and no code is sampled."""
    free = sample_traced(())
    steps = dict(enumerate(np.split(free.codes, SMALL.schedule.offsets[1:-1], axis=1)))
    given = GivenCodes.of_steps(steps, SMALL.schedule, Index(SMALL.codes))
    again = sample_given((), given, seeds=(8, 9))
    np.testing.assert_array_equal(again.codes, free.codes)
    np.testing.assert_allclose(again.images, free.images, atol=1e-6)
    assert any(
        (ours.sampled != theirs.sampled).any()
        for ours, theirs in zip(again.trace.steps(), free.trace.steps(), strict=True)
    )
    for ours, theirs in zip(again.trace.steps(), free.trace.steps(), strict=True):
        np.testing.assert_allclose(ours.method.logits, theirs.method.logits, atol=1e-6)


@pytest.mark.parametrize('shared', [((0, 1),), ((1, 2),), ((0, 2),)], ids=str)
def test_every_choice_of_buckets_gives_the_same_codes(shared):
    """Padded to the last scale, the one before it ends behind the rows that are read again.

    A cache of these rows alone would move its keys over those of earlier scales.
    """
    model = dataclasses.replace(SMALL, sides=(3, 3, 4))
    assert model.schedule.sizes[-1] <= model.schedule.starts[-2]
    np.testing.assert_array_equal(codes_of(model, shared), codes_of(model, ()))


@functools.cache
def codes_of(model, shared) -> np.ndarray:
    run, args = sampling(model, shared)
    return jax.device_get(jax.jit(lambda *args: run(*args).codes)(*args))


def test_a_piece_refuses_a_write_behind_its_end():
    schedule, step = Pyramid.square((3, 3, 4)), Step(jnp.int32(1), 2, padded=True)

    def zeros(rows: int) -> KV:
        return KV(*[jnp.zeros((1, 1, 1, rows, 1))] * 2)

    first = KVPieces().finish(zeros(9))
    with pytest.raises(ValueError, match='9 rows cannot hold a step that ends with its row 25'):
        first.start(zeros(9)).write(zeros(16), schedule, step)
    assert first.start(zeros(25)).write(zeros(16), schedule, step).finished == first.finished
    with pytest.raises(ValueError, match='has no current piece'):
        first.write(zeros(16), schedule, step)


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
        {'settings': dataclasses.replace(GUIDED, smooth=True)},
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_codes_do_not_depend_on_buckets(case):
    model, shared, options = CASES[case]
    codes = []
    for choice in ((), shared):
        run, args = sampling(model, choice, **options)
        codes.append(jax.jit(lambda *args, run=run: run(*args).codes)(*args))
    np.testing.assert_array_equal(*codes)


def test_bucket_excludes_refined_scales():
    star = dataclasses.replace(SMALL, sides=(1, 2, 4), refinement=Refinement(first=2, blocks=1))
    settings = dataclasses.replace(GUIDED, stable=StableSettings(version='new'))
    run, args = sampling(star, ((0, 1),), settings=settings)
    assert jax.eval_shape(run, *args).codes.shape == (B, 21)
    run, args = sampling(star, ((0, 2),), settings=settings)
    with pytest.raises(UserError, match='leave the scales that it refines out'):
        jax.eval_shape(run, *args)


def test_noise_does_not_depend_on_padding():
    """Noise belongs to the token: it does not depend on how many tokens follow."""
    keys_B = program.image_keys([1, 2])
    logits_BLV = jnp.zeros((B, 16, 32))
    padded, alone = Index.sample(keys_B, logits_BLV), Index.sample(keys_B, logits_BLV[:, :9])
    np.testing.assert_array_equal(padded[:, :9], alone)
    padded, alone = (methods.gumbel_noise(keys_B, (size, 32)) for size in (16, 9))
    np.testing.assert_array_equal(padded[:, :9], alone)
    rank, step = stable.RandomRanking(), Step.at(2)
    padded, alone = (rank(keys_B, step, jnp.int32(0), size) for size in (16, 9))
    np.testing.assert_array_equal(padded[:, :9], alone)


def test_padded_maps_are_resized_like_single_ones():
    grids = ((1, 2), (3, 2), (4, 5))
    rng = np.random.default_rng(0)
    tokens, canvas = (jnp.float32(rng.normal(size=(2, *of, 3))) for of in ((20,), (6, 5)))

    @jax.jit
    def padded(index):
        small = padding.shrink(canvas, grids, index, resize.area_matrix)
        placed = padding.place(tokens, grids, index)
        large = padding.enlarge(placed, grids, index, (6, 5), resize.bicubic_matrix)
        return large, padding.take(small, grids, index)

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


def test_bucket_is_one_group_of_steps():
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
        run, args = sampling(SMALL, shared)
        bodies.append(str(jax.make_jaxpr(run)(*args)).count('top_k['))
    assert bodies == [3, 2, 1]


def test_divide_minimises_padding():
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
def test_buckets_out_of_order_are_refused(shared):
    with pytest.raises(UserError, match='scales in order below 4'):
        program.compile_program(STAR.build(), VQ.build(), shared)


@pytest.mark.parametrize('shared', [((0, 1, 2),), (3,), 3, (('a', 'b'),)])
def test_buckets_other_than_pairs_are_refused(shared):
    with pytest.raises(UserError, match='pairs of the first and the last scale'):
        buckets.choose(shared, SIZES, 'cpu')


def test_raster_refuses_buckets():
    with pytest.raises(UserError, match='share one body as they are'):
        Raster(2, 2).groups(shared=((0, 1),))


def test_pipeline_takes_buckets(tmp_path):
    """The rows of this model mix, so that each image is sampled alone."""
    load = functools.partial(star_jax.load, tiny.write_model(tmp_path / 'model'))
    alone, together = (
        load(cross_attention='released', buckets=shared) for shared in (None, [[0, 2]])
    )
    how = {'guidance': 2.0, 'top_k': 8, 'top_p': 0.0}
    np.testing.assert_array_equal(alone(['a', 'b'], **how), together(['a', 'b'], **how))
    with pytest.raises(UserError, match='scales in order below 3'):
        load(buckets=((0, 3),))


def test_command_line_takes_buckets_as_pairs():
    given = arguments.parse(Sample, ['a', '--buckets', '0', '2', '5', '6'], 'sample')
    assert given.buckets == ((0, 2), (5, 6))
    assert arguments.parse(Sample, ['a'], 'sample').buckets is None


def test_sweep_of_buckets_has_each_choice():
    sides = ['--sides', *map(str, SIDES)]
    expanded = bench.expand([bench.sweep_of_buckets(SIZES)])
    jobs = [bench.read_sampling('', [*sides, *words])[1] for _, words in expanded]
    assert [job.buckets for job in jobs] == [((0, 0),), ((0, 1),), ONE]
