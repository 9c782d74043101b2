"""How large may a part of a network be?"""

LARGEST = 2**20  # larger than any size in use, and the product of three fits 64 bits


def check_sizes(**sizes: float | tuple[float, ...]) -> None:
    """Raises a ValueError that names the first size, or tuple of sizes, outside [1, LARGEST]."""
    for name, size in sizes.items():
        values = size if isinstance(size, tuple) else (size,)
        if not all(1 <= value <= LARGEST for value in values):
            raise ValueError(f'{name} must lie in [1, {LARGEST}], not {size}')
