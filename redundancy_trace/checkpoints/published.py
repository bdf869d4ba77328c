"""How a model's checkpoints are published on the Hub: branches and tags, or folders of `main`."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from redundancy_trace.checkpoints.formats import weight_files
from redundancy_trace.checkpoints.names import ParsedName, parse_name
from redundancy_trace.checkpoints.records import Checkpoint, CheckpointKind
from redundancy_trace.hub import Hub, Ref, RepoFile

# With fewer refs that tell a place in the training, the checkpoints are looked for elsewhere.
FEWEST_REFS = 2


@dataclass(frozen=True)
class Published:
    """What was found of a model.

    Attributes:
        checkpoints: In no order.
        main: `main` with all its files, where they had to be looked at.
    """

    checkpoints: tuple[Checkpoint, ...]
    main: Checkpoint | None = None


def published_checkpoints(hub: Hub, model: str) -> Published:
    """Every checkpoint of a model; one request, and one more where its refs are no training checkpoints.

    Raises:
        InputError: No such model, no access, no network.
    """
    found = _of_refs(hub.refs(model))
    main = next((c for c in found if c.name == "main" and c.kind == "branch" and c.commit), None)
    if main is None or main.commit is None or sum(c.is_parsed for c in found) >= FEWEST_REFS:
        return Published(tuple(found))
    files = hub.files(model, main.commit)
    names = {checkpoint.name for checkpoint in found}
    folders = [c for c in _of_folders(files, main.commit) if c.name not in names]
    return Published((*found, *folders), replace(main, files=files))


def with_files(checkpoint: Checkpoint, files: tuple[RepoFile, ...]) -> Checkpoint:
    """The checkpoint with its files, and the size and format of the weights among them."""
    weights = weight_files(files)
    return replace(checkpoint, files=files, bytes=weights.bytes, format=weights.format)


def _of_refs(refs: Iterable[Ref]) -> list[Checkpoint]:
    """One checkpoint a ref; of a branch and a tag of one name the branch, as the Hub resolves it."""
    found: dict[str, Checkpoint] = {}
    for ref in refs:
        parsed = parse_name(ref.name) if ref.kind != "other" else None
        found.setdefault(ref.name, _checkpoint(ref.name, ref.kind, ref.commit, parsed))
    return list(found.values())


def _of_folders(files: Iterable[RepoFile], commit: str) -> list[Checkpoint]:
    """The folders of one commit that are named like checkpoints and hold a config and weights."""
    inside: dict[str, list[RepoFile]] = defaultdict(list)
    for file in files:
        path = PurePosixPath(file.path)
        inside[str(path.parent)].append(replace(file, path=path.name))
    found: list[tuple[Checkpoint, str | None]] = []
    for folder, own in sorted(inside.items()):
        if (parsed := _parse_folder(folder)) and any(file.path == "config.json" for file in own):
            checkpoint = with_files(_checkpoint(folder, "subfolder", commit, parsed[0]), tuple(own))
            found.append((replace(checkpoint, subfolder=folder), parsed[1]))
    readable = [(checkpoint, run) for checkpoint, run in found if checkpoint.format]
    if len({run for _, run in readable}) == 1:
        return [checkpoint for checkpoint, _ in readable]
    # Several runs in one repository are series of their own.
    return [replace(checkpoint, seed=checkpoint.seed or run) for checkpoint, run in readable]


def _parse_folder(folder: str) -> tuple[ParsedName, str | None] | None:
    """What a folder's path says, and the folder that it is in where the name is the last part alone."""
    if whole := parse_name(folder, "folder"):
        return whole, None
    path = PurePosixPath(folder)
    last = parse_name(path.name, "folder")
    return (last, str(path.parent)) if last else None


def _checkpoint(name: str, kind: CheckpointKind, commit: str | None, parsed: ParsedName | None) -> Checkpoint:
    said = parsed or ParsedName()
    return Checkpoint(
        name=name,
        kind=kind,
        commit=commit,
        stage=said.stage,
        ingredient=said.ingredient,
        seed=said.seed,
        step=said.step,
        tokens=said.tokens,
        index=said.index,
    )
