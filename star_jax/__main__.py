"""`python -m star_jax` is `star-jax`."""

import sys

from star_jax.cli import main

sys.exit(main())
