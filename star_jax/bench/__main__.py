"""`python -m star_jax.bench JOB.json start|measure` is a process of the sampling benchmark.

Nothing stands before its work but what stands before a user's.
"""

import sys

from star_jax.parallel import memory


def main(path: str, task: str) -> None:
    memory.keep()
    from star_jax.bench import worker  # JAX starts threads, and memory is kept before

    worker.main(path, task)


if __name__ == '__main__':
    main(*sys.argv[1:])
