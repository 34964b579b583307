"""How the C library's allocator treats freed memory; only the command line changes it, since a library must not."""

from __future__ import annotations

import ctypes
import os

SWITCH = "MIRROR_MODULES_KEEP_MEMORY"

# Names of the variables that glibc reads when a process starts, parameters of mallopt(3) and their values: no block is
# mapped by itself, and the heap grows by 256 MiB at a time and is never trimmed.
_SETTINGS = (
    ("MALLOC_MMAP_MAX_", -4, 0),
    ("MALLOC_TOP_PAD_", -2, 2**28),
    ("MALLOC_TRIM_THRESHOLD_", -1, -1),
)


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensors, in this process and in those that it starts.

    By default, glibc returns the memory of each large tensor to the system as soon as it is freed, and the system
    clears it page by page for the next one, which can take a third of the time of training on a CPU.

    Does nothing on systems without glibc, if the environment variable MIRROR_MODULES_KEEP_MEMORY is 0, or if the
    environment already sets the allocator.

    Returns:
        Whether freed memory is kept.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if os.environ.get(SWITCH) == "0" or chosen or not _is_glibc():
        return False
    library, kept = ctypes.CDLL(None), True
    for name, parameter, value in _SETTINGS:
        kept &= bool(library.mallopt(parameter, value))
        # Processes that this one starts read the variables. They are of type size_t, so that -1 is their largest value.
        os.environ[name] = str(value % 2**64)
    return kept


def _is_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (AttributeError, OSError, ValueError):
        return False
