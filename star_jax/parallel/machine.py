"""On what does a program run?"""

import os
import sys
from typing import Any

import flax
import jax
import jaxlib

from star_jax.errors import UserError
from star_jax.parallel import flags, startup


def memory() -> int:
    """Bytes of this machine's own memory, not of its accelerators."""
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def check_memory(what: str, size: int) -> None:
    """Raises UserError where `what`, of `size` bytes, cannot be held by this machine."""
    if size > memory():
        raise UserError(
            f'{what} would take {size / 2**30:,.0f} GiB, and this machine has '
            f'{memory() / 2**30:,.0f}: ask for less'
        )


def describe() -> dict[str, Any]:
    """Versions, devices and settings of the environment: what a measured figure belongs to."""
    device = jax.devices()[0]
    return {
        'jax': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'flax': flax.__version__,
        'python': sys.version.split()[0],
        'platform': device.platform,
        'device': device.device_kind,
        'devices': jax.device_count(),
        'cores': startup.cores(),
        'settings': {name: os.environ[name] for name in flags.NAMES if name in os.environ},
    }
