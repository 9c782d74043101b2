"""star_jax: scale-wise autoregressive text-to-image generation in JAX.

pipe = star_jax.load('shipped')
images = pipe(['a red circle'])  # uint8 [1, 64, 64, 3]
"""

import importlib
from typing import Any

from star_jax.errors import RunError, UserError, UserTypeError

__version__ = '0.1.0'

# Imported on first use: the command line starts here too, and handles ctrl-c before JAX comes in.
_MODULES = {
    'load': 'star_jax.sampling.loading',
    'ImageSize': 'star_jax.sampling.image_size',
    'Pipeline': 'star_jax.sampling.pipeline',
    'Settings': 'star_jax.core.settings',
    'StableSettings': 'star_jax.core.settings',
}
__all__ = ['RunError', 'UserError', 'UserTypeError', '__version__', *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted(__all__)
