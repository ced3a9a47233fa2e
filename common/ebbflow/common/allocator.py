"""Tells the C library's allocator to keep the memory that a stream of chunks frees and takes again.

By default glibc gives every block of a MiB back to the kernel as soon as it is free, and the next one costs a page
fault for each 4 KiB: more time than reading, encrypting and sending the chunk. Other C libraries stay as they are.
"""

import ctypes

KEPT_BYTES = 16 << 20
"""Free memory that an arena keeps at its end."""
ARENAS = 4
"""Most arenas; each thread that finds its own busy would get another one, and each keeps free memory of its own."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # <malloc.h>


def keep_chunks() -> bool:
    """Sets the allocator of this process. Called once, when a process starts that moves weights.

    Returns:
        Whether the C library took it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    values = {_ARENA_MAX: ARENAS, _MMAP_THRESHOLD: KEPT_BYTES, _TRIM_THRESHOLD: KEPT_BYTES}
    return all(mallopt(option, value) == 1 for option, value in values.items())
