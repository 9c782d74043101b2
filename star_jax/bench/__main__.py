"""The worker process of a benchmark: `python -m star_jax.bench JOB.json start|measure`.

Before the measured work it does only what every star-jax process does first.
"""

import sys

from star_jax import terminal
from star_jax.errors import UserError
from star_jax.parallel import malloc


def main(path: str, task: str) -> None:
    terminal.ignore_broken_pipes()
    malloc.keep_freed_memory()  # before JAX starts threads
    from star_jax.bench import worker

    try:
        worker.main(path, task)
    except UserError as error:
        sys.exit(f'star-jax: {error}')


if __name__ == '__main__':
    main(*sys.argv[1:])
