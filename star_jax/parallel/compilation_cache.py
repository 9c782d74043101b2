"""Which entries of the compilation cache are incomplete?

JAX writes the entries of its persistent cache in place, so a kill or a full disk may leave a
truncated one. JAX then warns and compiles at every start, and never replaces the entry.
"""

import contextlib
import importlib
import zlib
from pathlib import Path

ENTRIES = '*-cache'  # file names that JAX gives its entries
CHECKED = '.checked'  # its modification time: all older entries are complete
ZSTANDARD = b'\x28\xb5\x2f\xfd'  # JAX compresses with zstandard if it is installed, else with zlib


def remove_truncated(folder: Path) -> None:
    """Removes truncated entries from a cache folder, so that JAX compiles and writes them again.

    Only entries that are newer than the last call are read. An entry that another process is
    writing counts as truncated: its removal costs one compilation later. A read-only folder is left
    as it is.
    """
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        marker = folder / CHECKED
        since = marker.stat().st_mtime_ns if marker.exists() else 0
        new_marker = folder / f'{CHECKED}.new'
        new_marker.touch()  # the time by the clock of the file system
        for entry in folder.glob(ENTRIES):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                if entry.stat().st_mtime_ns >= since and not _is_complete(entry.read_bytes()):
                    entry.unlink()
        new_marker.replace(marker)


def _is_complete(content: bytes) -> bool:
    """Whether JAX can decompress an entry."""
    try:
        if content.startswith(ZSTANDARD):
            importlib.import_module('zstandard').ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except ImportError:
        return True  # JAX cannot read it here either; another installation wrote it
    except Exception:  # each package has its own errors
        return False
    return True
