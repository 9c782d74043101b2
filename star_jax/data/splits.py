"""Which examples are held out from training?

The split of an example depends on its name alone: it is the same on every machine and does not
change when a dataset grows.
"""

import hashlib
from collections.abc import Sequence


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def held_out(names: Sequence[str], share: float) -> frozenset[str]:
    """About `share` of the names, each chosen independently.

    Of two or more names at least one is held out and at least one is not. With a single name, or a
    share of 0, none is held out.
    """
    if share == 0 or len(names) < 2:
        return frozenset()
    chosen = {name for name in names if fraction(name) < share}
    ranked = sorted(names, key=fraction)
    return frozenset((chosen | {ranked[0]}) - {ranked[-1]})
