"""How large may a number of a config be?"""

from star_jax.core.argument_types import number
from star_jax.errors import UserError

MOST_LAYERS = 1024  # layers that are traced one by one
MAX_STEPS = 2**31 - 1  # of a run: programs count them in int32
LARGEST_BATCH = 2**20  # images of a batch
LARGEST = 2**20  # larger than any size in use, and the product of three fits 64 bits


def check_codes(codes: int) -> None:
    """Raises a UserError unless `codes` is the size of a codebook."""
    check_sizes(codes=codes)
    if codes < 2:
        raise UserError('codes must be at least 2, or there is nothing to predict, not 1')


def check_not_negative(**values: float) -> None:
    """Raises a UserError that names the first negative value, or the first that is NaN."""
    for name, value in values.items():
        if not value >= 0:
            raise UserError(f'{name} must not be negative, not {value}')


def check_sizes(most: int = LARGEST, **sizes: float | tuple[float, ...]) -> None:
    """Raises a UserError that names the first size, or a size of a tuple, outside [1, most].

    A value that is not a number raises a UserTypeError.
    """
    for name, size in sizes.items():
        for value in size if isinstance(size, tuple) else (size,):
            if not 1 <= number(name, value) <= most:
                raise UserError(f'{name} must lie in [1, {most}], not {value}')
