"""What must be settled before JAX touches a device?"""

import os
import pathlib

import jax

MOST_HOST_DEVICES = 8


def cache_folder() -> pathlib.Path:
    """Where caches live: $STAR_JAX_CACHE, or ~/.cache/star_jax."""
    return pathlib.Path(os.environ.get('STAR_JAX_CACHE') or '~/.cache/star_jax').expanduser()


def start() -> None:
    """Keeps compiled programs between processes, and gives a CPU one device per core.

    Small convolutions do not fill two cores; a batch split over two host devices does (training
    1.7 times faster). Does nothing to accelerators.
    """
    jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        devices = min(2 ** ((cores or 1).bit_length() - 1), MOST_HOST_DEVICES)
        jax.config.update('jax_num_cpu_devices', devices)
