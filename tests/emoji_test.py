"""Are emoji named, split and rendered correctly? No network, no npm."""

import collections
import hashlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from star_jax import image_io
from star_jax.data import emoji, prepared
from star_jax.errors import UserError

RED = '<rect width="{w}" height="{h}" fill="#f00"/>'
VIOLIN = dict(label='violin', hexcode='1F3BB', tags=['instrument', 'music', 'violin'])
WAVE = dict(label='waving hand', hexcode='1F44B', tags=['bye'])
FLAG = dict(label='flag: Bosnia & Herzegovina', hexcode='1F1E7-1F1E6', tags=['BA', 'flag'])
SEA = dict(label='water wave', hexcode='1F30A', tags=['ocean'])
SCISSORS = dict(label='scissors', hexcode='2702', tags=['cutting'])


def iconify(names, **shape) -> str:
    body = RED.format(w=shape.get('width', 32), h=shape.get('height', 32))
    icons = {name: dict(body=f'{body}<!--{name}-->', **shape) for name in names}
    return json.dumps(dict(prefix='x', width=32, height=32, icons=icons))


@pytest.fixture
def packages(tmp_path):
    """A node_modules with about five icons in each of four styles."""
    files = {
        '@iconify-json/noto/icons.json': iconify(
            ['violin', 'waving-hand', 'waving-hand-dark-skin-tone', 'flag-bosnia-and-herzegovina']
        ),
        '@iconify-json/fluent-emoji-flat/icons.json': iconify(
            ['violin', 'waving-hand', 'waving-hand-medium-light', 'lighthouse']
        ),
        '@iconify-json/fxemoji/icons.json': iconify(
            ['blackscissors', 'wiredkeyboard', 'dissapointedrelief', 'fiddle', 'wave']
        ),
        'emojibase-data/en/data.json': json.dumps([VIOLIN, WAVE, FLAG, SCISSORS, SEA]),
        'emojibase-data/en/shortcodes/some.json': json.dumps(
            {'1F3BB': ['fiddle'], '1F44B': 'wave'}
        ),
    }
    for name, text in files.items():
        path = tmp_path / 'packages' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assets = tmp_path / 'packages' / '@lobehub/fluent-emoji-3d/assets'
    for code in ('1f3bb', '1f44b-1f3fb', '2702-fe0f'):
        image_io.save_png(np.zeros((4, 4, 3), np.uint8), assets / f'{code}.webp')
    return tmp_path / 'packages'


@pytest.fixture
def renderer(monkeypatch):
    """Renders every SVG in its own colour, and records the calls."""
    calls = []

    def svg_to_bytes(svg_string: str, width: int, height: int, **options) -> bytes:
        calls.append(svg_string)
        colour = list(hashlib.sha256(svg_string.encode()).digest()[:3])
        return image_io.encode(np.full((height, width, 3), colour, np.uint8))

    module = types.SimpleNamespace(svg_to_bytes=svg_to_bytes, calls=calls)
    monkeypatch.setitem(sys.modules, 'resvg_py', module)
    return module


def labels(packages, style: str) -> dict[str, str]:
    return {icon.name: icon.label for icon in emoji.read_icons(packages, [style])}


def icon(label: str, style: str) -> emoji.Icon:
    return emoji.Icon(style=style, name=label, label=label)


def test_concept_has_one_label_in_every_style(packages):
    flag = 'flag: Bosnia & Herzegovina'
    assert labels(packages, 'noto') == {
        'violin': 'violin',
        'waving-hand': 'waving hand',
        'flag-bosnia-and-herzegovina': flag,
    }
    assert labels(packages, 'fluent-3d') == {'1f3bb': 'violin', '2702-fe0f': 'scissors'}
    assert (
        labels(packages, 'fluent-flat')['lighthouse'] == 'lighthouse'
    )  # no Unicode name: the file name


def test_names_without_separators_are_resolved_or_left_out(packages):
    assert labels(packages, 'firefox') == {
        'blackscissors': 'scissors',  # by the name of the character
        'fiddle': 'violin',  # by a shortcode
        'wiredkeyboard': 'wired keyboard',  # a symbol that never became an emoji
        'wave': 'water wave',  # not the waving hand of the shortcode
    }


def test_captions_are_sorted_from_detailed_to_simple(packages):
    (violin,) = (i for i in emoji.read_icons(packages, ['fluent-flat']) if i.name == 'violin')
    assert violin.captions == (
        'violin, Fluent flat emoji (instrument, music)',
        'violin, Fluent flat emoji',
        'Fluent flat emoji of violin',
        'violin',
    )


@pytest.fixture(scope='module')
def many_icons():
    """2,000 labels in one to seven styles, and their splits."""
    styles = list(emoji.STYLES)
    icons = [icon(f'l{n}', style) for n in range(2000) for style in styles[: 1 + n % len(styles)]]
    return icons, emoji.split(icons)


def test_held_out_labels_are_trained_in_no_style(many_icons):
    splits = collections.defaultdict(set)
    for held_icon, name in zip(*many_icons, strict=True):
        splits[name].add(held_icon.label)
    assert not splits['held_out_labels'] & (splits['train'] | splits['held_out_pairs'])
    assert 0.035 < len(splits['held_out_labels']) / 2000 < 0.065


def test_held_out_pairs_are_trained_in_two_other_styles(many_icons):
    trained = collections.Counter(
        i.label for i, name in zip(*many_icons, strict=True) if name == 'train'
    )
    held_out = [i.label for i, name in zip(*many_icons, strict=True) if name == 'held_out_pairs']
    assert min(trained[label] for label in held_out) == 2
    assert 0.035 < len(held_out) / len(many_icons[0]) < 0.065


def test_held_out_concept_is_not_trained_in_another_gender():
    words = ('', 'man ', 'woman ', 'person ')
    styles = list(emoji.STYLES)
    icons = [icon(f'{word}job{n}', style) for n in range(300) for word in words for style in styles]
    trained, held_out = set(), set()
    for job_icon, name in zip(icons, emoji.split(icons), strict=True):
        pair = (job_icon.label.split()[-1], job_icon.style)
        if name == 'held_out_labels':
            pair = pair[0]
        (trained if name == 'train' else held_out).add(pair)
    assert held_out and not held_out & (trained | {job for job, _ in trained})
    assert emoji.concept('man: red hair') == emoji.concept('woman: red hair') == 'red hair'
    assert emoji.concept('person walking: facing right') == emoji.concept('man walking')
    assert emoji.concept('person') == 'person' and emoji.concept('mango') == 'mango'


def test_split_does_not_depend_on_the_order(many_icons):
    icons, splits = many_icons
    assert emoji.split(icons[::-1]) == splits[::-1]


def test_rendering_resumes_at_missing_files(packages, renderer, tmp_path):
    icons = emoji.read_icons(packages, ['noto'])
    rendered = emoji.render_all(icons, tmp_path / 'rendered', 8)
    assert len(renderer.calls) == 3
    rendered[1][1].unlink()
    assert emoji.render_all(icons, tmp_path / 'rendered', 8) == rendered
    assert len(renderer.calls) == 4


def test_identical_images_are_kept_once(tmp_path):
    rendered = []
    for name, colour in (('a', 1), ('b', 2), ('c', 1)):
        path = image_io.save_png(np.full((4, 4, 3), colour, np.uint8), tmp_path / f'{name}.png')
        rendered.append((icon(name, 'noto'), path))
    assert emoji.distinct(rendered) == rendered[:2]


def test_dataset_is_written_completely(packages, renderer, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, 'install', lambda work: packages)
    monkeypatch.setattr(emoji, 'HELD_OUT_LABELS', 0.0)
    out = tmp_path / 'set'
    sets = ('noto', 'fluent-flat', 'fluent-3d', 'firefox')
    summary = emoji.prepare(out, size=16, sets=sets)
    counts = collections.Counter()
    for split in summary.images:
        source = prepared.Prepared(path=str(out), split=split).open(8)
        counts[split] = len(source)
        assert source[0]['image'].shape == (8, 8, 3)
    assert (
        counts == summary.images and counts.total() == 3 + 1 + 1 + 4
    )  # identical images are kept once
    licences = prepared.Prepared(path=str(out), caption='licence').open(8)
    found = {licences[i]['captions'][0] for i in range(len(licences))}
    assert found <= {'Apache-2.0', 'MIT', 'CC-BY-4.0'}
    assert 1 <= sum(emoji.prepare(out, size=16, sets=sets, limit=4).images.values()) <= 4


def test_missing_tools_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.shutil, 'which', lambda name: None)
    with pytest.raises(UserError, match='npm was not found.*install Node.js'):
        emoji.install(tmp_path)
    monkeypatch.setitem(sys.modules, 'resvg_py', None)
    with pytest.raises(UserError, match='pip install'):
        emoji.prepare(tmp_path / 'set')
    with pytest.raises(UserError, match="no emoji style 'apple': expected some of noto"):
        emoji.prepare(tmp_path / 'set', sets=['apple'])


def test_npm_failure_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.shutil, 'which', lambda name: name)
    failed = types.SimpleNamespace(returncode=1, stderr='npm error code ENOTFOUND')
    monkeypatch.setattr(emoji.subprocess, 'run', lambda *args, **options: failed)
    with pytest.raises(UserError, match='ENOTFOUND'):
        emoji.install(tmp_path)


def test_installed_packages_are_not_downloaded_again(tmp_path, monkeypatch):
    for package, version in emoji.pinned().items():
        path = tmp_path / 'node_modules' / package / 'package.json'
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(dict(version=version)))
    monkeypatch.setattr(emoji.shutil, 'which', lambda name: None)
    assert emoji.install(tmp_path) == tmp_path / 'node_modules'


def test_versions_are_pinned_without_a_host():
    lock = Path(emoji.__file__).with_name('emoji_package-lock.json').read_text()
    assert '://' not in lock
    for package, version in emoji.pinned().items():
        entry = json.loads(lock)['packages'][f'node_modules/{package}']
        assert entry['version'] == version and entry['integrity'].startswith('sha512-')
    assert {style.package for style in emoji.STYLES.values()} < set(emoji.pinned())


def test_wide_icons_are_extended_to_squares_on_white(tmp_path):
    pytest.importorskip('resvg_py')
    path = tmp_path / '@iconify-json/noto/icons.json'
    path.parent.mkdir(parents=True)
    path.write_text(iconify(['bar'], width=32, height=16))
    english = tmp_path / 'emojibase-data/en'
    english.mkdir(parents=True)
    (english / 'data.json').write_text('[]')
    (bar,) = emoji.read_icons(tmp_path, ['noto'])
    image = emoji.render(bar, 32)
    assert image.shape == (32, 32, 3)
    assert (image[9:23] == (255, 0, 0)).all()
    assert (image[:7] == 255).all() and (image[25:] == 255).all()
