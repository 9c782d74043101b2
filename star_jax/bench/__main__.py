"""`python -m star_jax.bench ORDER.json start|measure` is a process of a benchmark.

Nothing stands before its work but what stands before a user's.
"""

import sys

from star_jax.errors import UserError
from star_jax.parallel import malloc


def main(path: str, task: str) -> None:
    malloc.keep_freed_memory()
    from star_jax.bench import worker  # JAX starts threads, and memory is kept before

    try:
        worker.main(path, task)
    except UserError as error:
        sys.exit(f'star-jax: {error}')


if __name__ == '__main__':
    main(*sys.argv[1:])
