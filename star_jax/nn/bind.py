"""How are the methods of a module called with its parameters?"""

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import linen as nn

M = TypeVar('M', bound=nn.Module)


def bind(module: M, params: Mapping[str, Any]) -> M:
    """`module` with its parameters: its methods are then plain functions of arrays.

    Bind anew wherever a transformation begins (the body of a scan, a gradient, a jitted function):
    Flax refuses a module that was bound outside of it.
    """
    return module.bind({'params': params})
