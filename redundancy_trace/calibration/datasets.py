"""Text in dataset repositories of the Hub: which files are a configuration's split, read without `datasets`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from redundancy_trace.calibration.texts import Piece, column_of_file
from redundancy_trace.errors import InputError, nearest
from redundancy_trace.hub import Hub

C4 = "hf:allenai/c4:en:validation:text"
# Held-out text first: a model has been trained on the rest.
SPLIT_ORDER = ("validation", "test", "train")
_MAIN = "main"
_CONVERTED = "refs/convert/parquet"
_DATA_FILE = re.compile(r".+\.(parquet|jsonl|json|txt|jsonl\.gz|json\.gz|txt\.gz)")
_SPLIT_WORDS = {
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "train": "train",
    "training": "train",
}
# JSON that describes a repository rather than being its data.
_METADATA = ("dataset_infos.json", "dataset_info.json", "state.json")
Layout = Mapping[str, Mapping[str, list[str]]]


@dataclass(frozen=True)
class DatasetName:
    """`hf:NAME[:config][:split][:column]`; an empty part is left to us.

    Example:
        >>> DatasetName.parse("hf:Salesforce/wikitext:wikitext-2-raw-v1:test")
        DatasetName(repo='Salesforce/wikitext', config='wikitext-2-raw-v1', split='test', column='text')
    """

    repo: str
    config: str | None
    split: str | None
    column: str

    @classmethod
    def parse(cls, text: str) -> "DatasetName":
        """Read the parts.

        Raises:
            InputError: There are too many, or no name.
        """
        parts = [part.strip() for part in text.removeprefix("hf:").split(":")]
        if len(parts) > 4 or not parts[0]:
            raise InputError(
                f"--calibration {text} cannot be read; it looks like hf:NAME[:config][:split][:column], such as "
                "hf:Salesforce/wikitext:wikitext-2-raw-v1:test."
            )
        repo, config, split, column = (*parts, "", "", "")[:4]
        return cls(repo, config or None, split or None, column or "text")


def dataset_pieces(name: DatasetName, hub: Hub) -> Iterator[Piece]:
    """The documents of a split, file by file in order of their names; a file is fetched when it is reached.

    Raises:
        InputError: No such repository, configuration, split, file or column; names those there are.
    """
    layout, refs = _layout(name, hub)
    for path in chosen_files(layout, name):
        file = hub.dataset_file(name.repo, path, [*refs.values()][-1])
        for revision, commit in refs.items():
            hub.keep_ref(name.repo, revision, commit, "dataset")
        yield from column_of_file(file, name.column, f"{path} of {name.repo}")


def chosen_files(layout: Layout, name: DatasetName) -> list[str]:
    """The files of one split.

    Args:
        layout: Configuration -> split -> paths.
        name: What is asked for. Without a configuration: `default`, or the only one. Without a split:
            the first of validation, test, train.

    Raises:
        InputError: There is none such, or several configurations and none is named.
    """
    config = name.config
    if config is None:
        if len(layout) > 1 and "default" not in layout:
            known = ", ".join(sorted(layout)[:20])
            raise InputError(
                f"{name.repo} has {len(layout)} configurations: {known}. "
                f"Name one: --calibration hf:{name.repo}:{min(layout)}."
            )
        config = "default" if "default" in layout else next(iter(layout))
    if config not in layout:
        known = ", ".join(nearest(config, layout) or sorted(layout)[:20])
        hint = ""
        if config in _SPLIT_WORDS:
            hint = f" For a split of the default configuration: hf:{name.repo}::{config}."
        raise InputError(f"{name.repo} has no configuration {config!r}; there is {known}.{hint}")
    splits = layout[config]
    split = name.split or next((known for known in SPLIT_ORDER if known in splits), next(iter(splits)))
    if split not in splits:
        raise InputError(f"{name.repo} has no split {split!r} in {config}; there is {', '.join(sorted(splits))}.")
    return splits[split]


def layout_of(paths: list[str]) -> Layout:
    """Configurations and splits by the names of files and folders.

    A split is a word of the file's name, else a folder, else `train`; a configuration is the folder that is
    neither a split nor `data`, else `default`.

    Example:
        >>> layout_of(["data/train-00000-of-00001.parquet", "raw/test/0000.parquet"])
        {'default': {'train': ['data/train-00000-of-00001.parquet']}, 'raw': {'test': ['raw/test/0000.parquet']}}
    """
    layout: dict[str, dict[str, list[str]]] = {}
    for path in sorted(paths):
        *folders, file = PurePosixPath(path).parts
        split = next((found for part in (file, *reversed(folders)) if (found := _split_in(part))), "train")
        kept = [folder for folder in folders if folder.removeprefix("partial-") not in ("data", *_SPLIT_WORDS)]
        layout.setdefault("/".join(kept) or "default", {}).setdefault(split, []).append(path)
    return layout


def layout_declared(configs: Any, paths: list[str]) -> Layout:
    """Configurations and splits as the `configs` of a dataset card declare them.

    Args:
        configs: The value as it stands in the card; anything but a list of configurations gives none.
        paths: The data files of the repository.
    """
    layout: dict[str, dict[str, list[str]]] = {}
    for config in configs if isinstance(configs, list) else ():
        if not isinstance(config, dict) or "config_name" not in config:
            continue
        prefix = f"{folder}/" if (folder := str(config.get("data_dir") or "").strip("./")) else ""
        inside = {path.removeprefix(prefix): path for path in sorted(paths) if path.startswith(prefix)}
        splits: dict[str, list[str]] = {}
        for split, patterns in _declared_splits(config.get("data_files")):
            found = [inside[path] for path in inside if any(_matches(path, pattern) for pattern in patterns)]
            if found:
                splits[split] = found
        if prefix and "data_files" not in config:
            for path in inside:
                splits.setdefault(_split_in(path) or "train", []).append(inside[path])
        if splits:
            layout[str(config["config_name"])] = splits
            if config.get("default") is True:
                layout.setdefault("default", splits)
    return layout


def _layout(name: DatasetName, hub: Hub) -> tuple[Layout, dict[str, str]]:
    """The layout of a repository, and revision -> commit of what it was seen at; the files are of the last one."""
    commit = hub.resolve(name.repo, _MAIN, "dataset")
    paths = [file.path for file in hub.files(name.repo, commit, "dataset")]
    data = [path for path in paths if _is_data(path)]
    if "README.md" in paths and data:
        card = hub.dataset_file(name.repo, "README.md", commit)
        if declared := layout_declared(_configs_of(card), data):
            return declared, {_MAIN: commit}
    # Beside tables, a text file is a licence or a list of requirements.
    for suffixes in ((".parquet",), (".jsonl", ".jsonl.gz", ".json", ".json.gz"), (".txt", ".txt.gz")):
        if chosen := [path for path in data if path.endswith(suffixes)]:
            return layout_of(chosen), {_MAIN: commit}
    # The Hub's own copy of a dataset whose files are of another kind, or made by a script.
    refs = {ref.name: ref.commit for ref in hub.refs(name.repo, "dataset")}
    if _CONVERTED in refs:
        copies = hub.files(name.repo, refs[_CONVERTED], "dataset")
        if chosen := [file.path for file in copies if file.path.endswith(".parquet")]:
            return layout_of(chosen), {_MAIN: commit, _CONVERTED: refs[_CONVERTED]}
    shown = ", ".join(sorted(paths)[:8]) or "nothing"
    raise InputError(
        f"{name.repo} has no .parquet, .jsonl(.gz), .json(.gz) or .txt(.gz) file; it holds: {shown}. "
        "Save its text to a file and name that with --calibration FILE.txt."
    )


def _is_data(path: str) -> bool:
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith(".") for part in parts)
    return bool(_DATA_FILE.fullmatch(path)) and not hidden and parts[-1] not in _METADATA


def _configs_of(card: Path) -> Any:
    from huggingface_hub.repocard import metadata_load

    try:
        return (metadata_load(card) or {}).get("configs")
    except Exception:  # a card that is no YAML says nothing; the names of the files do
        return None


def _declared_splits(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Split and patterns: a card gives a pattern, several, or entries of `split` and `path`."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    elif isinstance(data_files, str):
        data_files = [data_files]
    for entry in data_files if isinstance(data_files, list) else ():
        if isinstance(entry, dict):
            path = entry.get("path")
            yield str(entry.get("split", "train")), [str(p) for p in path] if isinstance(path, list) else [str(path)]
        else:
            yield "train", [str(entry)]


def _matches(path: str, pattern: str) -> bool:
    """Whether a path fits a glob in which `*` stays inside a folder and `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return bool(re.fullmatch("".join(meanings.get(part, re.escape(part)) for part in parts), path))


def _split_in(name: str) -> str | None:
    """The split that a file or folder is named after: `c4-validation.00000.json` is validation."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)
