"""Under which names are families and tokenizers registered?

A model folder and the config of a run use these names; reading one never imports anything. A family
from another package is registered by a call in its module, which a Python config file or a Python
caller imports before it loads a folder.
"""

from typing import TypeVar

from star_jax.protocols import Family, TokenizerConfig

F = TypeVar('F', bound=type[Family])
T = TypeVar('T', bound=type[TokenizerConfig])

FAMILIES: dict[str, type[Family]] = {}
TOKENIZERS: dict[str, type[TokenizerConfig]] = {}


def register_family(name: str, config: F) -> F:
    """Lets folders and configs name the family of a config class; returns the class.

    Raises ValueError if the name or the class is taken.
    """
    return _register(FAMILIES, name, config)


def register_tokenizer(name: str, config: T) -> T:
    """Lets folders and configs name a tokenizer's config class; returns the class.

    Raises ValueError if the name or the class is taken.
    """
    return _register(TOKENIZERS, name, config)


def name_of(config: Family | TokenizerConfig) -> str:
    """The registered name of a config's class.

    Raises ValueError for a class that is not registered, with the call that registers it.
    """
    for known in (FAMILIES, TOKENIZERS):
        for name, kind in known.items():
            if kind is type(config):
                return name
    kind = type(config).__name__
    what = 'family' if isinstance(config, Family) else 'tokenizer'
    raise ValueError(f'{kind} has no name: register_{what}(NAME, {kind}) gives it one')


def _register(known: dict[str, type], name: str, config: type) -> type:
    taken = known.get(name)
    if taken is not None and f'{taken.__module__}.{taken.__qualname__}' != (
        f'{config.__module__}.{config.__qualname__}'
    ):
        raise ValueError(f'the name {name!r} is taken by {taken.__module__}.{taken.__qualname__}')
    known[name] = config
    return config
