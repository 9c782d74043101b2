"""star_jax: scale-wise autoregressive text-to-image generation in JAX.

pipe = star_jax.load('shipped')
images = pipe(['a red circle'])  # uint8 [1, 64, 64, 3]
"""

from typing import Any

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
    # The command line starts here too, and handles ctrl-c before JAX is imported.
    if name == 'load':
        from star_jax.sampling.loading import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
