"""Which grids does an image of a given aspect ratio have?

A template is a list of grids for one ratio of height to width; the name of a resolution selects the
first of them. The published ones are those of Infinity (Infinity specification 2.1): fifteen ratios
with thirteen grids each. Images are 16 px a cell.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping

from star_jax.core.argument_types import check_types
from star_jax.core.schedule import Grids, Pyramid, show_grids
from star_jax.errors import UserError

# Height / width -> height x width of every scale; the inverse of a ratio has the sides swapped.
_TALL = {
    '1.0': '1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64',
    '1.25': '1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56',
    '1.333': '1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54',
    '1.5': '1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52',
    '1.75': '1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48',
    '2.0': '1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45',
    '2.5': '1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40',
    '3.0': '1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37',
}
_INVERSE = {
    '1.25': '0.8',
    '1.333': '0.75',
    '1.5': '0.666',
    '1.75': '0.571',
    '2.0': '0.5',
    '2.5': '0.4',
    '3.0': '0.333',
}

# How many scales an image has at each published resolution, named by its area in pixels.
RESOLUTIONS = {'0.06M': 7, '0.25M': 10, '0.60M': 12, '1M': 13}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Templates:
    """The grids of images of each aspect ratio.

    Attributes:
        grids: pairs of a name and the height x width of every scale in tokens, from coarse to fine,
            such as '4:3' and '1x1 2x2 3x4 6x8'. A name that is a number is the ratio of height to
            width; otherwise it is that of the last scale.
        resolutions: pairs of a name and the number of first scales that images of it have.
    """

    grids: tuple[tuple[str, str], ...] = ()
    resolutions: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        counts = {name: len(grids) for name, grids in self.by_name.items()}
        for name in self.names:
            if not name or self.names.count(name) > 1:
                raise UserError(
                    f'every template needs a name of its own, and {name!r} is empty or names two'
                )
        for (name, count), (after, other) in itertools.pairwise(counts.items()):
            if count != other:
                raise UserError(
                    f'all templates need equally many scales, but {name!r} has {count} and '
                    f'{after!r} has {other}'
                )
        for name, count in self.resolutions:
            if not 1 <= count <= min(counts.values(), default=0):
                raise UserError(
                    f'the resolution {name} has {count} scales, but the templates have '
                    f'{min(counts.values(), default=0)}'
                )

    def __bool__(self) -> bool:
        return bool(self.grids)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.grids)

    @functools.cached_property
    def by_name(self) -> Mapping[str, Grids]:
        """The grids of every template."""
        return {name: _parse(name, scales) for name, scales in self.grids}

    def schedule(self, name: str, scales: int) -> Pyramid:
        """The first scales of a template, whose positions refer to its last grid.

        Raises:
            UserError: there is no such template, or it has fewer scales.
        """
        if name not in self.by_name:
            raise UserError(
                f'there is no template {name!r}: choose one of {", ".join(self.names) or "none"}'
            )
        grids = self.by_name[name]
        if scales > len(grids):
            raise UserError(f'the template {name} has {len(grids)} scales, not {scales}')
        return Pyramid(grids[:scales], grids[-1])

    def ratio(self, name: str) -> float:
        """The ratio of height to width that images of a template have."""
        try:
            return float(name)
        except ValueError:
            height, width = self.by_name[name][-1]
            return height / width

    def nearest(self, ratio: float) -> str:
        """The template with the nearest ratio of height to width; the first of equally near ones.

        Raises UserError if there is no template.
        """
        if not self.grids:
            raise UserError('the model has no templates, and images of one size')
        return min(self.names, key=lambda name: abs(self.ratio(name) - ratio))

    def of_grids(self, grids: Grids) -> str:
        """The template that begins with these grids; UserError if none does."""
        for name, template in self.by_name.items():
            if template[: len(grids)] == grids:
                return name
        raise UserError(f'no template begins with the grids of the model, {show_grids(grids)}')

    def scales(self, resolution: str) -> int:
        """The number of scales at a resolution; UserError if there is none of that name."""
        counts = dict(self.resolutions)
        if resolution not in counts:
            raise UserError(
                f'there is no resolution {resolution!r} of this model: choose one of '
                f'{", ".join(counts) or "none"}'
            )
        return counts[resolution]

    def resolution(self, scales: int) -> str:
        """The name of the resolution with so many scales, '' if it has none."""
        return {count: name for name, count in self.resolutions}.get(scales, '')


def _parse(name: str, scales: str) -> Grids:
    """The grids that a text such as '1x1 2x2' lists; UserError for another text."""
    pairs = [re.fullmatch(r'(\d+)x(\d+)', scale) for scale in scales.split()]
    if not pairs or not all(pairs):
        raise UserError(
            f'the template {name!r} is {scales!r}, expected the height x width of every scale, '
            "such as '1x1 2x2 3x4'"
        )
    grids = tuple((int(pair[1]), int(pair[2])) for pair in pairs)
    Pyramid(grids)  # refuses grids that shrink
    return grids


def _published() -> tuple[tuple[str, str], ...]:
    """The published templates; their order decides between templates that are equally near."""
    templates = []
    for name, scales in _TALL.items():
        templates.append((name, scales))
        if name in _INVERSE:
            swapped = re.sub(r'(\d+)x(\d+)', r'\2x\1', scales)
            templates.append((_INVERSE[name], swapped))
    return tuple(templates)


PUBLISHED = Templates(grids=_published(), resolutions=tuple(RESOLUTIONS.items()))
