"""What must be settled before JAX touches a device?"""

import contextlib
import ctypes
import os
import pathlib
import sys

import jax

MOST_HOST_DEVICES = 8
# Settings of malloc by their numbers in <malloc.h>: never trim, never map, one arena for all
# threads (the others cannot hold large pieces).
KEEP_MEMORY = {-1: -1, -4: 0, -8: 1}


def cache_folder() -> pathlib.Path:
    """Where caches live: $STAR_JAX_CACHE, or ~/.cache/star_jax."""
    return pathlib.Path(os.environ.get('STAR_JAX_CACHE') or '~/.cache/star_jax').expanduser()


def start() -> None:
    """Keeps compiled programs between processes, and memory between calls; one CPU device per core.

    Small convolutions do not fill two cores; a batch split over two host devices does. Does nothing
    to accelerators. What the caller's environment has chosen stands: its cache of programs, its
    number of host devices, a device that is in use already.
    """
    _keep_memory()
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'xla'))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
        return
    with contextlib.suppress(RuntimeError):  # JAX has started: its devices cannot change
        jax.config.update('jax_num_cpu_devices', _host_devices())


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_memory() -> None:
    """What the process has freed stays its own, where the C library is glibc.

    XLA allocates the temporaries of a program at every call, and glibc maps pieces of that size and
    gives them back: the kernel then clears each page anew, for 40 % of the processor time of a
    training step of configs/shapes.py.
    """
    chosen = [name for name in os.environ if name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))]
    if sys.platform != 'linux' or chosen:
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in KEEP_MEMORY.items():
            mallopt(setting, value)


def _host_devices() -> int:
    """One per core, rounded down to a power of two."""
    return min(2 ** (cores().bit_length() - 1), MOST_HOST_DEVICES)
