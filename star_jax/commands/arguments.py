"""How do arguments become a dataclass?"""

from collections.abc import Sequence
from typing import TypeVar

import tyro

from star_jax.errors import UserError

Arguments = TypeVar('Arguments')


def parse(
    cls: type[Arguments],
    arguments: Sequence[str],
    command: str,
    default: Arguments | None = None,
) -> Arguments:
    """The dataclass that the arguments fill; `default` supplies what they leave out.

    Exits with status 2 on unknown or ill-typed arguments, as every command line does. Raises
    UserError for values that a config refuses.
    """
    options = {} if default is None else {'default': default}
    try:
        return tyro.cli(
            cls,
            args=list(arguments),
            prog=f'star-jax {command}',
            config=(tyro.conf.AvoidSubcommands,),
            **options,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
