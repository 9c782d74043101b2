"""What do the parts of a module receive and return?"""

from typing import Any

from flax import linen as nn


def recorded(module: nn.Module, params: dict, *args: Any) -> tuple[Any, dict[str, tuple]]:
    """The output of a module, and the first argument and the output of its parts, by name."""
    parts = {}

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.method_name == '__call__' and len(context.module.path) == 1:
            parts[context.module.name] = (args[0], out)
        return out

    with nn.intercept_methods(record):
        return module.apply({'params': params}, *args), parts
