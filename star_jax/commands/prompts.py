"""Which prompts does a command get, and can a text encoder read them?"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from star_jax import files
from star_jax.data import lists
from star_jax.errors import UserError

NO_TEXT = ('Cc', 'Cs')  # categories of Unicode: control characters, surrogates
OPEN = ('/dev/fd/', '/dev/stdin', '/proc/self/fd/')  # pipes that a shell has opened: `<(command)`
MAX_CHARACTERS = 2_000  # in a prompt; text encoders read a few hundred at most


def read(given: Sequence[str], path: Path | None, classes: Sequence[str]) -> list[str]:
    """The prompts or classes of a command line.

    Args:
        given: prompts in quotes.
        path: a text file with one prompt per line (None: none); empty lines are left out.
        classes: numbers or names of classes.

    Raises:
        UserError: none or several of the three are given, or the file cannot be read.
    """
    if classes:
        if given or path:
            raise UserError('an image is sampled from a prompt or from a class: leave one out')
        return list(classes)
    if path is None:
        if not given:
            raise UserError(
                'there is no prompt: give some in quotes, or a file with --prompts FILE'
            )
        return list(given)
    if given:
        raise UserError('prompts are given in quotes or in --prompts FILE: leave one out')
    if not str(path).startswith(OPEN):
        files.check_regular(path, files.MOST_TEXT)
    try:
        lines = files.lines(path.read_text(encoding='utf-8-sig'))
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}): give a text file with one prompt per line'
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path} is not text in UTF-8 (byte {error.start}): save it in UTF-8, one '
            'prompt per line'
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f'{path} holds no prompt: write one per line')
    return prompts


def check(prompt: str) -> None:
    """Raises UserError unless a prompt is text of a usable length."""
    if not prompt.strip():
        raise UserError('a prompt is empty: write one, or leave it out')
    if len(prompt) > MAX_CHARACTERS:
        raise UserError(
            f'a prompt has {len(prompt):,} characters ({prompt[:30]!r}...), expected at most '
            f'{MAX_CHARACTERS:,}, of which a text encoder reads only the first: make it shorter'
        )
    invalid = (
        character
        for character in prompt
        if unicodedata.category(character) in NO_TEXT and not character.isspace()
    )
    if character := next(invalid, None):
        raise UserError(
            f'the prompt {ascii(prompt[:30])} holds {ascii(character)}, which is not text: '
            'expected UTF-8 without control characters'
        )
    if not lists.is_visible(prompt):
        raise UserError(f'a prompt has only invisible characters ({ascii(prompt)}): write one')
