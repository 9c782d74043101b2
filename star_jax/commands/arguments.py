"""How do the words of a command line become a dataclass?"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from star_jax import terminal
from star_jax.commands import help_text
from star_jax.commands.help_text import HELP, HELP_ALL, Sections
from star_jax.errors import UserError

Arguments = TypeVar('Arguments')

_types = tyro.constructors.ConstructorRegistry()

USAGE_ERROR = 2  # exit status of an invalid command line
MAX_SUGGESTIONS = 3  # options that one error message suggests
MISSING = re.compile(r'((?:--\S+ )?[A-Z]+) (.*?)\.? \(required\)')  # part of tyro's message
PLAIN = {  # Python's errors -> the same in plain words
    r'invalid literal for int\(\) with base 10: (.*)': r'\1 is not a whole number',
    r'could not convert string to float: (.*)': r'\1 is not a number',
}


def parse(
    cls: type[Arguments],
    words: Sequence[str],
    command: str,
    default: Arguments | None = None,
    common: Sections = help_text.ALL,
    about: str = '',
) -> Arguments:
    """The dataclass that a command line describes.

    With --help or --help-all among the words it prints the help and exits instead.

    Args:
        cls: dataclass of the arguments.
        words: the command line after the command.
        command: its name, and what precedes the options, such as 'train [CONFIG]'.
        default: instance with the values of arguments that are not given.
        common: sections of options that --help describes besides the fields of `cls` itself (none:
            it describes all options).
        about: what the config with the default values is, for --help-all.

    Raises:
        UserError: an argument is unknown or ill-typed, or a config refuses its value.
    """
    if asks_for_help(words):
        everything = HELP_ALL in words
        text = help_text.render(cls, command, default, common, everything, about)
        sys.stdout.write(terminal.printable(text, keep='\n'))
        raise SystemExit(0)
    options = {} if default is None else {'default': default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                cls,
                args=list(words),
                prog=f'star-jax {command}',
                add_help=False,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.PositionalMetavarFromFieldName),
                registry=_types,
                **options,
            )
    except ValueError as error:
        raise UserError(str(error)) from error
    except SystemExit as stopped:
        if stopped.code != USAGE_ERROR:
            sys.stderr.write(terminal.printable(errors.getvalue(), keep='\n'))
            raise
        raise UserError(_sentence(errors.getvalue(), command)) from stopped


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether one of the words is -h, --help or --help-all."""
    return not {*HELP, HELP_ALL}.isdisjoint(words)


@_types.primitive_rule
def _path(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """The rule for paths: an empty word, such as an unset variable of a shell, is refused."""

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
    """tyro's error message, a titled box, as one sentence.

    Lines divide the box into paragraphs: the error, then similar options or the help of the
    argument.
    """
    lines = [line.strip(' │') for line in box.splitlines() if line.strip()]
    blocks = re.split('^[-─╰╯]+$', '\n'.join(lines[1:]), flags=re.MULTILINE)
    paragraphs = [' '.join(block.split()) for block in blocks if block.strip()]
    error, *others = paragraphs or [' '.join(lines)]
    error = re.sub('^Error parsing ', '', error).rstrip('.')
    for pattern, plain in PLAIN.items():
        error = re.sub(pattern, plain, error)
    if missing := MISSING.findall(error):
        error = f'expected {" and ".join(f"{name} ({text})" for name, text in missing)}'
    similar = next((other for other in others if other.startswith('Perhaps')), '')
    names = [word for word in similar.split() if word.startswith('--')]
    suggestion = f', did you mean {" or ".join(names[:MAX_SUGGESTIONS])}' if names else ''
    return f'{error}{suggestion}; star-jax {help_text.command_words(command)} --help explains'
