"""What does a cache hold for a tokenizer of bits, and which runs does it serve?"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_families

from star_jax import cli
from star_jax.checkpoint import folder
from star_jax.core.self_correction import SelfCorrection
from star_jax.errors import UserError
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training import train
from star_jax.training.run import Run
from star_jax.training.transformer_job import TransformerJob

FLIPPED = SelfCorrection(strength=0.5)


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Run:
    toy_families.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        config = BSQ(
            autoencoder=Autoencoder(
                width=4, multipliers=(1,), blocks=1, groups=2, stem=4, attention=False
            ),
            grids=((1, 1), (2, 2), (4, 4)),
            bits=3,
        )
        params = tiny.random_params(config.abstract())
        place = tmp_path_factory.mktemp('tokenizer') / 'model'
        folder.write(place, folder.StoredTokenizer(config=config, params=params))
        yield dataclasses.replace(tiny.STAR, model=toy_families.BitScales(), tokenizer=str(place))


@pytest.fixture(scope='module')
def of_bits(run, tmp_path_factory) -> Path:
    return train.cache(
        dataclasses.replace(run, cache=str(tmp_path_factory.mktemp('sets') / 'bits'))
    )


@pytest.fixture(scope='module')
def of_features(run, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp('sets') / 'features'
    return train.cache(dataclasses.replace(run, cache=str(place)), features=True)


def job(run: Run, place: Path | str = '', **changes) -> TransformerJob:
    return TransformerJob(dataclasses.replace(run, cache=str(place), **changes))


def targets(job: TransformerJob):
    (batch,) = next(iter(job.batches(0)))
    compute = jax.jit(job.program._targets)
    return compute(job.frozen, batch, jax.random.key(0)), batch


def test_cached_bits_are_packed_and_give_the_targets_of_live_encoding(run, of_bits):
    cached, live = targets(job(run, of_bits)), targets(job(run))
    assert cached[1].encoded.dtype == jnp.uint8 and cached[1].encoded.shape == (8, 21, 1)
    for ours, theirs in zip(cached[0], live[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('correction', [SelfCorrection(), FLIPPED])
def test_cached_features_serve_every_strength(run, of_features, correction):
    cached = targets(job(run, of_features, correction=correction))
    live = targets(job(run, correction=correction))
    assert cached[1].encoded.dtype == jnp.float32 and cached[1].encoded.shape == (8, 4, 4, 3)
    share = np.mean(np.asarray(cached[0].codes_BL) != np.asarray(live[0].codes_BL))
    assert share < 0.01
    stored = next((of_features / 'data').glob('*.npy'))
    assert np.load(stored).dtype == np.float16


def test_cached_bits_are_refused_where_bits_are_flipped(run, of_bits, tmp_path):
    with pytest.raises(UserError, match='labels of later scales depend on the flips'):
        job(run, of_bits, correction=FLIPPED)
    with pytest.raises(UserError, match='data cache --features'):
        train.cache(dataclasses.replace(run, cache=str(tmp_path / 'new'), correction=FLIPPED))


def test_flips_are_refused_by_a_tokenizer_without_bits(tmp_path):
    place = tiny.write_tokenizer(tmp_path / 'model')
    with pytest.raises(UserError, match='VQ tokenizer has no bits to flip'):
        job(dataclasses.replace(tiny.STAR, tokenizer=place), correction=FLIPPED)


def test_training_with_flips_from_features_takes_a_step(run, of_features):
    flipped = job(run, of_features, correction=FLIPPED)
    state, batch = flipped.init(), next(iter(flipped.batches(0)))
    _, metrics = flipped.step(0, state, batch)
    assert np.isfinite(metrics['loss'])


def test_the_command_takes_the_option_of_images_beside_that_of_texts(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, 'cache', lambda run, features: asked.append((run, features)) or '')
    words = ['data', 'cache', '--features', '--text-features', 'inside', '--cache', str(tmp_path)]
    assert cli.main(words) == 0
    (settings, features), *_ = asked
    assert features and settings.text_features == 'inside'
