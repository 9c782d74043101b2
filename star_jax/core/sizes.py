"""How large may a part of a network be?"""

LARGEST = 2**20  # more than anyone trains, and small enough for the products of three of them


def check_sizes(owner: object, *sizes: float) -> None:
    """Raises ValueError unless every size of `owner` lies in [1, LARGEST]."""
    if not all(1 <= size <= LARGEST for size in sizes):
        raise ValueError(f'every size must lie in [1, {LARGEST}]: {owner}')
