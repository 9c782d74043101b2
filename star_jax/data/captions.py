"""Which English captions describe a scene, and what does a caption claim?

`scene_captions` describes a scene, `parse_caption` parses a caption, and `matches` compares the
parsed claims with a scene; evaluation uses the last two on generated images. The language:

    caption = [opening] body ["on a white background"] | "a white background with" body
    body    = noun phrases joined by ",", "and" or a relation ("to the left of", "above", ...)
    phrase  = "a" [size] colour shape [place]
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator

from star_jax.data.scenes import (
    COLOURS,
    MAX_THINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    relation,
)
from star_jax.errors import UserError

CLEAR_MARGIN = 1 / 16  # a caption states a relation only if one axis dominates by this much

OPENINGS = ('a picture of', 'there is')
PLACES = {
    'top left': 'in the top left',
    'top': 'at the top',
    'top right': 'in the top right',
    'left': 'on the left',
    'center': 'in the center',
    'right': 'on the right',
    'bottom left': 'in the bottom left',
    'bottom': 'at the bottom',
    'bottom right': 'in the bottom right',
}
PHRASES = {
    'left of': ('to the left of', 'left of'),
    'right of': ('to the right of', 'right of'),
    'above': ('above',),
    'below': ('below',),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mention:
    """One thing in a caption.

    Attributes:
        colour: a key of `scenes.COLOURS`.
        shape: one of `scenes.SHAPES`.
        size: one of `scenes.SIZES`, or None if the caption has no size.
        place: a key of PLACES, or None if the caption has no place.
    """

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Related:
    """A relation between two things of a caption: the first is, for example, left of the second.

    Attributes:
        first: number of a thing in the order of the caption.
        relation: a key of `scenes.RELATIONS`.
        second: number of another thing.
    """

    first: int
    relation: str
    second: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claims:
    """Everything that a caption states.

    Attributes:
        things: in the order of the caption.
        relations: stated relations between them.
        background: colour of the background, or None if the caption has none.
    """

    things: tuple[Mention, ...]
    relations: tuple[Related, ...] = ()
    background: str | None = None


def scene_captions(scene: Scene) -> tuple[str, ...]:
    """True captions of a scene, the most detailed first.

    Every caption names the colour and shape of every thing. It has fewer than 30 words and commas,
    so that a text encoder of 32 tokens reads all of them.
    """
    bodies = tuple(_bodies(scene.things))
    background = f'{_with_article(scene.background)} background'
    return (
        *(f'{body} on {background}' for body in bodies),
        *bodies,
        *(f'{opening} {bodies[0]}' for opening in OPENINGS),
        f'{background} with {bodies[0]}',
    )


def parse_caption(caption: str) -> Claims:
    """The claims of a caption. Raises `UserError` for a sentence outside of the language."""
    body, background = _split_background(_strip_opening(caption.strip().lower().rstrip('.')))
    nouns = list(_NOUN.finditer(body))
    edges = [0, *itertools.chain.from_iterable(noun.span() for noun in nouns), len(body)]
    between = [body[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    relations = [_JOINTS.get(joint.strip()) for joint in between[1:-1]]
    if not nouns or between[0] or between[-1] or None in relations:
        raise UserError(
            f'{caption!r} is not a caption of the shapes language: write for example '
            "'a small red circle to the left of a large blue square on a white background'"
        )
    return Claims(
        things=tuple(_mention(noun) for noun in nouns),
        relations=tuple(
            Related(first=number, relation=relation, second=number + 1)
            for number, relation in enumerate(relations)
            if relation
        ),
        background=background,
    )


def matches(claims: Claims, scene: Scene) -> bool:
    """Whether a scene has exactly the claimed things, and all their claimed attributes."""
    by_name = {(thing.colour, thing.shape): thing for thing in scene.things}
    names = [(mention.colour, mention.shape) for mention in claims.things]
    if sorted(names) != sorted((thing.colour, thing.shape) for thing in scene.things):
        return False
    things = [by_name[name] for name in names]
    return (
        all(_fits(*pair) for pair in zip(claims.things, things, strict=True))
        and all(
            relation(things[related.first], things[related.second]) == related.relation
            for related in claims.relations
        )
        and claims.background in (None, scene.background)
    )


def is_in_place(thing: Thing, place: str) -> bool:
    """Whether a thing is in a place; 'top' is a whole row and includes 'top left'."""
    return set(place.split()) <= set(thing.place.split())


def _fits(mention: Mention, thing: Thing) -> bool:
    return mention.size in (None, thing.size) and is_in_place(thing, mention.place or '')


def _bodies(things: tuple[Thing, ...]) -> Iterator[str]:
    plain = [_noun(thing) for thing in things]
    sized = [_noun(thing, size=True) for thing in things]
    lists = [_placed(sized, things), _placed(plain, things), sized, plain]
    # Three things with sizes and places are too long for the text encoder, and always small.
    for nouns in lists[len(things) == MAX_THINGS :]:
        yield _enumerate(nouns)
        if len(things) > 1:
            yield _enumerate(nouns[::-1])
    for first, second in itertools.permutations(range(len(things)), 2):
        name = relation(things[first], things[second], CLEAR_MARGIN)
        if name is None:
            continue
        rest = [f', and {noun}' for at, noun in enumerate(plain) if at not in (first, second)]
        for phrase in PHRASES[name]:
            yield ''.join((f'{plain[first]} {phrase} {plain[second]}', *rest))
        if not rest:
            phrase = PHRASES[name][0]
            yield f'{sized[first]} {phrase} {sized[second]}'
            yield f'{plain[first]} {phrase} {sized[second]}'


def _noun(thing: Thing, size: bool = False) -> str:
    return _with_article(f'{thing.size + " " if size else ""}{thing.colour} {thing.shape}')


def _placed(nouns: list[str], things: tuple[Thing, ...]) -> list[str]:
    return [f'{noun} {PLACES[thing.place]}' for noun, thing in zip(nouns, things, strict=True)]


def _with_article(words: str) -> str:
    return f'{"an" if words.startswith("orange") else "a"} {words}'


def _enumerate(nouns: list[str]) -> str:
    *most, last = nouns
    return f'{", ".join(most)} and {last}' if most else last


def _any(words: tuple[str, ...] | dict[str, object]) -> str:
    return '|'.join(sorted(words, key=len, reverse=True))  # 'top left' before 'top'


_NOUN = re.compile(
    rf'\ban? (?:(?P<size>{_any(SIZES)}) )?(?P<colour>{_any(COLOURS)}) (?P<shape>{_any(SHAPES)})\b'
    rf'(?: (?:in|at|on) the (?P<place>{_any(PLACES)})\b)?'
)
_BACKGROUND = rf'an? (?P<colour>{_any(COLOURS)}) background'
_BACKGROUNDS = (
    re.compile(rf'(?P<body>.+?),? on {_BACKGROUND}'),
    re.compile(rf'{_BACKGROUND} with (?P<body>.+)'),
)
_JOINTS = {',': '', 'and': '', ', and': ''} | {
    phrase: name for name in RELATIONS for phrase in PHRASES[name]
}


def _strip_opening(text: str) -> str:
    return functools.reduce(lambda text, opening: text.removeprefix(f'{opening} '), OPENINGS, text)


def _split_background(text: str) -> tuple[str, str | None]:
    for pattern in _BACKGROUNDS:
        if match := pattern.fullmatch(text):
            return match['body'], match['colour']
    return text, None


def _mention(noun: re.Match[str]) -> Mention:
    return Mention(**noun.groupdict())
