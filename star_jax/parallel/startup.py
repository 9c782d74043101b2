"""What must be settled before JAX touches a device?"""

import contextlib
import os
import pathlib

import jax

from star_jax.parallel import compilation_cache, hosts

MOST_HOST_DEVICES = 8


def cache_folder() -> pathlib.Path:
    """Where caches live: $STAR_JAX_CACHE, or ~/.cache/star_jax."""
    return pathlib.Path(os.environ.get('STAR_JAX_CACHE') or '~/.cache/star_jax').expanduser()


def start(*, together: bool = False) -> None:
    """Keeps compiled programs between processes, and gives a CPU one device per core.

    `together`: where the environment says that this process is one of several (see `hosts`), it
    joins them, and JAX then knows the devices of all. Raises UserErrors as `hosts.join` does.

    Programs that an earlier process could not write to their end are removed from where they lie.
    Small convolutions do not fill two cores; a batch split over two host devices does. Does nothing
    to accelerators. What the caller's environment has chosen stands: its cache of programs, its
    number of host devices, a device that is in use already.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'xla'))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    place = jax.config.jax_compilation_cache_dir
    if place and '://' not in place:
        compilation_cache.drop_torn(pathlib.Path(place))
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices cannot change
            jax.config.update('jax_num_cpu_devices', _host_devices())
    if together:
        hosts.join()


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_devices() -> int:
    """One per core, rounded down to a power of two."""
    return min(2 ** (cores().bit_length() - 1), MOST_HOST_DEVICES)
