"""Are units made once and whole, and does a report call what is there, and nothing else?"""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tiny
import xla_flags
from rich.console import Console

from star_jax import cli
from star_jax.checkpoint import config, folder, weights
from star_jax.core.schedule import Pyramid, square_grids
from star_jax.core.settings import Settings
from star_jax.errors import NotFiniteError, UserError
from star_jax.nn.positions import Learned, NoPositions, NormalisedRotary
from star_jax.studies import (
    curves,
    positions_report,
    provenance,
    starts,
    statistics,
    transfer,
    units,
)
from star_jax.studies import positions_unit as unit_module
from star_jax.studies.arms import KINDS, Arm, DataSet, LargerSize
from star_jax.studies.cost_result import CostResult, KindCost
from star_jax.studies.held_out import HeldOut
from star_jax.studies.positions import PositionsStudy, Stage
from star_jax.studies.positions_result import Carried, PositionsResult
from star_jax.studies.reference import ReferenceUnit
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.training.run import Pace

STUDY = Path(__file__).parents[1] / 'configs' / 'study' / 'positions.py'
SEEDS = (0, 1, 2)
STUDIES = 200
NOISE = 0.01
HARDWARE = {'cores': 2, 'device': 'cpu', 'jax': '0.10.2'}
TIMES = ('hardware', 'seconds')  # fields of a result that a second making may change


@pytest.fixture(scope='module', autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.setenv('COLUMNS', '100')
        yield


def star_jax(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stopped:
            status = stopped.code
    return status, out.getvalue(), err.getvalue()


def error_of(*words: object) -> str:
    """The one sentence on stderr of a command that must be refused."""
    status, _, err = star_jax(*words)
    assert status == 2, err
    assert err.count('\n') == 1, err
    return err


# Synthetic units


def synthetic(arm: str, seed: int, loss: float, **changes: object) -> PositionsResult:
    """A unit whose losses are all `loss`, and whose share of right images is half of it."""
    kind, _, without = arm.partition(',')
    held_out = HeldOut(step=10, loss=loss, accuracy=0.5, scales=(loss, loss))
    aligned = tuple(
        unit_module.Aligned(objects=n, count=250, all=loss / 2, number=0.5, colours=0.5, shapes=0.5)
        for n in (1, 2)
    )
    larger = Carried(
        size=128,
        steps=312,
        before=held_out,
        after=held_out,
        aligned_before=aligned,
        aligned_after=aligned,
    )
    fields = {
        'study': 'positions',
        'kind': kind,
        'level_embedding': not without,
        'seed': seed,
        'data': 'shapes',
        'commit': 'abc',
        'images': 100,
        'hardware': ({'cores': 2, 'device': 'cpu', 'jax': '0.10.2'},),
        'positions': KINDS[kind](),
        'settings': 'same',
        'tokenizer': 'sha',
        'parameters': 1,
        'curve': (held_out,) * 10,
        'area': loss,
        'fall': 0.0,
        'aligned': aligned,
        'larger': larger,
    }
    return PositionsResult(**(fields | changes))


def synthetic_study(random: np.random.Generator, effects: dict[str, float]) -> list:
    """All units of a study whose arms differ by these effects only."""
    offsets = random.normal(scale=10 * NOISE, size=len(SEEDS))
    return [
        synthetic(arm, seed, 1 + effects.get(arm, 0) + offsets[seed] + random.normal(scale=NOISE))
        for arm in positions_report.ARMS
        for seed in SEEDS
    ]


def test_null_studies_are_called_in_seven_percent_at_most():
    random = np.random.default_rng(0)
    called = sum(
        any(
            answer.adjusted < statistics.ERROR_RATE
            for answer in positions_report.answers(synthetic_study(random, {}))
        )
        for _ in range(STUDIES)
    )
    assert called <= 0.07 * STUDIES


def test_an_interval_covers_the_true_difference_in_95_percent():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(STUDIES):
        results = synthetic_study(random, {'normalised': -0.005})
        scores = {(one.arm, one.seed): one.area for one in results}
        found = statistics.difference(scores, 'normalised', 'learned')
        assert found.freedom == 18  # 30 units, 10 arms, 3 seeds
        covered += found.low <= -0.005 <= found.high
    assert 0.92 * STUDIES <= covered <= 0.98 * STUDIES


def test_a_known_difference_is_found_and_given_a_verdict():
    effects = {'normalised': -0.2, 'raw': 0.2, 'normalised, no levels': -0.5}
    results = synthetic_study(np.random.default_rng(6), effects)
    answers = positions_report.answers(results)
    assert [answer.verdict for answer in answers] == [
        'confirmed',  # area: normalised below learned
        'confirmed',  # at the larger size: normalised below raw
        'refuted',  # without levels: lower instead of higher
        'left open',  # rounded: no difference
        'refuted',  # area: raw above learned
        'refuted',  # final loss of raw and learned: not the same
        'refuted',  # alignment, here half the loss: lower
    ]
    first = answers[0].found
    assert first.low < -0.2 < first.high and first.p < 1e-6


def test_same_means_an_interval_within_the_margin():
    (claim,) = [claim for claim in positions_report.CLAIMS if claim.expected == 'same']

    def verdict(low: float, high: float, p: float) -> str:
        found = statistics.Difference(value=(low + high) / 2, low=low, high=high, p=p, freedom=18)
        return claim.verdict(found, p)

    assert verdict(0.001, 0.019, 0.01) == 'confirmed'
    assert verdict(-0.03, 0.01, 0.5) == 'left open'
    assert verdict(0.03, 0.05, 0.001) == 'refuted'
    assert verdict(0.015, 0.05, 0.001) == 'left open'


def test_differences_by_seed_are_of_the_seeds_that_both_arms_have():
    scores = {('a', 1): 3.0, ('a', 0): 1.0, ('a', 2): 9.0, ('b', 0): 4.0, ('b', 1): 5.0}
    assert statistics.by_seed(scores, 'a', 'b') == (-3.0, -2.0)


def test_holm_steps_down():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []


def test_an_arm_without_units_is_not_measured():
    results = [one for one in synthetic_study(np.random.default_rng(3), {}) if one.kind != 'raw']
    answers = positions_report.answers(results)
    assert [answer.verdict == 'not measured' for answer in answers] == [
        'raw' in (answer.claim.first, answer.claim.second) for answer in answers
    ]
    assert positions_report.answers([]) and statistics.difference({}, 'a', 'b') is None


# Reports


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder with the files of a synthetic study, and of a failed unit."""
    place = tmp_path / 'results'
    place.mkdir()
    for one in synthetic_study(np.random.default_rng(4), {'learned': 0.2}):
        config.write(place / f'{one.arm}-{one.seed}.json', one)
    failed = {'curve': (), 'area': None, 'fall': None, 'aligned': (), 'larger': None}
    one = synthetic('none', 7, 1.0, failure='step 7: loss is nan', **failed)
    config.write(place / 'failed.json', one)
    return place


def change(path: Path, **fields: object) -> None:
    config.write_json(path, config.read_json(path) | fields)


def test_report_writes_tables_numbers_and_curves(results, tmp_path):
    status, out, err = star_jax('study', 'report', results, '--out', tmp_path / 'report')
    assert status == 0, err
    numbers = config.read_json(tmp_path / 'report.json')
    assert len(numbers['units']) == 31 and len(numbers['primary']) == 7
    assert numbers['primary'][0]['verdict'] == 'confirmed'
    tables = (tmp_path / 'report_tables.md').read_text()
    assert 'rounded, no levels' in tables and 'step 7: loss is nan' in tables
    assert '128 px' in tables and 'abc' in tables
    assert (tmp_path / 'report.png').read_bytes().startswith(b'\x89PNG')
    assert 'Primary comparisons' in out
    kept = {path.name: path.read_bytes() for path in tmp_path.glob('report*')}
    assert star_jax('study', 'report', results, '--out', tmp_path / 'report')[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob('report*')} == kept


def test_report_adds_the_cost_of_a_step(results, tmp_path):
    one = KindCost(
        seconds=0.1, seconds_per_image=0.025, ratio=1.5, ratios=(1.4, 1.5, 2.0), gflop=9, bytes=0
    )
    path, out = tmp_path / 'cost.json', tmp_path / 'report'
    training = {'4 images a step': {'raw': one}}
    fields = {'commit': 'abc', 'hardware': HARDWARE, 'rounds': 3, 'text_tokens': 8, 'sampling': {}}
    cost = CostResult(study='positions', training=training, **fields)
    config.write(path, cost)
    words = ('study', 'report', results, '--out', out, '--cost', path)
    status, _, err = star_jax(*words)
    assert status == 0, err
    row = ['raw', '25.00', '1.500 (1.400 to 2.000)', '9.00', '0.0']
    assert f'| {" | ".join(row)} |' in (tmp_path / 'report_tables.md').read_text()
    numbers = config.read_json(tmp_path / 'report.json')
    assert numbers['cost'] == config.read_json(path)
    assert numbers['tables'][-1]['rows'] == [row]
    path.write_text('{"rounds": 3}')
    assert 'expected a file of `star-jax study cost`' in error_of(*words)
    config.write(path, dataclasses.replace(cost, study='families'))
    assert "is the cost of the study 'families', and the units are of 'positions'" in error_of(
        *words
    )
    with pytest.raises(UserError, match='a part has no kinds'):
        dataclasses.replace(cost, sampling={'1 at once': {}})


@pytest.mark.parametrize(
    ('fields', 'sentence'),
    [
        ({'commit': 'def'}, 'units of 2 different commits (abc, def)'),
        ({'settings': 'other'}, '2 different settings'),
        ({'tokenizer': 'other'}, '2 different tokenizers'),
        ({'kind': 'rotten'}, "there is no kind 'rotten' of positions"),
        ({'positions': {'kind': 'Learnt'}}, 'Learnt'),
        ({'positions': {'kind': 'NormalisedRotary', 'theta': 5.0}}, 'have different positions'),
        ({'study': 'colours'}, "a unit of the study 'colours'"),
        ({'curve': []}, 'the curve has 0 points, expected 10'),
        ({'area': 'low'}, 'area'),
        ({'seed': 1}, 'seed 1 has two files'),
    ],
)
def test_report_refuses_units_that_do_not_compare(results, fields, sentence):
    change(results / 'normalised-0.json', **fields)
    error = error_of('study', 'report', results)
    assert sentence.replace('settingss', 'settings') in error, error


def test_report_names_a_damaged_file_and_what_to_do(results, tmp_path):
    (results / 'normalised-0.json').write_text('{"study": "posi')
    assert 'normalised-0.json is damaged' in (error := error_of('study', 'report', results))
    assert '`star-jax study run` makes this unit again' in error
    assert 'has no results of units' in error_of('study', 'report', tmp_path / 'nowhere')


def test_the_words_after_study_are_checked(tmp_path):
    assert 'expected one of run, report, cost' in error_of('study')
    assert "not 'rnu'" in error_of('study', 'rnu')
    empty = tmp_path / 'empty.py'
    empty.write_text('study = 3')
    assert 'expected a study' in error_of('study', 'run', empty)
    named = (
        'from types import SimpleNamespace\n'
        'study = SimpleNamespace(name={name}, units=[], timed_runs={runs}, timed_samplers={{}})\n'
    )
    for words, name, runs, sentence in (
        ('run', '3', '{}', 'expected a study, with a name'),
        ('run', '"a/b"', '{}', "the study is called 'a/b', expected a name for files"),
        ('cost', '"a"', '3', 'expected a study, with a name, units, timed_runs'),
        ('cost', '"a"', '{"raw": 3}', 'expected a study, with a name, units, timed_runs'),
        ('cost', '"a"', '{}', 'the study a has no runs to time'),
    ):
        empty.write_text(named.format(name=name, runs=runs))
        assert sentence in error_of('study', words, empty)
    empty.write_text('')
    assert "defines no 'study'" in error_of('study', 'run', empty)
    assert 'there is no unit' in error_of('study', 'run', STUDY, '--only', 'shapes-raw-9')


# The shipped study


def test_the_study_is_the_registered_one(tmp_path):
    study = units.load(STUDY)
    names = [unit.name for unit in study.units]
    assert names[:3] == ['shapes-reference', 'shapes-normalised-0', 'shapes-rounded-0']
    assert len(names) == 1 + 21 + 9 + 6 + 6
    assert {unit.data.settings for unit in study.units if unit.data.name == 'shapes'} == {
        study.units[0].data.settings
    }
    first = study.units[1]
    run, larger = first.run, first.larger_run(Path('init'))
    assert run.pace.steps * run.batch == 100_000 and run.model.schedule.length == 103
    assert larger.model.schedule.length == 359 and larger.data.count == 312 * 16
    rates = [float(larger.optimizer.learning_rate.at(step, 312)) for step in (0, 100, 311)]
    assert rates == pytest.approx([2e-4] * 3)
    status, out, _ = star_jax('study', 'run', STUDY, '--list', '--results', tmp_path)
    assert status == 0 and out.split() == names


def test_kinds_and_names_must_agree():
    with pytest.raises(UserError, match="no kind 'sinus'"):
        Arm(kind='sinus', positions=NoPositions())
    with pytest.raises(UserError, match='learned are Learned, not NoPositions'):
        Arm(kind='learned', positions=NoPositions())
    with pytest.raises(UserError, match='seeds must be different, not 1, 0, 1$'):
        Arm(kind='learned', positions=Learned(), seeds=(1, 0, 1))
    twice = Stage(data=tiny_data(), arms=(Arm(kind='none', positions=NoPositions()),) * 2)
    with pytest.raises(UserError, match="two units are called 'tiny-none-0'"):
        PositionsStudy(stages=(twice,))


# Carried to a larger size


def test_a_level_is_copied_and_learned_rows_are_interpolated():
    small, large = (Pyramid(square_grids(sides)) for sides in ((1, 2), (1, 2, 4)))
    table_LD = np.arange(5 * 3, dtype=np.float32).reshape(5, 3)
    params = {'levels': np.arange(2.0)[:, None], 'table': {'table': table_LD}, 'other': np.ones(2)}
    extended = transfer.extend(params, small, large)
    assert extended['levels'][:, 0].tolist() == [0, 1, 1]
    rows_RD = extended['table']['table']
    assert np.array_equal(rows_RD[:5], table_LD) and rows_RD.shape == (21, 3)
    # torch.nn.functional.interpolate(mode='bilinear', align_corners=False), first row of channel 0
    assert rows_RD[5:9, 0].tolist() == pytest.approx([3.0, 3.75, 5.25, 6.0])
    assert np.array_equal(extended['other'], params['other'])
    with pytest.raises(UserError, match='the same grids and one more'):
        transfer.extend(params, small, Pyramid(square_grids((1, 3, 4))))


# A unit


def tiny_data(tokenizer: str = '', sampled: int = 0) -> DataSet:
    pace = Pace(steps=10, log=1, sample=100, save=2, keep=1)
    return DataSet(
        name='tiny',
        run=dataclasses.replace(
            tiny.STAR, tokenizer=tokenizer, pace=pace, sampling=Settings(guidance=1.0, top_k=5)
        ),
        sampled=sampled,
        larger=LargerSize(sides=(1, 2, 4, 8), steps=2),
    )


def write_study(place: Path) -> Path:
    """A study of two arms at 64 and 128 px, with an untrained tokenizer, as a file."""
    stem = Autoencoder(width=8, multipliers=(1, 1, 1), blocks=1, groups=4, stem=4)
    vq = dataclasses.replace(tiny.TOKENIZER.model, autoencoder=stem, phis=1)
    params = tiny.random_params(vq.abstract())
    folder.write(place / 'tokenizer', folder.StoredTokenizer(config=vq, params=params))
    arms = (
        Arm(kind='learned', positions=Learned(), seeds=(3,)),
        Arm(kind='normalised', positions=NormalisedRotary(theta=100, extent=32), seeds=(3,)),
    )
    data = tiny_data(str(place / 'tokenizer'), sampled=2)
    study = PositionsStudy(stages=(Stage(data=data, arms=arms),), codes=str(place / 'codes'))
    config.write(place / 'study.json', study)
    path = place / 'study.py'
    path.write_text(
        'from pathlib import Path\n'
        'from star_jax.checkpoint import config\n'
        'from star_jax.studies.positions import PositionsStudy\n'
        "study = config.read(Path(__file__).with_name('study.json'), PositionsStudy)\n"
    )
    return path


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
    """A folder with a study of one finished unit."""
    place = tmp_path_factory.mktemp('study')
    status, _, err = star_jax(*run_words(write_study(place), '--only', 'tiny-learned-3'))
    assert status == 0, err
    return place


def run_words(study: Path, *options: object) -> list:
    place = study.parent
    return [
        'study',
        'run',
        study,
        '--results',
        place / 'results',
        '--work',
        place / 'work',
        *options,
    ]


def lasting(path: Path) -> dict:
    """The fields of a result that making it again must not change."""
    return {name: x for name, x in config.read_json(path).items() if name not in TIMES}


@pytest.mark.slow
def test_a_unit_measures_everything_at_both_sizes(made):
    path = made / 'results' / 'tiny-learned-3.json'
    opening = ['study', 'kind', 'level_embedding', 'seed', 'data', 'commit', 'images', 'hardware']
    assert list(config.read_json(path))[:8] == opening
    result = config.read(path, PositionsResult)
    assert [point.step for point in result.curve] == list(range(1, 11))
    assert result.area == pytest.approx(np.mean([point.loss for point in result.curve]))
    assert result.fall == result.curve[7].loss - result.curve[9].loss
    assert [one.objects for one in result.aligned] == [1, 2]
    larger = result.larger
    assert larger.size == 128 and len(larger.before.scales) == 4 == len(larger.after.scales)
    assert larger.before.loss != larger.after.loss
    assert result.images == 80 and result.positions == Learned()
    trained = weights.flatten(folder.read(made / 'work/tiny-learned-3/trained/model').params)
    carried = weights.flatten(folder.read(made / 'work/tiny-learned-3/extended').params)
    assert {name for name in trained if trained[name].shape != carried[name].shape} == {
        'levels',
        'table/table',
    }


@pytest.mark.slow
def test_a_finished_unit_is_kept_and_a_damaged_one_made_again(made, monkeypatch):
    path = made / 'results' / 'tiny-learned-3.json'
    before = path.read_bytes()
    words = run_words(made / 'study.py', '--only', 'tiny-learned-3')
    with monkeypatch.context() as patch:
        patch.setattr(unit_module.PositionsUnit, 'measure', pytest.fail)
        assert star_jax(*words)[0] == 0 and path.read_bytes() == before
    first = lasting(path)
    path.write_bytes(before[:300])
    status, out, err = star_jax(*words)
    assert status == 0, err
    assert 'made again' in out and lasting(path) == first


@pytest.mark.slow
def test_what_a_unit_lacks_is_named_and_the_next_is_made(made, monkeypatch, tmp_path):
    study = units.load(made / 'study.py')
    tried = []

    def measure(self, work, console):
        tried.append(self.name)
        raise UserError('there is no such tokenizer')

    monkeypatch.setattr(unit_module.PositionsUnit, 'measure', measure)
    monkeypatch.setattr(ReferenceUnit, 'measure', measure)
    with pytest.raises(UserError, match='3 units could not be made .*no such tokenizer'):
        units.run(study, tmp_path / 'results', tmp_path / 'work', Console(quiet=True))
    assert tried == ['tiny-reference', 'tiny-learned-3', 'tiny-normalised-3']


@pytest.mark.slow
def test_a_unit_whose_loss_is_not_finite_is_recorded(made, monkeypatch, tmp_path):
    def measure(self, work):
        raise NotFiniteError('stopped', 'step 4: loss is nan')

    monkeypatch.setattr(unit_module.PositionsUnit, '_measure', measure)
    study = units.load(made / 'study.py')
    only = ['tiny-normalised-3']
    assert units.run(study, tmp_path / 'r', tmp_path / 'w', Console(quiet=True), only)
    result = config.read(tmp_path / 'r' / 'tiny-normalised-3.json', PositionsResult)
    assert result.failure == 'step 4: loss is nan' and not result.curve


@pytest.mark.slow
def test_a_killed_unit_continues_to_the_same_result(tmp_path):
    """Killed at different moments; every start goes on where the last one was killed."""
    path = write_study(tmp_path)
    command = [sys.executable, '-m', 'star_jax', *map(str, run_words(path))]
    command += ['--only', 'tiny-learned-3']
    environment = os.environ | {'XLA_FLAGS': xla_flags.QUICK}
    assert subprocess.run(command, env=environment).returncode == 0
    result = tmp_path / 'results' / 'tiny-learned-3.json'
    whole = lasting(result)
    work = tmp_path / 'work'
    for mark in ('trained/checkpoints/*', 'aligned.json', 'before.json', 'trained_larger/config*'):
        result.unlink(missing_ok=True)
        if mark.startswith('trained/'):
            work.rename(tmp_path / 'kept')
        process = subprocess.Popen(command, env=environment)
        while not list((work / 'tiny-learned-3').glob(mark)) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment).returncode == 0
    assert lasting(result) == whole


# Curves


def test_names_of_lines_keep_their_distance():
    moved = curves.spread([0.5, 0.51, 0.9], 0.1)
    assert np.diff(sorted(moved)).min() >= 0.1 - 1e-9
    assert moved[0] < moved[1] < moved[2]
    assert curves.spread([1.0, 1.0], 0.2) == pytest.approx([0.8, 1.0])


def test_once_computes_once_and_again_after_damage(tmp_path):
    path, calls = tmp_path / 'a' / 'once.json', []

    def compute() -> dict:
        calls.append(1)
        return {'x': 1 / 3}

    assert (
        units.once(path, {'n': 2}, compute) == units.once(path, {'n': 2}, compute) == {'x': 1 / 3}
    )
    for damaged in ('{"x": 0.3', 'null', '{"x": 1}'):
        path.write_text(damaged)
        calls.clear()
        assert units.once(path, {'n': 2}, compute) == {'x': 1 / 3} and len(calls) == 1
    assert units.once(path, {'n': 3}, compute) == {'x': 1 / 3} and len(calls) == 2


def test_a_folder_records_machines_and_seconds_of_all_starts(tmp_path, monkeypatch):
    def record(machine: str, now: float, commit: str = 'abc') -> list[str]:
        monkeypatch.setattr(starts.machine, 'describe', lambda: {'device': machine})
        monkeypatch.setattr(starts.time, 'time', lambda: now)
        return [one['device'] for one in starts.record(work, commit)]

    def leave(name: str, now: float) -> None:
        (work / name).write_text('')
        os.utime(work / name, (now, now))

    work = tmp_path / 'a' / 'work'
    assert record('idle', 100.0) == ['idle']
    assert record('first', 200.0, 'def') == ['first']  # no work was left by the other commit
    leave('checkpoint', 230.0)  # killed some time after it
    assert record('second', 300.0, 'def') == ['first', 'second']
    leave('model', 340.0)
    assert record('first', 400.0, 'def') == ['first', 'second']
    monkeypatch.setattr(starts.time, 'time', lambda: 405.0)
    assert starts.seconds(work) == 30 + 40 + 5
    with pytest.raises(UserError, match='has work of commit def, and this is commit abc, .*remove'):
        record('first', 500.0)
    assert len(config.read_json(work / starts.FILE)) == 3
    (work / starts.FILE).unlink()
    with pytest.raises(UserError, match='has work of an unknown commit, and this is commit def'):
        record('first', 500.0, 'def')


def test_a_unit_that_another_commit_has_begun_is_refused(tmp_path, monkeypatch):
    def measure(unit: ReferenceUnit, work: Path, console: Console) -> None:
        (work / 'checkpoint').write_text('')  # and stops

    def run(commit: str) -> bool:
        monkeypatch.setattr(provenance, 'read_commit', lambda: commit)
        return units.run(study, tmp_path / 'results', tmp_path / 'work', Console(quiet=True), only)

    study, only = units.load(STUDY), ['shapes-reference']
    monkeypatch.setattr(ReferenceUnit, 'measure', measure)
    assert not run('abc') and not run('abc')
    with pytest.raises(
        UserError, match='shapes-reference: .*work of commit abc, and this is .*def'
    ):
        run('def')


def test_the_commit_is_that_of_the_repository():
    commit = provenance.read_commit()
    assert commit == provenance.UNKNOWN or len(commit.removesuffix('-modified')) == 40
