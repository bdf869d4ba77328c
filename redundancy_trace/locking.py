"""Locks on folders between processes; a lock is gone with its process, however that ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def try_lock(folder: Path) -> int | None:
    """Lock a folder, if no other process has it.

    Returns:
        A descriptor, closed to give the lock up; None if another process has it, or has just deleted the folder.

    Raises:
        OSError: Folders cannot be locked here.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        _flock(descriptor, wait=False)
        if folder.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes to leave the folder, and keep them waiting; where there are no locks, go ahead."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            _flock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int, *, wait: bool) -> None:
    try:
        import fcntl
    except ImportError as error:
        raise OSError("no locks on this system") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
