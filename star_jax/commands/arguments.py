"""How do arguments become a dataclass?"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from star_jax.errors import UserError

Arguments = TypeVar('Arguments')

_types = tyro.constructors.ConstructorRegistry()

USAGE = 2  # the exit status of every command line that cannot be meant
GUESSES = 3  # of what was meant, in one sentence


def parse(
    cls: type[Arguments],
    arguments: Sequence[str],
    command: str,
    default: Arguments | None = None,
) -> Arguments:
    """The dataclass that the arguments fill; `default` supplies what they leave out.

    Raises UserError for unknown or ill-typed arguments, and for values that a config refuses.
    """
    options = {} if default is None else {'default': default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                args=list(arguments),
                prog=f'star-jax {command}',
                config=(tyro.conf.AvoidSubcommands,),
                registry=_types,
                **options,
            )
    except ValueError as error:
        raise UserError(str(error)) from error
    except SystemExit as stopped:
        if stopped.code != USAGE:
            sys.stderr.write(said.getvalue())
            raise
        raise UserError(_sentence(said.getvalue(), command)) from stopped


@_types.primitive_rule
def _path(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Of a path; nothing, such as an unset variable of a shell, names none."""

    def read(words: list[str]) -> Path:
        if not words[0] or '\0' in words[0]:
            raise ValueError(f'{words[0]!r} names no file or folder')
        return Path(words[0])

    if info.type not in (Path, Path | None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar='PATH',
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda path: [str(path)],
    )


def _sentence(box: str, command: str) -> str:
    """What tyro says in a box, as one sentence.

    Under the title stand paragraphs with lines between them: what is wrong, mostly a guess of what
    was meant or the help of the argument, and where more is said.
    """
    lines = [line.strip(' │') for line in box.splitlines() if line.strip()]
    found = re.split('^[-─╰╯]+$', '\n'.join(lines[1:]), flags=re.MULTILINE)
    paragraphs = [' '.join(paragraph.split()) for paragraph in found if paragraph.strip()]
    wrong, *others = paragraphs or [' '.join(lines)]
    wrong = re.sub('^Error parsing ', '', wrong).rstrip('.')
    guessed = next((other for other in others if other.startswith('Perhaps')), '')
    meant = [word for word in guessed.split() if word.startswith('--')]
    guess = f', did you mean {" or ".join(meant[:GUESSES])}' if meant else ''
    words = ' '.join(word for word in command.split() if word.islower())
    return f'{wrong}{guess}; star-jax {words} --help explains'
