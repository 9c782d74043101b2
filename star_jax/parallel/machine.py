"""What machine does a program run on?"""

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib

from star_jax.errors import UserError
from star_jax.parallel import flags, mesh


def host_memory() -> int:
    """Bytes of the machine's main memory, without its accelerators."""
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def check_memory(name: str, size: int) -> None:
    """Raises UserError if `name`, which takes `size` bytes, does not fit into main memory."""
    if size > host_memory():
        raise UserError(
            f'{name} would take {size / 2**30:,.0f} GiB, and this machine has '
            f'{host_memory() / 2**30:,.0f}: choose smaller sizes'
        )


def describe() -> dict[str, Any]:
    """Versions, devices and environment settings, to be stored with every measurement."""
    device = jax.devices()[0]
    return {
        'jax': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'flax': flax.__version__,
        'python': sys.version.split()[0],
        'platform': device.platform,
        'device': device.device_kind,
        'devices': jax.device_count(),
        'processor': _processor(),
        'cores': mesh.cores(),
        'settings': {name: os.environ[name] for name in flags.NAMES if name in os.environ},
    }


def _processor() -> str:
    """The name of the processor, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text('utf-8', 'replace').splitlines():
            key, _, value = line.partition(':')
            if key.strip() == 'model name':
                return value.strip()
    return platform.processor()
