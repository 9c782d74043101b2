"""Which settings of JAX must be made before it uses a device?"""

import contextlib
import os
import pathlib

import jax

from star_jax import files
from star_jax.parallel import compilation_cache, hosts, mesh

MAX_HOST_DEVICES = 8


def start(*, distributed: bool = False) -> None:
    """Enables the persistent compilation cache and gives a CPU one device per core.

    Truncated entries of the cache are removed. Small convolutions do not use two cores; a batch
    that is sharded over two host devices does. Accelerators are not affected. Choices of the user's
    environment take precedence: a cache folder, a number of host devices, a backend that is already
    initialized.

    Args:
        distributed: connects to the other processes that the environment names (see `hosts`), so
            that JAX has the devices of all. Raises UserError as `hosts.connect` does.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update('jax_compilation_cache_dir', str(files.cache_folder() / 'xla'))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    folder = jax.config.jax_compilation_cache_dir
    if folder and '://' not in folder:
        compilation_cache.remove_truncated(pathlib.Path(folder))
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        with contextlib.suppress(RuntimeError):  # the backend is initialized: devices are fixed
            jax.config.update('jax_num_cpu_devices', _host_devices())
    if distributed:
        hosts.connect()


def _host_devices() -> int:
    """One device per core, rounded down to a power of two."""
    return min(2 ** (mesh.cores().bit_length() - 1), MAX_HOST_DEVICES)
