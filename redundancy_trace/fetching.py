"""Where the bytes of a checkpoint are, and how long they stay: in place, in the user's Hub cache, or in transit."""

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Literal

from redundancy_trace.checkpoints import Checkpoint, needed_files, raw_state, weight_files
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.hub import Hub, RemoteFolder, RepoFile, Stopped, is_refused, may_pass
from redundancy_trace.locking import try_lock

_TURN_SECONDS = 0.2
_TRANSIT = ".fetched"
_KEPT = ".kept"


@dataclass(frozen=True)
class Remote:
    """Weight files of a commit on their server; it can be handed to another process, which opens it."""

    hub: Hub
    repo: str
    commit: str
    files: tuple[RepoFile, ...]

    def open(self, on_bytes: Callable[[int], None] | None = None, stopped: Event | None = None) -> RemoteFolder:
        """The files, to be read piece by piece; nothing is asked for yet."""
        return self.hub.remote_folder(self.repo, self.commit, self.files, on_bytes, stopped)


@dataclass(frozen=True)
class Fetched:
    """A checkpoint that can be read.

    Attributes:
        folder: Holds its config and weights.
        temporary: Whether it was fetched for this run and may be deleted; never the user's own files.
        bytes_moved: Bytes that came over the network for it.
        remote: The weight files on their server, where they are read piece by piece and never stored.
    """

    folder: Path
    temporary: bool
    bytes_moved: int
    remote: Remote | None = None
    _claim: "_Claim | None" = field(default=None, repr=False, compare=False)
    _room: "Room | None" = field(default=None, repr=False, compare=False)


class NoRoom(CheckpointError):
    """A checkpoint does not fit the disk, or its share of it."""


class Room:
    """The room on disk that fetched checkpoints may take; one that has to wait for it waits until another is gone."""

    def __init__(self, budget: int | None = None) -> None:
        """Room for `budget` bytes (`--disk-budget`), None = as much as is free."""
        self._budget = budget
        self._changed = threading.Condition()
        self._held: dict[Path, int] = {}
        self._kept = 0

    def reserve(self, folder: Path, total: int, present: int, name: str, stopped: Event | None = None) -> None:
        """Reserve room for a checkpoint of `total` bytes, of which `present` are there, before the first is moved.

        Raises:
            NoRoom: It does not fit, and nothing is about to be deleted.
        """
        with self._changed:
            while (reason := self._lacking(folder, total, present, name)) is not None:
                if not self._held:
                    raise NoRoom(reason)
                if stopped is not None and stopped.is_set():
                    raise Stopped
                self._changed.wait(_TURN_SECONDS)
            self._held[folder] = total

    def release(self, folder: Path, *, kept: bool = False) -> None:
        """A checkpoint is deleted, or (`kept`) stays."""
        with self._changed:
            total = self._held.pop(folder, 0)
            self._kept += total if kept else 0
            self._changed.notify_all()

    def _lacking(self, folder: Path, total: int, present: int, name: str) -> str | None:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if total - present > free:
            return _no_space(name, there, total - present, free)
        used = sum(self._held.values()) + self._kept
        if self._budget is not None and used + total > self._budget:
            beside = f", {used:,} are in use" if used else ""
            return (
                f"{name} needs {total:,} bytes on disk, but --disk-budget is {self._budget:,}{beside}. Give more, or "
                "--fetch stream, which needs none."
            )
        return None


def fetch(
    listing_model: str,
    checkpoint: Checkpoint,
    hub: Hub,
    into: Path,
    on_bytes: Callable[[int], None] | None = None,
    stopped: Event | None = None,
    room: Room | None = None,
    how: Literal["auto", "file", "stream"] = "file",
    *,
    code: bool = False,
    on_arrival: Callable[[], None] | None = None,
) -> Fetched:
    """Bring a checkpoint's config and weights to this machine, unless they are here.

    Args:
        listing_model: The repository (`Listing.model`), where the checkpoint names none of its own.
        checkpoint: Which one.
        hub: Where from.
        into: The run's folder for this commit; taken up as it is, unless another process is at work in it: then one
            beside it is used, so that two processes on one run neither write into nor delete each other's files.
        on_bytes: Told the bytes of each chunk that arrives (negative when a file starts again); an exception that
            it raises ends the download.
        stopped: Once set (by another thread), the download ends soon.
        room: Where room on the disk is reserved; None = as much as is free.
        how: `stream` fetches the config alone and leaves the weights to be read from the server; `auto` does so where
            they do not fit the disk.
        code: Whether the model's own code beside the config is fetched too (`--trust-remote-code`).
        on_arrival: Called, by the calling thread, when the last byte is there, before the hashes are checked.

    Raises:
        CheckpointError: There are no weights, a file cannot be had, or there is no space. What has arrived stays to be
            gone on with if the fault may pass or be mended; else nothing is left behind.
    """
    if checkpoint.path is not None:
        return Fetched(_whole_folder(checkpoint, checkpoint.path), temporary=False, bytes_moved=0)
    commit = checkpoint.commit
    if commit is None:
        raise CheckpointError(f"{checkpoint.name} of {listing_model} has no commit; list the model again.")
    repo = checkpoint.repo or listing_model
    try:
        files = _needed(repo, checkpoint, hub, commit, code=code)
    except CheckpointError:
        if hub.is_offline:
            raise _not_cached(repo, checkpoint) from None
        raise
    below = checkpoint.subfolder or ""
    if cached := hub.cached(repo, commit, [file.path for file in files]):
        return Fetched(cached / below, temporary=False, bytes_moved=0)
    if hub.is_offline:
        raise _not_cached(repo, checkpoint)
    moved = 0

    def count(number: int) -> None:
        nonlocal moved
        moved += max(0, number)
        if on_bytes:
            on_bytes(number)

    room = room or Room()
    try:
        claim = _claim(into)
    except OSError as error:
        raise CheckpointError(f"{checkpoint.name} cannot be stored: {error}.") from error
    fetched = Fetched(claim.folder / below, temporary=True, bytes_moved=0, _claim=claim, _room=room)
    remote: Remote | None = None
    try:
        if how != "stream":
            try:
                room.reserve(claim.folder, _size(files), _present(claim.folder, files), checkpoint.name, stopped)
            except NoRoom:
                if how == "file":
                    raise
                how = "stream"
        if how == "stream":
            weights = tuple(file for file in files if file.path.endswith((".safetensors", ".bin")))
            files = tuple(file for file in files if file not in weights)
            remote = Remote(hub, repo, commit, weights)
        hub.download(repo, commit, files, claim.folder, count, stopped, on_arrival)
    except BaseException as error:
        cause = error.__cause__
        full = _is_full(error) or _is_full(cause)
        ended = isinstance(error, Stopped) or not isinstance(error, Exception)
        mendable = may_pass(cause) or (is_refused(cause) and _present(claim.folder, files) > 0)
        (leave if ended or mendable else discard)(fetched)
        if full or isinstance(error, OSError):
            raise _disk_error(error, claim.folder, files, checkpoint.name) from error
        raise
    return replace(fetched, bytes_moved=moved, remote=remote)


def discard(fetched: Fetched) -> None:
    """Delete what was fetched for the run; files that the user had before, or has kept (`--keep`), stay."""
    if fetched._claim is None or not fetched._claim.held:
        return
    if (fetched._claim.folder / _KEPT).exists():
        leave(fetched)
        return
    shutil.rmtree(fetched._claim.folder, ignore_errors=True)
    fetched._claim.let_go()
    if fetched._room is not None:
        fetched._room.release(fetched._claim.folder)


def leave(fetched: Fetched) -> None:
    """Let go of what was fetched but leave it where it is: another call, or process, takes it up."""
    if fetched._claim is None or not fetched._claim.held:
        return
    fetched._claim.let_go()
    if fetched._room is not None:
        fetched._room.release(fetched._claim.folder, kept=True)
    _remove_if_empty(fetched._claim.folder)


def abandon(into: Path) -> None:
    """Delete what `leave` left of a commit, unless another process has taken it up."""
    if into.is_dir():
        discard(Fetched(into, temporary=True, bytes_moved=0, _claim=_claim(into)))


def keep(fetched: Fetched) -> None:
    """Let go of what was fetched and mark it as the user's (`--keep`), so that no later sweep takes it for waste."""
    if fetched._claim is not None and fetched._claim.held:
        (fetched._claim.folder / _KEPT).touch()
    leave(fetched)


def is_kept(fetched: Fetched) -> bool:
    """Whether it lies in the run because the user wanted to `--keep` it."""
    return fetched._claim is not None and (fetched._claim.folder / _KEPT).exists()


def cache_folder() -> Path:
    """Where this program keeps what no run holds: `$XDG_CACHE_HOME/redundancy-trace`, else below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redundancy-trace"


def place_of(run: Path, checkpoint: Checkpoint) -> Path:
    """Where in a run what is fetched of a checkpoint stays until it is scored."""
    inside = (checkpoint.subfolder or "").replace("/", "--")
    return run / _TRANSIT / "-".join(filter(None, (checkpoint.commit, inside)))


def sweep_out(run: Path, listed: Iterable[Checkpoint], scored: Iterable[Checkpoint]) -> None:
    """Delete what killed sweeps left of checkpoints that are scored, or no longer listed.

    Args:
        run: The run folder.
        listed: All checkpoints: what is there of those without scores is for a later sweep.
        scored: Those with scores.
    """
    stays = {place_of(run, checkpoint) for checkpoint in listed} - {place_of(run, done) for done in scored}
    for folder in (run / _TRANSIT).glob("*"):
        if folder not in stays and not (folder / _KEPT).exists():
            abandon(folder)
    close_transit(run)


def close_transit(run: Path) -> None:
    """Remove the folder of what is in transit, unless something is still there."""
    _remove_if_empty(run / _TRANSIT)


def _needed(model: str, checkpoint: Checkpoint, hub: Hub, commit: str, *, code: bool) -> tuple[RepoFile, ...]:
    """What has to be there of a checkpoint, with paths from the root of the repository."""
    below = f"{checkpoint.subfolder}/" if checkpoint.subfolder else ""
    files = checkpoint.files
    try:
        # A listing of very many checkpoints knows their weights only.
        if files is None or any(file.sha256 is file.git_sha1 is None for file in needed_files(files)):
            files = _below(hub.files(model, commit), below)
    except InputError as error:  # the listing was fine, so it is this one checkpoint
        raise CheckpointError(str(error)) from error
    _check_complete(files, f"{checkpoint.name} of {model}")
    own = [file for file in files if code and file.path.endswith(".py") and "/" not in file.path]
    return tuple(replace(file, path=below + file.path) for file in (*own, *needed_files(files)))


def _below(files: Sequence[RepoFile], folder: str) -> tuple[RepoFile, ...]:
    """The files of a folder (`a/b/`, or `` for the root), with paths from there."""
    return tuple(replace(file, path=file.path.removeprefix(folder)) for file in files if file.path.startswith(folder))


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


@dataclass
class _Claim:
    """A folder that this process alone works in; the lock on it is gone with the process."""

    folder: Path
    descriptor: int | None
    held: bool = True

    def let_go(self) -> None:
        """Give the folder free."""
        self.held = False
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _claim(into: Path) -> _Claim:
    """The folder `into`, made if it is not there, or one beside it while another process holds it."""
    number = 1
    while True:
        folder = into if number == 1 else into.with_name(f"{into.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = try_lock(folder)
        except OSError:  # a file system without locks: nobody else's files can be told from those of the dead
            folder = into.with_name(f"{into.name}-{uuid.uuid4().hex[:8]}")
            folder.mkdir(parents=True)
            return _Claim(folder, None)
        if descriptor is not None:
            return _Claim(folder, descriptor)
        number += 1


def _size(files: Sequence[RepoFile]) -> int:
    return sum(file.size for file in files)


def _present(folder: Path, files: Sequence[RepoFile]) -> int:
    """Bytes on disk of what an earlier call fetched; a file that is still arriving counts by its blocks."""
    there = [path for file in files for path in (folder / file.path, folder / f"{file.path}.part") if path.is_file()]
    return sum(min(path.stat().st_size, path.stat().st_blocks * 512) for path in there)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # not empty, or not there


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _disk_error(error: BaseException, folder: Path, files: Sequence[RepoFile], name: str) -> CheckpointError:
    if _is_full(error) or _is_full(error.__cause__):
        parent = next(path for path in folder.parents if path.exists())
        return CheckpointError(_no_space(name, parent, _size(files), shutil.disk_usage(parent).free))
    return CheckpointError(f"{name} cannot be stored: {error}.")


def _no_space(name: str, folder: Path, needed: int, free: int) -> str:
    return (
        f"No space for {name}: it needs {needed:,} bytes, {free:,} are free at {folder}. Free some, or put the run "
        "elsewhere with --out."
    )
