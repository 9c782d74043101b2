"""How large may a part of a network be?"""

LARGEST = 2**20  # more than anyone trains, and small enough for the products of three of them


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels, of such a pair or of the side of a square."""
    return (size, size) if isinstance(size, int) else size


def check_sizes(**sizes: float | tuple[float, ...]) -> None:
    """Raises ValueError that names a size which does not lie, or not always, in [1, LARGEST]."""
    for name, given in sizes.items():
        if not all(
            1 <= size <= LARGEST for size in (given if isinstance(given, tuple) else [given])
        ):
            raise ValueError(f'{name} must lie in [1, {LARGEST}], not {given}')
