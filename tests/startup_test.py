"""Are the settings of start-up in effect?"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from star_jax.parallel import compilation_cache, startup

ROOT = Path(__file__).parents[1]
PROGRAM = """
import resource
from star_jax.parallel import malloc

malloc.keep_freed_memory()

import jax, jax.numpy as jnp
from star_jax.parallel import startup

startup.start()

@jax.jit
def program(x):
    return jnp.fft.ifft(jnp.fft.fft(jnp.outer(x, x))).real.sum()

x = jnp.ones(3000)
faults = [0]
for _ in range(30):
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
steps = sorted(after - before for before, after in zip(faults, faults[1:]))
print(steps[len(steps) // 2], len(jax.devices()))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='a setting of glibc')
@pytest.mark.parametrize('kept', [True, False])
def test_keep_freed_memory_avoids_page_faults(kept, tmp_path):
    """72 MB of temporaries are 18,000 pages; a user's own settings of malloc take precedence.

    The median call counts: now and then a call needs more memory than all before it.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    environment |= {'PYTHONPATH': str(ROOT), 'STAR_JAX_CACHE': str(tmp_path)}
    environment |= {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    environment |= {} if kept else {'MALLOC_TOP_PAD_': '131072'}
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    faults, devices = map(int, done.stdout.split())
    assert devices >= 1
    assert (faults < 1_000) == kept


@pytest.fixture
def kept_programs(tmp_path):
    """A folder in which JAX caches every program during the test."""
    names = ('compilation_cache_dir', 'persistent_cache_min_compile_time_secs')
    before = {f'jax_{name}': getattr(jax.config, f'jax_{name}') for name in names}
    for name, value in zip(before, (str(tmp_path), 0), strict=True):
        jax.config.update(name, value)
    jax_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def compile_program(x: jax.Array) -> Path:
    """Compiles a program, or reads it from the cache; returns the path of its entry."""
    jax.jit(lambda x: x * 3 + 1)(x)
    (entry,) = Path(jax.config.jax_compilation_cache_dir).glob('jit__lambda*-cache')
    return entry


def test_start_removes_truncated_cache_entries(kept_programs):
    """JAX alone warns at every start."""
    x = jnp.arange(5.0)
    content = compile_program(x).read_bytes()
    startup.start()
    for truncated in (content[:-1], content[: len(content) // 2], b''):
        entry = compile_program(x)
        entry.write_bytes(truncated)
        for _ in range(2):
            with pytest.warns(UserWarning, match='Error reading persistent compilation cache'):
                compile_program(x)
        startup.start()
        assert not entry.exists()
        compile_program(x)
        startup.start()
        assert entry.exists()


def test_remove_truncated_reads_only_new_entries(tmp_path, monkeypatch):
    for name in ('a-cache', 'b-cache', 'other'):
        (tmp_path / name).write_bytes(b'truncated')
    os.utime(tmp_path / 'a-cache', (0, 0))
    (tmp_path / compilation_cache.CHECKED).touch()
    os.utime(tmp_path / compilation_cache.CHECKED, (1, 1))
    (tmp_path / 'c-cache').write_bytes(compilation_cache.ZSTANDARD)
    monkeypatch.setitem(sys.modules, 'zstandard', None)  # JAX cannot read it here either
    compilation_cache.remove_truncated(tmp_path)
    assert sorted(path.name for path in tmp_path.glob('*')) == [
        compilation_cache.CHECKED,
        'a-cache',
        'c-cache',
        'other',
    ]
