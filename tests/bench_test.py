"""Benchmarks start cold and warm processes, and print rates as shares of the machine's rates."""

import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from star_jax.bench import bench_tables, process, sampling, suite, timing, torch_loop
from star_jax.checkpoint import config, folder, weights
from star_jax.commands import bench, data
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.families.infinity import Infinity
from star_jax.families.llamagen import LlamaGen
from star_jax.families.star import Star
from star_jax.parallel import machine, mesh
from star_jax.protocols import Family
from star_jax.sampling import weight_layout
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
    """The JSON report of `bench sample`, from two real processes."""
    out = tiny.with_name('report.json')
    words = ['sample', str(tiny), *OPTIONS.split(), '--batch', '2', '--json', str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('XLA_FLAGS', raising=False)  # a quick compilation would not be kept
        assert bench.main(words) == 0
    (report,) = json.loads(out.read_text())
    return report


def test_sample_options_override_the_config(report):
    job = report['job']
    assert job['model']['depth'] == 2 and job['model']['width'] == 16
    assert job['settings'] | {'guidance': 2.0, 'top_k': 8} == job['settings']
    assert report['pixels'] == 4 and job['text_tokens'] == 3


def test_warm_process_reads_the_program_from_the_cache(report):
    cold, warm = report['cold_start'], report['warm_start']
    assert (cold['cache_hits'], warm['cache_hits']) == (0, 1)
    assert warm['compile_seconds'] < cold['compile_seconds']
    for start in (cold, warm):
        stages = [start['stages'][stage] for stage in bench_tables.STAGES]
        assert stages == sorted(stages) and stages[0] > 0
        from_weights, from_jax = (
            start[f'{stage}_to_dispatch_seconds'] for stage in ('weights', 'jax')
        )
        assert from_weights < from_jax < start['stages']['dispatch']
        assert 0 < start['processor_seconds'] < start['processor_seconds_to_dispatch']


def test_rates_are_operations_over_time_and_shares_of_the_matrix_rate(report):
    for part in report['parts'].values():
        assert part['gflops'] == pytest.approx(part['gflop'] / part['seconds'])
        share = part['gflops'] / report['matrix_rate_gflops']
        assert part['matrix_rate_share'] == pytest.approx(share)
        read_rate = part['gbytes'] / part['seconds'] / report['read_rate_gbytes']
        assert part['read_rate_share'] == pytest.approx(read_rate)
    program, scales, decoder = (report['parts'][name] for name in ('program', 'scales', 'decoder'))
    assert program['gflop'] == pytest.approx(scales['gflop'] + decoder['gflop'])
    assert program['time_share'] == 1 and 0 < decoder['gflop'] < program['gflop']
    assert report['matrix_rate_gflops'] > 0.1 and report['read_rate_gbytes'] > 0.1
    assert report['devices'] == 1 and 0 < decoder['gbytes'] < program['gbytes']


def test_times_are_percentiles_of_the_runs(report):
    time = report['time']
    assert len(time['seconds']) == 3 and min(time['seconds']) > 0
    assert time['p50_seconds'] == pytest.approx(np.median(time['seconds']))
    assert time['p50_seconds'] <= time['p95_seconds'] <= max(time['seconds'])
    assert time['images_per_second'] * time['p50_seconds'] == pytest.approx(2)
    assert time['seconds_per_image'] * 2 == pytest.approx(time['p50_seconds'])


def test_report_contains_environment_and_memory(report):
    environment, memory = report['environment'], report['memory']
    assert environment['jax'] and environment['device'] and environment['cores'] > 0
    assert len(environment['load']) == 2 and memory['weights'] > 0
    assert any(name.endswith('_peak') for name in memory)
    assert 'depth 2' in bench_tables.summary(report) and 'batch 2' in bench_tables.summary(report)


@pytest.mark.parametrize(
    'family, settings, guidance',
    [
        (Infinity(), Settings(guidance=0.0), 'guidance 0'),
        (Infinity(), Settings(guidance=1.0), 'without guidance'),
        (Star(), Settings(guidance=0.0), 'without guidance'),
        (Star(), Settings(guidance=4.0, stop=1), 'without guidance'),
        (Star(), Settings(guidance=0.0, guidance_per_step=(4.0,) * 10), 'guidance per step'),
    ],
)
def test_summary_names_the_guidance_of_the_steps(family, settings, guidance):
    described = process.describe(sampling.SamplingJob(model=family, settings=settings))
    environment = machine.describe() | {'load': [0, 0]}
    summary = bench_tables.summary(described | {'pixels': 256, 'environment': environment})
    assert f', {guidance}, batch 1' in summary


def test_a_line_of_json_that_a_library_prints_is_no_report():
    lines = []
    prints = f"""print('{{"a": 1}}'); print('{process.REPORT}{{"b": 2}}')"""
    reports, status = process._run([sys.executable, '-c', prints], os.environ, lines.append)
    assert (reports, lines, status) == ([{'b': 2}], ['{"a": 1}'], 0)


@pytest.fixture(scope='module')
def swept(tiny):
    """The report of a training step with a sweep, and the folder of its profile."""
    out, trace = tiny.with_name('swept.json'), tiny.with_name('trace')
    words = ['train', str(tiny), '--model.depth', '1', '--repeats', '2', '--text-tokens', '3']
    words += ['--sweep', 'batch=8', '--json', str(out), '--profile', str(trace)]
    assert bench.main(words) == 0
    return json.loads(out.read_text()), trace


@pytest.mark.slow
def test_train_measures_and_profiles_a_step(swept):
    (report,), trace = swept
    assert report['job']['run']['batch'] == 8
    assert [report[name]['cache_hits'] for name in ('cold_start', 'warm_start')] == [0, 1]
    step, forward = report['parts']['program'], report['parts']['forward']
    assert 2.5 < step['gflop'] / forward['gflop'] < 3.1
    assert step['gbytes'] > 2 * forward['gbytes'] > 0 and report['devices'] > 0
    assert 'training, star, depth 1' in bench_tables.summary(report)
    assert len(list(trace.glob('batch 8/plugins/profile/*'))) == 1
    assert bench_tables.sweep({'a': report, 'b': report}).row_count == 2


def test_expand_names_every_combination_of_a_sweep():
    expanded = list(bench.expand(['batch=1,8', 'sides=1 2,1 2 4']))
    assert [name for name, _ in expanded][:2] == ['batch 1, sides 1 2', 'batch 1, sides 1 2 4']
    assert expanded[-1][1] == ['--batch', '8', '--sides', '1', '2', '4']


def test_expand_turns_switches_on_and_off(tiny):
    swept = list(bench.expand(['released-loss-scale=True,False', 'model.qk-norm=False']))
    assert [name for name, _ in swept] == [
        'released-loss-scale True, model.qk-norm False',
        'released-loss-scale False, model.qk-norm False',
    ]
    runs = [bench.read_training(str(tiny), words)[1].run for _, words in swept]
    switches = [(run.released_loss_scale, run.model.qk_norm) for run in runs]
    assert switches == [(True, False), (False, False)]


def test_expand_sweeps_over_policies_of_remat(tiny):
    swept = list(bench.expand(['remat=none,dots,full']))
    runs = [bench.read_training(str(tiny), words)[1].run for _, words in swept]
    assert [run.remat for run in runs] == ['none', 'dots', 'full']


def test_operations_repeated_by_remat_count_once(tiny):
    _, job = bench.read_training(str(tiny), ['--batch', '8', '--text-tokens', '3'])
    words = ['--batch', '8', '--text-tokens', '3', '--remat', 'full']
    _, remat = bench.read_training(str(tiny), words)
    (once, _), (repeated, _) = (each.prepare().main.cost() for each in (job, remat))
    assert remat.run.remat == 'full' and repeated == once


def test_attention_times_every_kernel_for_the_same_operations(tiny, tmp_path):
    out = tmp_path / 'attention.json'
    names = ['dense', 'chunked']
    assert bench.main(['attention', str(tiny), '--kernels', *names, '--json', str(out)]) == 0
    report = json.loads(out.read_text())
    assert report['rows'] == 5 and report['visible_share'] == pytest.approx((1 + 4 * 5) / 25)
    rows = report['kernels']
    assert [row['kernel'] for row in rows] == ['dense', 'dense', 'chunked', 'chunked']
    forward, both = (row['gflops'] * row['p50_seconds'] for row in rows[:2])
    assert forward == pytest.approx(4 * 21 * 16 / 1e9) and both == pytest.approx(3 * forward)


def test_data_compares_the_pipeline_with_one_thread(tmp_path):
    out = tmp_path / 'data.json'
    words = ['data', '--data.count', '64', '--batch', '8', '--batches', '2', '--size', '32']
    assert bench.main([*words, '--json', str(out)]) == 0
    report = json.loads(out.read_text())
    rates = (report['images_per_second'], report['one_thread_images_per_second'])
    assert report['speedup'] == pytest.approx(rates[0] / rates[1]) and report['examples'] == 64


def sampling_report(batch: int, temporaries: float) -> dict:
    memory = {'weights': 100.0, 'temporaries': temporaries, 'limit': 1000.0}
    return {'job': {'batch': batch}, 'memory': memory}


def test_largest_batch_fills_the_memory_beside_the_weights():
    # 10 MiB per image, and 750 MiB for images.
    assert suite.largest_batch(sampling_report(1, 20), sampling_report(8, 90)) == 72
    # Fewer images than were measured.
    assert suite.largest_batch(sampling_report(1, 20), sampling_report(8, 900)) == 4


def test_largest_batch_needs_two_different_batches():
    twice = suite.SuiteSettings(batches=(8, 8), resolutions=(0,))
    reports = {'sample a batch 8': sampling_report(8, 90)}
    assert not list(suite._largest_jobs({'a': Run()}, twice, reports))


def test_suite_resumes_and_tries_failed_jobs_again(tiny, tmp_path, monkeypatch, capsys):
    started = []

    def run_worker(job, task, cache, on_progress, profile=None):
        started.append((type(job).__name__, task))
        if isinstance(job, process.TrainingJob):
            raise UserError('out of memory')
        return {'start': {'compile_seconds': 1.0, 'stages': {'first result': 2.5}}} | fake

    fake = {
        'pixels': 4,
        'time': {'p50_seconds': 1.0, 'p95_seconds': 1.1, 'images_per_second': 1.0},
        'parts': {'program': {'gflops': 5.0, 'matrix_rate_share': 0.5, 'read_rate_share': 0.25}},
        'memory': {'weights': 1.0, 'temporaries': 0.0, 'limit': 8.0, 'process_peak': 2.0},
        'environment': machine.describe() | {'load': [0, 0]},
    }
    monkeypatch.setattr(process, 'run_worker', run_worker)
    monkeypatch.setenv('COLUMNS', '160')
    words = ['suite', str(tiny), '--resolutions', '0', '--trained', '0']
    words += ['--out', str(tmp_path), '--batches', '1', '8', '--no-largest']
    assert bench.main(words) == 0
    output = capsys.readouterr().out
    assert 'sample tiny batch 8' in output and 'train tiny batch 16: out of memory' in output
    assert started == [
        ('SamplingJob', 'measure'),
        ('SamplingJob', 'start'),
        ('SamplingJob', 'measure'),
        ('TrainingJob', 'measure'),
    ]
    assert bench.main(words) == 0 and started[4:] == [('TrainingJob', 'measure')]  # again
    with pytest.raises(UserError, match='other settings .dtype: "bfloat16" -> "float32".*--out'):
        bench.main([*words, '--dtype', 'float32'])
    table = (tmp_path / 'report.md').read_text()
    assert (
        '| sample tiny batch 1 | 1 | 1.10 | 1 | 0.005 | 50.0% | 25.0% | 1.0 / 1.0 | 2.5 / 2.5 | 2 |'
        in table
    )


@pytest.fixture
def started(monkeypatch):
    """The batches of the jobs that a suite starts, of which none is measured."""
    batches = []

    def run_worker(job, *args):
        batches.append(job.batch)
        memory = {'weights': 1.0, 'temporaries': 1.0, 'limit': 1e9}
        return {'start': {}, 'parts': {'program': {'read_rate_share': 0.5}}, 'memory': memory}

    monkeypatch.setattr(process, 'run_worker', run_worker)
    return batches


SMALL = suite.SuiteSettings(resolutions=(256,), trained=(), batches=(1, 2))


def measure_suite(out: Path, *models: Family) -> suite.Reports:
    runs = {f'model{number}': Run(model=model) for number, model in enumerate(models)}
    return suite.measure(runs, SMALL, out, 1.0, lambda line: None)


def test_suite_finds_every_mistake_before_it_starts_a_job(started, tmp_path):
    with pytest.raises(UserError, match='LlamaGen has .* give .* --resolutions 0 --trained 0'):
        measure_suite(tmp_path, Star(), LlamaGen())
    config.write_json(tmp_path / 'sample_model1_256_px_batch_2.json', [])
    with pytest.raises(UserError, match='batch_2.json holds no report of a benchmark: give'):
        measure_suite(tmp_path, Star(), Star())
    assert not started


def test_suite_keeps_its_reports_where_the_largest_batch_fits_nowhere(started, tmp_path):
    *reports, largest = measure_suite(tmp_path, Star()).values()
    assert [report['job']['batch'] for report in reports] == [1, 2] and started == [1, 1, 2]
    assert largest.keys() == {suite.FAILED} and 'would take' in largest[suite.FAILED]


def test_suite_refuses_reports_of_an_earlier_version(tmp_path):
    job = sampling.SamplingJob(model=Star(), dtype='bfloat16')
    path = tmp_path / 'report.json'
    config.write_json(path, {'job': config.to_json(job), 'parts': {'program': {'gflops': 5.0}}})
    with pytest.raises(UserError, match='another version measured it: give another --out'):
        suite._read_report(path, job)


def test_time_in_turn_warms_up_and_alternates():
    log = []
    calls = {name: lambda name=name: log.append(name) or np.zeros(()) for name in 'ab'}
    seconds = timing.time_in_turn(calls, repeats=2)
    assert all(seconds[name].shape == (2,) and (seconds[name] >= 0).all() for name in 'ab')
    turns = [name for name, _ in itertools.groupby(log)]
    assert turns == ['a', 'b'] * 3


def test_percentiles_are_those_of_single_runs():
    """One run in ten is slow: means of runs back to back would hide it."""
    runs = itertools.count()
    seconds = timing.time_in_turn(
        {'program': lambda: time.sleep(0.02 * (next(runs) % 10 == 0))}, repeats=30
    )['program']
    latencies = timing.percentiles(seconds)
    assert latencies['p50_seconds'] < 0.01 and latencies['p95_seconds'] > 0.015


def test_rates_of_a_machine_are_means_over_runs_back_to_back():
    runs = []
    seconds = timing.time_in_turn({'rate': lambda: runs.append(0)}, 2, averaged=('rate',))
    assert seconds['rate'].shape == (2,) and len(runs) > 100


@pytest.mark.parametrize('count', [1, 8])
def test_rates_are_those_of_all_devices_of_the_work(count, monkeypatch):
    monkeypatch.setattr(timing, 'SIDE', 64)
    monkeypatch.setattr(timing, 'READ', 2**20)
    devices = jax.devices()[:count]
    product, read = timing.matrix_product('float32', devices), timing.read(devices)
    assert product.amount == count * 2 * 64**3 and read.amount == 2**20
    for rate, shape in ((product, (count, 64, 64)), (read, (count, timing.SUMS))):
        result = rate.call()
        assert result.devices() == set(devices) and result.shape == shape
    np.testing.assert_array_equal(product.call()[-1], np.full((64, 64), 64.0))
    np.testing.assert_array_equal(read.call().sum(), 2**18)


def test_cache_that_must_be_read_has_the_rows_before_each_step():
    model = Star(depth=2, width=16, heads=2, sides=(1, 2, 3), text_width=8)
    per_row = 2 * 2 * 16 * 4  # keys and values, layers, channels, float32
    assert sampling.cache_read(model.build(), rows=6, steps=3) == 6 * per_row * (0 + 1 + 5)
    assert sampling.cache_read(model.build(), rows=6, steps=2) == 6 * per_row * (0 + 1)


@pytest.mark.parametrize(
    'words, message',
    [
        (
            [],
            'expected sample, train, buckets, attention, layers, torch, data or suite after bench',
        ),
        (['smaple'], "not 'smaple'"),
        (['sample', '--sweep', 'batch'], 'OPTION=A,B'),
        (['sample', '--sweep', 'sides="1 2'], 'No closing quotation'),
        (['sample', '--dtype', 'float16'], 'float32.*bfloat16'),
        (['attention', '--dtype', 'float64'], 'float32.*bfloat16'),
        (['suite', STAR, '--dtype', 'float16'], 'float32.*bfloat16'),
        (['sample', '--resolution', '300'], '256, 512, 1024'),
        (['train', '--repeats', '0'], 'at least 1'),
        (['attention', '--kernels', 'fast'], 'fast'),
        (['torch'], 'name the config of a LlamaGen model'),
        (['torch', 'configs/var_d16.py'], 'this model is a Pyramid'),
        (['torch', 'configs/llamagen_b.py', '--steps', '577'], 'an image has 576 steps'),
        (['data', '--batches', '0'], 'at least 1'),
        (['data', '--batches', str(10**20)], 'batches must be at most 100,000'),
        (['data', '--threads', str(10**9)], 'threads must be at most 1,024'),
        (['data', '--data.count', '9', '--size', '16', '--batch', str(10**12)], 'would take'),
        (['attention', '--repeats', str(10**20)], 'repeats must be at most 100,000'),
        (['attention', '--batch', str(10**12)], 'a batch of 1,000,000,000,000 images would take'),
        (['train', '--repeats', str(10**20)], 'repeats must be at most 100,000'),
        (['sample', '--repeats', str(10**20)], 'repeats must be at most 100,000'),
        (['suite', STAR, '--repeats', str(10**20)], 'repeats must be at most 100,000'),
        (['suite', '--minutes', '1'], 'name some'),
        (['suite', 'missing.py', '--resolutions', '300'], 'no published scales'),
        (['suite', 'missing.py', '--minutes', 'nan'], 'must be positive'),
        (['suite', STAR, STAR], 'two have the same name'),
        (['sample', 'missing.py'], 'missing.py'),
        (['sample', 'nowhere/at/all'], 'there is no such folder'),
        (['sample', '--batch', '0'], 'at least 1'),
    ],
)
def test_bench_reports_mistakes_in_one_sentence(words, message):
    with pytest.raises(UserError, match=message):
        bench.main(words)


@pytest.mark.parametrize(
    'job, options, message',
    [
        (sampling.SamplingJob, {'model': Star(), 'repeats': 10**20}, 'repeats must be at most'),
        (suite.SuiteSettings, {'repeats': 10**20}, 'repeats must be at most'),
        (data.Show, {'source': 'shapes', 'size': 0}, 'size must lie in'),
    ],
)
def test_jobs_and_options_of_python_callers_are_checked(job, options, message):
    with pytest.raises(UserError, match=message):
        job(**options)


def test_bench_refuses_an_existing_folder_of_programs(tiny, tmp_path):
    with pytest.raises(UserError, match='name a new folder'):
        bench.main(['sample', str(tiny), '--compilation-cache', str(tmp_path)])


def test_sample_takes_sizes_and_weights_of_a_model_folder(tmp_path):
    model = Star(depth=1, width=16, heads=2, sides=(1, 2), codes=32, channels=4, text_width=8)
    autoencoder = Autoencoder(width=8, multipliers=(1,), blocks=1, groups=2)
    job = sampling.SamplingJob(model=model, autoencoder=autoencoder, text_tokens=3)
    params = jax.device_get(job.prepare().main.args[0])
    tokenizer = folder.StoredTokenizer(config=job.tokenizer, params=params['tokenizer'])
    content = folder.StoredModel(
        config=model, params=params['model'], tokenizer=tokenizer, text=None
    )
    path = tmp_path / 'model'
    folder.write(path, content)

    _, job = bench.read_sampling(str(path), ['--batch', '3'])
    assert (job.model, job.autoencoder, job.batch) == (model, autoencoder, 3)
    loaded = dataclasses.replace(job, text_tokens=3).prepare().main.args[0]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    _, _, on_host = dataclasses.replace(job, dtype='bfloat16')._read()
    assert kernel_kinds(on_host) == {(np.ndarray, 'bfloat16')}

    (path / folder.MODEL).unlink()  # options are read without weights
    with pytest.raises(UserError, match='leave out depth: 1 -> 2'):
        bench.read_sampling(str(path), ['--depth', '2'])


def kernel_kinds(params: dict) -> set[tuple[type, str]]:
    """The types and dtypes of the kernels of all layers."""
    flat = weights.flatten(params['model']['blocks'])
    return {(type(x), str(x.dtype)) for name, x in flat.items() if name.endswith('kernel')}


def test_a_device_holds_weights_in_the_compute_dtype_alone(monkeypatch):
    put, model = [], LlamaGen(depth=2, width=16, heads=2, hidden=32, grid=(2, 2), codes=32)
    job = sampling.SamplingJob(model=model, dtype='bfloat16')
    monkeypatch.setattr(sampling, 'random_arrays', lambda shapes: put.append(shapes) or shapes)
    job.build()
    assert kernel_kinds(put[0]) == {(jax.ShapeDtypeStruct, 'bfloat16')}


def test_layers_are_timed_in_both_forms(tmp_path, capsys):
    model = LlamaGen(depth=2, width=16, heads=2, hidden=32, grid=(2, 2), codes=32)
    path = tmp_path / 'config.json'
    config.write_json(path, config.to_json(Run(model=model)))
    words = ['--repeats', '1', '--stop', '3', '--json', str(path)]
    assert bench.main(['layers', str(path), *words]) == 0
    report = json.loads(path.read_text())
    assert report['same_codes'] and report['steps'] == 3
    scanned, arranged = report['forms'].values()
    assert scanned['ratio'] == 1 and arranged['p50_seconds'] > 0
    assert scanned['matrix_rate_share'] > 0 and scanned['read_rate_share'] > 0
    assert 'sampled' in capsys.readouterr().out


def test_layers_of_a_pyramid_are_timed_where_their_weights_are_large(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='there is nothing to compare'):
        bench.main(['layers', str(tiny)])
    monkeypatch.setattr(weight_layout, 'LARGE', 0)
    path, words = tmp_path / 'layers.json', ['--depth', '2', '--repeats', '1', '--text-tokens', '3']
    assert bench.main(['layers', str(tiny), *words, '--json', str(path)]) == 0
    report = json.loads(path.read_text())
    assert report['same_codes'] and report['steps'] == 2
    with pytest.raises(UserError, match='samples every image alone: give --batch 1'):
        bench.main(['layers', str(tiny), '--released-cross-attention', '--batch', '2'])


def test_the_loop_without_pytorch_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(UserError, match='the loop needs PyTorch'):
        torch_loop.loop(Star(depth=1, width=8, heads=1), batch=1, steps=1)


def test_the_loop_is_compared_on_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    with pytest.raises(UserError, match='would run on a GPU: set JAX_PLATFORMS=cpu'):
        torch_loop.run(torch_loop.TorchLoopJob(model=LlamaGen(grid=(8, 8))))


def test_the_table_of_the_loop_names_its_threads():
    numbers = ('step_ms', 'loop_step_ms', 'ratio', 'read_gbytes_a_step')
    numbers += ('read_rate_gbytes', 'read_rate_share', 'compile_seconds')
    report = dict.fromkeys(numbers, 1.0) | {'batch': 1, 'threads': 16}
    assert 'on 16 threads' in bench_tables.torch_loop(report).title


def test_the_loop_uses_as_many_threads_as_the_program():
    torch = pytest.importorskip('torch')
    model = LlamaGen(depth=1, width=16, heads=2, hidden=32, grid=(2, 2), codes=32)
    assert torch_loop.loop(model, batch=1, steps=1)() > 0
    assert torch.get_num_threads() == mesh.cores()
