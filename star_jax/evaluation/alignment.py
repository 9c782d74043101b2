"""Does a picture show what its caption says?

Everything that the caption says must hold, and nothing else may be there; the single attributes
say what fails where it does not.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from star_jax.data import captions
from star_jax.data.captions import Claims, Mention
from star_jax.data.scenes import Thing, relation
from star_jax.evaluation import scene_parser
from star_jax.evaluation.scene_parser import Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """What of a caption holds in a picture; None is what the caption does not say.

    `count` and `colours` look at all patches, whatever their form, `shapes` at all things, `pairs`
    at which colour goes with which shape; `sizes`, `places` and `relations` at the things that fit
    the mentions best, where one that is missing is wrong.
    """

    all: bool
    count: bool
    colours: bool
    shapes: bool
    pairs: bool
    sizes: bool | None
    places: bool | None
    relations: bool | None
    background: bool | None


def aligned(image_hwc: np.ndarray, caption: str) -> bool:
    """Whether all that a caption says holds in a picture, and nothing else is there.

    The picture as for `reader.inspect`, the caption as for `captions.parse_caption`.
    """
    return judge(image_hwc, caption).all


def judge(image_hwc: np.ndarray, caption: str) -> Alignment:
    """The single attributes of `aligned`."""
    return compare(scene_parser.inspect(image_hwc), captions.parse_caption(caption))


def compare(reading: Reading, claims: Claims) -> Alignment:
    """What holds of some claims in what was read."""
    said, shown = claims.things, reading.things
    scene = reading.scene
    matches = _match(said, shown)
    return Alignment(
        all=scene is not None and captions.matches(claims, scene),
        count=reading.background is not None and len(said) == len(shown) + len(reading.strange),
        colours=_same(
            [each.colour for each in said],
            [*(each.colour for each in shown), *reading.strange],
        ),
        shapes=_same([each.shape for each in said], [each.shape for each in shown]),
        pairs=_same(
            [(each.colour, each.shape) for each in said],
            [(each.colour, each.shape) for each in shown],
        ),
        sizes=_every(
            thing is not None and mention.size == thing.size
            for mention, thing in zip(said, matches, strict=True)
            if mention.size
        ),
        places=_every(
            thing is not None and captions.is_in_place(thing, mention.place)
            for mention, thing in zip(said, matches, strict=True)
            if mention.place
        ),
        relations=_every(
            _related(matches[related.first], matches[related.second], related.relation)
            for related in claims.relations
        ),
        background=claims.background and claims.background == reading.background,
    )


def _match(said: Sequence[Mention], shown: Sequence[Thing]) -> tuple[Thing | None, ...]:
    """The thing meant by each mention: first by colour and shape, then by either of them."""
    options = itertools.permutations([*shown, *[None] * len(said)], len(said))
    return max(options, key=lambda things: sum(map(_likeness, said, things)))


def _likeness(mention: Mention, thing: Thing | None) -> int:
    if thing is None:
        return 0
    colour, shape = mention.colour == thing.colour, mention.shape == thing.shape
    return 1 + 2 * (colour + shape) + 4 * (colour and shape)


def _same(some: list, others: list) -> bool:
    return sorted(some) == sorted(others)


def _every(held: Iterator[bool]) -> bool | None:
    """Whether all of them hold; None where there is none."""
    held = list(held)
    return all(held) if held else None


def _related(first: Thing | None, second: Thing | None, name: str) -> bool:
    return first is not None and second is not None and relation(first, second) == name
