"""`star-jax verify DIR...`"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from star_jax.commands import arguments
from star_jax.errors import UserError
from star_jax.parallel import startup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Compares recorded cases of the original implementations with this code, array by array.

    The exit status is 1 if an array differs by more than its case allows, or if no rule computes
    it, and 2 if a folder is no case that can be computed; the other folders are verified.

    Example: star-jax verify tests/golden/star/*

    Attributes:
        folders: folders of recorded cases, each with config.json and safetensors files.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]


def main(words: Sequence[str]) -> int:
    options = arguments.parse(Verify, words, 'verify')
    if not options.folders:
        raise UserError('there is no case to verify: give one or more case folders')
    startup.start()
    from star_jax.verify import check

    return check.main(options.folders)
