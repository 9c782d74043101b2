"""Is a study a fair comparison, and are its numbers those that the runs reported?"""

import dataclasses
import io
import json
import re
import shutil
import statistics
import weakref
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from star_jax import cli
from star_jax.checkpoint import config, weights
from star_jax.errors import NotFiniteError, UserError
from star_jax.nn.positions import Learned, NoPositions
from star_jax.studies import study, study_report, summary
from star_jax.training import train as story_of_a_run
from star_jax.training import trainer
from star_jax.training.run import Pace, Run
from star_jax.training.transformer_job import TransformerJob

STUDIED = Path(__file__).parents[1] / 'configs' / 'study'
SEEDS = (3, 4)
STEPS = 4


@pytest.fixture(scope='module', autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.setenv('COLUMNS', '100')
        yield


@pytest.fixture(scope='module')
def shared(tmp_path_factory) -> Run:
    place = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')
    pace = Pace(steps=STEPS, log=2, sample=2, save=4)
    return dataclasses.replace(tiny.STAR, tokenizer=place, pace=pace)


@pytest.fixture(scope='module')
def home(shared, tmp_path_factory) -> Path:
    """Two configs, and a study of them."""
    home = tmp_path_factory.mktemp('home')
    config.write(home / 'rotary.json', shared)
    config.write(home / 'learned.json', with_model(shared, positions=Learned()))
    jobs, build, train = [], story_of_a_run.build_job, story_of_a_run.main

    def remember(run: Run) -> TransformerJob:
        job = build(run)
        jobs.append(weakref.ref(job))
        return job

    def train_or_invent(run: Run, out: Path, *how: object) -> bool:
        """The first seed's runs are real, and the others as if they had gone a little worse."""
        if run.seed == SEEDS[0]:
            return train(run, out, *how)
        first = out.with_name(f'seed-{SEEDS[0]}')
        shutil.copytree(first / 'model', out / 'model')
        config.write(out / 'config.json', run)
        lines = map(json.loads, (first / 'metrics.jsonl').read_text().splitlines())
        worse = [{k: v if k == 'step' else 1.1 * v for k, v in line.items()} for line in lines]
        (out / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in worse))
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerJob, 'sample_grid', pytest.fail)
        patch.setattr(trainer, '_print_summary', lambda *_: None)  # traces a step to count its work
        patch.setattr(story_of_a_run, 'build_job', remember)
        patch.setattr(story_of_a_run, 'main', train_or_invent)
        status, out, err = star_jax(*words(home))
    assert status == 0, err
    assert len(jobs) == 4 and not any(job() for job in jobs), 'what has ended leaves the memory'
    assert not list(home.glob('out/*/*/samples/*')), 'nobody looks at them'
    assert [f'run {n} of 4' in out for n in range(1, 6)] == [True] * 4 + [False]
    shutil.copytree(home / 'out', home / 'kept')
    return home


@pytest.fixture(scope='module')
def report(home) -> dict:
    return json.loads((home / 'out' / 'study.json').read_text())


def with_model(run: Run, **changes: object) -> Run:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def words(home: Path, *options: object) -> list:
    configs = [home / 'rotary.json', home / 'learned.json']
    return ['study', *configs, '--seeds', *SEEDS, '--out', home / 'out', *options]


def star_jax(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stopped:
            status = stopped.code
    return status, out.getvalue(), err.getvalue()


def complaint(*words: object) -> str:
    """The one sentence on stderr of a study that must be refused."""
    status, _, err = star_jax('study', *words)
    assert status == 2, err
    assert err.startswith('star-jax study: ') and err.count('\n') == 1, err
    return err


def lines(home: Path, name: str, seed: int) -> list[dict]:
    path = home / 'out' / name / f'seed-{seed}' / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(home: Path) -> dict[str, bytes]:
    return {name: (home / 'out' / name).read_bytes() for name in ('study.json', 'study.md')} | {
        'study.png': (home / 'out' / 'study.png').read_bytes()
    }


# The numbers.


def test_report_holds_the_metrics_of_the_runs(home, report):
    final = {}
    for run in report['runs']:
        reported = lines(home, run['config'], run['seed'])
        held_out = [line for line in reported if 'validation/loss' in line]
        assert run['curve'] == [[line['step'], line['validation/loss']] for line in held_out]
        assert {f'validation/{name}': x for name, x in run['final'].items()} | {
            'step': STEPS
        } == held_out[-1]
        assert {'loss', 'accuracy', 'loss/0', 'loss/2', 'accuracy/1'} <= run['final'].keys()
        speeds = [line['images_per_second'] for line in reported if 'images_per_second' in line]
        assert run['images_per_second'] == statistics.median(speeds)
        final[run['config'], run['seed']] = run['final']
    assert config.read(home / 'out' / 'learned' / 'seed-4' / 'config.json', Run).seed == 4
    assert [*final] == [(name, seed) for seed in SEEDS for name in ('rotary', 'learned')]
    first, other = report['outcomes']
    for name, score in other['scores'].items():
        ours, theirs = (
            np.array([final[which, seed][name] for seed in SEEDS])
            for which in ('learned', 'rotary')
        )
        assert score['mean'] == pytest.approx(ours.mean())
        assert score['deviation'] == pytest.approx(ours.std(ddof=1))
        assert score['difference'] == pytest.approx((ours - theirs).mean())
        assert score['low'] <= score['difference'] <= score['high']
        assert first['scores'][name]['difference'] is None
    assert other['parameters'] - first['parameters'] == 21 * 32, 'the learned table'
    assert other['differences'] == ['model.positions: NormalisedRotary -> Learned']


def test_tables_print_the_metrics(home, report):
    page = (home / 'out' / 'study.md').read_text()
    for one in report['outcomes']:
        loss = one['scores']['loss']
        row = next(line for line in page.splitlines() if line.startswith(f'| {one["config"]} |'))
        assert f'{loss["mean"]:.3f} ± {loss["deviation"]:.3f}' in row
        assert f'{one["scores"]["loss/2"]["mean"]:.3f} ±' in page
        assert f'| {one["parameters"]:,} | {one["images_per_second"]:.1f} |' in page
    assert '2 seeds are few' in page and 'model.positions: NormalisedRotary -> Learned' in page


def test_interval_is_students():
    score = summary.compare({1: 1.1, 2: 2.3, 5: 3.2}, {1: 1.0, 2: 2.0, 5: 3.0})
    # Differences 0.1, 0.3, 0.2: mean 0.2, deviation 0.1; t is 4.3027 at two degrees of freedom.
    assert (score.low, score.high) == pytest.approx(
        (0.2 - 4.3027 * 0.1 / 3**0.5, 0.44841), abs=1e-5
    )
    assert not score.excludes_zero
    assert summary.compare({1: 1.5, 2: 2.5, 3: 3.51}, {1: 1.0, 2: 2.0, 3: 3.0}).excludes_zero
    alone = summary.compare({1: 1.5}, {1: 1.0})
    assert alone == summary.Comparison(
        mean=1.5, deviation=None, difference=0.5, low=None, high=None
    )


def test_comparison_pairs_common_seeds():
    score = summary.compare({1: 1.1, 3: 9.0}, {1: 1.0, 2: 5.0})
    assert (score.mean, score.difference) == (pytest.approx(5.05), pytest.approx(0.1))
    assert score.low is None
    assert summary.compare({1: 1.1}, {}).difference is None


# Going on.


def test_finished_study_only_writes_the_same_report(home, monkeypatch):
    before = files(home)
    assert before['study.png'].startswith(b'\x89PNG')
    for name in before:
        (home / 'out' / name).unlink()
    monkeypatch.setattr(story_of_a_run, 'main', pytest.fail)
    status, out, _ = star_jax(*words(home))
    assert status == 0 and 'run 1 of 4' not in out
    assert files(home) == before


def test_only_missing_runs_are_trained(home, report, monkeypatch):
    """A run deleted, one stopped before its model was written."""
    shutil.rmtree(home / 'out' / 'learned' / 'seed-3')
    shutil.rmtree(home / 'out' / 'rotary' / 'seed-4' / 'model')
    trained = train_from_memory(monkeypatch, home)
    status, out, _ = star_jax(*words(home))
    assert status == 0
    assert trained == ['learned/seed-3', 'rotary/seed-4']
    assert 'run 3 of 4' in out and 'run 4 of 4' in out
    again = json.loads((home / 'out' / 'study.json').read_text())
    assert scores(again) == scores(report)


def test_stopped_run_stops_the_study(home, monkeypatch):
    shutil.rmtree(home / 'out' / 'rotary' / 'seed-3' / 'model')
    before = files(home)
    with monkeypatch.context() as patch:
        patch.setattr(story_of_a_run, 'main', lambda *_: False)
        status, out, _ = star_jax(*words(home))
    assert status == 0 and 'the same command continues it' in out
    assert files(home) == before
    train_from_memory(monkeypatch, home)
    assert star_jax(*words(home))[0] == 0
    assert files(home) == before


def test_non_finite_run_is_named_and_the_others_continue(home, report, monkeypatch):
    """The first config's, so that the others have one seed less to be compared with."""
    shutil.rmtree(home / 'out' / 'rotary' / 'seed-3')
    shutil.rmtree(home / 'out' / 'learned' / 'seed-4')
    trained = train_from_memory(monkeypatch, home, failing='rotary/seed-3')
    status, out, _ = star_jax(*words(home))
    assert (status, trained) == (0, ['rotary/seed-3', 'learned/seed-4'])
    assert 'lower the rate' in out and 'rotary, seed 3' in out and 'step 2: loss is nan' in out
    again = json.loads((home / 'out' / 'study.json').read_text())
    first, other = again['outcomes']
    assert first['failures'] == {'3': 'step 2: loss is nan'} and not other['failures']
    assert first['scores']['loss']['mean'] == report['runs'][2]['final']['loss']
    assert other['scores']['loss']['mean'] == report['outcomes'][1]['scores']['loss']['mean']
    assert '| rotary (1 of 2) |' in (home / 'out' / 'study.md').read_text()
    assert star_jax(*words(home))[0] == 0 and len(trained) == 2, 'it would come to the same end'
    shutil.rmtree(home / 'out' / 'rotary' / 'seed-3')
    train_from_memory(monkeypatch, home)
    assert star_jax(*words(home))[0] == 0
    assert json.loads((home / 'out' / 'study.json').read_text()) == report


def test_study_without_a_finished_run_is_reported(home, monkeypatch):
    trained = train_from_memory(monkeypatch, home, failing='rotary/seed-3')
    options = ['--seeds', '3', '--out', home / 'lost']
    status, out, _ = star_jax('study', home / 'rotary.json', *options)
    assert status == 0 and trained == ['rotary/seed-3'] and 'step 2: loss is nan' in out
    assert not (home / 'lost' / 'study.png').exists()


def test_a_damaged_report_is_told(home):
    path = home / 'out' / 'learned' / 'seed-4' / 'metrics.jsonl'
    whole = path.read_text()
    for torn in (whole[: len(whole) // 2], '\n'.join(whole.splitlines()[:-1])):
        path.write_text(torn)
        assert 'learned/seed-4' in complaint(*words(home)[1:])
    path.write_text(whole)


def train_from_memory(monkeypatch, home: Path, failing: str = '') -> list[str]:
    """The runs that are trained from now on; each ends as the same run ended before, or fails."""
    trained = []

    def end(run: Run, out: Path, *_: object) -> bool:
        trained.append(f'{out.parent.name}/{out.name}')
        if trained[-1] == failing:
            raise NotFiniteError('step 2: loss is nan: lower the rate', 'step 2: loss is nan')
        shutil.copytree(home / 'kept' / trained[-1], out, dirs_exist_ok=True)
        return True

    monkeypatch.setattr(story_of_a_run, 'main', end)
    return trained


def scores(report: dict) -> list:
    return [(run['config'], run['seed'], run['final'], run['curve']) for run in report['runs']]


# Equal conditions.


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'batch': 16}, 'batch: 8 -> 16'),
        ({'data': dataclasses.replace(tiny.DATA, count=40)}, 'data.count'),
        ({'validation': tiny.DATA}, 'validation'),
        ({'pace': Pace(steps=5, log=2, sample=2, save=2)}, 'pace.steps'),
        ({'optimizer': dataclasses.replace(tiny.OPTIMIZER, clip=1.0)}, 'optimizer.clip'),
        ({'tokenizer': 'another'}, 'tokenizer'),
        ({'text': 'another'}, 'text'),
        ({'caption_drop': 0.0}, 'caption_drop'),
    ],
)
def test_unequal_conditions_are_refused(shared, changes, named):
    with pytest.raises(UserError, match=named):
        study.Study(configs={'a': shared, 'b': dataclasses.replace(shared, **changes)}, seeds=(0,))


def test_another_task_is_refused_and_another_model_is_not(shared):
    with pytest.raises(UserError, match='model.sides'):
        study.Study(configs={'a': shared, 'b': with_model(shared, sides=(1, 4))}, seeds=(0,))
    other = dataclasses.replace(with_model(shared, depth=1, qk_norm=False), seed=9)
    asked = study.Study(configs={'a': shared, 'b': other}, seeds=(0,))
    assert asked.differences()['b'] == ['model.depth: 2 -> 1', 'model.qk_norm: true -> false']


@pytest.mark.parametrize(
    ('words', 'named'),
    [
        (lambda home: [], 'expected configs'),
        (lambda home: [home / 'none.py'], 'none.py'),
        (lambda home: [home / 'rotary.json', home / 'rotary.json'], "'rotary'"),
        (lambda home: [home / 'rotary.json', '--seeds', '1', '1'], 'seeds'),
        (lambda home: [home / 'rotary.json', '--seeds', '-1'], 'seeds'),
        (lambda home: [home / 'rotary.json', '--seed', '7'], '--seeds'),
        (lambda home: [home / 'rotary.json', '--batch', '0'], 'batch'),
        (lambda home: [home / 'unfit.json', '--out', home / 'unfit'], 'model.codes is 16'),
        (lambda home: words(home, '--batch', '16')[1:], 'batch: 8 -> 16'),
    ],
)
def test_what_cannot_be_studied_is_told_before_anything_trains(home, shared, words, named):
    config.write(home / 'unfit.json', with_model(shared, codes=16))
    assert named in complaint(*words(home))
    assert not (home / 'unfit').exists()


def test_unknown_options_exit_with_2(home):
    status, _, err = star_jax('study', home / 'rotary.json', '--bach', '4')
    assert status == 2 and '--bach' in err
    status, out, _ = star_jax('study', '--help')
    assert status == 0 and '--seeds' in out and 'star-jax study configs/' in out


def test_seed_has_the_same_meaning_for_every_config(shared):
    """The first weights of all that two models share; the order of data is the seed's alone."""
    jobs = [
        TransformerJob(with_model(dataclasses.replace(shared, seed=5), **changes))
        for changes in ({}, {'positions': NoPositions(), 'level_embedding': False})
    ]
    levels, plain = (weights.flatten(jax.device_get(job.init().params)) for job in jobs)
    assert levels.keys() - plain.keys() == {'levels'}
    for name, array in plain.items():
        np.testing.assert_array_equal(array, levels[name], err_msg=name)


# The tables, the plot, and the configs that come with the project.


@pytest.mark.parametrize('scales', [4, 10])
def test_tables_fit_a_terminal(scales):
    columns = ['config', *[f'scale {scale}' for scale in range(scales)]]
    row = ['rotary_without_levels', *['5.123 ± 0.012'] * scales]
    cells = study_report.Cells(title='Held-out loss by scale', columns=columns, rows=[row, row])
    report = io.StringIO()
    console = Console(file=report, width=200)
    for table in cells.for_terminal():
        console.print(table)
    text = report.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert re.findall(r'scale \d', text) == columns[1:]
    assert text.count('5.123 ± 0.012') == 2 * scales


def test_names_of_lines_do_not_overlap():
    assert study_report.spread([0.2, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.5, 0.9])
    assert study_report.spread([0.5, 0.52, 0.5], 0.1) == pytest.approx(
        [0.406667, 0.606667, 0.506667]
    )
    crowded = study_report.spread([1.0] * 5 + [0.0] * 5, 0.1)
    assert min(np.diff(np.sort(crowded))) >= 0.1 - 1e-9
    assert min(crowded) >= 0 and max(crowded) <= 1 + 1e-9


def test_one_point_and_one_seed_are_plotted(tmp_path):
    study_report.plot({'a': [[(5, 1.0)]], 'b': [[(5, 1.0)]]}, '1 seed', tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 1000


def test_shipped_study_compares_positions_only():
    runs = {path.stem: config.load_run(path, Run) for path in sorted(STUDIED.glob('*.py'))}
    asked = study.Study(configs=runs, seeds=(0, 1, 2))
    assert next(iter(runs)) == 'rotary_normalised'
    assert asked.differences() == {
        'rotary_normalised': [],
        'rotary_raw': ['model.positions: NormalisedRotary -> RawRotary'],
        'rotary_without_levels': ['model.level_embedding: true -> false'],
        'table_learned': ['model.positions: NormalisedRotary -> Learned'],
        'table_sincos': ['model.positions: NormalisedRotary -> SinCos'],
        'without_positions': ['model.positions: NormalisedRotary -> NoPositions'],
    }
