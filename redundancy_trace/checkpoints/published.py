"""How a model's checkpoints are published on the Hub: branches and tags, folders of `main`, or a repository each."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from redundancy_trace.checkpoints.formats import raw_state, weight_files
from redundancy_trace.checkpoints.known import RepositoryRun, known_note, known_order, known_run, moved_to
from redundancy_trace.checkpoints.names import ParsedName, parse_name
from redundancy_trace.checkpoints.records import Checkpoint, CheckpointKind
from redundancy_trace.errors import InputError
from redundancy_trace.hub import Hub, Ref, RepoFile

# With fewer refs that tell a place in the training, the checkpoints are looked for elsewhere.
FEWEST_REFS = 2
PARALLEL_REPOSITORIES = 8


@dataclass(frozen=True)
class Published:
    """What was found of a model.

    Attributes:
        checkpoints: In no order; those that are repositories have no commit yet.
        repo: The repository that answered, where it is not the one that was asked for.
        main: `main` with all its files, where they had to be looked at.
        notes: What to tell the user.
    """

    checkpoints: tuple[Checkpoint, ...]
    repo: str | None = None
    main: Checkpoint | None = None
    notes: tuple[str, ...] = ()


def published_checkpoints(hub: Hub, model: str) -> Published:
    """Every checkpoint of a model; one request, and one or two more where its refs are no training checkpoints.

    Raises:
        InputError: No such model, no access, no network; or nothing but state of a training program.
    """
    run = known_run(model)
    if run and run.name == (moved_to(model) or model):
        found, notes = _of_run(hub, run)
        return Published(found, notes=_told(known_note(run.name), *notes))
    repo, refs = _refs(hub, model)
    found = _in_known_order(_of_refs(refs, repo), repo or model)
    notes = _told(f"{model} is {repo} now." if repo else None, known_note(repo or model))
    main = next((c for c in found if c.name == "main" and c.kind == "branch" and c.commit), None)
    if sum(c.is_parsed for c in found) >= FEWEST_REFS:
        return Published(found, repo, notes=notes)
    if run:
        others, more = _of_run(hub, run)
        alone = f"{model} is one checkpoint of a run of {len(others)}; --revisions main means it alone."
        return Published((*found, *others), repo, notes=(*notes, *more, alone))
    if main is None or main.commit is None:
        return Published(found, repo, notes=notes)
    files = hub.files(repo or model, main.commit)
    names = {checkpoint.name for checkpoint in found}
    folders = [replace(c, repo=repo) for c in _of_folders(files, main.commit) if c.name not in names]
    _refuse_raw(model, (*found, *folders), files)
    return Published((*found, *folders), repo, replace(main, files=files), notes)


def with_own_commits(hub: Hub, checkpoints: Sequence[Checkpoint]) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    """The chosen checkpoints that are repositories get the commit of their `main`: one request each.

    Returns:
        All checkpoints, and why some have no commit.

    Raises:
        InputError: None of them could be asked.
    """
    asked = [c.repo for c in checkpoints if c.chosen and c.repo and c.commit is None]

    def commit_of(repo: str) -> str | InputError:
        try:
            return hub.resolve(repo, "main")
        except InputError as error:
            return error

    with ThreadPoolExecutor(PARALLEL_REPOSITORIES, "listing") as pool:
        answers = dict(zip(asked, pool.map(commit_of, asked), strict=True))
    commits = {repo: answer for repo, answer in answers.items() if isinstance(answer, str)}
    errors = [answer for answer in answers.values() if isinstance(answer, InputError)]
    if errors and not commits:
        raise errors[0]
    resolved = tuple(
        replace(c, commit=commits.get(c.repo)) if c.chosen and c.repo and c.commit is None else c for c in checkpoints
    )
    return resolved, tuple(map(str, errors))


def with_files(checkpoint: Checkpoint, files: tuple[RepoFile, ...]) -> Checkpoint:
    """The checkpoint with its files, and the size and format of the weights among them."""
    weights = weight_files(files)
    return replace(checkpoint, files=files, bytes=weights.bytes, format=weights.format)


def _told(*notes: str | None) -> tuple[str, ...]:
    return tuple(note for note in notes if note is not None)


def _refuse_raw(model: str, found: Iterable[Checkpoint], files: Sequence[RepoFile]) -> None:
    """Refuse a repository whose `main` holds the training program's own files and nothing that can be read."""
    if any(checkpoint.is_parsed for checkpoint in found) or weight_files(files).format:
        return
    if raw := raw_state(file.path for file in files):
        raise InputError(f"{model} holds no checkpoint that can be read: {raw}")


def _refs(hub: Hub, model: str) -> tuple[str | None, tuple[Ref, ...]]:
    """The refs of a model, and its present name (which is then told) where it has been renamed."""
    try:
        refs, name = hub.refs_and_name(model)
    except InputError:
        if (repo := moved_to(model)) is None:
            raise
        return repo, hub.refs(repo)
    return None if name == model else name, refs


def _of_refs(refs: Iterable[Ref], repo: str | None) -> tuple[Checkpoint, ...]:
    """One checkpoint a ref; of a branch and a tag of one name the branch, as the Hub resolves it."""
    found: dict[str, Checkpoint] = {}
    for ref in refs:
        parsed = parse_name(ref.name) if ref.kind != "other" else None
        found.setdefault(ref.name, replace(_checkpoint(ref.name, ref.kind, ref.commit, parsed), repo=repo))
    return tuple(found.values())


def _in_known_order(checkpoints: tuple[Checkpoint, ...], repo: str) -> tuple[Checkpoint, ...]:
    """Names that tell no step, numbered as the table of known runs has them."""
    order = {name: index for index, name in enumerate(known_order(repo))}
    return tuple(replace(c, index=order[c.name]) if c.name in order else c for c in checkpoints)


def _of_run(hub: Hub, run: RepositoryRun) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    """The repositories of a run, none of them asked yet, and what to tell. Offline: those in the user's cache."""
    repositories, notes = list(run.repositories), []
    if run.searched and not hub.is_offline:
        owner, _, name = run.name.partition("/")
        try:
            repositories += [repo for repo in hub.search(owner, name) if run.holds(repo)]
        except InputError as error:
            notes.append(f"The Hub was not to be asked which repositories {run.name} has, so only known ones: {error}")
    found = []
    for repo in dict.fromkeys(repositories):
        name = repo.rpartition("/")[2]
        found.append(replace(_checkpoint(name, "repo", None, parse_name(name, "repo")), repo=repo))
    if hub.is_offline:
        found = [checkpoint for checkpoint in found if _is_cached(hub, checkpoint)]
    return tuple(found), tuple(notes)


def _is_cached(hub: Hub, checkpoint: Checkpoint) -> bool:
    try:
        return bool(hub.resolve(checkpoint.repo or "", "main"))
    except InputError:
        return False


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
    return Checkpoint(name=name, kind=kind, commit=commit, **(parsed or ParsedName()).fields())
