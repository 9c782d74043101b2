"""Which scales share one body of the sampling program?

By default each scale has a body of its own, which runs fastest. The scales of a bucket share one
scanned body, in which each is padded to the widest: less to compile, more to compute. The images
are the same.
"""

import itertools
import operator
from collections.abc import Hashable, Sequence

from star_jax.errors import UserError, UserTypeError

Buckets = tuple[tuple[int, int], ...]  # the first and the last scale of each, counted from 0

# The default number of buckets of each platform; 0: each scale has a body of its own.
# `star-jax bench buckets` measures the cost of each choice.
COUNTS = {'cpu': 0, 'gpu': 0, 'tpu': 0}


def choose(buckets: Buckets | None, sizes: Sequence[int], platform: str) -> Buckets:
    """The given buckets, or the default ones of a platform.

    Args:
        buckets: the user's buckets; None for the default.
        sizes: the tokens of each scale.
        platform: 'cpu', 'gpu' or 'tpu'.

    Raises:
        UserError: the buckets are not pairs of numbers.
    """
    if buckets is None:
        return divide(sizes, COUNTS.get(platform, 0))
    try:
        return tuple((operator.index(first), operator.index(last)) for first, last in buckets)
    except (TypeError, ValueError) as error:
        kind = UserTypeError if isinstance(error, TypeError) else UserError
        raise kind(
            f'buckets are pairs of the first and the last scale of each, not {buckets!r}: give '
            f'such pairs, as in {((0, len(sizes) - 1),)} for one bucket of all scales'
        ) from error


def divide(sizes: Sequence[int], count: int) -> Buckets:
    """The buckets with the least padding, at most `count` of them; 0: none.

    A scale that would be alone in its bucket is left out.

    >>> divide((1, 4, 9, 16, 25, 36, 64, 100, 169, 256), 3)
    ((0, 5), (6, 7), (8, 9))
    """
    if not count:
        return ()
    steps = len(sizes)
    cuts = itertools.combinations(range(1, steps), min(count, steps) - 1)
    choices = (tuple(itertools.pairwise((0, *cut, steps))) for cut in cuts)
    best = min(choices, key=lambda ends: sum((end - first) * sizes[end - 1] for first, end in ends))
    return tuple((first, end - 1) for first, end in best if end - first > 1)


def padding(sizes: Sequence[int], buckets: Buckets) -> float:
    """The tokens that a program with these buckets computes, over the tokens of an image."""
    added = (sizes[last] - size for first, last in buckets for size in sizes[first : last + 1])
    return 1 + sum(added) / sum(sizes)


def check(buckets: Buckets, kinds: Sequence[Hashable]) -> None:
    """Checks buckets against the scales of a model.

    Args:
        buckets: the first and the last scale of each.
        kinds: for each scale, how it is sampled (`SamplingMethod.kind`).

    Raises:
        UserError: the buckets overlap, are out of order, or mix scales of different kinds.
    """
    before = -1
    for first, last in buckets:
        if not before < first <= last < len(kinds):
            pairs = ' '.join(f'{first} {last}' for first, last in buckets)
            raise UserError(
                f'the buckets {pairs} are not the first and the last of scales in order below '
                f'{len(kinds)}: give such pairs, as in 0 {len(kinds) - 1} for one bucket of all '
                'scales'
            )
        if len(set(kinds[first : last + 1])) > 1:
            raise UserError(
                f'the scales {first} to {last} cannot share a bucket, because stable sampling '
                'refines some of them: leave the scales that it refines out of the buckets'
            )
        before = last
