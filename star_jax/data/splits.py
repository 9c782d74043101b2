"""Which examples are kept from training?

What a name decides stays decided: on every machine, whatever else is in the set.
"""

import hashlib
from collections.abc import Sequence


def fraction(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def held_out(names: Sequence[str], share: float) -> frozenset[str]:
    """About `share` of the names, each chosen by itself; two or more are never all on one side.

    Of one name, or with a share of 0, none is held out.
    """
    if share == 0 or len(names) < 2:
        return frozenset()
    chosen = {name for name in names if fraction(name) < share}
    ranked = sorted(names, key=fraction)
    return frozenset((chosen | {ranked[0]}) - {ranked[-1]})
