"""XLA's options for tests: tiny programs run for milliseconds, so compilation must be quick."""

import jaxlib.version

QUICK = '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
if jaxlib.version.__version_info__ < (0, 12):
    # Together with the options above a fifth of the time; newer versions do not have it.
    QUICK += ' --xla_cpu_use_fusion_emitters=false'
# Devices may need minutes to meet on a busy machine; by default XLA aborts after 40 seconds.
PATIENT = '--xla_cpu_collective_call_terminate_timeout_seconds=900'


def devices(count: int) -> str:
    """The value of XLA_FLAGS for `count` devices on this machine."""
    return f'--xla_force_host_platform_device_count={count} {QUICK} {PATIENT}'
