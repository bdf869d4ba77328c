"""From a model's name to its checkpoints: listed, ordered, selected; and to and from `listing.json`."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from redundancy_trace.checkpoints.duplicates import duplicates_note, mark_duplicates
from redundancy_trace.checkpoints.formats import needed_files, raw_state, weight_files
from redundancy_trace.checkpoints.local import FileKey, is_local, local_checkpoints
from redundancy_trace.checkpoints.ordering import in_training_order
from redundancy_trace.checkpoints.published import published_checkpoints, with_files, with_own_commits
from redundancy_trace.checkpoints.records import Checkpoint, Listing
from redundancy_trace.checkpoints.selection import full_commits, select, selector_items
from redundancy_trace.checkpoints.tokens import with_tokens
from redundancy_trace.errors import InputError
from redundancy_trace.hub import Hub, RepoFile

PARALLEL_TREES = 8
# The Hub grants an anonymous user 500 calls of its interface in five minutes, and 3,000 questions for one file.
MANY_TREES = 300
FEW_WEIGHT_FILES = 4


def list_checkpoints(
    model: str | Path,
    revisions: str = "log:20",
    *,
    endpoint: str | None = None,
    offline: bool = False,
    tokens_per_step: int | None = None,
    remembered: Mapping[FileKey, str] | None = None,
    known: Listing | None = None,
) -> Listing:
    """List the checkpoints of a model; no weights are moved or read.

    Args:
        model: Hub repository (`org/name`), known run of one repository a checkpoint (`TinyLlama/TinyLlama-1.1B`,
            `google/multiberts`, or any one of its repositories), or local folder.
        revisions: Which are chosen: `all`, `every:10`, `log:20`, `linear:20`, `1000..50000`, `tokens:0..100B`,
            `stage:1`, names, globs, commits, `@file`, or several with commas.
        endpoint: Address of the Hub; None = `HF_ENDPOINT`, else huggingface.co.
        offline: Only local folders and the user's Hub cache.
        tokens_per_step: Tokens in one step, where names tell steps alone.
        remembered: Hashes of local files that are known from before.
        known: An earlier listing of the model: the files of a commit never change, so they are not asked for again
            (unless only the cache was looked at, which may hold some of them).

    Returns:
        Every ref, in training order. Of a repository, files, bytes and format are known of those that were selected,
        and of those that are known from before. What turns out to repeat the weights of another is marked and, unless
        it is named, not chosen.

    Raises:
        InputError: No such model, no access, no network, or a selector that selects nothing.
    """
    model = str(model).strip()
    if is_local(model):
        ordered = in_training_order(local_checkpoints(model, remembered or {}))
        placed = with_tokens(ordered, tokens_per_step)
        return reselected(Listing(model, "local", placed), revisions)
    hub = Hub(endpoint=endpoint, offline=offline)
    if known is not None and known.source == "cache" and not hub.is_offline:
        known = None
    published = published_checkpoints(hub, model)
    found = with_tokens(in_training_order(published.checkpoints), tokens_per_step)
    for commit in full_commits(selector_items(revisions), found):
        resolved = hub.resolve(published.repo or model, commit)
        found += (Checkpoint(name=commit, kind="other", commit=resolved, repo=published.repo),)
    if not found and hub.is_offline:
        raise InputError(_nothing_named(model, hub.cached_commits(model)))
    seen = [checkpoint for checkpoint in (*(known or ()), published.main) if checkpoint]
    listed, notes = _choose(hub, model, _as_known(found, known), revisions, seen)
    if not hub.is_offline:  # there the files of a commit are those that were once asked for
        _refuse_empty(model, listed)
    return Listing(model, "cache" if hub.is_offline else "hub", listed, (*published.notes, *notes))


def listing_to_json(listing: Listing, remembered: Mapping[FileKey, str] | None = None) -> dict[str, Any]:
    """What `listing.json` holds: the listing whole, and the hashes of local files that are known."""
    return {
        "model": listing.model,
        "source": listing.source,
        "notes": list(listing.notes),
        "checkpoints": [_checkpoint_to_json(checkpoint) for checkpoint in listing],
        "hashes": [[*key, digest] for key, digest in sorted((remembered or {}).items())],
    }


def listing_from_json(data: Mapping[str, Any]) -> Listing:
    """The listing that `listing_to_json` wrote.

    Raises:
        InputError: It is not one.
    """
    try:
        checkpoints = tuple(map(_checkpoint_from_json, data["checkpoints"]))
        return Listing(data["model"], data["source"], checkpoints, tuple(data.get("notes", ())))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"listing.json is not one of this program ({error!r}); delete it to list again.") from error


def remembered_from_json(data: Mapping[str, Any]) -> dict[FileKey, str]:
    """The hashes of local files that `listing_to_json` wrote."""
    return {(path, size, mtime_ns): digest for path, size, mtime_ns, digest in data.get("hashes", ())}


def _nothing_named(repo: str, commits: Sequence[str]) -> str:
    """What may be typed where the cache recorded no revision of a repository by name."""
    if not commits:
        return f"The Hub cache holds no files of {repo}. Leave out --offline to download them."
    shown = ", ".join(commits[:5]) + (f" and {len(commits) - 5} more" if len(commits) > 5 else "")
    return (
        f"The Hub cache holds no named revision of {repo}, only the commits {shown}. Choose among them, as in "
        f"--revisions {commits[0]}, or leave out --offline to ask the Hub for names."
    )


def reselected(listing: Listing, revisions: str) -> Listing:
    """The listing with duplicates marked by the hashes that are now known, and anew chosen from the others."""
    marked = mark_duplicates(listing.checkpoints)
    chosen = _with_choice(marked, revisions, listing.model)
    note = duplicates_note(chosen)
    return replace(listing, checkpoints=chosen, notes=tuple(dict.fromkeys(filter(None, (*listing.notes, note)))))


def _as_known(checkpoints: tuple[Checkpoint, ...], known: Listing | None) -> tuple[Checkpoint, ...]:
    """With what an earlier listing knows of the same commits: a duplicate that was found once is not forgotten."""
    trees = {_place(c): c.files for c in known or () if c.files and c.commit}
    remembered = [with_files(c, files) if (files := trees.get(_place(c))) else c for c in checkpoints]
    return mark_duplicates(remembered)


def _choose(
    hub: Hub, model: str, found: tuple[Checkpoint, ...], revisions: str, seen: Sequence[Checkpoint]
) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    """Choose, look at the hashes, leave out what repeats another's weights, and fill up, until nothing changes."""
    told: dict[str, None] = {}
    while True:
        chosen, notes = with_own_commits(hub, _with_choice(found, revisions, model))
        told |= dict.fromkeys(notes)
        listed = _with_files(hub, model, chosen, seen)
        compared = _with_main(hub, model, listed, seen)
        seen = [*seen, *(c for c in compared if c.name == "main" and c.files)]
        marked = mark_duplicates(compared)
        marked = tuple(
            replace(c, duplicate_of=m.duplicate_of, partial_duplicate_of=m.partial_duplicate_of) if c.files else c
            for c, m in zip(listed, marked, strict=True)
        )
        if [c.repeats for c in marked] == [c.repeats for c in found]:
            return marked, tuple(filter(None, (*told, duplicates_note(marked))))
        found = marked


def _with_main(
    hub: Hub, model: str, checkpoints: tuple[Checkpoint, ...], seen: Sequence[Checkpoint]
) -> tuple[Checkpoint, ...]:
    """With the files of `main` too, which wrong uploads were seen to repeat; one alone is compared with none."""
    if sum(c.chosen for c in checkpoints) < 2 or any(c.kind == "repo" for c in checkpoints):
        return checkpoints  # a run of repositories may be named by one of them, whose `main` is that checkpoint itself
    asked = [replace(c, chosen=c.name == "main" and c.kind in ("branch", "tag")) for c in checkpoints]
    return _with_files(hub, model, asked, (*seen, *checkpoints))


def _with_choice(checkpoints: Sequence[Checkpoint], revisions: str, model: str) -> tuple[Checkpoint, ...]:
    chosen = set(select(checkpoints, revisions, model))
    if not chosen:
        blank = [replace(c, duplicate_of=None, partial_duplicate_of=None) for c in checkpoints]
        meant = [replace(checkpoints[index], chosen=False) for index in select(blank, revisions, model)]
        raise InputError(f"--revisions {revisions} selects nothing else of {model}. {duplicates_note(meant)}")
    return tuple(replace(checkpoint, chosen=index in chosen) for index, checkpoint in enumerate(checkpoints))


def _with_files(
    hub: Hub, model: str, checkpoints: Sequence[Checkpoint], seen: Sequence[Checkpoint]
) -> tuple[Checkpoint, ...]:
    """Files, bytes and format of the chosen ones: one request for each commit whose files are not known.

    Of very many commits only the weight files are asked for, as they are called in the last: those requests count
    towards a larger limit of the Hub.
    """
    trees = {_place(c): c.files for c in (*seen, *checkpoints) if c.commit and c.files}
    asked = {_place(c): c for c in checkpoints if c.chosen and c.commit and _place(c) not in trees}
    like: tuple[RepoFile, ...] = ()
    if len(asked) > MANY_TREES and len({c.repo for c in asked.values()}) == 1:
        place, last = asked.popitem()
        like = trees[place] = hub.files(last.repo or model, str(last.commit))

    def files_of(checkpoint: Checkpoint) -> tuple[RepoFile, ...]:
        repo, commit = checkpoint.repo or model, str(checkpoint.commit)
        return _files_like(hub, repo, commit, like) or hub.files(repo, commit)

    with ThreadPoolExecutor(PARALLEL_TREES, "listing") as pool:
        trees |= dict(zip(asked, pool.map(files_of, asked.values()), strict=True))
    return tuple(with_files(c, trees[_place(c)]) if c.chosen and c.commit else c for c in checkpoints)


def _files_like(hub: Hub, repo: str, commit: str, like: Sequence[RepoFile]) -> tuple[RepoFile, ...]:
    """The weight files of a commit that are called as those of another, with the config that is to be expected.

    Size and hash of the latter are not known; whoever fetches it has to ask. Nothing where a file is not there, or the
    weights are in too many files for this to be worth it.
    """
    weights = weight_files(like)
    if not 0 < len(weights.files) <= FEW_WEIGHT_FILES:
        return ()
    others = [replace(file, sha256=None, git_sha1=None) for file in needed_files(like) if file not in weights.files]
    found: list[RepoFile] = []
    for file in weights.files:
        try:
            facts = hub.file_facts(repo, commit, file.path)
        except InputError:  # a server that does not answer this; what is really wrong, the tree will tell
            return ()
        if facts is None or facts.sha256 is None:
            return ()
        found.append(facts)
    return (*others, *found)


def _refuse_empty(model: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse a choice of nothing but refs without weights that are no training checkpoints, such as an empty `main`."""
    chosen = [checkpoint for checkpoint in checkpoints if checkpoint.chosen]
    if any(checkpoint.is_parsed or checkpoint.format for checkpoint in chosen):
        return
    name, files = chosen[0].name, chosen[0].files or ()
    held = ", ".join(sorted({file.path.partition("/")[0] for file in files})[:5]) or "nothing"
    training = [checkpoint.name for checkpoint in checkpoints if checkpoint.is_parsed]
    if training:
        reach = f"{training[0]} to {training[-1]}" if len(training) > 1 else training[0]
        hint = f"Checkpoints ({len(training)}): {reach}. Name one, or give --revisions log:20."
    else:
        refs = ", ".join(checkpoint.name for checkpoint in checkpoints[:10])
        hint = raw_state(file.path for file in files) or f"Its refs are {refs}."
    raise InputError(f"{name} of {model} has no weights that can be read; it holds {held}. {hint}")


def _place(checkpoint: Checkpoint) -> tuple[str | None, ...]:
    """Where its files are: two checkpoints at one place have the same."""
    return checkpoint.repo, checkpoint.commit, checkpoint.subfolder


def _checkpoint_to_json(checkpoint: Checkpoint) -> dict[str, Any]:
    data = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    data["path"] = None if checkpoint.path is None else str(checkpoint.path)
    data["files"] = None if checkpoint.files is None else [asdict(file) for file in checkpoint.files]
    return data


def _checkpoint_from_json(data: Mapping[str, Any]) -> Checkpoint:
    files = data["files"]
    known: dict[str, Any] = dict(data) | {
        "path": None if data["path"] is None else Path(data["path"]),
        "files": None if files is None else tuple(RepoFile(**file) for file in files),
    }
    return Checkpoint(**known)
