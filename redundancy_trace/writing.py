"""Files that are there whole or not at all: written beside their place under a name of their own, then renamed."""

import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

# No reader takes a file with this ending for one of its own.
PART = ".part"
STRAY_AFTER_SECONDS = 3600.0


def write_whole(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> Path:
    """Write a file so that no reader, and no other process, ever meets half of it.

    Args:
        path: Where it goes; its folder is made if need be.
        write: Called with the name to write to, which is in the same folder.
        replace: Whether a file that is there is replaced; if not, it stays as it is, whoever wrote it.

    Returns:
        `path`.

    Raises:
        OSError: It cannot be written; nothing is left, and what was there before stays.
    """
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(part)
        if replace or not _linked(part, path):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def part_of(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")


def remove_stray_parts(folders: Iterable[Path]) -> None:
    """Delete what killed processes left half-written; what was written to within the hour may be in use, and stays."""
    for folder in folders:
        for part in folder.glob(f".*{PART}"):
            try:
                if time.time() - part.stat().st_mtime > STRAY_AFTER_SECONDS:
                    part.unlink()
            except OSError:
                continue  # gone meanwhile, or another user's


def _linked(part: Path, path: Path) -> bool:
    """Whether there is a file at `path` now: unlike a rename, a link fails where another process was faster."""
    try:
        os.link(part, path)
    except FileExistsError:
        return True
    except OSError:  # a file system without hard links
        return False
    return True
