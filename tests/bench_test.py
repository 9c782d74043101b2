"""The sampling benchmark: a cold and a warm process, and rates that are shares of the machine's."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from star_jax.bench import bench_tables, process, sampling, suite, timing
from star_jax.checkpoint import folder
from star_jax.commands import bench
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.parallel import machine
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.training.run import Run

TINY = """
from star_jax.families.star import Star
from star_jax.core.settings import Settings
from star_jax.training.run import Run

run = Run(
    model=Star(depth=1, width=16, heads=2, sides=(1, 2), codes=32, channels=4, text_width=8),
    sampling=Settings(top_k=8, guidance=2.0),
)
"""
TOKENIZER = '--autoencoder.width 8 --autoencoder.groups 2 --autoencoder.multipliers 1 1'
STAR = str(Path(__file__).parents[1] / 'configs' / 'star_d16_256.py')
OPTIONS = f'--depth 2 {TOKENIZER} --autoencoder.blocks 1 --text-tokens 3 --repeats 3'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp('bench') / 'tiny.py'
    path.write_text(TINY)
    return path


@pytest.fixture(scope='module')
def report(tiny):
    """What the command writes for two real processes."""
    out = tiny.with_name('report.json')
    words = ['sample', str(tiny), *OPTIONS.split(), '--batch', '2', '--json', str(out)]
    assert bench.main(words) == 0
    (report,) = json.loads(out.read_text())
    return report


def test_options_change_the_config(report):
    job = report['job']
    assert job['model']['depth'] == 2 and job['model']['width'] == 16
    assert job['settings'] | {'guidance': 2.0, 'top_k': 8} == job['settings']
    assert report['pixels'] == 4 and job['text_tokens'] == 3


def test_the_second_process_finds_the_program(report):
    cold, warm = report['cold_start'], report['warm_start']
    assert (cold['found'], warm['found']) == (0, 1)
    assert warm['compile_seconds'] < cold['compile_seconds']
    for start in (cold, warm):
        reached = [start['reached'][stage] for stage in bench_tables.STAGES]
        assert reached == sorted(reached) and reached[0] > 0
        assert start['since_weights'] < start['since_jax'] < start['reached']['dispatch']
        assert 0 < start['processor_seconds'] < start['processor_seconds_to_dispatch']


def test_rates_are_work_over_time_and_shares_of_the_matrix_rate(report):
    for part in report['parts'].values():
        assert part['gflops'] == pytest.approx(part['gflop'] / part['seconds'])
        assert part['share'] == pytest.approx(part['gflops'] / report['matrix_rate_gflops'])
    whole, scales, decoder = (report['parts'][name] for name in ('program', 'scales', 'decoder'))
    assert whole['gflop'] == pytest.approx(scales['gflop'] + decoder['gflop'])
    assert whole['of_time'] == 1 and 0 < decoder['gflop'] < whole['gflop']
    assert report['matrix_rate_gflops'] > 0.1


def test_times_are_those_of_the_runs(report):
    time = report['time']
    assert len(time['seconds']) == 3 and min(time['seconds']) > 0
    assert time['p50_seconds'] == pytest.approx(np.median(time['seconds']))
    assert time['p50_seconds'] <= time['p95_seconds'] <= max(time['seconds'])
    assert time['images_per_second'] * time['p50_seconds'] == pytest.approx(2)
    assert time['seconds_per_image'] * 2 == pytest.approx(time['p50_seconds'])


def test_the_report_says_where_and_how_much_memory(report):
    environment, memory = report['environment'], report['memory']
    assert environment['jax'] and environment['device'] and environment['cores'] > 0
    assert len(environment['load']) == 2 and memory['weights'] > 0
    assert any(name.endswith('_peak') for name in memory)
    assert 'depth 2' in bench_tables.summary(report) and 'batch 2' in bench_tables.summary(report)


@pytest.fixture(scope='module')
def swept(tiny):
    """The report of a training step, and what was traced."""
    out, trace = tiny.with_name('swept.json'), tiny.with_name('trace')
    words = ['train', str(tiny), '--model.depth', '1', '--repeats', '2', '--text-tokens', '3']
    words += ['--sweep', 'batch=8', '--json', str(out), '--profile', str(trace)]
    assert bench.main(words) == 0
    return json.loads(out.read_text()), trace


def test_a_step_is_measured_and_traced(swept):
    (report,), trace = swept
    assert report['job']['run']['batch'] == 8
    assert (report['cold_start']['found'], report['warm_start']['found']) == (0, 1)
    whole, forward = report['parts']['program'], report['parts']['forward']
    assert 2.5 < whole['gflop'] / forward['gflop'] < 3.1
    assert 'training, depth 1' in bench_tables.summary(report)
    assert len(list(trace.glob('batch 8/plugins/profile/*'))) == 1
    assert bench_tables.sweep({'a': report, 'b': report}).row_count == 2


def test_every_combination_of_a_sweep_is_named():
    expanded = list(bench.expand(['batch=1,8', 'sides=1 2,1 2 4']))
    assert [name for name, _ in expanded][:2] == ['batch 1, sides 1 2', 'batch 1, sides 1 2 4']
    assert expanded[-1][1] == ['--batch', '8', '--sides', '1', '2', '4']


def test_a_sweep_turns_a_switch_on_and_off(tiny):
    swept = list(bench.expand(['remat=True,False', 'model.qk-norm=False']))
    assert [name for name, _ in swept] == [
        'remat True, model.qk-norm False',
        'remat False, model.qk-norm False',
    ]
    runs = [bench.read_training(str(tiny), words)[1].run for _, words in swept]
    assert [(run.remat, run.model.qk_norm) for run in runs] == [(True, False), (False, False)]


def test_what_is_computed_again_to_save_memory_counts_once(tiny):
    _, job = bench.read_training(str(tiny), ['--batch', '8', '--text-tokens', '3'])
    _, again = bench.read_training(str(tiny), ['--batch', '8', '--text-tokens', '3', '--remat'])
    assert again.run.remat and again.prepare().whole.flops == job.prepare().whole.flops


def test_every_kernel_is_timed_and_does_the_same_work(tiny, tmp_path):
    out = tmp_path / 'attention.json'
    names = ['dense', 'chunked']
    assert bench.main(['attention', str(tiny), '--kernels', *names, '--json', str(out)]) == 0
    report = json.loads(out.read_text())
    assert report['rows'] == 5 and report['seen'] == pytest.approx((1 + 4 * 5) / 25)
    found = report['kernels']
    assert [row['kernel'] for row in found] == ['dense', 'dense', 'chunked', 'chunked']
    forward, both = (row['gflops'] * row['p50_seconds'] for row in found[:2])
    assert forward == pytest.approx(4 * 21 * 16 / 1e9) and both == pytest.approx(3 * forward)


def test_reading_is_compared_with_one_thread(tmp_path):
    out = tmp_path / 'data.json'
    words = ['data', '--data.count', '64', '--batch', '8', '--batches', '2', '--size', '32']
    assert bench.main([*words, '--json', str(out)]) == 0
    report = json.loads(out.read_text())
    rates = (report['images_per_second'], report['one_thread_images_per_second'])
    assert report['ratio'] == pytest.approx(rates[0] / rates[1]) and report['examples'] == 64


def described(batch: int, temporaries: float) -> dict:
    memory = {'weights': 100.0, 'temporaries': temporaries, 'limit': 1000.0}
    return {'job': {'batch': batch}, 'memory': memory}


def test_the_largest_batch_is_what_fits_beside_the_weights():
    assert suite.largest_batch(described(1, 20), described(8, 90)) == 72  # 10 an image, 750 to fill
    assert suite.largest_batch(described(1, 20), described(8, 900)) == 4  # less than was tried


def test_a_batch_given_twice_tells_no_more_than_once():
    twice = suite.Suite(batches=(8, 8), resolutions=(0,))
    reports = {'sample a batch 8': described(8, 90)}
    assert not list(suite._largest({'a': Run()}, twice, reports))


def test_a_suite_goes_on_where_it_was_and_survives_what_fails(tiny, tmp_path, monkeypatch, capsys):
    begun = []

    def observe(job, task, cache, notice, profile=None):
        begun.append((type(job).__name__, task))
        if isinstance(job, process.Training):
            raise UserError('out of memory')
        return {'start': {'compile_seconds': 1.0, 'reached': {'first result': 2.5}}} | fake

    fake = {
        'pixels': 4,
        'time': {'p50_seconds': 1.0, 'p95_seconds': 1.1, 'images_per_second': 1.0},
        'parts': {'program': {'gflops': 5.0, 'share': 0.5}},
        'memory': {'weights': 1.0, 'temporaries': 0.0, 'limit': 8.0, 'process_peak': 2.0},
        'environment': machine.describe() | {'load': [0, 0]},
    }
    monkeypatch.setattr(process, 'observe', observe)
    monkeypatch.setenv('COLUMNS', '160')
    words = ['suite', str(tiny), '--resolutions', '0', '--trained', '0']
    words += ['--out', str(tmp_path), '--batches', '1', '8', '--no-largest']
    assert bench.main(words) == 0
    said = capsys.readouterr().out
    assert 'sample tiny batch 8' in said and 'train tiny batch 16: out of memory' in said
    assert begun == [
        ('Sampling', 'measure'),
        ('Sampling', 'start'),
        ('Sampling', 'measure'),
        ('Training', 'measure'),
    ]
    assert bench.main(words) == 0 and len(begun) == 4
    with pytest.raises(UserError, match='other settings .dtype: "bfloat16" -> "float32".*--out'):
        bench.main([*words, '--dtype', 'float32'])
    table = (tmp_path / 'report.md').read_text()
    assert (
        '| sample tiny batch 1 | 1 | 1.10 | 1 | 0.005 | 50.0% | 1.0 / 1.0 | 2.5 / 2.5 | 2 |'
        in table
    )


def test_work_is_timed_in_turn_after_a_warm_up():
    calls = []
    works = {name: lambda name=name: calls.append(name) or np.zeros(()) for name in 'ab'}
    seconds = timing.take_turns(works, repeats=2)
    assert all(seconds[name].shape == (2,) and (seconds[name] >= 0).all() for name in 'ab')
    turns = [name for name, _ in itertools.groupby(calls)]
    assert turns == ['a', 'b'] * 3


@pytest.mark.parametrize(
    'words, sentence',
    [
        ([], 'expected sample, train, buckets, attention, data or suite after bench'),
        (['smaple'], "not 'smaple'"),
        (['sample', '--sweep', 'batch'], 'OPTION=A,B'),
        (['sample', '--sweep', 'sides="1 2'], 'No closing quotation'),
        (['sample', '--dtype', 'float16'], 'float32.*bfloat16'),
        (['attention', '--dtype', 'float64'], 'float32.*bfloat16'),
        (['suite', STAR, '--dtype', 'float16'], 'float32.*bfloat16'),
        (['sample', '--resolution', '300'], '256, 512, 1024'),
        (['train', '--repeats', '0'], 'at least 1'),
        (['attention', '--kernels', 'fast'], 'fast'),
        (['data', '--batches', '0'], 'at least 1'),
        (['suite', '--minutes', '1'], 'name some'),
        (['suite', 'missing.py', '--resolutions', '300'], 'no published scales'),
        (['suite', 'missing.py', '--minutes', 'nan'], 'must be positive'),
        (['suite', STAR, STAR], 'two are equal'),
        (['sample', 'missing.py'], 'missing.py'),
        (['sample', 'nowhere/at/all'], 'there is no such folder'),
        (['sample', '--batch', '0'], 'at least 1'),
    ],
)
def test_mistakes_are_told(words, sentence):
    with pytest.raises(UserError, match=sentence):
        bench.main(words)


def test_a_cache_that_exists_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match='name a new folder'):
        bench.main(['sample', str(tiny), '--programs', str(tmp_path)])


def test_a_model_folder_brings_its_own_sizes_and_weights(tmp_path):
    model = Star(depth=1, width=16, heads=2, sides=(1, 2), codes=32, channels=4, text_width=8)
    autoencoder = Autoencoder(width=8, multipliers=(1,), blocks=1, groups=2)
    job = sampling.Sampling(model=model, autoencoder=autoencoder, text_tokens=3)
    params = jax.device_get(job.prepare().whole.args[0])
    tokenizer = folder.Tokenizer(config=job.tokenizer, params=params['tokenizer'])
    content = folder.Model(
        family='star', config=model, params=params['model'], tokenizer=tokenizer, text=None
    )
    place = tmp_path / 'model'
    folder.write(place, content)

    _, found = bench.read_sampling(str(place), ['--batch', '3'])
    assert (found.model, found.autoencoder, found.batch) == (model, autoencoder, 3)
    of_folder = dataclasses.replace(found, text_tokens=3).prepare().whole.args[0]
    jax.tree.map(np.testing.assert_array_equal, of_folder, params)
    with pytest.raises(UserError, match='leave out depth: 1 -> 2'):
        bench.read_sampling(str(place), ['--depth', '2'])
