"""With which settings of XLA does each platform run, and why?

    python -m star_jax.parallel.flags gpu train CONFIG ...

is `star-jax train CONFIG ...` with them, and so do all launch scripts start it: they must stand in
the environment before JAX is imported. Flags are added before those that the environment has
already, so that a user's own come last and decide.

XLA ends a process at a flag that it does not know: these are known to JAX 0.10.2 and libtpu
0.0.42.1. They follow the advice of JAX, NVIDIA and MaxText; only the CPU's have been timed. On by
default already, and so not repeated, are command buffers of fusions and matmuls on GPU, and on TPU
the latency-hiding scheduler; the flags for sums of gradients between slices changed nothing in a
scan of layers compiled for two slices of v5e.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from star_jax.errors import UserError

GPU = (
    # Collectives start early and end late, with matmuls between: off by default.
    '--xla_gpu_enable_latency_hiding_scheduler=true',
    # The layers are a scan: gather the parameters of the next one (axis fsdp), and sum the
    # gradients of the last one (axis data), while one computes. Reduce-scatters do by default.
    '--xla_gpu_enable_pipelined_all_gather=true',
    '--xla_gpu_enable_pipelined_all_reduce=true',
    # Then two turns of the scan in one, so that what was gathered early is not copied.
    '--xla_gpu_enable_while_loop_double_buffering=true',
    # cuBLAS for large matmuls: by default Triton's are compiled and timed beside it, at several
    # tilings each, while the run waits to begin.
    '--xla_gpu_enable_triton_gemm=false',
)
TPU = (
    # All-gathers of parameters (axis fsdp) go on in steps within the matmuls beside them, as
    # MaxText has it for v6e. On v5e they do anyway: a compiled scan of layers stays the same.
    '--xla_enable_async_all_gather=true',
    '--xla_tpu_enable_async_collective_fusion=true',
    '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
    '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
    '--xla_tpu_overlap_compute_collective_tc=true',
)
MEMORY_FRACTION = 0.92  # of a GPU

ENVIRONMENT: dict[str, dict[str, str]] = {
    'gpu': {
        'XLA_FLAGS': ' '.join(GPU),
        # By default a quarter of the memory is left to others, and on a node of its own there are
        # none but NCCL, cuDNN and the driver.
        'XLA_CLIENT_MEM_FRACTION': str(MEMORY_FRACTION),
    },
    'tpu': {'LIBTPU_INIT_ARGS': ' '.join(TPU)},
    # Pages of 2 MiB for large arrays: with those of 4 KiB the kernel takes most of a second to hand
    # out each GiB that a program asks for, at every call. A step of configs/shapes.py takes 0.77 of
    # the time that it takes with small pages which are kept (`memory.keep`), and 0.82 of that with
    # both.
    'cpu': {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'},
}
NAMES = sorted({name for each in ENVIRONMENT.values() for name in each})
OLD_NAMES = {'XLA_CLIENT_MEM_FRACTION': 'XLA_PYTHON_CLIENT_MEM_FRACTION'}  # not both, says JAX


def environment(platform: str, given: Mapping[str, str]) -> dict[str, str]:
    """The environment `given`, with what `platform` ('gpu', 'tpu', 'cpu') runs with.

    What is given stands. Raises UserError for another platform.
    """
    if platform not in ENVIRONMENT:
        raise UserError(f'there is no platform {platform!r}: give one of {", ".join(ENVIRONMENT)}')
    both = dict(given)
    for name, value in ENVIRONMENT[platform].items():
        if value.startswith('--'):
            both[name] = f'{value} {given.get(name, "")}'.rstrip()
        elif name not in given and OLD_NAMES.get(name, name) not in given:
            both[name] = value
    return both


def main(arguments: Sequence[str]) -> int:
    """Becomes `star-jax` with all arguments but the first, on the platform that this one names.

    Returns only where it cannot: the exit status.
    """
    try:
        settings = environment(arguments[0] if arguments else '', os.environ)
    except UserError as error:
        sys.stderr.write(f'star_jax.parallel.flags: {error}\n')
        return 2
    return os.execve(sys.executable, [sys.executable, '-m', 'star_jax', *arguments[1:]], settings)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
