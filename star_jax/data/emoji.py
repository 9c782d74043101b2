"""How is a dataset of real captioned images made?

Seven open emoji designs are rendered at any size: one concept in up to seven styles, each image
with its name, keywords, style, licence and attribution. They are icons on white, not photographs.
Two splits are held out: whole concepts, and (concept, style) pairs of concepts that are trained in
other styles ("zebra, Noto" and "piano, Fluent 3D" are trained, "zebra, Fluent 3D" is held out).
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

from star_jax import image_io
from star_jax.console import track
from star_jax.data import prepared
from star_jax.data.splits import fraction
from star_jax.errors import UserError

HELD_OUT_LABELS = 0.05  # share of the concepts that are trained in no style
HELD_OUT_PAIRS = 0.06  # share of the (concept, style) pairs to hold out; 5 % of the images qualify
TRAINED_STYLES = 2  # the label of a held-out pair is trained in at least so many other styles
MAX_TAGS = 4  # keywords in a caption: more exceed the 32 tokens of the text encoder
TONES = ('light', 'medium-light', 'medium', 'medium-dark', 'dark')
# File names that are misspelt, or that name another emoji in Unicode.
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
    """One emoji design.

    Attributes:
        name: the style in captions.
        package: the npm package.
        licence: licence of the images.
        attribution: credit that the licence asks for.
        run_together: file names have no separators, so that unknown names give no caption.
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
        licence='CC-BY-4.0',  # licence of the images; the package names the licence of its code
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
    """An emoji before it is rendered, as SVG or bitmap file.

    Attributes:
        style: a key of STYLES.
        name: unique in the style.
        label: name of the emoji in captions.
        tags: keywords that are not in the label.
        svg: SVG text, or ''.
        file: bitmap file, if there is no SVG.
    """

    style: str
    name: str
    label: str
    tags: tuple[str, ...] = ()
    svg: str = ''
    file: Path = Path()

    @property
    def captions(self) -> tuple[str, ...]:
        """The most detailed first: "violin, Fluent flat emoji (instrument, music)"."""
        style = STYLES[self.style].name
        plain = f'{self.label}, {style}'
        full = f'{plain} ({", ".join(self.tags[:MAX_TAGS])})' if self.tags else plain
        return tuple(dict.fromkeys((full, plain, f'{style} of {self.label}', self.label)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmojiSummary:
    """The result of `prepare`.

    Attributes:
        images: images per split.
        labels: number of labels in all splits.
        seconds: duration.
        megabytes: size on disk.
    """

    images: Mapping[str, int]
    labels: int
    seconds: float
    megabytes: float


def prepare(
    out: Path,
    size: int = 128,
    sets: Sequence[str] = tuple(STYLES),
    limit: int | None = None,
) -> EmojiSummary:
    """Downloads, renders and writes the dataset.

    Splits: `train`, `held_out_labels`, `held_out_pairs`. The folder `OUT.work` beside `out` holds
    the packages (227 MB) and the rendered images, so that an interrupted run continues; it may be
    deleted afterwards.

    Args:
        out: folder of the dataset.
        size: side of the images in pixels.
        sets: keys of STYLES.
        limit: number of icons, for a trial (None: all).

    Raises:
        UserError: npm or the renderer is missing, or a style is unknown.
    """
    start = time.monotonic()
    for key in sets:
        if key not in STYLES:
            raise UserError(f'no emoji style {key!r}: expected some of {", ".join(STYLES)}')
    _renderer()  # fails before the download if the renderer is missing
    out = Path(out).absolute()
    prepared.check_free(out)
    work = out.with_name(f'{out.name}.work')
    packages = install(work)
    # Sorted by label, so that a trial has its labels in every style; independent of the splits.
    icons = sorted(read_icons(packages, sets), key=lambda icon: fraction(f'trial {icon.label}'))
    rendered = distinct(render_all(icons[:limit], work / 'rendered' / str(size), size))
    splits = split([icon for icon, _ in rendered])
    records = collections.defaultdict(list)
    for (icon, path), name in zip(rendered, splits, strict=True):
        records[name].append((icon, path))
    prepared.write(
        out,
        {name: map(_record, split_icons) for name, split_icons in sorted(records.items())},
        name='emoji',
        description=f'Emoji in {len(sets)} styles, {size} px, rendered by star_jax.data.emoji.',
        extra=('style',),
    )
    return EmojiSummary(
        images={name: len(split_icons) for name, split_icons in sorted(records.items())},
        labels=len({icon.label for icon, _ in rendered}),
        seconds=time.monotonic() - start,
        megabytes=sum(file.stat().st_size for file in out.iterdir()) / 1e6,
    )


def install(work: Path) -> Path:
    """Installs the npm packages at their pinned versions.

    Args:
        work: folder of the installation.

    Returns:
        The path of `node_modules`.

    Raises:
        UserError: npm is missing or fails.
    """
    modules = work / 'node_modules'
    if all(_installed(modules, package) == version for package, version in pinned().items()):
        return modules
    if shutil.which('npm') is None:
        raise UserError(
            'npm was not found, which downloads the emoji: install Node.js and try again'
        )
    work.mkdir(parents=True, exist_ok=True)
    for name in ('package.json', 'package-lock.json'):
        (work / name).write_text(_resource(f'emoji_{name}'))
    options = ['--ignore-scripts', '--no-audit', '--no-fund']
    done = subprocess.run(['npm', 'ci', *options], cwd=work, capture_output=True, text=True)
    if done.returncode:
        message = ' '.join(done.stderr.split()[-40:])
        raise UserError(f'npm could not download the emoji ({message}): fix that and try again')
    return modules


@functools.cache
def pinned() -> Mapping[str, str]:
    """Versions of the npm packages, by package."""
    return json.loads(_resource('emoji_package.json'))['dependencies']


class Names:
    """Finds the emoji of a file name, from Unicode names (CLDR) and shortcodes.

    Designs differ in age and spelling: "black-scissors", "scissors" and "2702" are one emoji.

    Args:
        packages: the path of `node_modules`.
    """

    def __init__(self, packages: Path):
        english = packages / 'emojibase-data' / 'en'
        self._emoji = json.loads((english / 'data.json').read_text())
        self._by_code = {_bare(emoji['hexcode']): emoji for emoji in self._emoji}
        self._by_name = self._unicode_names()
        for codes in sorted((english / 'shortcodes').glob('*.json')):
            self._add_shortcodes(json.loads(codes.read_text()))
        self._by_name |= {_squash(emoji['label']): emoji for emoji in self._emoji}

    def by_name(self, name: str) -> dict[str, Any] | None:
        """The emoji "beaming-face", or "beamingface"; None for an unknown name."""
        name = RENAMED.get(name, name).removeprefix('flag-for-')
        return self._by_name.get(_squash(name)) or self._by_name.get(
            _squash(name.removeprefix('person-'))
        )

    def by_code(self, code: str) -> dict[str, Any] | None:
        """The emoji with the code points "1f3bb"; None for unknown ones."""
        return self._by_code.get(_bare(code))

    def _unicode_names(self) -> dict[str, dict[str, Any]]:
        """Names of characters: old designs use them, also for symbols that are not emoji."""
        emoji_by_name = {}
        for point in [*range(0x2000, 0x3300), *range(0x1F000, 0x1FC00)]:
            if name := unicodedata.name(chr(point), ''):
                emoji = self._by_code.get(f'{point:x}', dict(label=name.lower()))
                emoji_by_name[_squash(name)] = emoji
        return emoji_by_name

    def _add_shortcodes(self, shortcodes: Mapping[str, str | list[str]]) -> None:
        for code, names in shortcodes.items():
            emoji = self._by_code.get(_bare(code))
            for name in [names] if isinstance(names, str) else names:
                if emoji is not None:
                    self._by_name.setdefault(_squash(name), emoji)


def read_icons(packages: Path, sets: Iterable[str]) -> list[Icon]:
    """All icons of these styles that have a name, without skin-tone variants."""
    names = Names(packages)
    icons = []
    for key in sets:
        folder = packages / STYLES[key].package
        read_style = _bitmap_icons if (folder / 'assets').is_dir() else _iconify_icons
        icons.extend(read_style(folder, key, names))
    return icons


def render_all(icons: Sequence[Icon], folder: Path, size: int) -> list[tuple[Icon, Path]]:
    """Renders each icon to `folder`/style-version/name.png; existing files are kept."""
    versions = pinned()
    rendered = []
    for icon in track(icons, f'rendering at {size} px', len(icons)):
        style = f'{icon.style}-{versions[STYLES[icon.style].package]}'
        path = folder / style / f'{icon.name}.png'
        if not path.exists():
            image_io.save_png(render(icon, size), path)
        rendered.append((icon, path))
    return rendered


def render(icon: Icon, size: int) -> np.ndarray:
    """The (size, size, 3) uint8 image of an icon, on white."""
    if not icon.svg:
        return image_io.crop(image_io.load_image(icon.file), size)
    # Sizes in mm need dpi; without system fonts, every machine renders the same.
    png = _renderer().svg_to_bytes(
        svg_string=icon.svg, width=size, height=size, dpi=96, skip_system_fonts=True
    )
    return image_io.crop(image_io.decode(png), size)


def distinct(rendered: Iterable[tuple[Icon, Path]]) -> list[tuple[Icon, Path]]:
    """The first of every group of identical images."""
    first = {}
    for icon, path in rendered:
        first.setdefault(hashlib.sha256(path.read_bytes()).digest(), (icon, path))
    return list(first.values())


def split(icons: Sequence[Icon]) -> list[str]:
    """The split of each icon, which does not depend on the order of `icons`.

    Labels of one concept are in one split, because "pilot" and "man pilot" are almost one image.
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
    """The common part of labels that differ in gender or direction alone."""
    shared = re.sub(r'^(man|woman|person|men|women|people)\b:? ?', '', label)
    return shared.removesuffix(' facing right').removesuffix(':') or label


def _held_out_styles(name: str, labels: Mapping[str, set[str]]) -> set[str]:
    """The held-out styles of a concept; each of its labels is trained in enough other styles."""
    fractions = {style: fraction(f'{name} in {style}') for style in set().union(*labels.values())}
    held_out = set()
    for style in sorted(fractions, key=fractions.get):
        candidate = held_out | {style}
        enough = all(
            len(styles - candidate) >= TRAINED_STYLES
            for styles in labels.values()
            if styles & candidate
        )
        if fractions[style] < HELD_OUT_PAIRS and enough:
            held_out = candidate
    return held_out


def _iconify_icons(folder: Path, key: str, names: Names) -> Iterator[Icon]:
    """Icons of an iconify package: SVG bodies by name."""
    icons = json.loads((folder / 'icons.json').read_text())
    for name, body in sorted(icons['icons'].items()):
        if body.get('hidden') or _has_tone(name, icons['icons']):
            continue
        emoji = names.by_name(name)
        if emoji is None and STYLES[key].run_together:
            continue  # "dissapointedrelief" is no caption
        label = emoji['label'] if emoji else name.replace('-', ' ')
        yield _icon(key, name, label, emoji, svg=_svg(icons, body))


def _bitmap_icons(folder: Path, key: str, names: Names) -> Iterator[Icon]:
    """Icons of a package of bitmaps, which are named by code points."""
    for file in sorted((folder / 'assets').glob('*.webp')):
        emoji = names.by_code(file.stem)
        if emoji is not None and not TONE_CODES & set(file.stem.split('-')):
            yield _icon(key, file.stem, emoji['label'], emoji, file=file)


def _icon(
    style: str, name: str, label: str, emoji: Mapping[str, Any] | None, **source: Any
) -> Icon:
    words = set(re.findall(r'\w+', label.lower()))
    tags = [tag for tag in (emoji or {}).get('tags', ()) if re.search(r'\w', tag)]
    tags = tuple(tag for tag in tags if tag.lower() not in words)
    return Icon(style=style, name=name, label=label, tags=tags, **source)


def _svg(icons: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
    """An SVG document with the view box of the icon, extended to a square around its centre."""

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
    """Whether a name contains "skin-tone", or is the name of another icon and a tone."""
    stems = (name.removesuffix(f'-{tone}') for tone in TONES if name.endswith(f'-{tone}'))
    return 'skin-tone' in name or any(stem in icons for stem in stems)


def _record(rendered: tuple[Icon, Path]) -> dict[str, Any]:
    icon, path = rendered
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
        raise UserError(f'resvg-py was not found, which renders the emoji: {INSTALL}') from None
    return resvg_py


def _installed(modules: Path, package: str) -> str | None:
    try:
        return json.loads((modules / package / 'package.json').read_text())['version']
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _resource(name: str) -> str:
    return (importlib.resources.files('star_jax.data') / name).read_text()


def _bare(code: str) -> str:
    """Code points without variation selectors, which designs use inconsistently."""
    return '-'.join(point for point in code.lower().split('-') if point != 'fe0f')


def _squash(name: str) -> str:
    """Letters and digits alone: "Piñata", "pinata" and "pi-ñata" are one name."""
    plain = unicodedata.normalize('NFKD', name).lower().replace('&', 'and')
    return re.sub('[^a-z0-9]', '', plain)
