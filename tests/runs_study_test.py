"""Does a study of runs name, prepare and report its units?"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny

from star_jax import cli
from star_jax.checkpoint import config, folder, models
from star_jax.console import Console
from star_jax.core.codes import Index
from star_jax.core.settings import Settings
from star_jax.errors import NotFiniteError, UserError
from star_jax.families.fit import check_tokenizer
from star_jax.plan import workload
from star_jax.studies import aligned, cost, runs, runs_report, starts, units
from star_jax.studies.aligned import Aligned
from star_jax.studies.cost_result import CostResult
from star_jax.studies.held_out import HeldOut
from star_jax.studies.runs_result import RunResult, TokenizerResult
from star_jax.training import trainer
from star_jax.training.run import Pace

STUDY = Path(__file__).parents[1] / 'configs' / 'study' / 'infinity.py'


@pytest.fixture(scope='module')
def study() -> runs.RunsStudy:
    return units.load(STUDY)


def test_units_are_tokenizers_then_contenders_seed_by_seed(study):
    names = [unit.name for unit in study.units]
    assert names[:4] == [f'tokenizer-{bits}-bits' for bits in (9, 8, 16, 32)]
    assert names[4:7] == ['bits-9-0', 'index-512-0', 'bits-9-corrected-0']
    assert len(set(names)) == 4 + 2 * 6 and names[-1] == 'bits-32-1'
    corrected = next(unit for unit in study.units if unit.name == 'bits-9-corrected-0')
    assert corrected.run.cache.endswith('9-bits-features') and corrected.run.pace.images == 0


def test_equal_transformers_are_compared(study):
    plain = [one.run for one in study.contenders]
    models_of = {dataclasses.replace(run.model, bits=9, indexed=False) for run in plain}
    assert study.timed_runs['bits-8'].model.bits == 8
    assert len(models_of) == 1 and len({run.pace for run in plain}) == 1


def test_a_tokenizer_of_bits_serves_a_contender_of_indices(study, tmp_path):
    unit = next(unit for unit in study.units if unit.name == 'index-512-0')
    unit = dataclasses.replace(unit, folder=str(tmp_path))
    with pytest.raises(UserError, match='make the unit tokenizer-9-bits first'):
        unit.measure(tmp_path, None)
    bits = study.units[0].run.model
    place = runs.tokenizer_folder(str(tmp_path), '9-bits') / trainer.MODEL
    params = tiny.random_params(bits.abstract())
    folder.write(place, folder.StoredTokenizer(config=bits, params=params))
    run = unit._prepared()
    found = models.read_tokenizer(run.tokenizer).config
    assert found == dataclasses.replace(bits, indexed=True) and found.vocabulary == Index(512)
    check_tokenizer(run.model, found, where='it', remedy='none')
    head = unit._head()
    assert (head['tokenizer'], head['tokenizer_digest']) == ('9-bits', models.digest(place))


def test_a_failed_tokenizer_is_named_by_the_units_that_need_it(study, tmp_path, monkeypatch):
    short = dataclasses.replace(study, folder=str(tmp_path / 'shared'))

    def train(run: Any, out: Path) -> bool:
        out.mkdir(parents=True, exist_ok=True)
        raise NotFiniteError('stopped', 'step 4: loss is nan')

    monkeypatch.setattr(runs.train, 'main', train)
    only = ('tokenizer-9-bits', 'index-512-0')
    with pytest.raises(UserError, match=r'index-512-0: .* 9-bits failed \(step 4: loss is nan\)'):
        units.run(short, tmp_path / 'results', tmp_path / 'work', Console(quiet=True), only)
    path = tmp_path / 'results' / 'tokenizer-9-bits.json'
    assert config.read(path, TokenizerResult).failure == 'step 4: loss is nan'


def test_a_result_that_is_too_large_is_not_written(study, tmp_path, monkeypatch):
    fields = {'study': 'infinity', 'tokenizer': '9-bits', 'images': 8, 'failure': 'x' * 50_000}
    monkeypatch.setattr(runs.TokenizerUnit, 'measure', lambda *_: fields)
    short = dataclasses.replace(study, folder=str(tmp_path / 'shared'))
    with pytest.raises(UserError, match='tokenizer-9-bits: a result of 50,.* expected 50,000'):
        results, only = tmp_path / 'results', ['tokenizer-9-bits']
        units.run(short, results, tmp_path / 'work', Console(quiet=True), only)
    assert not list(tmp_path.glob('results/*'))


def test_images_of_a_unit_are_those_of_all_its_batches(study, monkeypatch):
    unit = next(unit for unit in study.units if unit.name == 'bits-9-0')
    run = unit.contender.run
    optimizer = dataclasses.replace(run.optimizer, accumulate=2)
    twice = dataclasses.replace(unit.contender, run=dataclasses.replace(run, optimizer=optimizer))
    monkeypatch.setattr(runs.models, 'digest', lambda source: 'aa')
    images = dataclasses.replace(unit, contender=twice)._head()['images']
    assert images == 2 * unit._head()['images'] == 2 * run.batch * run.pace.steps


def test_wrong_studies_are_refused(study):
    twice = (study.contenders[0], study.contenders[0])
    with pytest.raises(UserError, match="two units are called 'bits-9-0'"):
        dataclasses.replace(study, contenders=twice)
    other = (dataclasses.replace(study.contenders[0], tokenizer='other'),)
    with pytest.raises(UserError, match="names the tokenizer 'other'"):
        dataclasses.replace(study, contenders=other)


def result(
    name: str, seed: int, loss: float, numbers: int, right: float, baseline: str = 'bits-9'
) -> RunResult:
    point = HeldOut(step=1, loss=loss, accuracy=0.5, scales=())
    return RunResult(
        study='infinity',
        contender=name,
        baseline=baseline,
        seed=seed,
        commit='abc',
        images=100,
        hardware=(),
        settings=name,
        parameters=1000,
        tokens=85,
        numbers=numbers,
        curve=(point,) * 10,
        aligned=(
            Aligned(objects=1, count=10, all=right, number=1, colours=1, shapes=1),
            Aligned(objects=2, count=30, all=0, number=1, colours=1, shapes=1),
        ),
        seconds={'training': 1.0, 'unit': 2.0},
    )


def test_the_report_compares_nats_of_images_and_alignment(tmp_path, capsys):
    place = tmp_path / 'results'
    place.mkdir()
    tokenizer = TokenizerResult(
        study='infinity', tokenizer='9-bits', commit='abc', images=8, hardware=(), psnr=25.0
    )
    config.write(place / 'tokenizer-9-bits.json', tokenizer)
    for seed, more in enumerate((0.0, 0.02, 0.01)):
        one = result('bits-9', seed, 0.1 + more, 9, 0.8)
        config.write(place / f'bits-9-{seed}.json', one)
        one = result('index-512', seed, 1.0 + more, 1, 0.4)
        config.write(place / f'index-512-{seed}.json', one)
    words = ['study', 'report', str(place), '--out', str(tmp_path / 'report')]
    assert cli.main(words) == 0
    tables = (tmp_path / 'report_tables.md').read_text()
    assert '| 9-bits | 8 | 25.0 |\n' in tables and 'index-512 - bits-9' in tables
    assert '| -40.0' not in tables and 'adjusted p' in tables and '| 0.000 |' in tables
    assert '20.0 (20.0 to 20.0)' in tables and '-10.0 (-10.0 to -10.0)' in tables
    assert result('bits-9', 0, 0.1, 9, 0.8).nats == pytest.approx(0.1 * 9 * 85)
    assert len(config.read_json(tmp_path / 'report.json')['units']) == 7
    config.write(
        place / 'other.json', dataclasses.replace(result('bits-9', 5, 0.1, 9, 0.8), commit='def')
    )
    assert cli.main(words) == 2
    assert 'units of 2 different commits (abc, def)' in capsys.readouterr().err
    changed = dataclasses.replace(result('bits-9', 5, 0.1, 9, 0.8), settings='other')
    config.write(place / 'other.json', changed)
    assert cli.main(words) == 2
    assert 'bits-9 have different settings' in capsys.readouterr().err
    (place / 'other.json').unlink()
    used = {'tokenizer': '9-bits', 'tokenizer_digest': 'aa'}
    for seed, contender in enumerate(('bits-9', 'index-512')):  # the others are of older code
        one = result(contender, seed, 0.1, 9, 0.8)
        config.write(place / f'{contender}-{seed}.json', dataclasses.replace(one, **used))
    assert cli.main(words) == 0
    config.write(
        place / 'tokenizer-9-bits.json', dataclasses.replace(tokenizer, tokenizer_digest='bb')
    )
    assert cli.main(words) == 2
    assert 'units of 2 different tokenizers called 9-bits (aa, bb)' in capsys.readouterr().err


def test_contenders_are_compared_with_the_first_one_of_the_study(study, tmp_path, capsys):
    first = study.contenders[0].name
    assert {unit.baseline for unit in study.units if hasattr(unit, 'contender')} == {first}
    (tmp_path / 'results').mkdir()
    for name in ('a', 'b', 'c'):
        for seed in (0, 1):
            one = result(name, seed, 0.1, 9, 0.5 + seed / 10, baseline='b')
            config.write(tmp_path / 'results' / f'{name}-{seed}.json', one)
    words = ['study', 'report', str(tmp_path / 'results'), '--out', str(tmp_path / 'report')]
    assert cli.main(words) == 0
    tables = (tmp_path / 'report_tables.md').read_text()
    assert '| a - b |' in tables and '| c - b |' in tables and '- a |' not in tables
    for damaged in ('null', '3', '[]', '"tokenizer"'):
        (tmp_path / 'results' / 'd-0.json').write_text(damaged)
        assert cli.main(words) == 2 and 'd-0.json is damaged' in capsys.readouterr().err
    other = result('d', 0, 0.1, 9, 0.5, baseline='d')
    config.write(tmp_path / 'results' / 'd-0.json', other)
    assert cli.main(words) == 2 and 'of several studies' in capsys.readouterr().err


def test_files_are_named_after_the_study(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(
        units, 'run', lambda study, results, work, *_: called.extend([results, work])
    )
    monkeypatch.setattr(cost, 'measure', lambda study, out, *_: called.append(out))
    monkeypatch.chdir(tmp_path)
    assert cli.main(['study', 'run', str(STUDY)]) == cli.main(['study', 'cost', str(STUDY)]) == 0
    names = ['docs/results/infinity', 'runs/infinity', 'runs/infinity_cost.json']
    assert called == list(map(Path, names))
    place = tmp_path / 'docs' / 'results' / 'infinity'
    place.mkdir(parents=True)
    config.write(place / 'bits-9-0.json', result('bits-9', 0, 0.1, 9, 0.8))
    assert cli.main(['study', 'run', str(STUDY), '--list']) == 0
    assert 'bits-9-0  made\nindex-512-0\n' in capsys.readouterr().out
    assert cli.main(['study', 'report', 'docs/results/infinity']) == 0
    assert sorted(path.name for path in Path('docs').glob('*.*')) == [
        'infinity.json',
        'infinity_tables.md',
    ]


@pytest.fixture(scope='module')
def families() -> runs.RunsStudy:
    return units.load(STUDY.with_name('families.py'))


def test_families_are_equal_in_parameters_and_arithmetic(families):
    runs_of = families.timed_runs
    parameters = [runs.trained_parameters(run.model) for run in runs_of.values()]
    assert max(parameters) < 1.03 * min(parameters)
    arithmetic = []
    for run in runs_of.values():
        run = dataclasses.replace(run, tokenizer='models/none')  # assumed: the family's own
        programs = workload.training(run, run.mesh.build(), 'cpu').needed_programs
        counted = workload.count_flops({'step': programs[workload.TRAINING_STEP]})
        arithmetic.append(run.pace.steps * sum(counted['step'].values()))
    assert max(arithmetic) < 1.005 * min(arithmetic)
    shared = {(run.data, run.validation, run.optimizer, run.batch) for run in runs_of.values()}
    assert len(shared) == 1


def test_families_share_the_tokenizer_of_bits(families, study):
    ours, theirs = dict(families.tokenizers), dict(study.tokenizers)
    assert ours['9-bits'] == theirs['9-bits'] and families.folder == study.folder
    assert len({run.model.autoencoder for run in ours.values()}) == 1


def test_a_unit_samples_with_the_settings_that_are_best_on_training_scenes(monkeypatch):
    asked = []

    def fake(pipe: str, settings: Settings, count: int, split: str) -> list[Aligned]:
        asked.append((pipe, count, split))
        share = {1.0: 0.5, 2.0: 0.75, 3.0: 0.75}[settings.guidance]
        return [Aligned(objects=1, count=4, all=share, number=1, colours=1, shapes=1)]

    monkeypatch.setattr(aligned.loading, 'prepare', lambda model, source: 'pipe')
    monkeypatch.setattr(aligned, '_alignment', fake)
    choices = tuple(Settings(guidance=guidance) for guidance in (1.0, 2.0, 3.0))
    assert aligned.best_settings(None, '', choices, 4) == choices[1]
    assert asked == [('pipe', 4, 'train')] * 3


def test_choices_belong_to_the_settings_of_a_unit(families):
    unit = next(unit for unit in families.units if unit.name == 'raster-0')
    fewer = dataclasses.replace(unit.contender, choices=unit.contender.choices[:2])
    assert unit.settings != dataclasses.replace(unit, contender=fewer).settings
    assert unit.settings != dataclasses.replace(unit, sampled=2).settings


def test_settings_of_the_committed_units_are_those_of_the_study(study):
    place = STUDY.parents[2] / 'docs' / 'results' / study.name
    trained = [unit for unit in study.units if isinstance(unit, runs.RunUnit)]
    for unit in trained:
        assert unit.settings == config.read(place / f'{unit.name}.json', RunResult).settings


def test_scores_of_other_sampling_settings_are_not_reused(families, tmp_path, monkeypatch):
    scored = []

    def score(model: Any, source: str, count: int) -> list[Aligned]:
        scored.append(count)
        return [Aligned(objects=1, count=count, all=1, number=1, colours=1, shapes=1)]

    model = folder.StoredModel(config=None, params={}, tokenizer=None, text=None)
    monkeypatch.setattr(runs.RunUnit, '_prepared', lambda unit: unit.run)
    monkeypatch.setattr(runs.RunUnit, '_head', lambda unit: {})
    monkeypatch.setattr(runs.train, 'cache', lambda run, features: None)
    monkeypatch.setattr(runs.train, 'main', lambda run, out: True)
    monkeypatch.setattr(runs.models, 'read', lambda source: model)
    monkeypatch.setattr(runs.held_out, 'curve', lambda out, pace: ())
    monkeypatch.setattr(runs, 'best_settings', lambda model, source, choices, count: choices[0])
    monkeypatch.setattr(runs, 'sampled_alignment', score)
    starts.record(tmp_path, 'abc')
    unit = next(unit for unit in families.units if unit.name == 'raster-0')
    first, *others = unit.contender.choices
    fewer = dataclasses.replace(unit.contender, choices=tuple(others))
    changed = dataclasses.replace(unit, sampled=2)
    for one in (unit, unit, changed, dataclasses.replace(unit, contender=fewer)):
        found = one.measure(tmp_path, None)
        assert found['sampling'] == one.contender.choices[0]
        assert found['aligned'][0].count == one.sampled
    assert scored == [250, 2, 250]


def shortened(study: runs.RunsStudy, folder: Path) -> runs.RunsStudy:
    """The study with a few steps on a few images."""

    def pace(run: Any, steps: int) -> Pace:
        return dataclasses.replace(run.pace, steps=steps, log=1, save=1, sample=steps)

    def few(run: Any, steps: int, images: int, **fields: Any) -> Any:
        data = dataclasses.replace(run.data, count=images)
        validation = dataclasses.replace(run.validation, count=16)
        return dataclasses.replace(
            run, data=data, validation=validation, pace=pace(run, steps), **fields
        )

    tokenizers = tuple(
        (name, few(run, 4, 32, plain_steps=min(run.plain_steps, 2)))
        for name, run in study.tokenizers
    )
    contenders = tuple(
        dataclasses.replace(one, run=few(one.run, 10, 32), seeds=(0,), choices=one.choices[:2])
        for one in study.contenders
    )
    return dataclasses.replace(
        study,
        tokenizers=tokenizers,
        contenders=contenders,
        folder=str(folder),
        sampled=2,
        chosen_by=1,
    )


@pytest.mark.slow
def test_a_short_study_of_families_from_end_to_end(families, tmp_path):
    short = shortened(families, tmp_path / 'shared')
    results, work = tmp_path / 'results', tmp_path / 'work'
    assert units.run(short, results, work, Console())
    runs_report.write(results, tmp_path / 'report', Console())
    found = {
        unit.name: units.read(results / f'{unit.name}.json', lambda _, unit=unit: unit.result_class)
        for unit in short.units
    }
    assert {found[f'{name}-0'].tokens for name in ('star', 'bits', 'raster')} == {85, 64}
    assert all(len(found[f'{one.name}-0'].curve) == 10 for one in short.contenders)
    assert found['raster-0'].sampling in families.contenders[-1].choices
    assert 'raster - star' in (tmp_path / 'report_tables.md').read_text()


def test_cost_times_every_contender(study, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, 'BATCHES', (1,))
    small = dataclasses.replace(study.contenders[0].run.model, depth=1, width=36, heads=3)
    first = study.contenders[0]
    tokenizer = dict(study.tokenizers)[first.tokenizer]
    autoencoder = tiny.TOKENIZER.model.autoencoder
    shrunk = dataclasses.replace(
        study,
        contenders=(
            dataclasses.replace(first, run=dataclasses.replace(first.run, model=small, batch=8)),
        ),
        tokenizers=(
            (
                first.tokenizer,
                dataclasses.replace(
                    tokenizer, model=dataclasses.replace(tokenizer.model, autoencoder=autoencoder)
                ),
            ),
        ),
    )
    out = tmp_path / 'cost.json'
    cost.measure(shrunk, out, rounds=1, text_tokens=3, console=Console())
    found = config.read(out, CostResult)
    timed = (*found.training.values(), *found.sampling.values())
    assert len(timed) == 2
    assert all(each.gflop > 0 and each.seconds > 0 for kinds in timed for each in kinds.values())
