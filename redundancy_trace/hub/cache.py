"""The user's own Hub cache: what of a repository is there without a network; nothing in it is deleted or moved."""

import re
from collections.abc import Sequence
from pathlib import Path

from redundancy_trace.errors import InputError, nearest
from redundancy_trace.hub.ranges import WrongContent
from redundancy_trace.hub.records import COMMIT, Ref, RepoFile, RepoKind


def cached_snapshot(repo: str, commit: str, paths: Sequence[str], kind: RepoKind) -> Path | None:
    """The folder of a commit that holds every one of `paths`, else None."""
    from huggingface_hub import try_to_load_from_cache

    snapshot: Path | None = None
    for path in paths:
        found = try_to_load_from_cache(repo, path, revision=commit, repo_type=kind)
        if not isinstance(found, str) or not Path(found).is_file():
            return None
        snapshot = Path(found).parents[path.count("/")]
    return snapshot


def cached_refs(repo: str, kind: RepoKind) -> tuple[Ref, ...]:
    """Revisions once asked for by name, at the commit they then had (branch or tag is not recorded)."""
    root = _folder(repo, kind) / "refs"
    found = sorted(file for file in root.rglob("*") if file.is_file())
    return tuple(Ref(file.relative_to(root).as_posix(), "branch", file.read_text().strip()) for file in found)


def cached_commits(repo: str, kind: RepoKind) -> tuple[str, ...]:
    """The commits of which the cache holds files, whether or not it recorded a name for them."""
    snapshots = _folder(repo, kind) / "snapshots"
    return tuple(sorted(path.name for path in snapshots.glob("*") if COMMIT.fullmatch(path.name)))


def record_ref(repo: str, revision: str, commit: str, kind: RepoKind) -> None:
    """Note at which commit a branch was, as huggingface_hub does for files that are asked for by its name."""
    file = _folder(repo, kind) / "refs" / revision
    if COMMIT.fullmatch(revision) or (file.is_file() and file.read_text() == commit):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(commit)


def cached_commit(repo: str, revision: str, kind: RepoKind) -> str:
    """The commit of a revision as the cache knows it.

    Raises:
        InputError: The cache does not know it; names those it knows.
    """
    if COMMIT.fullmatch(revision) and (_folder(repo, kind) / "snapshots" / revision).is_dir():
        return revision
    refs = cached_refs(repo, kind)
    for ref in refs:
        if ref.name == revision:
            return ref.commit
    names = ", ".join(nearest(revision, (ref.name for ref in refs)) or [ref.name for ref in refs[:3]])
    raise InputError(
        f"{repo} has no revision {revision!r} in the Hub cache (there: {names or 'none'}). "
        "Leave out --offline to look on the Hub."
    )


def cached_files(repo: str, commit: str, kind: RepoKind) -> tuple[RepoFile, ...]:
    """Those files of a commit that the cache holds."""
    snapshot = _folder(repo, kind) / "snapshots" / commit
    return tuple(
        RepoFile(file.relative_to(snapshot).as_posix(), file.stat().st_size, *_hashes_of_blob(file))
        for file in sorted(snapshot.rglob("*"))
        if file.is_file()
    )


def checked_file(file: Path) -> Path:
    """A file that huggingface_hub has just brought into the cache, which checks its length alone.

    Raises:
        WrongContent: It has another hash than its name tells; it is deleted, or it would be taken as it is ever after.
    """
    sha256, git_sha1 = _hashes_of_blob(file)
    with file.open("rb") as stream:
        right = RepoFile(file.name, file.stat().st_size, sha256, git_sha1).is_content(stream)
    if not right:
        file.resolve().unlink()
        file.unlink(missing_ok=True)
        raise WrongContent(file.name)
    return file


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(repo: str, kind: RepoKind) -> Path:
    folder = hub_cache() / f"{kind}s--{repo.replace('/', '--')}"
    if not folder.is_dir():
        raise InputError(
            f"{repo} is not in the Hub cache ({hub_cache()}), and the network is not to be used. "
            "Leave out --offline (and HF_HUB_OFFLINE), or name a local folder."
        )
    return folder


def _hashes_of_blob(file: Path) -> tuple[str | None, str | None]:
    """SHA-256 and git SHA-1: the cache names the blob of a large file by the one, of a small file by the other."""
    name = file.resolve().name
    return tuple(name if re.fullmatch(rf"[0-9a-f]{{{digits}}}", name) else None for digits in (64, 40))  # type: ignore[return-value]
