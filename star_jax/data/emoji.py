"""Where does a real captioned set come from?

Seven open emoji designs, drawn at any size: one concept in up to seven styles, each picture with
its name, keywords, style, licence and attribution. They are icons on white, not photographs.
Concepts are held out whole, and (concept, style) pairs whose concept is trained in other styles:
"zebra, Noto" and "piano, Fluent 3D" are seen, "zebra, Fluent 3D" is asked.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import re
import shutil
import subprocess
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import rich.console
import rich.progress

from star_jax import image_io
from star_jax.data import prepared
from star_jax.data.splits import fraction
from star_jax.errors import UserError

HELD_OUT_LABELS = 0.05  # share of the concepts, whose labels are trained in no style
HELD_OUT_PAIRS = 0.06  # share of the (concept, style) pairs asked for; 5 % of the images qualify
TRAINED_STYLES = 2  # a held-out pair's label is trained in at least so many other styles
TAGS = 4  # keywords in a caption: more would not fit the text encoder's 32 tokens
TONES = ('light', 'medium-light', 'medium', 'medium-dark', 'dark')
# File names that are misspelt, or that mean another picture in the Unicode names.
RENAMED = {
    'piata': 'pinata',
    'phoenix-bird': 'phoenix',
    'keycap': 'keycap-base',
    'bow': 'ribbon',
    'couple': 'couple-with-heart',
    'down': 'backhand-index-pointing-down',
    'up': 'index-pointing-up',
    'pout': 'person-pouting',
    'pouting': 'enraged-face',
    'wave': 'water-wave',
}
INSTALL = 'pip install resvg-py==0.5.0'
TONE_CODES = {'1f3fb', '1f3fc', '1f3fd', '1f3fe', '1f3ff'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """One design: `name` is how captions call it, `package` where npm has it.

    `run_together`: its file names lack spaces, so that only known ones make a caption.
    """

    name: str
    package: str
    licence: str
    attribution: str
    run_together: bool = False


STYLES = {
    'noto': Style(
        name='Noto emoji',
        package='@iconify-json/noto',
        licence='Apache-2.0',
        attribution='Noto Emoji, Google, https://github.com/googlefonts/noto-emoji',
    ),
    'noto-v1': Style(
        name='old Noto emoji',
        package='@iconify-json/noto-v1',
        licence='Apache-2.0',
        attribution='Noto Emoji (v1), Google, https://github.com/googlefonts/noto-emoji',
    ),
    'fluent': Style(
        name='Fluent emoji',
        package='@iconify-json/fluent-emoji',
        licence='MIT',
        attribution='Fluent Emoji, Microsoft, https://github.com/microsoft/fluentui-emoji',
    ),
    'fluent-flat': Style(
        name='Fluent flat emoji',
        package='@iconify-json/fluent-emoji-flat',
        licence='MIT',
        attribution='Fluent Emoji, Microsoft, https://github.com/microsoft/fluentui-emoji',
    ),
    'fluent-3d': Style(
        name='Fluent 3D emoji',
        package='@lobehub/fluent-emoji-3d',
        licence='MIT',
        attribution='Fluent Emoji, Microsoft, https://github.com/microsoft/fluentui-emoji',
    ),
    'firefox': Style(
        name='Firefox OS emoji',
        package='@iconify-json/fxemoji',
        licence='CC-BY-4.0',  # the art; its package names the licence of the code
        attribution='FxEmojis, Mozilla Foundation, https://github.com/mozilla/fxemoji, '
        'https://creativecommons.org/licenses/by/4.0/, rasterised on white',
        run_together=True,
    ),
    'twemoji': Style(
        name='Twitter emoji',
        package='@iconify-json/twemoji',
        licence='CC-BY-4.0',
        attribution='Twemoji, Twitter and contributors, https://github.com/jdecked/twemoji, '
        'https://creativecommons.org/licenses/by/4.0/, rasterised on white',
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Icon:
    """A picture before it is drawn: `svg` text, or the `file` of a bitmap.

    `name` is unique in its style; `tags` are keywords that the label does not say.
    """

    style: str
    name: str
    label: str
    tags: tuple[str, ...] = ()
    svg: str = ''
    file: Path = Path()

    @property
    def captions(self) -> tuple[str, ...]:
        """The fullest first: "violin, Fluent flat emoji (instrument, music)"."""
        style = STYLES[self.style].name
        plain = f'{self.label}, {style}'
        full = f'{plain} ({", ".join(self.tags[:TAGS])})' if self.tags else plain
        return tuple(dict.fromkeys((full, plain, f'{style} of {self.label}', self.label)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What was prepared: images of each split, labels in all, and its cost."""

    images: Mapping[str, int]
    labels: int
    seconds: float
    megabytes: float


def prepare(
    out: Path,
    size: int = 128,
    sets: Sequence[str] = tuple(STYLES),
    limit: int | None = None,
) -> Summary:
    """Fetches, draws and writes the set into the folder `out`.

    Splits: `train`, `held_out_labels`, `held_out_pairs`. Beside `out` the folder `OUT.work` keeps
    the packages (227 MB) and the drawn pictures, so that an interrupted run continues there; it may
    be deleted afterwards.
    `sets` are keys of STYLES; `limit` draws only so many icons, for a trial.
    Raises UserError where npm or the renderer is missing, or a style is unknown.
    """
    start = time.monotonic()
    for key in sets:
        if key not in STYLES:
            raise UserError(f'no emoji style {key!r}: expected some of {", ".join(STYLES)}')
    _renderer()  # before the download: it is the other thing that may be missing
    out = Path(out).absolute()
    prepared.check_free(out)
    work = out.with_name(f'{out.name}.work')
    packages = install(work)
    # By label, so that a trial has its labels in every style; in an order apart from the splits'.
    icons = sorted(read_icons(packages, sets), key=lambda icon: fraction(f'trial {icon.label}'))
    drawn = distinct(draw(icons[:limit], work / 'rendered' / str(size), size))
    splits = split([icon for icon, _ in drawn])
    records = collections.defaultdict(list)
    for (icon, path), name in zip(drawn, splits, strict=True):
        records[name].append((icon, path))
    prepared.write(
        out,
        {name: map(_record, found) for name, found in sorted(records.items())},
        name='emoji',
        description=f'Emoji in {len(sets)} styles, {size} px, drawn by star_jax.data.emoji.',
        extra=('style',),
    )
    return Summary(
        images={name: len(found) for name, found in sorted(records.items())},
        labels=len({icon.label for icon, _ in drawn}),
        seconds=time.monotonic() - start,
        megabytes=sum(file.stat().st_size for file in out.iterdir()) / 1e6,
    )


def install(work: Path) -> Path:
    """The npm packages at their pinned versions; returns their `node_modules`.

    Raises UserError where npm is missing or fails.
    """
    modules = work / 'node_modules'
    if all(_installed(modules, package) == version for package, version in pinned().items()):
        return modules
    if shutil.which('npm') is None:
        raise UserError('npm was not found, it fetches the emoji: install Node.js and try again')
    work.mkdir(parents=True, exist_ok=True)
    for name in ('package.json', 'package-lock.json'):
        (work / name).write_text(_resource(f'emoji_{name}'))
    options = ['--ignore-scripts', '--no-audit', '--no-fund']
    done = subprocess.run(['npm', 'ci', *options], cwd=work, capture_output=True, text=True)
    if done.returncode:
        complaint = ' '.join(done.stderr.split()[-40:])
        raise UserError(f'npm could not fetch the emoji ({complaint}): mend that and try again')
    return modules


@functools.cache
def pinned() -> Mapping[str, str]:
    """Package -> version."""
    return json.loads(_resource('emoji_package.json'))['dependencies']


class Names:
    """Which concept does a file name mean? The Unicode names (CLDR) and their keywords decide.

    Sets differ in age and spelling: "black-scissors", "scissors" and "2702" are one label.
    """

    def __init__(self, packages: Path):
        english = packages / 'emojibase-data' / 'en'
        self._emoji = json.loads((english / 'data.json').read_text())
        self._by_code = {_bare(emoji['hexcode']): emoji for emoji in self._emoji}
        self._by_word = self._unicode_names()
        for codes in sorted((english / 'shortcodes').glob('*.json')):
            self._add_shortcodes(json.loads(codes.read_text()))
        self._by_word |= {_squash(emoji['label']): emoji for emoji in self._emoji}

    def named(self, name: str) -> dict[str, Any] | None:
        """What "beaming-face", or "beamingface", shows; None where that is unknown."""
        name = RENAMED.get(name, name).removeprefix('flag-for-')
        return self._by_word.get(_squash(name)) or self._by_word.get(
            _squash(name.removeprefix('person-'))
        )

    def coded(self, code: str) -> dict[str, Any] | None:
        """What the emoji with the code points "1f3bb" shows."""
        return self._by_code.get(_bare(code))

    def _unicode_names(self) -> dict[str, dict[str, Any]]:
        """Old sets use the characters' own names, and draw symbols that never became emoji."""
        words = {}
        for point in [*range(0x2000, 0x3300), *range(0x1F000, 0x1FC00)]:
            if name := unicodedata.name(chr(point), ''):
                emoji = self._by_code.get(f'{point:x}', dict(label=name.lower()))
                words[_squash(name)] = emoji
        return words

    def _add_shortcodes(self, shortcodes: Mapping[str, str | list[str]]) -> None:
        for code, words in shortcodes.items():
            emoji = self._by_code.get(_bare(code))
            for word in [words] if isinstance(words, str) else words:
                if emoji is not None:
                    self._by_word.setdefault(_squash(word), emoji)


def read_icons(packages: Path, sets: Iterable[str]) -> list[Icon]:
    """Every icon of some styles that has a name, skin-tone variants left out."""
    names = Names(packages)
    icons = []
    for key in sets:
        folder = packages / STYLES[key].package
        read = _bitmap_icons if (folder / 'assets').is_dir() else _iconify_icons
        icons.extend(read(folder, key, names))
    return icons


def draw(icons: Sequence[Icon], folder: Path, size: int) -> list[tuple[Icon, Path]]:
    """Renders each icon into `folder`/style-version/name.png, but for those already there."""
    versions = pinned()
    drawn = []
    progress = rich.progress.track(
        icons, f'drawing at {size} px', console=rich.console.Console(stderr=True)
    )
    for icon in progress:
        style = f'{icon.style}-{versions[STYLES[icon.style].package]}'
        path = folder / style / f'{icon.name}.png'
        if not path.exists():
            image_io.save_png(render(icon, size), path)
        drawn.append((icon, path))
    return drawn


def render(icon: Icon, size: int) -> np.ndarray:
    """The (size, size, 3) picture of an icon, on white."""
    if not icon.svg:
        return image_io.crop(image_io.load_image(icon.file), size)
    # Without dpi, sizes in mm fail; without system fonts, every machine draws the same.
    png = _renderer().svg_to_bytes(
        svg_string=icon.svg, width=size, height=size, dpi=96, skip_system_fonts=True
    )
    return image_io.crop(image_io.decode(png), size)


def distinct(drawn: Iterable[tuple[Icon, Path]]) -> list[tuple[Icon, Path]]:
    """Without pictures that equal an earlier one to the pixel."""
    seen = {}
    for icon, path in drawn:
        seen.setdefault(hashlib.sha256(path.read_bytes()).digest(), (icon, path))
    return list(seen.values())


def split(icons: Sequence[Icon]) -> list[str]:
    """The split of each icon, whatever the order of `icons`.

    Labels of one concept stay together, for "pilot" and "man pilot" are almost the same picture.
    """
    concepts = collections.defaultdict(lambda: collections.defaultdict(set))
    for icon in icons:
        concepts[concept(icon.label)][icon.label].add(icon.style)
    pairs = {name: _held_out_styles(name, labels) for name, labels in concepts.items()}

    def choose(icon: Icon) -> str:
        name = concept(icon.label)
        if fraction(name) < HELD_OUT_LABELS:
            return 'held_out_labels'
        return 'held_out_pairs' if icon.style in pairs[name] else 'train'

    return [choose(icon) for icon in icons]


def concept(label: str) -> str:
    """What labels share that differ in gender or direction alone."""
    shared = re.sub(r'^(man|woman|person|men|women|people)\b:? ?', '', label)
    return shared.removesuffix(' facing right').removesuffix(':') or label


def _held_out_styles(name: str, labels: Mapping[str, set[str]]) -> set[str]:
    """The concept's styles to ask for: each label of theirs is trained in enough others."""
    chance = {style: fraction(f'{name} in {style}') for style in set().union(*labels.values())}
    held_out = set()
    for style in sorted(chance, key=chance.get):
        wider = held_out | {style}
        enough = all(
            len(styles - wider) >= TRAINED_STYLES for styles in labels.values() if styles & wider
        )
        if chance[style] < HELD_OUT_PAIRS and enough:
            held_out = wider
    return held_out


def _iconify_icons(folder: Path, key: str, names: Names) -> Iterator[Icon]:
    """Icons of the iconify layout: SVG bodies by name."""
    icons = json.loads((folder / 'icons.json').read_text())
    for name, body in sorted(icons['icons'].items()):
        if body.get('hidden') or _has_tone(name, icons['icons']):
            continue
        emoji = names.named(name)
        if emoji is None and STYLES[key].run_together:
            continue  # "dissapointedrelief" makes no caption
        label = emoji['label'] if emoji else name.replace('-', ' ')
        yield _icon(key, name, label, emoji, svg=_svg(icons, body))


def _bitmap_icons(folder: Path, key: str, names: Names) -> Iterator[Icon]:
    """Bitmaps called by code points."""
    for file in sorted((folder / 'assets').glob('*.webp')):
        emoji = names.coded(file.stem)
        if emoji is not None and not TONE_CODES & set(file.stem.split('-')):
            yield _icon(key, file.stem, emoji['label'], emoji, file=file)


def _icon(
    style: str, name: str, label: str, emoji: Mapping[str, Any] | None, **picture: Any
) -> Icon:
    words = set(re.findall(r'\w+', label.lower()))
    tags = [tag for tag in (emoji or {}).get('tags', ()) if re.search(r'\w', tag)]
    tags = tuple(tag for tag in tags if tag.lower() not in words)
    return Icon(style=style, name=name, label=label, tags=tags, **picture)


def _svg(icons: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
    """A document whose view is the icon's, made square around its centre."""

    def field(name: str, default: float) -> float:
        return icon.get(name, icons.get(name, default))

    width, height = field('width', 16), field('height', 16)
    side = max(width, height)
    left = field('left', 0) - (side - width) / 2
    top = field('top', 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )


def _has_tone(name: str, icons: Mapping[str, Any]) -> bool:
    """A skin-tone variant: it says so, or is another icon's name and a tone."""
    stems = (name.removesuffix(f'-{tone}') for tone in TONES if name.endswith(f'-{tone}'))
    return 'skin-tone' in name or any(stem in icons for stem in stems)


def _record(found: tuple[Icon, Path]) -> dict[str, Any]:
    icon, path = found
    style = STYLES[icon.style]
    return dict(
        key=f'{icon.style}/{icon.name}',
        image=path.read_bytes(),
        captions=icon.captions,
        label=icon.label,
        source=f'npm {style.package} {pinned()[style.package]}: {icon.name}',
        licence=style.licence,
        attribution=style.attribution,
        style=style.name,
    )


def _renderer() -> ModuleType:
    try:
        import resvg_py
    except ImportError:
        raise UserError(f'resvg-py was not found, it draws the emoji: {INSTALL}') from None
    return resvg_py


def _installed(modules: Path, package: str) -> str | None:
    try:
        return json.loads((modules / package / 'package.json').read_text())['version']
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _resource(name: str) -> str:
    return (importlib.resources.files('star_jax.data') / name).read_text()


def _bare(code: str) -> str:
    """Code points without the selectors of presentation, on which sets disagree."""
    return '-'.join(point for point in code.lower().split('-') if point != 'fe0f')


def _squash(name: str) -> str:
    """Letters and digits alone: "Piñata", "pinata" and "pi-ñata" are one word."""
    plain = unicodedata.normalize('NFKD', name).lower().replace('&', 'and')
    return re.sub('[^a-z0-9]', '', plain)
