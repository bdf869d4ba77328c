"""Where the bytes of a checkpoint are, and how long they stay: in place, in the user's Hub cache, or in transit."""

import errno
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from redundancy_trace.checkpoints import Checkpoint, needed_files, raw_state, weight_files
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.hub import Hub, RepoFile


@dataclass(frozen=True)
class Fetched:
    """A checkpoint that can be read.

    Attributes:
        folder: Holds its config and weights.
        temporary: Whether it was fetched for this run and may be deleted; never the user's own files.
        bytes_moved: Bytes that came over the network for it.
        root: What was fetched, whole, where `folder` is only a part of it.
    """

    folder: Path
    temporary: bool
    bytes_moved: int
    root: Path | None = None


def fetch(
    listing_model: str,
    checkpoint: Checkpoint,
    hub: Hub,
    into: Path,
    on_bytes: Callable[[int], None] | None = None,
    stopped: Event | None = None,
) -> Fetched:
    """Bring a checkpoint's config and weights to this machine, unless they are here.

    Args:
        listing_model: The repository (`Listing.model`) of all that have none of their own.
        checkpoint: Which one.
        hub: Where from.
        into: The run's folder for this commit. Each process has a folder of its own in it, so that two processes on
            one run neither write into nor delete each other's files.
        on_bytes: Told the bytes of each chunk that arrives (negative when a file starts again); an exception that
            it raises ends the download.
        stopped: Once set (by another thread), the download ends soon.

    Raises:
        CheckpointError: There are no weights, a file cannot be had, or there is no space. Nothing is left behind.
    """
    if checkpoint.path is not None:
        return Fetched(_whole_folder(checkpoint, checkpoint.path), temporary=False, bytes_moved=0)
    commit = checkpoint.commit
    if commit is None:
        raise CheckpointError(f"{checkpoint.name} of {listing_model} has no commit; list the model again.")
    repo = checkpoint.repo or listing_model
    try:
        files = _in_repository(checkpoint, _needed(repo, checkpoint, hub, commit))
    except CheckpointError:
        if hub.is_offline:
            raise _not_cached(listing_model, checkpoint) from None
        raise
    paths = [file.path for file in files]
    inside = checkpoint.subfolder or ""
    if cached := hub.cached(repo, commit, paths):
        return Fetched(cached / inside, temporary=False, bytes_moved=0)
    if hub.is_offline:
        raise _not_cached(listing_model, checkpoint)
    moved = 0

    def count(number: int) -> None:
        nonlocal moved
        moved += max(0, number)
        if on_bytes:
            on_bytes(number)

    folder = into / _owner()
    try:
        _adopt(into, folder)
        _check_space(folder, files, checkpoint.name)
        hub.download(repo, commit, paths, folder, count, stopped)
        _check_sizes(folder, files, checkpoint.name)
    except BaseException as error:
        discard(Fetched(folder, temporary=True, bytes_moved=moved))
        if isinstance(error, OSError) or _is_full(error.__cause__):
            raise _disk_error(error, folder, files, checkpoint.name) from error
        raise
    return Fetched(folder / inside, temporary=True, bytes_moved=moved, root=folder)


def discard(fetched: Fetched) -> None:
    """Delete what was fetched for the run; files that the user had before stay."""
    if not fetched.temporary:
        return
    root = fetched.root or fetched.folder
    shutil.rmtree(root, ignore_errors=True)
    try:
        root.parent.rmdir()
    except OSError:
        return  # another process has its own copy there


def abandon(into: Path) -> None:
    """Delete what this process has in the run's folder for a commit, while its download may not have ended yet."""
    discard(Fetched(into / _owner(), temporary=True, bytes_moved=0))


def _needed(model: str, checkpoint: Checkpoint, hub: Hub, commit: str) -> tuple[RepoFile, ...]:
    try:
        files = checkpoint.files if checkpoint.files is not None else _own(checkpoint, hub.files(model, commit))
    except InputError as error:  # the listing was fine, so it is this one checkpoint
        raise CheckpointError(str(error)) from error
    _check_complete(files, f"{checkpoint.name} of {model}")
    return needed_files(files)


def _own(checkpoint: Checkpoint, files: Sequence[RepoFile]) -> tuple[RepoFile, ...]:
    """Those files of a commit that are the checkpoint's, relative to its folder."""
    inside = f"{checkpoint.subfolder}/" if checkpoint.subfolder else ""
    return tuple(replace(file, path=file.path[len(inside) :]) for file in files if file.path.startswith(inside))


def _in_repository(checkpoint: Checkpoint, files: Sequence[RepoFile]) -> tuple[RepoFile, ...]:
    """A checkpoint's files, relative to the root of the repository."""
    inside = f"{checkpoint.subfolder}/" if checkpoint.subfolder else ""
    return tuple(replace(file, path=inside + file.path) for file in files)


def _not_cached(model: str, checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.name} of {model} is not whole in the Hub cache, and the network is not to be used. "
        "Leave out --offline (and HF_HUB_OFFLINE) to download it."
    )


def _whole_folder(checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder of a local checkpoint, looked at again: it may have changed since it was listed."""
    try:
        files = [RepoFile(path.name, path.stat().st_size, None) for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}.") from error
    _check_complete(files, f"{checkpoint.name} ({folder})")
    return folder


def _check_complete(files: Sequence[RepoFile], what: str) -> None:
    paths = [file.path for file in files]
    weights = weight_files(files)
    if not weights.files:
        if raw := raw_state(paths):
            raise CheckpointError(f"{what} has no weights that can be read: {raw}")
        shown = ", ".join(sorted(paths)[:5]) or "nothing"
        raise CheckpointError(
            f"{what} has no weights that can be read (model.safetensors, pytorch_model.bin, or their shards); "
            f"it holds: {shown}."
        )
    if weights.missing:
        raise CheckpointError(f"{what} is not complete: {', '.join(weights.missing[:3])} is not there.")
    if "config.json" not in paths:
        raise CheckpointError(f"{what} has weights, but no config.json.")


def _owner() -> str:
    """Name of this process's own folder."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _adopt(into: Path, folder: Path) -> None:
    """Take over what a process of this machine that is no longer alive had fetched (or kept) of the commit."""
    into.mkdir(parents=True, exist_ok=True)
    prefix = f"{socket.gethostname()}-"
    for left in into.iterdir() if not folder.exists() else ():
        pid = left.name.removeprefix(prefix)
        if left.name.startswith(prefix) and pid.isdecimal() and not _is_alive(int(pid)):
            try:
                left.rename(folder)
            except OSError:
                continue  # another process was faster
            return


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # signal 0 would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_space(folder: Path, files: Sequence[RepoFile], name: str) -> None:
    """Refuse before the first byte what cannot fit."""
    folder.mkdir(parents=True, exist_ok=True)
    present = sum(file.size for file in files if (folder / file.path).is_file())
    missing = sum(file.size for file in files) - present
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise CheckpointError(_no_space(name, folder, missing, free))


def _check_sizes(folder: Path, files: Sequence[RepoFile], name: str) -> None:
    for file in files:
        size = (folder / file.path).stat().st_size
        if size != file.size:
            raise CheckpointError(
                f"{file.path} of {name} has {size:,} bytes after the download, {file.size:,} are right."
            )


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _disk_error(error: BaseException, folder: Path, files: Sequence[RepoFile], name: str) -> CheckpointError:
    if _is_full(error) or _is_full(error.__cause__):
        parent = next(path for path in folder.parents if path.exists())
        needed = sum(file.size for file in files)
        return CheckpointError(_no_space(name, parent, needed, shutil.disk_usage(parent).free))
    return CheckpointError(f"{name} cannot be stored: {error}.")


def _no_space(name: str, folder: Path, needed: int, free: int) -> str:
    return (
        f"No space for {name}: it needs {needed:,} bytes, {free:,} are free at {folder}. Free some, or put the run "
        "elsewhere with --out."
    )
