"""Eight CPU devices, full float32 matmuls, compiled programs kept between runs."""

import gc
import os
import pathlib
from collections.abc import Iterator

import xla_flags

os.environ.setdefault('XLA_FLAGS', xla_flags.devices(8))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

HERE = pathlib.Path(__file__).parent

gc.set_threshold(200_000, 20, 100)  # tracing allocates much and frees little: an eighth of its time
jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_compilation_cache_dir', str(HERE.parent / '.cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.fixture(scope='module', autouse=True)
def programs_freed() -> Iterator[None]:
    """The compiled programs of a module are freed at its end.

    Each maps about six regions of memory (one module came to 22,680), and Linux gives a process
    65,530. Beyond them the compiler ends with a segmentation fault, or hangs.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='module')
def compiled_here() -> Iterator[None]:
    """Programs of the module come from no cache.

    Read from it, those with collectives over more devices than there are cores may wait for each
    other for ever (JAX 0.10.2 on two cores).
    """
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # or the decision of the first compilation stands
    yield
    jax.config.update('jax_enable_compilation_cache', True)
    compilation_cache.reset_cache()


@pytest.fixture(scope='session')
def golden() -> pathlib.Path:
    """The small recorded cases that travel with the repository."""
    return HERE / 'golden'
