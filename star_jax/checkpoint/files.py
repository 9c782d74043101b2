"""How is a file replaced so that a reader never meets half of it?"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when all went well.

    The folder must exist. Whatever fails inside leaves an earlier `path` as it was.
    """
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
    try:
        yield temporary
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
