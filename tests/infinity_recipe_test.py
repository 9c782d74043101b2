"""Does training follow the published recipe of Infinity (Infinity specification 6)?"""

import collections
import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from star_jax.convert.entries import to_state
from star_jax.convert.infinity import infinity_entries
from star_jax.core.codes import Bits, Targets
from star_jax.core.condition import TextCondition
from star_jax.data import pipeline
from star_jax.data.caption_choice import AnyCaption, ShortOrLong, WholeOrFirstSentence
from star_jax.errors import UserError
from star_jax.families.fit import check_tokenizer
from star_jax.families.infinity import Infinity
from star_jax.families.star import Star
from star_jax.losses import tokens
from star_jax.plan import workload
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training import summary
from star_jax.training.build import init_params
from star_jax.training.optimizer import AdamW, decayed
from star_jax.training.run import Run
from star_jax.training.schedules import LearningRate, weight_decay_at

TABLES = Path(__file__).parents[1] / 'docs' / 'specification' / 'tables'
CHUNKS = 2
PUBLISHED = Infinity(depth=2, width=64, heads=4, text_width=256, text_rows=64)
MODELS = {
    'published (shared adaLN)': PUBLISHED,
    'separate adaLN, ca_gamma, qk without cosine': dataclasses.replace(
        PUBLISHED, shared_adaln=False, cross_scale=1.0, qk_norm=False
    ),
}


def table_of(name: str):
    return json.loads((TABLES / f'infinity_{name}.json').read_text())


def published_state(model: Infinity, params) -> dict[str, np.ndarray]:
    return to_state(infinity_entries(model, CHUNKS), params)


@pytest.mark.parametrize('name', MODELS)
def test_decayed_parameters_are_the_published_group(name):
    model, listed = MODELS[name], table_of('optimizer_groups_and_init')['models'][name]
    boxed = model.abstract()
    groups = jax.tree.map(np.broadcast_to, decayed(boxed), jax.tree.map(lambda x: x.shape, boxed))
    state = published_state(model, meta.unbox(groups))
    assert {n for n, group in state.items() if group.all()} == set(listed['decayed'])
    assert {n for n, group in state.items() if not group.any()} == set(listed['not_decayed'])


@pytest.mark.parametrize('name', MODELS)
def test_fresh_weights_have_the_published_factors(name):
    model, listed = MODELS[name], table_of('optimizer_groups_and_init')['models'][name]
    params = init_params(Run(model=model), jax.random.key(0))
    factors = listed['special_init_factors_when_every_entry_was_1']
    plain = (3 * model.width) ** -0.5
    for tensor, array in published_state(model, meta.unbox(params)).items():
        factor = factors.get(tensor, 1.0)
        if tensor.endswith('bias'):
            assert not array.any(), tensor
            continue
        std = plain
        if tensor.endswith('ada_gss'):
            std = model.width**-0.5
        elif tensor == 'cfg_uncond':  # cut off at 2, which is 1.67 of its deviations
            std = 1.2 * 0.7956 / model.text_width**0.5
        elif tensor.endswith(('norm.weight', 'ca_gamma')):
            assert (array == 1).all(), tensor
            continue
        elif tensor.endswith('scale_mul_1H11'):
            np.testing.assert_allclose(array, math.log(4), rtol=1e-6)
            continue
        slots = np.atleast_1d(factor)
        six = array.reshape(len(slots), -1) if len(slots) > 1 else array.reshape(1, -1)
        error = 5 / np.sqrt(2 * six.shape[1])  # standard errors of a deviation
        np.testing.assert_allclose(six.std(axis=1), std * slots, rtol=error, err_msg=tensor)


def test_learning_rates_and_decays_are_those_of_the_table():
    schedules = table_of('lr_schedule')
    assert len(schedules) == 7
    for listed in schedules:
        rate = LearningRate(
            peak=listed['peak_lr'],
            warmup_steps=int(listed['warmup_its']),
            start=listed['wp0'],
            end=listed['wpe'],
            shape=listed['schedule'],
        )
        steps, rates, decays, undecayed = np.asarray(listed['rows']).T
        total = listed['max_it']
        found = rate.at(steps.astype(int), total)
        np.testing.assert_allclose(found, rates, atol=1e-6 * rate.peak)
        found = weight_decay_at(steps.astype(int), total, listed['wd'], listed['wd_end'])
        np.testing.assert_allclose(found, decays, atol=1e-7)
        assert not undecayed.any()


def test_the_learning_rate_is_in_proportion_to_the_images_of_an_update():
    rate = LearningRate(peak=6e-3, warmup_steps=0, end=1.0, per_images=256)
    optimizer = AdamW(learning_rate=rate, accumulate=2).for_batch(64)
    assert float(optimizer.learning_rate.at(0, 10)) == pytest.approx(3e-3)
    plain = AdamW()
    assert plain.for_batch(64) == plain


CAPTIONS = ('A red cat. It sleeps. Night --ar 2:1', 'a cat and a dog', 'a cat --v 5')


def test_captions_are_the_short_one_or_leading_sentences():
    choice, rng = ShortOrLong(), np.random.default_rng(0)
    counts = collections.Counter(choice.choose(CAPTIONS, rng) for _ in range(3000))
    expected = {
        'a cat': 1 / 2,
        'A red cat.': 1 / 6,
        'A red cat. It sleeps.': 1 / 6,
        'A red cat. It sleeps. Night.': 1 / 6,
    }
    assert set(counts) == set(expected) == set(choice.texts(CAPTIONS))
    for text, share in expected.items():
        assert counts[text] / 3000 == pytest.approx(share, abs=0.03)
    assert choice.texts(CAPTIONS)[0] == 'A red cat. It sleeps. Night.'


def test_captions_are_whole_or_end_before_the_first_full_stop():
    choice, rng = WholeOrFirstSentence(first=0.3), np.random.default_rng(0)
    counts = collections.Counter(choice.choose(CAPTIONS, rng) for _ in range(1000))
    assert choice.texts(CAPTIONS) == (CAPTIONS[0], 'A red cat')
    assert set(counts) == set(choice.texts(CAPTIONS))
    assert counts['A red cat'] / 1000 == pytest.approx(0.3, abs=0.05)
    assert choice.texts(('a cat',)) == ('a cat',) and choice.texts(('. a cat',)) == ('. a cat',)
    with pytest.raises(ValueError, match='first is a probability'):
        WholeOrFirstSentence(first=2)


@pytest.mark.parametrize('caption', ['--', '...', '', 'one. '])
def test_captions_without_sentences_stay(caption):
    choice = ShortOrLong(short=0)
    assert choice.texts((caption,)) == (choice.choose((caption,), np.random.default_rng(0)),)
    assert bool(choice.texts((caption,))[0]) == bool(caption)


def test_any_caption_is_each_of_them():
    rng = np.random.default_rng(0)
    assert {AnyCaption().choose(CAPTIONS, rng) for _ in range(50)} == set(CAPTIONS)
    with pytest.raises(ValueError, match='short is a probability'):
        ShortOrLong(short=2)


class Captioned:
    """A source of one image with three captions."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> pipeline.Example:
        image = np.zeros((1, 1, 3), np.uint8)
        return pipeline.Example(image=image, captions=CAPTIONS, label='')


def test_batches_have_chosen_captions():
    batches = pipeline.batches(
        Captioned(), batch=4, seed=0, threads=0, captions=ShortOrLong(short=1)
    )
    assert next(batches)['caption'] == ['a cat'] * 4


def test_the_first_scales_alone_are_trained():
    """The loss of the first scales is that of a model with these scales and inputs."""
    grids = ((1, 1), (2, 2), (4, 4))
    model = dataclasses.replace(PUBLISHED, bits=3, grids=grids, reference=(4, 4))
    short = dataclasses.replace(model, grids=grids[:2])
    params = meta.unbox(init_params(Run(model=model), jax.random.key(0)))
    rng = np.random.default_rng(0)
    inputs = np.float32(rng.normal(size=(2, 20, 3)))
    codes = rng.integers(0, 2, (2, 21, 3), np.int8)
    text = TextCondition(
        np.float32(rng.normal(size=(2, 4, 256))), np.ones((2, 4), np.int32), np.zeros((2, 256))
    )

    @jax.jit
    def losses(params):
        rows = model.schedule.leading_rows(2)
        whole = tokens.token_losses(
            model.build(), model.vocabulary, params, Targets(inputs, codes), text, rows=rows
        )
        first = Targets(inputs[:, :4], codes[:, :5])
        return whole, tokens.token_losses(short.build(), model.vocabulary, params, first, text)

    ours, theirs = losses(params)
    assert ours.nll_BL.shape == (2, 5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ours, theirs)
    np.testing.assert_array_equal(ours.right_BL, np.asarray(ours.hit_BL) == 1)
    assert 0 < np.mean(ours.right_BL) < np.mean(ours.hit_BL)
    metrics = tokens.mean_per_scale(model.schedule, *(tokens.sum_of_images(ours, 1)))
    assert metrics['token_accuracy'] == np.mean(np.asarray(ours.right_BL)[0])
    assert {'loss/1', 'token_accuracy/1'} <= metrics.keys() and 'loss/2' not in metrics
    weights = tokens.token_weights(model.schedule, 5, 0.5)
    np.testing.assert_allclose(jnp.asarray(weights)[0] / weights[1], 2, rtol=1e-6)


def test_the_summary_compares_classifiers_as_the_paper_does():
    text = summary.classifier(Bits(32), 2048)
    assert text.startswith('131,136 parameters (0.5 MiB) for 32 bits')
    assert '2^32 codes would have 8.8e+12 (32 TiB)' in text


@pytest.mark.parametrize(
    ('model', 'tokenizer', 'message'),
    [
        (Infinity(), BSQ(bits=16), 'model.bits is 32, but a token of the tokenizer has 16 bits'),
        (Infinity(bits=56), BSQ(bits=56, patchify=True), 'a token of the tokenizer has 224 bits'),
        (Infinity(bits=9), BSQ(bits=9, indexed=True), 'model.codes is 9 bits, but tokenizer.codes'),
        (Star(), BSQ(), 'model.codes is 4096, but tokenizer.codes is 32 bits'),
    ],
)
def test_a_tokenizer_of_other_bits_is_refused(model, tokenizer, message):
    with pytest.raises(UserError, match=message):
        check_tokenizer(model, tokenizer, where='it does not fit', remedy='name another')
    check_tokenizer(model, model.default_tokenizer(), where='it fits', remedy='')


def test_a_text_encoder_is_planned_in_the_dtype_of_the_run():
    held = {}
    for dtype in ('float32', 'bfloat16'):
        prompts = workload._prompts(Infinity(), 'models/flan-t5-xl', dtype)
        leaves = jax.tree.leaves(meta.unbox(prompts.params))
        held[dtype] = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    assert held['float32'] == 2 * held['bfloat16'] > 4e9
    assert prompts.one.states_BTE.dtype == jnp.float32 and prompts.one.mask_BT.shape == (1, 512)


def test_scales_that_a_model_lacks_are_refused():
    with pytest.raises(ValueError, match=r'trained_scales must lie in \[0, 7\]'):
        Run(model=Infinity(), trained_scales=8)
