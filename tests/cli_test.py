"""Do the commands print help, refuse mistakes, and work from the tokenizer to the images?"""

import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tyro

from star_jax import cli, image_io
from star_jax.checkpoint import config
from star_jax.commands import arguments, cache, help_text, run_config
from star_jax.data.folder import Folder
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.families.infinity import Infinity
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training.objective import Adversary, Objective
from star_jax.training.run import Run, TokenizerRun

ROOT = Path(__file__).parents[1]
PROMPTS = ('a red circle', 'a small blue star on a white background', 'a green ring')


def star_jax(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stopped:
            status = stopped.code
    return status, out.getvalue(), err.getvalue()


def error_message(*words: object) -> str:
    """The line on stderr of a command that must fail with exit status 2."""
    status, _, err = star_jax(*words)
    assert status == 2, err
    assert err.startswith(f'star-jax {words[0]}: ') and err.count('\n') == 1, err
    return err


@pytest.fixture(scope='module', autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.setenv('COLUMNS', '120')
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope='module')
def home(tmp_path_factory) -> Path:
    """Configs of tiny runs, as files."""
    home = tmp_path_factory.mktemp('home')
    config.write(home / 'tokenizer.json', tiny.TOKENIZER)
    config.write(home / 'star.json', tiny.STAR)
    return home


@pytest.fixture(scope='module')
def tokenizer(home) -> Path:
    """A run of `train-tokenizer`."""
    out = home / 'tokenizer'
    assert star_jax('train-tokenizer', home / 'tokenizer.json', '--out', out)[0] == 0
    return out


@pytest.fixture(scope='module')
def train(home, tokenizer) -> list:
    """The command line of a run of `train`."""
    options = ['--tokenizer', tokenizer / 'model', '--text', tiny.TEXT]
    return ['train', home / 'star.json', *options, '--out', home / 'star']


@pytest.fixture(scope='module')
def trained(home, train) -> Path:
    assert star_jax(*train)[0] == 0
    return home / 'star'


@pytest.fixture(scope='module')
def samples(home, trained) -> Path:
    """A folder of `sample`."""
    out = home / 'samples'
    assert star_jax('sample', *PROMPTS, '--model', trained / 'model', '--out', out)[0] == 0
    return out


# Help and versions.

# Every command line that describes options, with a file or folder that decides their defaults.
HELP_OF = [
    ('train',),
    ('train', 'configs/star_d30_1024_sampler.py'),
    ('train', 'configs/own_images.py'),
    ('train', 'configs/var_d16.py'),
    ('train-tokenizer',),
    ('train-tokenizer', 'configs/own_images_tokenizer.py'),
    ('sample',),
    ('reconstruct',),
    ('convert',),
    ('export',),
    ('data', 'prepare', 'emoji'),
    ('data', 'prepare', 'folder'),
    ('data', 'show'),
    ('data', 'cache'),
    ('data', 'check'),
    ('verify',),
    ('evaluate',),
    ('plan',),
    ('study', 'run'),
    ('study', 'report'),
    ('study', 'cost'),
    ('bench', 'sample'),
    ('bench', 'train'),
    ('bench', 'buckets'),
    ('bench', 'attention'),
    ('bench', 'layers', 'configs/llamagen_b.py'),
    ('bench', 'torch', 'configs/llamagen_b.py'),
    ('bench', 'data'),
    ('bench', 'suite'),
]
LISTS = [('data',), ('data', 'prepare'), ('study',), ('bench',)]  # commands of commands


def command_name(words: Sequence[str]) -> str:
    """The words without a config."""
    return ' '.join(word for word in words if '/' not in word)


def run_module(*words: str) -> subprocess.CompletedProcess:
    """A command line in a process of its own."""
    command = [sys.executable, '-X', 'importtime', '-m', 'star_jax', *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize('words', [(), ('--help',)])
def test_help_lists_every_command_with_an_example(words):
    status, out, _ = star_jax(*words)
    assert status == (0 if words else 2)
    for command in cli.COMMANDS:
        assert re.search(rf'^  {command} +\w.*\n +star-jax {command} ', out, re.MULTILINE), command
    assert out.index('\nSample images\n') < out.index('\nTrain\n') < out.index('\nEvaluate\n')


@pytest.mark.parametrize('words', ['--help', '--version'])
def test_help_and_version_start_without_jax(words):
    done = run_module(words)
    assert done.returncode == 0 and done.stdout
    assert not re.search(r'\| +(jax|numpy|tyro)$', done.stderr, re.MULTILINE)


def test_version_prints_the_versions_of_the_package_and_of_jax():
    status, out, _ = star_jax('--version')
    assert status == 0 and re.fullmatch(
        r'star-jax [\d.]+ \(Python .*, jax [\d.]+, flax .*\)\n', out
    )


@pytest.mark.parametrize('words', HELP_OF + LISTS, ids=' '.join)
def test_help_fits_two_screens_and_has_an_example(words):
    status, out, _ = star_jax(*words, '--help')
    command = f'star-jax {command_name(words)}'
    assert status == 0 and out.startswith(f'usage: {command} ')
    assert f'{command} ' in out.split('\n', 1)[1], 'an example'
    assert len(out.splitlines()) <= 100 and max(map(len, out.splitlines())) <= 120


def test_help_all_of_a_config_introduces_it():
    words, source = ('train', 'configs/infinity_125m.py'), 'Infinity specification 6 and 8'
    assert source in ' '.join(star_jax(*words, '--help-all')[1].split())
    assert source not in star_jax(*words, '--help')[1]


@pytest.fixture
def described(monkeypatch) -> Callable[[Sequence[str]], tuple[type, Any]]:
    """Maps a command line to the dataclass whose options its --help prints, and their defaults."""

    def read(words: Sequence[str]) -> tuple[type, Any]:
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(help_text, 'render', lambda *args: calls.append(args) or '')
            assert star_jax(*words, '--help')[0] == 0
        ((cls, _, default, *_),) = calls
        return cls, default

    return read


@pytest.mark.parametrize('words', HELP_OF, ids=' '.join)
def test_every_option_has_a_description(words, described):
    options = list(help_text.options(*described(words)))
    assert options and [option.name for option in options if not option.description] == []


@pytest.mark.parametrize('words', HELP_OF, ids=' '.join)
def test_help_names_every_option_that_the_parser_takes(words, described):
    """The parser is tyro's, help is not."""
    cls, default = described(words)
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit):
        tyro.cli(
            cls,
            args=['--help'],
            config=(tyro.conf.AvoidSubcommands,),
            registry=arguments._types,
            **({} if default is None else {'default': default}),
        )
    parsed = set(re.findall(r'^. --([a-z][\w.-]*)', text.getvalue(), re.MULTILINE))
    options = [option for option in help_text.options(cls, default) if not option.positional]
    assert {option.name for option in options} == parsed
    for flag in ('--help', '--help-all'):
        _, out, _ = star_jax(*words, flag)
        names = re.findall(r'--([\w.-]+)', out.replace('[no-]', ''))
        assert parsed <= set(names)


def test_documents_name_commands_and_options_that_exist(described):
    known: dict[str, set[str]] = {}
    for words in HELP_OF:
        options = help_text.options(*described(words))
        known.setdefault(command_name(words), set()).update(option.name for option in options)
    documents = [ROOT / 'README.md', *ROOT.glob('docs/**/*.md'), *ROOT.glob('launch/*.sh')]
    documents += [*ROOT.glob('configs/**/*.py'), *ROOT.glob('star_jax/c*/*.py')]
    count, unknown = 0, []
    for path in documents:
        text = re.sub(r' *\\\n *', ' ', path.read_text())
        for line in re.findall(r'star-jax ([a-z][^\n`|;&#]*)', text):
            command = max((name for name in known if line.startswith(name)), key=len, default='')
            names = re.findall(r'--([a-z][\w.-]*\w)', line)
            names = {re.sub(r'(^|\.)no-', r'\1', name) for name in names} - {'help', 'help-all'}
            unknown += [f'{path}: {line}'] if names - known.get(command, set()) else []
            count += bool(names)
    assert count > 50 and unknown == []


def test_help_of_every_command_is_tested():
    assert {words[0] for words in HELP_OF} == cli.COMMANDS.keys()


@pytest.mark.parametrize(
    ('run_type', 'sections'),
    [*run_config.COMMON.items(), (Run, run_config.PROGRAM), (Run, cache.COMMON)],
)
def test_common_options_exist(run_type, sections):
    """Options of the data depend on the kind of dataset, options of a model on its family."""
    kinds = (Shapes(), Folder(), Prepared(path='sets/any'))
    runs = [run_type(data=data) for data in kinds]
    if run_type is Run:
        runs.append(Run(model=Infinity()))
    else:
        adversarial = Objective(adversary=Adversary())
        runs += [TokenizerRun(model=model, objective=adversarial) for model in (BSQ(), RasterVQ())]
    names = {option.name for run in runs for option in help_text.options(run_type, run)}
    assert set(itertools.chain.from_iterable(sections.values())) <= names


@pytest.mark.parametrize(
    ('words', 'named'),
    [
        (('smaple', 'a red circle'), 'smaple'),
        (('sample', 'a red circle', '--temprature', '1'), '--temprature'),
        (('sample', 'a red circle', '--seed', 'one'), 'one'),
        (('sample', 'a red circle', '--seed', '-1'), 'seed'),
        (('sample', 'a red circle', '--guidance', '-1'), 'guidance'),
        (('train', '--model.depht', '3'), '--model.depht'),
        (('train', '--model.width', '1001'), '1001'),
        (('export',), 'expected RUN'),
        (('data', 'prepare', 'photographs', 'out'), 'photographs'),
    ],
)
def test_invalid_command_line_is_refused(words, named):
    status, _, err = star_jax(*words)
    assert status == 2 and named in err and 'Traceback' not in err


def test_misspelt_option_gets_a_suggestion():
    assert '--model.depth' in star_jax('train', '--model.depht', '3')[2]


# Missing and invalid inputs.


def test_sample_refuses_missing_prompts(tmp_path):
    assert 'there is no prompt' in error_message('sample')
    missing, empty, binary = (tmp_path / name for name in ('missing', 'empty', 'binary'))
    empty.write_text('\n  \n')
    binary.write_bytes(b'\xff\xfe\x00')
    for path in (missing, empty, binary):
        assert str(path) in error_message('sample', '--prompts', path)
    empty.write_text('a red circle\n')
    assert 'leave one out' in error_message('sample', 'a blue star', '--prompts', empty)


def test_sample_refuses_incomplete_models(tmp_path, home, tokenizer):
    assert 'no such folder' in error_message('sample', 'a star', '--model', tmp_path / 'nothing')
    assert 'config.json' in error_message('sample', 'a star', '--model', home)
    assert 'only a tokenizer' in error_message('sample', 'a star', '--model', tokenizer / 'model')


def test_sample_refuses_another_text_encoder(trained, tmp_path):
    words = ('sample', 'a star', '--model', trained / 'model', '--text')
    assert str(tmp_path) in error_message(*words, tmp_path)


def test_reconstruct_refuses_missing_and_damaged_images(tmp_path, tokenizer):
    options = ('--model', tokenizer / 'model', '--out', tmp_path / 'out')
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'\x89PNG\r\n\x1a\nand then nothing')
    assert 'no image' in error_message('reconstruct', *options)
    for path in (tmp_path / 'missing.png', broken):
        assert str(path) in error_message('reconstruct', path, *options)
    assert not (tmp_path / 'out').exists()


def test_train_refuses_configs_of_another_kind(home, tmp_path):
    assert 'TokenizerRun' in error_message('train', write(tmp_path / 'a.py', 'tokenizer'))
    assert 'Run' in error_message('train-tokenizer', write(tmp_path / 'b.py', 'star'))
    assert 'missing.py' in error_message('train', tmp_path / 'missing.py')
    (tmp_path / 'c.py').write_text('run = 1 +\n')
    assert 'c.py, line 1' in error_message('train', tmp_path / 'c.py')


def write(path: Path, name: str) -> Path:
    """A Python config file."""
    path.write_text(f'from tiny import {"TOKENIZER" if name == "tokenizer" else "STAR"} as run\n')
    return path


def test_train_refuses_parts_that_do_not_fit(home, train, tmp_path):
    out = ('--out', tmp_path / 'out')
    assert 'no such folder' in error_message(*train, *out, '--tokenizer', tmp_path / 'nothing')
    assert 'model.codes is 16' in error_message(*train, *out, '--model.codes', '16')
    assert 'divide over 8 devices' in error_message(*train, *out, '--batch', '6')
    assert 'devices' in error_message(*train, *out, '--mesh.tensor', '3')
    assert not (tmp_path / 'out').exists(), 'a run that cannot begin leaves nothing behind'


def test_data_refuses_missing_sets_and_splits(tmp_path):
    assert 'nowhere' in error_message('data', 'show', 'nowhere')
    assert 'train, validation, held_out' in error_message(
        'data', 'show', 'shapes', '--split', 'test'
    )
    assert 'prepare' in error_message('data') and 'prepare' in error_message('data', 'shwo')


def test_export_and_verify_refuse_other_folders(tmp_path):
    assert str(tmp_path) in error_message('export', tmp_path)
    assert str(tmp_path) in error_message('verify', tmp_path)
    assert 'no case' in error_message('verify')


# From the tokenizer to the images.


def test_trained_tokenizer_reconstructs_images(tokenizer, tmp_path):
    names = ['SHA256SUMS', 'config.json', 'tokenizer.safetensors']
    assert sorted(path.name for path in (tokenizer / 'model').iterdir()) == names
    for name in 'ab':
        image_io.save_png(np.full((20, 30, 3), 200, np.uint8), tmp_path / f'{name}.png')
    images = [tmp_path / 'a.png', tmp_path / 'b.png']
    options = ('--model', tokenizer / 'model', '--out', tmp_path / 'out')
    assert star_jax('reconstruct', *images, *options)[0] == 0
    found = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert found == ['000-a.png', '001-b.png', 'grid.png']


def test_run_writes_metrics_samples_and_a_model(trained):
    found = {path.name.split('.')[0] for path in trained.iterdir() if path.name[0] != '.'}
    assert found == {'config', 'data', 'checkpoints', 'samples', 'events', 'metrics', 'model'}
    lines = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4, 5, 6]
    assert {'loss/0', 'loss/2', 'accuracy/1', 'gradient_norm'} <= lines[0].keys()
    assert 'validation/loss' in lines[-1]
    assert [path.name for path in (trained / 'samples').iterdir()] == ['00000006.png']


def test_trained_model_samples_images(samples, trained):
    for index in range(len(PROMPTS)):
        assert image_io.load_image(samples / f'{index:06d}.png').shape == (16, 16, 3)
    assert image_io.load_image(samples / 'grid.png').ndim == 3
    lines = [json.loads(line) for line in (samples / 'samples.jsonl').read_text().splitlines()]
    assert [line['prompt'] for line in lines] == list(PROMPTS)
    assert [line['seed'] for line in lines] == [0, 1, 2]
    assert lines[0]['model']['source'] == str(trained / 'model')
    assert len(lines[0]['model']['sha256']) == 64
    assert lines[0]['settings']['top_k'] == 600


def test_recorded_seed_reproduces_its_image(samples, trained, tmp_path):
    """It is sampled from a file of prompts, and alone instead of in a batch."""
    (tmp_path / 'prompts.txt').write_text(f'{PROMPTS[1]}\n')
    options = ('--model', trained / 'model', '--seed', '1', '--out', tmp_path / 'out')
    assert star_jax('sample', '--prompts', tmp_path / 'prompts.txt', *options)[0] == 0
    again = image_io.load_image(tmp_path / 'out' / '000000.png')
    np.testing.assert_array_equal(again, image_io.load_image(samples / '000001.png'))


def test_interrupted_sampling_continues(samples, trained, tmp_path):
    """Only missing images are sampled; an incomplete last line of the record is removed."""
    out = shutil.copytree(samples, tmp_path / 'out')
    record = (out / 'samples.jsonl').read_text()
    lines = record.splitlines(keepends=True)
    (out / 'samples.jsonl').write_text(lines[0] + lines[1][:30])
    (out / '000002.png').unlink()
    first = (out / '000000.png').stat().st_mtime_ns
    command = ('sample', *PROMPTS, '--model', trained / 'model', '--out', out)
    assert star_jax(*command)[0] == 0
    assert (out / 'samples.jsonl').read_text() == record
    assert (out / '000000.png').stat().st_mtime_ns == first
    for name in ('000001.png', '000002.png', 'grid.png'):
        assert (out / name).read_bytes() == (samples / name).read_bytes()
    message = error_message(*command, '--top-p', '0.5')
    assert 'holds other images' in message and 'settings' in message
    assert (out / 'samples.jsonl').read_text() == record


def test_export_writes_the_same_model_from_the_checkpoint(trained, tmp_path):
    assert star_jax('export', trained, '--out', tmp_path / 'model')[0] == 0
    for name in ('config.json', 'model.safetensors', 'tokenizer.safetensors'):
        same = (trained / 'model' / name).read_bytes()
        assert (tmp_path / 'model' / name).read_bytes() == same


def test_finished_run_continues_without_a_step(train, trained):
    before = (trained / 'metrics.jsonl').read_bytes()
    status, out, _ = star_jax(*train)
    assert status == 0 and 'continuing from step 6' in out
    assert (trained / 'metrics.jsonl').read_bytes() == before


def test_run_folder_refuses_another_config(train, trained):
    message = error_message(
        *train, '--optimizer.learning-rate.peak', '0.5', '--caption-drop', '0.2'
    )
    assert 'optimizer.learning_rate.peak' in message and 'caption_drop: 0.1 -> 0.2' in message
    assert config.read(trained / 'config.json', type(tiny.STAR)).caption_drop == 0.1


def test_training_warm_starts_from_a_model_folder(home, train, trained):
    out = home / 'further'
    words = [*train[:-1], out, '--init', trained / 'model', '--pace.steps', '1']
    assert star_jax(*words)[0] == 0
    given = config.read(out / 'config.json', type(tiny.STAR))
    expected = dataclasses.replace(tiny.STAR.pace, steps=1)
    assert given.init == str(trained / 'model') and given.pace == expected
