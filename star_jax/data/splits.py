"""Which examples are trained on, and which are held out from training?

Folders named after splits decide it, and the field `split` of records. Where there are none, the
split of an example depends on a hash of its name alone: it is the same on every machine and does
not change when a dataset grows.
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

TRAIN, VALIDATION, TEST = 'train', 'validation', 'test'
SPLITS = (TRAIN, VALIDATION, TEST)
# Names of folders, in any case, and of containers such as train-00000-of-00002.parquet.
NAMES = {
    'train': TRAIN,
    'training': TRAIN,
    'val': VALIDATION,
    'valid': VALIDATION,
    'validation': VALIDATION,
    'dev': VALIDATION,
    'test': TEST,
    'testing': TEST,
    'eval': TEST,
    'evaluation': TEST,
}
CONTAINERS = ('.parquet', '.tar')

_ANY = '|'.join(sorted(NAMES, key=len, reverse=True))
_FOLDER = re.compile(rf'({_ANY})[-_. ]?\d*')  # val2017, too
_CONTAINER = re.compile(rf'({_ANY})(?![a-z])')


def named(path: str) -> str | None:
    """The split after which the first folder of a path is named, or a container in the path.

    Args:
        path: path relative to the dataset; images in containers count as files below them.
    """
    *folders, _ = PurePosixPath(path.casefold()).parts
    if not folders:
        return None
    numbers = [at for at, part in enumerate(folders) if part.endswith(CONTAINERS)]
    matches = [_FOLDER.fullmatch(folders[0])]
    if numbers:  # any folder around a container, its name, and the first folder in it
        inside = folders[numbers[0] + 1 : numbers[0] + 2]
        matches += [_FOLDER.fullmatch(part) for part in folders[1 : numbers[0]]]
        matches += [_CONTAINER.match(folders[numbers[0]])]
        matches += [_FOLDER.fullmatch(part) for part in inside]
    found = next((match for match in matches if match), None)
    return NAMES[found[1]] if found else None


def of_records(values: Iterable[object]) -> str | None:
    """The split that the records of one image state in a field, or None.

    Where they differ, tests come before validation and training: such an image is not trained on.
    """
    words = (value.strip().casefold() for value in values if isinstance(value, str))
    stated = (NAMES[found[1]] for found in map(_FOLDER.fullmatch, words) if found)
    return max(stated, key=SPLITS.index, default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """The split of every name.

    Attributes:
        by_user: whether folders or records decide.
        recorded: the split that the records of a name state.
        share: share of the names that are held out if neither decides.
        held_out: the held-out names.
    """

    by_user: bool
    recorded: Mapping[str, str]
    share: float
    held_out: frozenset[str]

    def split(self, name: str) -> str:
        """The split of an image.

        If the user decides: TRAIN where neither folder nor record do, and where they differ the
        later of SPLITS, so that no image that either calls a test is trained on.
        """
        if self.by_user:
            stated = filter(None, (named(name), self.recorded.get(name)))
            return max(stated, key=SPLITS.index, default=TRAIN)
        return VALIDATION if name in self.held_out else TRAIN

    def fault_split(self, name: str) -> str:
        """The split that reports a fault, so that each is reported once."""
        if self.by_user:
            return self.split(name)
        return VALIDATION if fraction(name) < self.share else TRAIN

    def counts(self, names: Iterable[str]) -> dict[str, int]:
        """The number of names per split that has any."""
        numbers = collections.Counter(map(self.split, names))
        return {split: numbers[split] for split in SPLITS if numbers[split]}


def assign(
    names: Sequence[str], others: Sequence[str], recorded: Mapping[str, str], share: float
) -> Assignment:
    """The splits of names.

    Args:
        names: paths of images relative to their dataset.
        others: paths of records that cannot be used, whose folders count, too.
        recorded: the split that the records of a path state, where they do.
        share: share of the names that are held out if neither folders nor records name a split.
    """
    by_user = bool(recorded) or any(map(named, (*names, *others)))
    chosen = frozenset() if by_user else held_out(names, share)
    return Assignment(by_user=by_user, recorded=recorded, share=share, held_out=chosen)


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def held_out(names: Sequence[str], share: float) -> frozenset[str]:
    """About `share` of the names, each chosen independently.

    At least one of two or more names is held out, and at least one is not. With a single name, or a
    share of 0, none is held out.
    """
    if share == 0 or len(names) < 2:
        return frozenset()
    chosen = {name for name in names if fraction(name) < share}
    ranked = sorted(names, key=fraction)
    return frozenset((chosen | {ranked[0]}) - {ranked[-1]})
