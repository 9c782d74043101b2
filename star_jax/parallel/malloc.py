"""Why does a process keep the memory that it has freed?

XLA allocates the temporaries of a program at every call. On a CPU, glibc maps blocks of that size
and returns them to the kernel, which clears each page again: 40 % of the processor time of a
training step of configs/shapes.py.
"""

import contextlib
import ctypes
import os
import sys

# Parameters of mallopt by their numbers in <malloc.h>: M_TRIM_THRESHOLD never, M_MMAP_MAX 0,
# M_ARENA_MAX 1 (other arenas cannot hold large blocks).
SETTINGS = {-1: -1, -4: 0, -8: 1}


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that the process frees; with another C library does nothing.

    Call it before any import that starts threads: glibc fixes the number of arenas when the first
    thread allocates. Settings of malloc in the user's environment take precedence. The price is
    memory: new blocks are allocated until the freed ones are large enough for all later calls.
    """
    user_settings = [name for name in os.environ if name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))]
    if sys.platform != 'linux' or user_settings:
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in SETTINGS.items():
            mallopt(setting, value)
