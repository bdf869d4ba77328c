"""Checkpoints in local folders: a folder of `checkpoint-N` folders, or one checkpoint alone."""

import hashlib
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path

from redundancy_trace.checkpoints.formats import raw_state, weight_files
from redundancy_trace.checkpoints.names import ParsedName, parse_name
from redundancy_trace.checkpoints.records import Checkpoint
from redundancy_trace.errors import CheckpointError, InputError, nearest
from redundancy_trace.hub import RepoFile

FileKey = tuple[str, int, int]  # absolute path, size, mtime_ns: while they stay, so does the content
_REPO_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What a training calls a folder that it is still writing: `tmp-checkpoint-500`, `step500-tmp`, `checkpoint-500.part`.
_UNFINISHED = re.compile(r"\..*|(?:tmp|temp)[-_.].*|.*[-_.](?:tmp|temp|part|partial|incomplete)", re.IGNORECASE)


def is_local(model: str) -> bool:
    """Whether a model is a folder rather than a Hub repository: it exists, or is written as a path.

    Example:
        >>> is_local("./run"), is_local("EleutherAI/pythia-70m")
        (True, False)
    """
    return (
        Path(model).expanduser().exists()
        or model.startswith((".", "~"))
        or Path(model).is_absolute()
        or not _REPO_NAME.fullmatch(model)
    )


def local_checkpoints(model: str, remembered: Mapping[FileKey, str]) -> tuple[Checkpoint, ...]:
    """Every checkpoint of a folder, in no order; no weight file is opened.

    Args:
        model: The folder, as the user named it.
        remembered: Known hashes of files; a checkpoint whose files are all known gets its commit.

    Raises:
        InputError: No such folder, or nothing in it that is a checkpoint.
    """
    folder = _existing(model)
    try:
        found = _found(folder, remembered)
    except OSError as error:
        raise InputError(f"{model} cannot be read: {error.strerror} ({error.filename}).") from error
    if not any(checkpoint.format for checkpoint in found) and (raw := raw_state(_paths(folder))):
        raise InputError(f"{model} holds no checkpoint that can be read: {raw}")
    if not found:
        unfinished = any(_UNFINISHED.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
        hidden = " Folders of unfinished saves, such as tmp-checkpoint-1000, are left out." if unfinished else ""
        raise InputError(f"{model} holds no checkpoint. {_what_is_there(folder)} {_WHAT_IS_EXPECTED}{hidden}")
    if not any(checkpoint.format for checkpoint in found):
        names = ", ".join(checkpoint.name for checkpoint in found[:3])
        raise InputError(f"{model} holds no weights ({names}). {_what_is_there(found[0].path)} {_WEIGHT_NAMES}")
    return tuple(found)


def _found(folder: Path, remembered: Mapping[FileKey, str]) -> list[Checkpoint]:
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not _UNFINISHED.fullmatch(path.name))
    found = [
        _checkpoint(path, remembered)
        for path in subfolders
        if (path / "config.json").is_file() or parse_name(path.name, "folder")
    ]
    if (folder / "config.json").is_file():
        # The Trainer saves the final model beside its checkpoint folders.
        found.append(_checkpoint(folder, remembered))
    return found


def local_commit(folder: Path, remembered: MutableMapping[FileKey, str]) -> str:
    """The commit of a local checkpoint: 40 hex digits over paths, sizes and hashes of its config and weights.

    Args:
        folder: The checkpoint.
        remembered: Known hashes; those computed now (which reads the files) are added.

    Raises:
        CheckpointError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for file in _identifying(_files(folder, {})):
        path = folder / file.path
        try:
            key = _key(path)
            if key not in remembered:
                with path.open("rb") as stream:
                    remembered[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        digest.update(f"{file.path}\t{file.size}\t{remembered[key]}\n".encode())
    return digest.hexdigest()[:40]


def hashed(checkpoint: Checkpoint, remembered: MutableMapping[FileKey, str]) -> Checkpoint:
    """A local checkpoint with its commit and the hashes of its weights; reads the files not yet `remembered`.

    Raises:
        CheckpointError: A file cannot be read.
    """
    assert checkpoint.path is not None
    commit = local_commit(checkpoint.path, remembered)
    return replace(checkpoint, commit=commit, files=_files(checkpoint.path, remembered))


_WHAT_IS_EXPECTED = (
    "Expected is a checkpoint (config.json beside its weights), or a folder of them named like checkpoint-1000 "
    "or step1000."
)
_WEIGHT_NAMES = (
    "Weights are model.safetensors, pytorch_model.bin, or their shards such as model-00001-of-00003.safetensors."
)


def _existing(model: str) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise InputError(f"{model} is a file; name the folder that holds config.json and the weights.")
    parent = folder.parent
    beside = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    like = ", ".join(str(parent / name) for name in nearest(folder.name, beside))
    raise InputError(
        f"There is no folder {model}{f'; did you mean {like}?' if like else '.'} "
        "A Hub repository is written org/name, such as EleutherAI/pythia-70m."
    )


def _checkpoint(folder: Path, remembered: Mapping[FileKey, str]) -> Checkpoint:
    files = _files(folder, remembered)
    weights = weight_files(files)
    parsed = parse_name(folder.name, "folder") or ParsedName()
    identifying = _identifying(files)
    known = bool(weights.files) and all(file.sha256 for file in identifying)
    return Checkpoint(
        name=folder.name,
        kind="local",
        commit=local_commit(folder, dict(remembered)) if known else None,
        path=folder,
        files=files,
        bytes=weights.bytes,
        format=weights.format,
        **parsed.fields(),
    )


def _files(folder: Path, remembered: Mapping[FileKey, str]) -> tuple[RepoFile, ...]:
    """The files of a folder, not those below it."""
    return tuple(
        RepoFile(path.name, path.stat().st_size, remembered.get(_key(path)))
        for path in sorted(folder.iterdir())
        if path.is_file()
    )


def _identifying(files: tuple[RepoFile, ...]) -> list[RepoFile]:
    weights = weight_files(files)
    configs = [file for file in files if file.path == "config.json"]
    index = [weights.index] if weights.index else []
    return sorted([*configs, *index, *weights.files], key=lambda file: file.path)


def _key(path: Path) -> FileKey:
    status = path.stat()
    return os.path.realpath(path), status.st_size, status.st_mtime_ns


def _paths(folder: Path) -> list[str]:
    """What is in a folder, three levels deep: as deep as training programs write."""
    return [path.relative_to(folder).as_posix() for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth)]


def _what_is_there(folder: Path | None) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder else []
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"In it: {shown}." if names else "It is empty."
