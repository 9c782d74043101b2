"""Which XLA settings does each platform run with, and why?

    python -m star_jax.parallel.flags gpu train CONFIG ...

runs `star-jax train CONFIG ...` with them, as all launch scripts do: they must be in the
environment before JAX is imported. They precede the flags that the environment already has, so
that the user's own take precedence.

XLA ends a process at an unknown flag: JAX 0.10.2 and libtpu 0.0.42.1 accept these. They follow the
recommendations of JAX, NVIDIA and MaxText; only those of the CPU have been timed. Already on by
default, and therefore absent, are command buffers of fusions and matmuls on GPU, and the
latency-hiding scheduler on TPU; the flags for all-reduces of gradients between slices changed
nothing in a scan of layers compiled for two slices of v5e.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from star_jax import terminal
from star_jax.errors import UserError

GPU = (
    # Collectives overlap with matmuls; off by default.
    '--xla_gpu_enable_latency_hiding_scheduler=true',
    # Layers are scanned: while one computes, all-gather the parameters of the next (axis fsdp) and
    # all-reduce the gradients of the previous one (axis data). Reduce-scatters do so by default.
    '--xla_gpu_enable_pipelined_all_gather=true',
    '--xla_gpu_enable_pipelined_all_reduce=true',
    # Two iterations of the scan are unrolled into one, so that gathered parameters are not copied.
    '--xla_gpu_enable_while_loop_double_buffering=true',
    # cuBLAS for large matmuls: by default XLA also compiles and times Triton kernels with several
    # tilings each, before the run starts.
    '--xla_gpu_enable_triton_gemm=false',
)
TPU = (
    # All-gathers of parameters (axis fsdp) are fused into the matmuls beside them, as MaxText does
    # for v6e. On v5e the flags do not change a compiled scan of layers.
    '--xla_enable_async_all_gather=true',
    '--xla_tpu_enable_async_collective_fusion=true',
    '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
    '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
    '--xla_tpu_overlap_compute_collective_tc=true',
)
MEMORY_FRACTION = 0.92  # share of a GPU's memory

ENVIRONMENT: dict[str, dict[str, str]] = {
    'gpu': {
        'XLA_FLAGS': ' '.join(GPU),
        # By default a quarter of the memory is left to other processes; on a dedicated node only
        # NCCL, cuDNN and the driver need some.
        'XLA_CLIENT_MEM_FRACTION': str(MEMORY_FRACTION),
    },
    'tpu': {'LIBTPU_INIT_ARGS': ' '.join(TPU)},
    # Pages of 2 MiB for large arrays: with 4 KiB pages the kernel takes most of a second to provide
    # each GiB that a program allocates, at every call. A step of configs/shapes.py takes 0.77 of
    # its time with small pages that are kept (`malloc.keep_freed_memory`), and 0.82 with both.
    'cpu': {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'},
}
NAMES = sorted({name for settings in ENVIRONMENT.values() for name in settings})
OLD_NAMES = {'XLA_CLIENT_MEM_FRACTION': 'XLA_PYTHON_CLIENT_MEM_FRACTION'}  # JAX refuses both


def environment(platform: str, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment variables with the settings of `platform` ('gpu', 'tpu', 'cpu') added.

    Values in `variables` take precedence. Raises UserError for another platform.
    """
    if platform not in ENVIRONMENT:
        raise UserError(f'there is no platform {platform!r}: give one of {", ".join(ENVIRONMENT)}')
    merged = dict(variables)
    for name, value in ENVIRONMENT[platform].items():
        if value.startswith('--'):
            merged[name] = f'{value} {variables.get(name, "")}'.rstrip()
        elif name not in variables and OLD_NAMES.get(name, name) not in variables:
            merged[name] = value
    return merged


def main(arguments: Sequence[str]) -> int:
    """Replaces the process by `star-jax` with all arguments after the first, the platform.

    Returns an exit status only if the platform is unknown.
    """
    try:
        settings = environment(arguments[0] if arguments else '', os.environ)
    except UserError as error:
        sys.stderr.write(f'star_jax.parallel.flags: {terminal.printable(str(error))}\n')
        return 2
    return os.execve(sys.executable, [sys.executable, '-m', 'star_jax', *arguments[1:]], settings)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
