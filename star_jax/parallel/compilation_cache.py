"""Which compiled programs on disk were never written to their end?

JAX writes the entries of its persistent cache in place, so a kill or a full disk may leave a part
of one. It then warns and compiles at every start, and never replaces what is there.
"""

import contextlib
import importlib
import zlib
from pathlib import Path

ENTRIES = '*-cache'  # as JAX names them
CHECKED = '.checked'  # the time of its change: all entries before were whole
ZSTANDARD = b'\x28\xb5\x2f\xfd'  # JAX packs so where that package is installed, else with zlib


def drop_torn(folder: Path) -> None:
    """Removes torn entries from a folder of programs, so that JAX compiles and writes them again.

    Only what has come since the last call is read. An entry that another process is writing counts
    as torn: removing it disturbs nobody, and costs one compilation later. A folder in which nothing
    can be changed stays as it is.
    """
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        marker = folder / CHECKED
        since = marker.stat().st_mtime_ns if marker.exists() else 0
        begun = folder / f'{CHECKED}.new'
        begun.touch()  # now, by the clock of the file system
        for entry in folder.glob(ENTRIES):
            with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
                if entry.stat().st_mtime_ns >= since and not _is_whole(entry.read_bytes()):
                    entry.unlink()
        begun.replace(marker)


def _is_whole(content: bytes) -> bool:
    """Whether JAX can unpack an entry."""
    try:
        if content.startswith(ZSTANDARD):
            importlib.import_module('zstandard').ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except ImportError:
        return True  # nor can JAX read it here: it is another installation's
    except Exception:  # the packages have errors of their own
        return False
    return True
