"""Does training learn, and does it continue from checkpoints and model folders?"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from star_jax.checkpoint import weights
from star_jax.checkpoint.training import Checkpoints
from star_jax.core.codes import Index
from star_jax.core.schedule import Pyramid
from star_jax.errors import UserError
from star_jax.losses.tokens import token_weights
from star_jax.parallel import rules
from star_jax.parallel.mesh import MeshShape
from star_jax.training import sample_grid, summary
from star_jax.training.run import Pace, Run
from star_jax.training.state import TrainState
from star_jax.training.transformer_job import TransformerJob


@pytest.fixture(scope='module', autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Run:
    tokenizer = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')
    return dataclasses.replace(tiny.STAR, tokenizer=tokenizer)


@pytest.fixture(scope='module')
def job(run) -> TransformerJob:
    data = dataclasses.replace(run.data, count=8 * 40)
    return TransformerJob(
        dataclasses.replace(run, data=data, caption_drop=0.0, pace=Pace(steps=1000))
    )


@pytest.fixture(scope='module')
def start(job) -> Callable[[], TrainState]:
    """Copies the state before step 0: a step gives its state away."""
    state = job.init()
    return lambda: jax.tree.map(jnp.copy, state)


def train(job: TransformerJob, state, batches, first: int = 0) -> tuple:
    """The state after steps on these batches, and the loss of each."""
    losses = []
    for step, batch in enumerate(batches, first):
        state, metrics = job.step(step, state, batch)
        losses.append(float(metrics['loss']))
    return state, losses


def take(job: TransformerJob, count: int, step: int = 0) -> list:
    """The first batches from `step` on."""
    return list(itertools.islice(job.batches(step), count))


def leaves(tree) -> dict[str, np.ndarray]:
    return weights.flatten(jax.device_get(tree))


def test_training_overfits_one_batch(job, start):
    batch = take(job, 1)[0]
    _, losses = train(job, start(), [batch] * 150)
    assert losses[0] == pytest.approx(np.log(32), abs=0.2)
    assert losses[-1] < 0.3


def test_training_lowers_the_loss_of_new_images(job, start):
    before = job.evaluate(start())
    state, losses = train(job, start(), take(job, 40))
    assert np.mean(losses[-5:]) < losses[0] - 0.3
    assert job.evaluate(state)['validation/loss'] < before['validation/loss'] - 0.3


def test_accumulated_steps_make_one_update_and_one_average(run):
    optimizer = dataclasses.replace(run.optimizer, accumulate=2)
    job = TransformerJob(dataclasses.replace(run, optimizer=optimizer, ema=0.75))
    state = job.init()
    start = leaves(state.params)
    first, second = take(job, 2)
    assert [len(first), len(second)] == [2, 2] and job.run.mean_batch == 2 * run.batch
    plain = TransformerJob(run)
    for micro_batch, (expected,) in zip((*first, *second), take(plain, 4), strict=True):
        np.testing.assert_array_equal(micro_batch.encoded, expected.encoded)
    np.testing.assert_array_equal(take(job, 1, step=1)[0][1].encoded, second[1].encoded)
    assert jax.tree.structure(job.abstract()) == jax.tree.structure(
        TransformerJob(dataclasses.replace(run, ema=0.75)).abstract()
    )  # nothing pending is saved
    state, metrics = job.step(0, state, first)
    end, means = leaves(state.params), leaves(state.ema)
    assert not np.array_equal(start['blocks/ffn/fc1/kernel'], end['blocks/ffn/fc1/kernel'])
    for name, mean in means.items():
        keep = 1 / 10  # at the first step of a run: early averages are over fewer steps
        np.testing.assert_allclose(mean, keep * start[name] + (1 - keep) * end[name], atol=1e-6)
    losses = [
        float(plain.step(number, plain.init(), (inputs,))[1]['loss'])
        for number, inputs in enumerate(first)
    ]
    assert float(metrics['loss']) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(('balance', 'shares'), [(0, (1, 4, 10)), (1, (1, 1, 1))])
def test_token_weights_balance_the_scales(balance, shares):
    weights_L = token_weights(Pyramid.square((1, 2, 4)), 15, balance)  # one token was dropped
    assert weights_L.mean() == pytest.approx(1)
    sums = [weights_L[:1].sum(), weights_L[1:5].sum(), weights_L[5:].sum()]
    np.testing.assert_allclose(np.array(sums) / sums[0], shares, rtol=1e-6)


def test_balanced_loss_trains_coarse_scales_first(job, start):
    balanced = TransformerJob(dataclasses.replace(job.run, balance=1.0))
    batch = take(job, 1)[0]
    first = {}
    for name, trained in {'plain': job, 'balanced': balanced}.items():
        state = start()
        for step in range(20):
            state, metrics = trained.step(step, state, batch)
        first[name] = float(metrics['loss/0'])
    assert first['balanced'] < first['plain']


def test_text_features_inside_the_program_equal_cached_ones(job, start):
    """They differ only by the float16 of the cache."""
    encoding = TransformerJob(dataclasses.replace(job.run, text_features='inside'))
    _, inside = train(encoding, start(), take(encoding, 3))
    _, cached = train(job, start(), take(job, 3))
    np.testing.assert_allclose(inside, cached, atol=2e-3)


def test_bfloat16_activations_train_float32_parameters(job, start):
    half = TransformerJob(dataclasses.replace(job.run, dtype='bfloat16', remat='full'))
    state, losses = train(half, start(), take(half, 3))
    _, full = train(job, start(), take(job, 3))
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {'float32'}
    np.testing.assert_allclose(losses, full, atol=0.05)


def test_summary_warns_of_a_collapsed_codebook(caplog):
    def usage(*used: int, times: int = 100) -> np.ndarray:
        return np.stack([np.arange(500) < count for count in used]) * times

    summary.warn_of_collapse(usage(25, 250), Index(500), summary.RESTART)
    two_images = usage(1, 250, times=2)  # they have two coarsest codes
    summary.warn_of_collapse(two_images, Index(500), summary.RESTART)
    assert not caplog.records
    summary.warn_of_collapse(usage(1, 250, times=500), Index(500), summary.RESTART)
    assert 'scale 0' in caplog.text and '1 of 500' in caplog.text
    assert 'all scales' not in caplog.text
    summary.warn_of_collapse(usage(50, 75), Index(500), summary.RESTART)
    assert 'all scales: validation images use 75 of 500' in caplog.text


def test_run_starts_from_a_model_folder(job, start, tmp_path):
    state, _ = train(job, start(), take(job, 2))
    job.export(state, tmp_path / 'model')
    settings = dataclasses.replace(job.run, init=str(tmp_path / 'model'), seed=5, ema=0.5)
    begun = TransformerJob(settings).init()
    for kept in (begun.params, begun.ema):
        assert all(
            np.array_equal(leaves(state.params)[name], x) for name, x in leaves(kept).items()
        )
    assert int(begun.step) == 0
    wider = dataclasses.replace(settings, model=dataclasses.replace(settings.model, mlp_ratio=2))
    with pytest.raises(UserError, match='ffn/fc1'):
        TransformerJob(wider).init()


def test_checkpoint_continues_on_another_mesh(job, start, tmp_path):
    batches = take(job, 4)
    state, _ = train(job, start(), batches[:2])
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, state)
    checkpoints.close()
    _, stayed = train(job, state, batches[2:], first=2)

    moved = TransformerJob(dataclasses.replace(job.run, mesh=MeshShape(data=2, fsdp=2, tensor=2)))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    step, restored = checkpoints.restore(moved.abstract())
    checkpoints.close()
    _, went_on = train(moved, restored, take(moved, 2, step), first=step)
    np.testing.assert_allclose(went_on, stayed, rtol=1e-5)


def test_sample_grid_is_split_over_the_mesh(job, monkeypatch):
    """Three images are filled up to a number that the devices divide; none stays whole on all."""
    shares, gather = [], rules.gather

    def remember(images: jax.Array) -> np.ndarray:
        shares.append((len(images), images.sharding.shard_shape(images.shape)[0]))
        return gather(images)

    def grid_on(mesh: MeshShape) -> np.ndarray:
        pace = dataclasses.replace(job.run.pace, images=3)
        sampled = TransformerJob(dataclasses.replace(job.run, mesh=mesh, pace=pace))
        assert sampled.compile_grid() > 0
        with monkeypatch.context() as patch:
            patch.setattr(sample_grid.rules, 'gather', remember)
            return sampled.sample_grid(sampled.init())

    grid, split_grid = grid_on(MeshShape(data=8)), grid_on(MeshShape(data=2, fsdp=2, tensor=2))
    assert shares == [(8, 1), (4, 1)]
    assert split_grid.shape == grid.shape
    assert np.abs(split_grid.astype(int) - grid).max() <= 1


def test_label_smoothing_changes_the_trained_loss_alone(job, start):
    smoothed = TransformerJob(dataclasses.replace(job.run, label_smoothing=0.25))
    state, (inputs,), key = start(), take(job, 1)[0], jax.random.key(0)

    @jax.jit
    def losses(params, inputs):
        results = []
        for program in (job.program, smoothed.program):
            value, parts = program.loss(
                params, job.frozen, *program.prepare(job.frozen, inputs, key)
            )
            score = program.score(params, job.frozen, inputs, key)
            results.append((value, program.metrics(parts), score))
        return results

    (loss, metrics, score), (smooth_loss, smooth_metrics, smooth_score) = losses(
        state.params, inputs
    )
    uniform = (smooth_loss - 0.75 * loss) / 0.25  # the mean of -log p over the codes
    assert uniform > np.log(32) - 1e-5 and abs(smooth_loss - loss) > 1e-6
    np.testing.assert_allclose(smooth_metrics.pop('loss'), smooth_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.pop('loss'), loss, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, smooth_metrics, metrics)
    jax.tree.map(np.testing.assert_array_equal, smooth_score, score)
