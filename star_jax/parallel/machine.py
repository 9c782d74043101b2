"""On what does a program run?"""

import os
import sys

import flax
import jax
import jaxlib

from star_jax.parallel import startup


def describe() -> dict[str, str | int]:
    """Versions, devices and what the environment asks of XLA: what a measured figure belongs to."""
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
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }
