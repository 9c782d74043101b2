"""Why does a process keep the memory that it has freed?

XLA allocates the temporaries of a program at every call. On a CPU, glibc maps pieces of that size
and gives them back, and the kernel clears each page anew: 40 % of the processor time of a training
step of configs/shapes.py.
"""

import contextlib
import ctypes
import os
import sys

# Settings of malloc by their numbers in <malloc.h>: never trim, never map, one arena for all
# threads (the others cannot hold large pieces).
SETTINGS = {-1: -1, -4: 0, -8: 1}


def keep() -> None:
    """What the process frees from now on stays its own, where the C library is glibc.

    glibc settles the number of its arenas when the first thread asks for one: call this before
    anything is imported that starts threads. A user's own settings of malloc stand. The price is
    memory: pieces that do not fit into the holes of earlier ones are taken anew, until they all do.
    """
    chosen = [name for name in os.environ if name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))]
    if sys.platform != 'linux' or chosen:
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in SETTINGS.items():
            mallopt(setting, value)
