"""Which model does a user mean?

A folder, a hub id, or 'shipped': the small one in this package.
"""

from pathlib import Path

from star_jax.checkpoint import folder
from star_jax.families import FAMILIES, TOKENIZERS

SHIPPED = 'shipped'


def read(place: str | Path) -> folder.Model:
    """The model at `place`; UserErrors as of `folder.read`."""
    return folder.read(locate(place), FAMILIES, TOKENIZERS)


def read_tokenizer(place: str | Path) -> folder.Tokenizer:
    """The tokenizer of whatever model folder lies at `place`."""
    return folder.read_tokenizer(locate(place), TOKENIZERS)


def holds_tokenizer_alone(place: str | Path) -> bool:
    """Whether the model folder at `place` has no transformer."""
    return folder.holds_tokenizer_alone(locate(place))


def locate(place: str | Path) -> Path:
    if str(place) == SHIPPED:
        return Path(__file__).parents[1] / SHIPPED
    return folder.find(place)
