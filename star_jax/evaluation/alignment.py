"""Does an image show what its caption states?

An image is aligned if all claims of the caption hold and the image shows nothing else. The other
attributes of `Alignment` name the kind of claim that fails.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from star_jax.data import captions
from star_jax.data.captions import Claims, Mention
from star_jax.data.scenes import Thing, relation
from star_jax.evaluation import scene_parser
from star_jax.evaluation.scene_parser import ParsedScene


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """Which claims of a caption hold in an image; None if the caption has no claim of this kind.

    `sizes`, `places` and `relations` compare each mention with the thing that matches it best; a
    missing thing counts as wrong.

    Attributes:
        all: every claim holds, and the image shows nothing else.
        count: as many patches as mentions, unrecognised patches included.
        colours: the same colours, unrecognised patches included.
        shapes: the same shapes.
        pairs: the same pairs of colour and shape.
        sizes: every stated size.
        places: every stated place.
        relations: every stated relation.
        background: the stated colour of the background.
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


def is_aligned(image_hwc: np.ndarray, caption: str) -> bool:
    """Whether an image shows all that a caption states, and nothing else; as `check`."""
    return check(image_hwc, caption).all


def check(image_hwc: np.ndarray, caption: str) -> Alignment:
    """Checks every claim of a caption.

    Args:
        image_hwc: (h, w, 3) uint8 RGB, both sides at least 40.
        caption: a sentence that `captions.parse_caption` accepts.

    Raises:
        UserError: an image of another form, or a sentence outside of the caption language.
    """
    return compare(scene_parser.parse(image_hwc), captions.parse_caption(caption))


def compare(parsed: ParsedScene, claims: Claims) -> Alignment:
    """Checks every claim against a parsed image."""
    mentions, things = claims.things, parsed.things
    scene = parsed.scene
    matches = _match(mentions, things)
    return Alignment(
        all=scene is not None and captions.matches(claims, scene),
        count=(
            parsed.background is not None
            and len(mentions) == len(things) + len(parsed.unrecognised)
        ),
        colours=_same_items(
            [mention.colour for mention in mentions],
            [*(thing.colour for thing in things), *parsed.unrecognised],
        ),
        shapes=_same_items(
            [mention.shape for mention in mentions], [thing.shape for thing in things]
        ),
        pairs=_same_items(
            [(mention.colour, mention.shape) for mention in mentions],
            [(thing.colour, thing.shape) for thing in things],
        ),
        sizes=_all_or_none(
            thing is not None and mention.size == thing.size
            for mention, thing in zip(mentions, matches, strict=True)
            if mention.size
        ),
        places=_all_or_none(
            thing is not None and captions.is_in_place(thing, mention.place)
            for mention, thing in zip(mentions, matches, strict=True)
            if mention.place
        ),
        relations=_all_or_none(
            _is_related(matches[related.first], matches[related.second], related.relation)
            for related in claims.relations
        ),
        background=claims.background and claims.background == parsed.background,
    )


def _match(mentions: Sequence[Mention], things: Sequence[Thing]) -> tuple[Thing | None, ...]:
    """The best thing for each mention: equal colour and shape count most, then either of them."""
    assignments = itertools.permutations([*things, *[None] * len(mentions)], len(mentions))
    return max(assignments, key=lambda assigned: sum(map(_similarity, mentions, assigned)))


def _similarity(mention: Mention, thing: Thing | None) -> int:
    if thing is None:
        return 0
    colour, shape = mention.colour == thing.colour, mention.shape == thing.shape
    return 1 + 2 * (colour + shape) + 4 * (colour and shape)


def _same_items(first: list, second: list) -> bool:
    return sorted(first) == sorted(second)


def _all_or_none(results: Iterator[bool]) -> bool | None:
    """Whether all results are true; None if there is none."""
    results = list(results)
    return all(results) if results else None


def _is_related(first: Thing | None, second: Thing | None, name: str) -> bool:
    return first is not None and second is not None and relation(first, second) == name
