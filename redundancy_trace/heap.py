"""The heap of the C library: large blocks are kept while batches run, and given back when a layer is done.

By itself glibc hands what a batch frees back to the system, and has every page of the next batch faulted in anew: 5 to
8 % of the time of a forward on the CPU. What it keeps instead is scattered between small blocks, and grows with the
number of layers unless it is trimmed. That is worth its own faults only where weights were copied to the heap: those
that are used as the file has them lie in its mapped pages. Threads share one heap: of the others, what is free at the
end is never given back, and each checkpoint's layers are read by another thread. With another C library nothing here
does anything.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

# Blocks up to this size come from the heap, and so much may be free at its end before it shrinks by itself.
_BLOCK_BYTES, _FREE_BYTES = 64 * 2**20, 256 * 2**20
# From so much that is let go on, the heap is trimmed.
_MUCH = 4 * 2**20
# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_UORDBLKS = 7  # of `struct mallinfo2`: bytes in use


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


@contextmanager
def letting_go() -> Iterator[None]:
    """Give what is free back to the system at the end, if much of it was freed meanwhile."""
    before = _in_use()
    try:
        yield
    finally:
        if before is None or before - (_in_use() or 0) >= _MUCH:
            give_back_freed_memory()


class _Use(ctypes.Structure):
    """`struct mallinfo2` of malloc.h: ten sizes."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


def _in_use() -> int | None:
    """Bytes of all blocks of the heap that are in use; None where the C library does not tell."""
    if (mallinfo2 := _glibc("mallinfo2")) is None:
        return None
    mallinfo2.restype = _Use  # type: ignore[attr-defined]
    return int(mallinfo2().sizes[_UORDBLKS])  # type: ignore[attr-defined]


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    try:
        library = ctypes.CDLL(None)
        return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # none to look in
        return None
