"""Do sampling, training and every family see the same network?

The laws hold for any family, so each is stated once and run on tiny STARs with different parts and
on a raster with a prefix that exists in this file only.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from star_jax.checkpoint.weights import flatten
from star_jax.convert.entries import to_params, to_state
from star_jax.convert.star import star_entries, vq_entries
from star_jax.core import condition
from star_jax.core.codes import Index, Targets
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.filters import NucleusFilter
from star_jax.core.flops import count_flops
from star_jax.core.guidance import StepSettings, guide
from star_jax.core.schedule import Raster, square_grids
from star_jax.core.visibility import Visibility
from star_jax.families.star import Star
from star_jax.families.var import Var
from star_jax.losses import tokens
from star_jax.nn import layers
from star_jax.nn.attention import Cosine, SelfAttention
from star_jax.nn.bind import bind
from star_jax.nn.blocks import BlockParts, Mlp, drop_paths
from star_jax.nn.heads import Head
from star_jax.nn.positions import Learned, NoPositions, NormalisedRotary, RawRotary, SinCos
from star_jax.nn.transformer import Transformer
from star_jax.sampling import trunks
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.program import SamplingInputs, compile_program, image_keys
from star_jax.sampling.sampler import sample
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.optimizer import AdamW
from star_jax.training.program import Frozen, Recipe, StepInputs, TrainingProgram
from star_jax.training.schedules import LearningRate

B, T, E, V = 3, 4, 8, 24
DEPTH, WIDTH, HEADS = 2, 16, 2
# Two of the three equal sides share one scanned body, in which the step is traced.
SIDES = (1, 2, 2, 2)


class Pixels(nn.Module):
    """A toy tokenizer of a raster: the canvas is the array of codes, an image is their pattern."""

    schedule: Raster
    size: int

    @property
    def codes(self):
        return Index(self.size)

    def encode(self, images):
        levels = (images[..., 0] + 1) / 2 * (self.size - 1)
        return levels.round().astype(jnp.int32).reshape(len(images), -1)

    def embed(self, codes_BL):
        return codes_BL[..., None].astype(jnp.float32)

    def mix(self, weights_BLV):
        return weights_BLV @ jnp.arange(self.size, dtype=jnp.float32)[:, None]

    def blank(self, batch):
        return jnp.zeros((batch, self.schedule.length), jnp.int32)

    def advance(self, canvas, sampled, step):
        canvas = jax.lax.dynamic_update_slice_in_dim(canvas, sampled.codes_BL, step.index, axis=1)
        last = step.like + 1 == self.schedule.steps
        return canvas, None if last else sampled.codes_BL

    def inputs(self, codes_BL):
        return codes_BL[:, :-1]

    def training_targets(self, encoded, key):
        return Targets(self.inputs(encoded), encoded)

    def decode(self, canvas):
        image = canvas.reshape(-1, self.schedule.height, self.schedule.width, 1)
        return image.repeat(3, -1) / (self.size - 1) * 2 - 1


class Prefix(nn.Module):
    """The rows of a raster's first step, from one vector per image."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, condition_BE):
        project = layers.Linear(
            E, self.rows * self.width, (None, 'embed'), nn.initializers.normal()
        )
        return project(condition_BE).reshape(-1, self.rows, self.width)

    def text(self, condition_BE):
        return None, None

    def padding(self, condition_BE):
        return None

    def summary(self, condition_BE):
        return None

    def unprompted(self, condition_BE, empty_1E):
        return condition.repeat(empty_1E, like=condition_BE)


class PaddedPrefix(Prefix):
    """A prefix whose first two rows are padding in some images."""

    def padding(self, condition_BE):
        return jnp.where(condition_BE[:, 0] > 0, 2, 0).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Family:
    """A network, its tokenizer, parameters of both and conditions for 2 B rows."""

    model: Transformer
    tokenizer: nn.Module
    params: dict
    conditions: Any
    star: Star | None = None

    def rows(self, which) -> Any:
        """The conditions of some rows: B prompted ones come first, then B unprompted ones."""
        return jax.tree.map(lambda x: x[np.asarray(which)], self.conditions)


def fill(module: nn.Module, *args, scale: float = 0.25, **kwargs) -> dict:
    """Random parameters, all of them far from where they start: zeros would hide mistakes."""
    rng = np.random.default_rng(0)
    init = functools.partial(module.init, **kwargs)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), *args)).get('params', {})
    return jax.tree.map(lambda p: jnp.float32(rng.normal(0, scale, p.shape)), shapes)


def texts(rows: int) -> TextCondition:
    """Captions of different lengths; what stands behind a mask of 0 is never to be seen."""
    rng = np.random.default_rng(1)
    mask = np.arange(T) < np.resize([2, 4, 3], rows)[:, None]
    return TextCondition(
        rng.normal(size=(rows, T, E)).astype(np.float32),
        mask.astype(np.int32),
        rng.normal(size=(rows, E)).astype(np.float32),
    )


@functools.cache
def star_family(**options) -> Family:
    options = {'sides': SIDES, **options}
    star = Star(depth=DEPTH, width=WIDTH, heads=HEADS, codes=V, channels=3, text_width=E, **options)
    sizes = Autoencoder(width=2, multipliers=(1,), blocks=1, groups=1)
    vq = VQ(autoencoder=sizes, grids=star.schedule.grids, codes=V, channels=3, phis=2)
    model, tokenizer = star.build(), vq.build()
    images = jnp.zeros((1, *vq.resolution, 3))
    inputs = jnp.zeros((1, star.schedule.length - star.schedule.sizes[0], star.channels))
    params = {
        'model': fill(model, inputs, texts(1)),
        'tokenizer': fill(tokenizer, images),
    }
    return Family(model, tokenizer, params, texts(2 * B), star)


@functools.cache
def var_family(**options) -> Family:
    var = Var(
        depth=DEPTH,
        width=WIDTH,
        heads=HEADS,
        codes=V,
        channels=3,
        sides=SIDES,
        classes=7,
        **options,
    )
    tokenizer = star_family().tokenizer
    inputs = jnp.zeros((1, var.schedule.length - 1, var.channels))
    labels = LabelCondition(ids_B=np.array([0, 3, 6, *[var.classes] * B], np.int32))
    model = fill(var.build(), inputs, jax.tree.map(lambda x: x[:1], labels))
    params = {'model': model, 'tokenizer': star_family().params['tokenizer']}
    return Family(var.build(), tokenizer, params, labels)


@functools.cache
def raster_family(prefix: type[Prefix] = Prefix, **attention: Any) -> Family:
    """A raster after `prefix`, with these fields of self-attention."""
    schedule = Raster(2, 3, prefix=3)
    init = nn.initializers.normal(0.02)
    scores = functools.partial(Cosine, HEADS)
    model = Transformer(
        schedule=schedule,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        starter=prefix(schedule.prefix, WIDTH),
        embedder=layers.Table(V, WIDTH, ('codes', 'embed'), init),
        positions=Learned(),
        block=BlockParts(
            self_attention=functools.partial(
                SelfAttention,
                width=WIDTH,
                heads=HEADS,
                scores=scores,
                kernel_init=init,
                out_init=init,
                **attention,
            ),
            mlp=functools.partial(Mlp, WIDTH, 2 * WIDTH, init, init),
        ),
        to_logits=Head(WIDTH, V, init, layers.LayerNorm()),
        init_rows=init,
        level_embedding=False,
    )
    inputs = jnp.zeros((1, schedule.length - 1), jnp.int32)
    conditions = np.random.default_rng(1).normal(size=(2 * B, E)).astype(np.float32)
    params = {'model': fill(model, inputs, conditions[:1], scale=0.5), 'tokenizer': {}}
    return Family(model, Pixels(schedule, V), params, conditions)


# Every option differs from the published one somewhere, every kind of positions occurs.
FAMILIES: dict[str, Callable[[], Family]] = {
    'star': star_family,
    'learned_adaln_plain_scores': functools.partial(
        star_family,
        sides=(1, 2, 3),
        positions=Learned(),
        shared_adaln=True,
        cross_attention=False,
        qk_norm=False,
    ),
    'raw_adaln_without_level': functools.partial(
        star_family,
        sides=(2, 2, 2, 2),
        positions=RawRotary(theta=100.0),
        shared_adaln=True,
        level_embedding=False,
        released_cross_attention=True,
    ),
    'sin_cos_without_norm': functools.partial(
        star_family, sides=(1, 3), positions=SinCos(), level_embedding=False, logit_norm=False
    ),
    'var': var_family,
    'raster': raster_family,
    # Both query heads read one key head.
    'padded_raster_with_shared_keys': functools.partial(
        raster_family, PaddedPrefix, kv_heads=1, biases=()
    ),
}


@pytest.fixture(scope='module', params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]()


@pytest.fixture(scope='module')
def star() -> Family:
    return star_family()


@functools.cache
def sampling(model: Transformer, tokenizer: nn.Module):
    """The whole sampler as one program, and how often it was traced."""
    count = []

    def run(params, **inputs):
        count.append(None)
        return sample(model, tokenizer, params, trace=True, **inputs)

    return jax.jit(run), count


def keys(*seeds) -> jax.Array:
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def filtered(top_p=0.9) -> FilteredSampling:
    return FilteredSampling(NucleusFilter(top_k=20, top_p=top_p))


def settings_of(family: Family, guidance: float, temperature: float = 1.0) -> StepSettings:
    """Guidance that falls from step to step, and temperature that rises."""
    return StepSettings(
        guidance=np.float32(guidance) * falling(family),
        temperature=np.float32(temperature) / falling(family),
    )


def sample_rows(
    family: Family,
    which=range(2 * B),
    seeds=range(B),
    guidance=2.0,
    temperature=1.0,
    top_p=0.9,
):
    """Images of some rows, under the settings of `settings_of`."""
    run, _ = sampling(family.model, family.tokenizer)
    sampled = run(
        family.params,
        keys_B=keys(*seeds),
        condition=family.rows(which),
        settings=settings_of(family, guidance, temperature),
        method=filtered(top_p),
    )
    return jax.device_get(sampled)


def falling(family: Family) -> np.ndarray:
    return np.linspace(1, 0.5, family.model.schedule.steps, dtype=np.float32)


@functools.cache
def forcing(model: Transformer, tokenizer: nn.Module):
    """Teacher-forced logits of every token: inputs from codes, all rows at once."""

    @jax.jit
    def run(params, codes_BL, condition):
        inputs = bind(tokenizer, params['tokenizer']).inputs(codes_BL)
        logits = model.apply({'params': params['model']}, inputs, condition)
        return logits[:, model.schedule.sampled_rows], inputs

    return run


def forced(family: Family, codes_BL, condition):
    run = forcing(family.model, family.tokenizer)
    return jax.device_get(run(family.params, codes_BL, condition))


def guided_logits(sampled) -> np.ndarray:
    """[B, L, V] of all steps."""
    return np.concatenate([step.method.guided for step in sampled.trace.steps()], axis=1)


def test_families_cover_static_and_traced_steps():
    counts = {
        name: [g.count for g in make().model.schedule.groups()] for name, make in FAMILIES.items()
    }
    assert counts['star'] == [1, 2, 1]
    assert counts['raw_adaln_without_level'] == [3, 1]
    assert counts['raster'] == [1, 4, 1]


def test_sampling_computes_the_logits_of_training(family):
    """Step by step through the cache or all at once through the mask, known or traced steps."""
    prompted, unprompted = family.rows(range(B)), family.rows(range(B, 2 * B))
    free, guided = sample_rows(family, guidance=0.0), sample_rows(family, guidance=1.0)
    logits = guided_logits(free)
    expected, _ = forced(family, free.codes, prompted)
    assert expected.std() > 0.3  # otherwise agreement would mean little
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    both = np.concatenate(
        [forced(family, guided.codes, rows)[0] for rows in (prompted, unprompted)]
    )
    if family.star and family.star.released_cross_attention:
        return  # its unprompted rows see the first prompted one, and only in a batch with it
    weights = falling(family)[family.model.schedule.step_of_token][:, None]
    np.testing.assert_allclose(guided_logits(guided), guide(both, B, weights), atol=6e-5)
    rows = np.concatenate([step.method.logits for step in guided.trace.steps()], axis=1)
    np.testing.assert_allclose(rows, both, atol=2e-5)


def test_inputs_of_training_are_folded_advances(family):
    sampled = sample_rows(family)
    _, inputs = forced(family, sampled.codes, family.rows(range(B)))
    steps = sampled.trace.steps()
    stepwise = np.concatenate([step.inputs for step in steps[:-1]], axis=1)
    np.testing.assert_allclose(stepwise, inputs, atol=2e-5)
    assert len(steps) == family.model.schedule.steps and steps[-1].inputs is None


def test_codes_are_those_that_the_logits_give(family):
    """Temperature of the step, filter, key folded with the step and order of codes, by hand."""
    sampled = sample_rows(family)
    schedule = family.model.schedule

    @jax.jit
    def choose(key, logits, temperature):
        kept = filtered().filter(logits, temperature)
        return Index(V).sample(key[None], kept[None])[0], jax.nn.softmax(kept)

    temperatures = settings_of(family, 2.0).temperature
    for step, trace in enumerate(sampled.trace.steps()):
        first, end = schedule.offsets[step : step + 2]
        key = jax.random.fold_in(jax.random.key(1), step)
        codes, probs = choose(key, trace.method.guided[1], temperatures[step])
        np.testing.assert_array_equal(sampled.codes[1, first:end], codes)
        np.testing.assert_allclose(trace.method.probs[1], probs, atol=1e-6)


@pytest.mark.parametrize('name', ['star', 'raster'])
def test_trace_holds_start_rows_and_the_final_cache(name):
    """The keys and values of all rows, prompted and unprompted, are those of teacher forcing."""
    family = FAMILIES[name]()
    schedule, sampled = family.model.schedule, sample_rows(family)

    @jax.jit
    def run(params, codes_BL, condition):
        inputs = bind(family.tokenizer, params['tokenizer']).inputs(codes_BL)
        network = bind(family.model, params['model'])
        start = network.start(condition)
        later = np.arange(schedule.starts[1], schedule.starts[-1])
        _, kv = network.trunk(
            jnp.concatenate([start, network.embed(inputs, later)], axis=1),
            np.arange(schedule.starts[-1]),
            text_kv=network.text_kv(condition),
            condition=condition,
            visibility=Visibility(bounds=schedule.visibility()),
        )
        return start, kv

    codes = np.concatenate([sampled.codes] * 2)
    start, kv = run(family.params, codes, family.conditions)
    np.testing.assert_allclose(sampled.trace.start, start, atol=1e-6)
    for cached, forced_ in zip(sampled.trace.cache, kv, strict=True):
        np.testing.assert_allclose(cached, forced_, atol=2e-5)


def test_sampling_does_not_depend_on_the_blocks_of_keys_and_values(monkeypatch):
    """Every scale in a block of its own, or all small ones in one."""
    family, joined = star_family(), sample_rows(star_family())
    monkeypatch.setattr(trunks, 'LEAST_ROWS', 1)
    apart = jax.jit(functools.partial(sample, family.model, family.tokenizer, trace=True))(
        family.params,
        keys_B=keys(*range(B)),
        condition=family.conditions,
        settings=settings_of(family, 2.0),
        method=filtered(),
    )
    np.testing.assert_array_equal(apart.codes, joined.codes)
    for ours, theirs in zip(apart.trace.cache, joined.trace.cache, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize('name', ['star', 'raster'])
def test_an_image_alone_is_the_image_in_a_batch(name):
    family = FAMILIES[name]()
    together = sample_rows(family)
    for image in range(B):
        alone = sample_rows(family, which=[image, B + image], seeds=[image])
        np.testing.assert_array_equal(alone.codes[0], together.codes[image])
        np.testing.assert_allclose(alone.images[0], together.images[image], atol=1e-5)


def test_an_image_depends_on_its_own_key_only(family):
    first, second = sample_rows(family, seeds=[0, 1, 2]), sample_rows(family, seeds=[0, 7, 2])
    np.testing.assert_array_equal(first.codes[::2], second.codes[::2])
    assert (first.codes[1] != second.codes[1]).any()


def test_no_guidance_needs_no_unprompted_rows():
    family = FAMILIES['sin_cos_without_norm']()
    both, half = (sample_rows(family, which=range(n), guidance=0.0) for n in (2 * B, B))
    np.testing.assert_array_equal(both.codes, half.codes)
    np.testing.assert_allclose(both.images, half.images, atol=1e-5)
    guided = sample_rows(family, guidance=2.0)
    assert (guided.codes != both.codes).any()


def test_numbers_do_not_compile_the_sampler_again(star):
    _, count = sampling(star.model, star.tokenizer)
    sample_rows(star)
    before = len(count)
    codes = [
        sample_rows(star, guidance=0.5).codes,
        sample_rows(star, top_p=0.3).codes,
        sample_rows(star, temperature=3.0).codes,
    ]
    assert len(count) == before
    assert len({c.tobytes() for c in codes}) == 3


def inner(jaxpr) -> list:
    """The programs inside the equations of a program."""
    values = jax.tree.leaves(
        [list(eqn.params.values()) for eqn in jaxpr.eqns], is_leaf=lambda v: hasattr(v, 'eqns')
    )
    return [getattr(v, 'jaxpr', v) for v in values if hasattr(v, 'eqns')]


def equations(jaxpr) -> list:
    """The equations of a program and of all programs inside it."""
    return [*jaxpr.eqns, *(eqn for child in inner(jaxpr) for eqn in equations(child))]


@pytest.mark.parametrize('name', ['star', 'raster'])
def test_the_sampler_is_one_program_that_writes_keys_and_values_once(name):
    family = FAMILIES[name]()
    schedule = family.model.schedule
    run = functools.partial(sample, family.model, family.tokenizer)
    program = jax.make_jaxpr(run)(
        family.params,
        keys_B=keys(0, 1, 2),
        condition=family.conditions,
        settings=settings_of(family, 0.0),
        method=filtered(),
    )
    found = equations(program.jaxpr)
    assert not [eqn for eqn in found if 'callback' in eqn.primitive.name]
    of_layers = (DEPTH, 2 * B, HEADS)

    def rows(eqn) -> list[int]:
        """Rows of the keys and values of all layers among the results."""
        shapes = [v.aval.shape for v in eqn.outvars]
        return [shape[3] for shape in shapes if shape[:3] == of_layers and len(shape) == 5]

    updates = [eqn for eqn in found if eqn.primitive.name == 'dynamic_update_slice' and rows(eqn)]
    # A step that has its body alone writes nothing twice; a shared one updates keys and values.
    assert len(updates) == 2 * sum(group.count > 1 for group in schedule.groups())
    over_layers = [
        eqn
        for eqn in found
        if eqn.primitive.name == 'scan'
        and not [e for e in equations(eqn.params['jaxpr'].jaxpr) if e.primitive.name == 'scan']
    ]
    assert len(over_layers) >= len(schedule.groups())
    for eqn in over_layers:  # layers return what is new; none carries or returns what was before
        assert set(rows(eqn)) <= set(schedule.reads)


def changed(family: Family, row: int, **edits) -> np.ndarray:
    """Which rows' teacher-forced logits move when the text of one row changes."""
    prompted = family.rows(range(B))
    codes = np.random.default_rng(5).integers(0, V, (B, family.model.schedule.length))
    other = jax.tree.map(lambda x, y: y.astype(x.dtype), prompted, prompted.replace(**edits))
    before, after = (forced(family, codes, rows)[0] for rows in (prompted, other))
    moved = np.abs(before - after).max((1, 2))
    assert ((moved == 0) | (moved > 1e-3)).all()
    return moved > 0


def test_image_depends_on_its_own_text(star):
    states = star.conditions.states_BTE[:B]
    moved = changed(star, 1, states_BTE=states * [[[1]], [[-1]], [[1]]])
    assert moved.tolist() == [False, True, False]


def test_released_images_depend_on_the_first_text():
    family = FAMILIES['raw_adaln_without_level']()
    states = family.conditions.states_BTE[:B]
    assert not changed(family, 1, states_BTE=states * [[[1]], [[-1]], [[-1]]]).any()
    assert changed(family, 0, states_BTE=states * [[[-1]], [[1]], [[1]]]).all()


def test_group_of_released_images_depends_on_its_first_text():
    family = FAMILIES['raw_adaln_without_level']()
    codes = np.random.default_rng(5).integers(0, V, (B, family.model.schedule.length))
    with_batch_groups = dataclasses.replace(family, model=family.model.with_batch_groups(B))
    together = forced(with_batch_groups, codes, family.rows(range(B)))[0]
    alone = [forced(family, codes[b : b + 1], family.rows([b]))[0] for b in range(B)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_a_released_image_is_the_same_alone_and_in_a_batch():
    family = FAMILIES['raw_adaln_without_level']()
    run = compile_program(family.model, family.tokenizer)
    inputs = SamplingInputs(
        keys_B=image_keys(range(B)),
        prompted=family.rows(range(B)),
        empty=family.rows([B]),
        settings=settings_of(family, 2.0),
        method=filtered(),
    )
    together = run(family.params, inputs)
    for b in range(B):
        single = inputs.replace(keys_B=inputs.keys_B[b : b + 1], prompted=family.rows([b]))
        np.testing.assert_array_equal(run(family.params, single)[0], together[b])


def test_padding_of_text_does_not_matter(star):
    prompted = star.rows(range(B))
    hidden = np.where(prompted.mask_BT[..., None] > 0, prompted.states_BTE, 1e3)
    assert not changed(star, 0, states_BTE=hidden).any()
    # Nor does its length.
    longer = prompted.replace(
        states_BTE=np.pad(prompted.states_BTE, ((0, 0), (0, 3), (0, 0)), constant_values=9.0),
        mask_BT=np.pad(prompted.mask_BT, ((0, 0), (0, 3))),
    )
    codes = np.zeros((B, star.model.schedule.length), np.int32)
    short, long = (forced(star, codes, rows)[0] for rows in (prompted, longer))
    np.testing.assert_allclose(short, long, atol=1e-5)


def test_half_precision_ends_at_the_logits():
    """Activations and cache are bfloat16; logits, canvas and images float32."""
    full = FAMILIES['raw_adaln_without_level']()
    half = dataclasses.replace(full, model=full.star.build(dtype='bfloat16'))
    sampled = sample_rows(half, guidance=0.0)
    assert sampled.images.dtype == jnp.float32
    assert {step.canvas.dtype for step in sampled.trace.steps()} == {jnp.dtype('float32')}
    logits = guided_logits(sampled)
    assert logits.dtype == np.float32
    prompted = half.rows(range(B))
    coarse, fine = (forced(one, sampled.codes, prompted)[0] for one in (half, full))
    assert coarse.dtype == jnp.float32
    spread = fine.std()
    assert 0 < np.abs(coarse - fine).mean() < 0.05 * spread
    assert np.abs(logits - fine).mean() < 0.05 * spread


def test_recomputing_and_unrolling_layers_changes_nothing():
    family = FAMILIES['raw_adaln_without_level']()
    schedule, condition = family.model.schedule, family.rows(range(B))
    codes = np.random.default_rng(5).integers(0, V, (B, schedule.length))
    inputs = forced(family, codes, condition)[1]

    def loss(params, model):
        return Index(V).nll(model.apply({'params': params}, inputs, condition), codes).mean()

    remats = [family.star.build(remat=remat) for remat in ('full', 'dots')]
    others = (*remats, family.star.build(unroll=DEPTH))
    learn = [jax.value_and_grad(functools.partial(loss, model=m)) for m in (family.model, *others)]
    values = [jax.device_get(jax.jit(run)(family.params['model'])) for run in learn]
    for other in values[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), values[0], other)
    gradients = flatten(values[0][1])
    assert all(np.isfinite(leaf).all() for leaf in gradients.values())
    # The last scales, gates and biases included: everything takes part.
    assert [name for name, leaf in gradients.items() if not np.abs(leaf).any()] == []
    programs = [jax.make_jaxpr(run)(family.params['model']).jaxpr for run in learn[:3]]
    names = {eqn.primitive.name for eqn in equations(programs[1])}
    assert names & {'remat', 'remat2', 'checkpoint'}
    # `full` computes products with weights again, `dots` only those of attention.
    plain, full, dots = (sum(map(is_product_with_weights, equations(p))) for p in programs)
    assert dots == plain < full
    plain, full, dots, _ = (count_flops(run, family.params['model']) for run in learn)
    assert plain < dots < full


def is_product_with_weights(equation) -> bool:
    if equation.primitive.name != 'dot_general':
        return False
    _, batch_dimensions = equation.params['dimension_numbers']
    return not any(batch_dimensions)


def test_dropped_paths_are_rare_above_and_keep_the_mean():
    paths = np.asarray(drop_paths(jax.random.key(0), 4, 20000, 0.3))
    assert paths.shape == (4, 2, 20000)
    for layer, rate in enumerate((0.0, 0.1, 0.2, 0.3)):
        for branch in paths[layer]:
            np.testing.assert_allclose(np.unique(branch)[-1], 1 / (1 - rate), rtol=1e-6)
            assert set(np.unique(branch)[:-1]) == ({0.0} if rate else set())
            np.testing.assert_allclose((branch == 0).mean(), rate, atol=0.015)
            np.testing.assert_allclose(branch.mean(), 1, atol=0.02)
    both = (paths[3] == 0).all(0).mean()  # the two branches are dropped independently
    np.testing.assert_allclose(both, 0.09, atol=0.01)
    assert (drop_paths(jax.random.key(0), 3, 5, 0.0) == 1).all()
    assert (drop_paths(jax.random.key(0), 1, 5, 0.5) == 1).all()


def test_a_path_of_zero_removes_its_branch_of_its_image():
    family = FAMILIES['learned_adaln_plain_scores']()
    model, params = family.model, family.params['model']
    condition = family.rows(range(B))
    codes = np.random.default_rng(5).integers(0, V, (B, model.schedule.length))
    logits, inputs = forced(family, codes, condition)

    @jax.jit
    def run(params, paths):
        network = bind(model, params)
        features = network.features(inputs, condition, paths=paths)
        return features, network.head(features, condition)

    ones = np.ones((DEPTH, 2, B), np.float32)
    np.testing.assert_allclose(run(params, ones)[1], logits, atol=1e-5)
    for layer, branch, last in ((0, 0, 'attn/proj'), (1, 1, 'ffn/fc2')):
        paths = ones.copy()
        paths[layer, branch, 1] = 0
        room, name = last.split('/')
        silent = jax.tree.map(lambda p, layer=layer: p.at[layer].set(0), params['blocks'])
        blocks = params['blocks'] | {room: params['blocks'][room] | {name: silent[room][name]}}
        without, whole = run(params, paths)[0], run(params, ones)[0]
        removed = run(params | {'blocks': blocks}, ones)[0]
        np.testing.assert_allclose(without[1], removed[1], atol=1e-5)
        np.testing.assert_allclose(without[::2], whole[::2], atol=1e-5)
        assert np.abs(without[1] - whole[1]).max() > 1e-2
    doubled = run(params, 0 * ones)[0]
    rows = bind(model, params).start(condition)
    np.testing.assert_allclose(doubled[:, :1], rows, atol=1e-5)


def test_dropped_tokens_do_not_affect_the_others(star):
    """Kept rows are computed as if dropped rows did not exist (STAR specification 4.1)."""
    model, params, condition = star.model, star.params['model'], star.rows(range(B))
    last = model.schedule.starts[-2]
    kept = np.r_[0:last, last + 1, last + 3]
    codes = np.random.default_rng(5).integers(0, V, (B, model.schedule.length))
    logits, inputs = forced(star, codes, condition)

    @jax.jit
    def run(inputs):
        network = bind(model, params)
        return network.head(network.features(inputs, condition, kept), condition)

    found = run(inputs)
    np.testing.assert_allclose(found[:, :last], logits[:, :last], atol=1e-5)
    assert np.abs(found[:, last:] - logits[:, kept[last:]]).max() > 1e-3
    first = model.schedule.starts[1]
    other = inputs.copy()
    other[:, [last - first, last + 2 - first]] = 9
    np.testing.assert_array_equal(run(other), found)


OPTIONS = [
    {},
    {'shared_adaln': True, 'level_embedding': False, 'positions': Learned()},
    {'qk_norm': False, 'logit_norm': False, 'positions': SinCos()},
    {'cross_attention': False, 'level_embedding': False, 'positions': NoPositions()},
    {'positions': NormalisedRotary(theta=100.0, extent=32.0), 'released_cross_attention': True},
]
TOKENIZERS = [
    VQ(autoencoder=Autoencoder(width=4, groups=2), grids=square_grids((1, 2)), codes=V, channels=3),
    VQ(
        autoencoder=Autoencoder(width=4, multipliers=(1, 2), blocks=1, groups=4, stem=4),
        grids=square_grids((1, 2)),
        codes=V,
        channels=3,
        phis=1,
        normalised=True,
    ),
]


def abstract_star(options: dict) -> tuple[Star, Any]:
    star = Star(
        depth=DEPTH,
        width=WIDTH,
        heads=HEADS,
        sides=(1, 2),
        codes=V,
        channels=3,
        text_width=E,
        **options,
    )
    inputs = jnp.zeros((1, 4, 3))
    return star, jax.eval_shape(star.build().init, jax.random.key(0), inputs, texts(1))['params']


def abstract_vq(vq: VQ) -> Any:
    images = jnp.zeros((1, *vq.resolution, 3))
    return jax.eval_shape(vq.build().init, jax.random.key(0), images)['params']


@pytest.mark.parametrize(
    'boxed',
    [
        *(
            pytest.param(lambda o=o: abstract_star(o)[1], id=f'star{i}')
            for i, o in enumerate(OPTIONS)
        ),
        *(
            pytest.param(lambda vq=vq: abstract_vq(vq), id=f'vq{i}')
            for i, vq in enumerate(TOKENIZERS)
        ),
    ],
)
def test_every_parameter_names_all_its_axes(boxed):
    leaves = jax.tree_util.tree_leaves_with_path(boxed(), is_leaf=lambda x: hasattr(x, 'names'))
    assert leaves
    known = {'layers', 'embed', 'heads', 'mlp', 'vocab', 'codes', 'channels', None}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), name
        assert len(leaf.names) == leaf.value.ndim, name
        assert set(leaf.names) <= known, name
        assert (leaf.names[0] == 'layers') == ("['blocks']" in name), name


def test_conversion_tables_name_every_parameter_once():
    trees = [(star_entries(star), nn.unbox(boxed)) for star, boxed in map(abstract_star, OPTIONS)]
    trees += [(vq_entries(vq, ()), nn.unbox(abstract_vq(vq))) for vq in TOKENIZERS]
    rng = np.random.default_rng(0)
    for entries, shapes in trees:
        params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
        state = to_state(entries, params)
        assert len(state) == len(entries)
        back = to_params(entries, state)
        assert (back.missing, back.unknown) == ((), ())
        jax.tree.map(np.testing.assert_array_equal, back.params, params)


def test_scaled_loss_scales_gradients_but_not_the_recorded_loss():
    family = raster_family()
    codes = jnp.zeros((B, family.model.schedule.length), jnp.int32)
    inputs = StepInputs(encoded=codes, prompts=family.rows(range(B)))
    frozen = Frozen(tokenizer={}, empty=family.rows([B]))
    metrics = {}
    for scale in (1.0, 3.0):
        program = training_program(family, 10, Recipe(loss_scale=scale))
        state = program.start(jax.tree.map(jnp.array, family.params['model']))
        train = jax.jit(program.train)
        metrics[scale] = jax.device_get(train(state, frozen, (inputs,), jax.random.key(0)[None])[1])
    assert metrics[3.0]['loss'] == pytest.approx(metrics[1.0]['loss'])
    assert metrics[3.0]['gradient_norm'] == pytest.approx(
        3 * metrics[1.0]['gradient_norm'], rel=1e-5
    )


def training_program(family: Family, steps: int, recipe: Recipe, **rates) -> TrainingProgram:
    optimizer = AdamW(**rates).build(steps)
    return TrainingProgram(
        network=family.model, tokenizer=family.tokenizer, optimizer=optimizer, recipe=recipe
    )


def test_raster_is_trained_on_what_the_sampler_generates():
    """A raster trains with the step of a pyramid: afterwards condition b generates image b."""
    family = raster_family()
    model, tokenizer = family.model, family.tokenizer
    grid = np.random.default_rng(3).integers(0, V, (B, 2, 3, 1))
    images = np.rint(grid.repeat(3, -1) / (V - 1) * 255).astype(np.uint8)
    prompted, unprompted = family.rows(range(B)), family.rows([B])
    inputs = StepInputs(encoded=tokens.encode(tokenizer, {}, images), prompts=prompted)
    frozen = Frozen(tokenizer={}, empty=unprompted)
    recipe = Recipe(condition_drop=0.1, drop_path=0.1, ema=0.5)
    rates = LearningRate(peak=1e-2, warmup_steps=1)
    program = training_program(family, 200, recipe, learning_rate=rates)
    state, train = (
        program.start(jax.tree.map(jnp.array, family.params['model'])),
        jax.jit(program.train),
    )
    losses = []
    for step in range(120):
        key = jax.random.fold_in(jax.random.key(1), step)
        state, metrics = train(state, frozen, (inputs,), key[None])
        losses.append(float(metrics['loss']))
    assert losses[-1] < losses[0] / 4
    run, _ = sampling(model, tokenizer)
    sampled = run(
        {'model': state.ema, 'tokenizer': {}},
        keys_B=keys(*range(B)),
        condition=prompted,
        settings=settings_of(family, 0.0),
        method=FilteredSampling(NucleusFilter(top_k=1), greedy=True),
    )
    np.testing.assert_array_equal(sampled.codes, grid.reshape(B, -1))
