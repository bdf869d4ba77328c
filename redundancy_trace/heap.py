"""The heap of the C library: large blocks are kept while batches run, and given back when a layer is done.

By itself glibc hands what a batch frees back to the system, and has every page of the next batch faulted in anew: 5 to
8 % of the time of a forward on the CPU. What it keeps instead is scattered between small blocks, and grows with the
number of layers unless it is trimmed. Threads share one heap: of the others, what is free at the end is never given
back, and each checkpoint's layers are read by another thread. With another C library nothing here does anything.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache

# Blocks up to this size come from the heap, and so much may be free at its end before it shrinks by itself.
_BLOCK_BYTES, _FREE_BYTES = 64 * 2**20, 256 * 2**20
# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@cache
def keep_freed_memory() -> None:
    """Have this process use freed memory again rather than give it back, unless its environment sets it otherwise."""
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _FREE_BYTES)
        mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Give all that is free back to the system now."""
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    try:
        library = ctypes.CDLL(None)
        return getattr(library, name) if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # none to look in
        return None
