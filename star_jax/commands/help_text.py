"""What does `--help` print?

The options of a command are the fields of its dataclass and of the dataclasses in it; the
`Attributes:` of their docstrings describe them. A command with many options names its common ones
in sections: `--help` describes those and lists the others by name, `--help-all` describes all.
"""

import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import docstring_parser
import tyro

HELP = ('-h', '--help')
HELP_ALL = '--help-all'

MAX_WIDTH = 120  # columns of a line
MAX_INVOCATION = 36  # columns; the description of a longer option starts on the next line
OWN = 'options'  # title of the options that no nested dataclass has

Sections = Mapping[str, Sequence[str]]  # title -> names of options, without the dashes
ALL: Sections = types.MappingProxyType({})  # no sections: --help describes all options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option or positional argument of a command.

    Attributes:
        name: name without the dashes, such as pace.steps.
        invocation: name and type, such as '--pace.steps INT'.
        description: description of the field in the docstring.
        default: the default value in words ('': none, or the description has it).
        group: dotted name of the nested dataclass that has the field.
        owner: class that has the field.
        positional: whether the option is a positional argument.
    """

    name: str
    invocation: str
    description: str
    default: str
    group: str
    owner: type
    positional: bool


def render(
    cls: type, command: str, default: Any, common: Sections, everything: bool, about: str = ''
) -> str:
    """The help of a command.

    Args:
        cls: dataclass of the arguments; its docstring introduces the command.
        command: name of the command, and what precedes the options, such as 'train [CONFIG]'.
        default: instance with the default values, or None.
        common: sections of options that are described besides the fields of `cls` itself.
        everything: whether to describe all options; so does an empty `common`.
        about: what the config with the default values is, shown if everything is.
    """
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    arguments = list(options(cls, default))
    positional = [option for option in arguments if option.positional]
    named = [option for option in arguments if not option.positional]
    words = ' '.join([command, *(option.invocation for option in positional)])
    lines = [f'usage: star-jax {words} [OPTIONS]', '', *_introduction(cls, width)]
    if everything:
        lines += _filled(about, width)
    lines += _section('arguments', positional, width)
    if everything or not common:
        for group, members in _by_group(named).items():
            lines += _section(_heading(group, members), members, width)
        return '\n'.join([*lines, ''])
    sections = {OWN: [option for option in named if option.owner is cls]}
    by_name = {option.name: option for option in named}
    for title, names in common.items():
        sections[title] = [by_name[name] for name in names if name in by_name]
    for title, members in sections.items():
        lines += _section(title, members, width)
    described = set(itertools.chain.from_iterable(sections.values()))
    others = [option for option in named if option not in described]
    lines += _names(others, f'star-jax {command_words(command)} {HELP_ALL}', width)
    return '\n'.join([*lines, ''])


def options(cls: type, default: Any = None, group: str = '', prefix: str = '') -> Iterator[Option]:
    """All options of a dataclass, in the order of their fields, nested dataclasses last.

    The values of `default` decide the class of every nested dataclass, as in `arguments.parse`.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    texts, nested = descriptions(cls), []
    for field in dataclasses.fields(cls):
        kind, *markers = _unpacked(hints[field.name])
        value = _default(field) if default is None else getattr(default, field.name)
        names = [marker.name for marker in markers if hasattr(marker, 'name')]
        name = next((name for name in names if name is not None), field.name).replace('_', '-')
        if dataclasses.is_dataclass(value):
            inline = not name or tyro.conf.OmitArgPrefixes in markers
            path, inner = (group, prefix) if inline else (f'{group}.{name}', f'{prefix}{name}.')
            nested.append(options(type(value), value, path.strip('.'), inner))
        elif not any(map(dataclasses.is_dataclass, typing.get_args(kind))):
            positional = tyro.conf.Positional in markers
            yield Option(
                name=prefix + name,
                invocation=_invocation(prefix, name, kind, value, positional),
                description=texts.get(field.name, ''),
                default=_default_words(value),
                group=group,
                owner=cls,
                positional=positional,
            )
    yield from itertools.chain.from_iterable(nested)


@functools.cache
def descriptions(cls: type) -> dict[str, str]:
    """The description of each field of a dataclass, from its docstring and those of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        params = docstring_parser.parse(vars(base).get('__doc__') or '').params
        texts |= {param.arg_name: ' '.join((param.description or '').split()) for param in params}
    return {name: text.rstrip('.') for name, text in texts.items()}


def command_words(command: str) -> str:
    """The name of a command without its arguments, which are in capitals or brackets."""
    return ' '.join(word for word in command.split() if word.islower())


def _introduction(cls: type, width: int) -> list[str]:
    """The docstring of the class up to its `Attributes:`, filled to the width."""
    return _filled(inspect.cleandoc(cls.__doc__ or '').partition('\nAttributes:')[0], width)


def _filled(text: str, width: int) -> list[str]:
    """The paragraphs of a text, filled to the width; indented ones stay as they are."""
    lines = []
    for paragraph in filter(None, text.strip('\n').split('\n\n')):
        kept = paragraph.splitlines() if paragraph.startswith(' ') else None
        lines += [*(kept or textwrap.wrap(' '.join(paragraph.split()), width)), '']
    return lines


def _by_group(named: Sequence[Option]) -> dict[str, list[Option]]:
    groups: dict[str, list[Option]] = {}
    for option in named:
        groups.setdefault(option.group, []).append(option)
    return groups


def _heading(group: str, members: Sequence[Option]) -> str:
    """The name of a group and the first line of its dataclass's docstring."""
    if not group:
        return OWN
    return f'{group} - {inspect.cleandoc(members[0].owner.__doc__ or "").splitlines()[0]}'


def _section(title: str, members: Sequence[Option], width: int) -> list[str]:
    """A titled list of options with their descriptions; nothing if there are none."""
    if not members:
        return []
    column = min(max(len(option.invocation) for option in members), MAX_INVOCATION) + 4
    indent = ' ' * column
    lines = [title.rstrip('.') + ':']
    for option in members:
        first = f'  {option.invocation}'.ljust(column)
        if len(option.invocation) > column - 4:
            lines.append(f'  {option.invocation}')
            first = indent
        text = f'{option.description} {option.default}'.strip()
        filled = textwrap.wrap(
            text,
            max(width, 2 * column),
            initial_indent=first,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        lines += filled or [first.rstrip()]
    return [*lines, '']


def _names(others: Sequence[Option], command: str, width: int) -> list[str]:
    """The options that are not described, a paragraph of names per group."""
    lines = [f'further options, which {command} describes:'] if others else []
    for members in _by_group(others).values():
        names = ' '.join(f'--{option.name}' for option in members)
        lines += textwrap.wrap(
            names, width, initial_indent='  ', subsequent_indent='    ', break_on_hyphens=False
        )
    return lines


def _unpacked(hint: Any) -> tuple[Any, ...]:
    """A type and the objects that annotate it."""
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)


def _default(field: dataclasses.Field) -> Any:
    """The default value of a field; MISSING if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _invocation(prefix: str, name: str, kind: Any, value: Any, positional: bool) -> str:
    if positional:
        metavar = name.upper() + (' ...' if typing.get_origin(kind) is tuple else '')
        return metavar if value is dataclasses.MISSING else f'[{metavar}]'
    return f'--{prefix}[no-]{name}' if kind is bool else f'--{prefix}{name} {_metavar(kind)}'


def _metavar(kind: Any) -> str:
    """The placeholder of a value: INT, {float32,bfloat16}, [INT ...]."""
    origin = typing.get_origin(kind)
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if origin is typing.Literal:
        return '{' + ','.join(map(str, parts)) + '}'
    if origin in (typing.Union, types.UnionType):
        return _metavar(parts[0])
    if origin is tuple:
        words = ' '.join(_metavar(part) for part in parts if part is not Ellipsis)
        return f'[{words} ...]' if Ellipsis in parts else words
    return kind.__name__.upper()


def _default_words(value: Any) -> str:
    if value is dataclasses.MISSING:
        return '(required)'
    if isinstance(value, bool):
        return f'(default: {"on" if value else "off"})'
    if value is None or value in ('', ()):
        return ''
    return f'(default: {_words(value)})'


def _words(value: Any) -> str:
    """A value as it is typed: the parts of nested tuples one after another."""
    return ' '.join(map(_words, value)) if isinstance(value, tuple) else str(value)
