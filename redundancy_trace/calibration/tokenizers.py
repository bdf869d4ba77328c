"""Where the tokenizer is, and which special tokens it puts in front of a sequence."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import Listing, is_local, tokenizer_files
from redundancy_trace.errors import InputError, first_line
from redundancy_trace.hub import Hub, RepoFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of them makes a tokenizer; the others only describe it.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_NONE_OF = f"has no tokenizer (none of {', '.join(_VOCABULARIES)})."
# Places without a tokenizer that are named, where many have none for one reason.
_PLACES_TOLD = 3


@dataclass(frozen=True)
class TokenizerSource:
    """A place where a tokenizer may be.

    Attributes:
        place: A local folder, or a Hub repository.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder in the repository; None = its root.
    """

    place: Path | str
    revision: str = "main"
    subfolder: str | None = None

    def __str__(self) -> str:
        pinned = isinstance(self.place, str) and self.revision != "main"
        where = f"{self.subfolder} of {self.place}" if self.subfolder else str(self.place)
        return f"{where} at {self.revision[:12]}" if pinned else where


def tokenizer_sources(listing: Listing) -> tuple[TokenizerSource, ...]:
    """Where the tokenizer of the chosen checkpoints may be, in order: theirs, `main`'s, the finished model's."""
    if listing.source == "local":
        places = [Path(listing.model).expanduser(), *(c.path for c in reversed(listing.chosen) if c.path is not None)]
        return tuple(map(TokenizerSource, places))
    last = [checkpoint for checkpoint in listing.chosen if checkpoint.commit][-1:]
    repo = next((c.repo for c in last if c.repo), listing.model)
    pinned = [TokenizerSource(repo, c.commit or "main", c.subfolder) for c in last]
    return (*pinned, *map(TokenizerSource, dict.fromkeys((repo, listing.model, _final_model(repo)))))


class _NoTokenizer(InputError):
    """A place without a tokenizer that can be loaded: its name, then the reason."""

    def __init__(self, source: TokenizerSource, reason: str) -> None:
        super().__init__(f"{source} {reason}")
        self.place = str(source)
        self.reason = reason


def find_tokenizer(
    candidates: Sequence[TokenizerSource],
    *,
    named: str | None = None,
    hub: Hub | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedTokenizerBase":
    """The tokenizer of the first candidate that has one.

    Args:
        candidates: Where to look, in order; one without a tokenizer is passed over.
        named: What the user named with `--tokenizer` (folder or repository); nothing else is then looked at.
        hub: Where repositories come from.
        trust_remote_code: Whether the repository's own code may be run.

    Raises:
        InputError: None has one; says where was looked and why each would not do.
    """
    hub = hub or Hub()
    if named is not None:
        place = Path(named).expanduser() if is_local(named) else named
        candidates = [TokenizerSource(place)]
    tried: list[InputError] = []
    for source in dict.fromkeys(candidates):
        try:
            return load_tokenizer(source, hub, trust_remote_code=trust_remote_code)
        except InputError as error:
            tried.append(error)
    if named is not None:
        raise InputError(f"--tokenizer {named}: {tried[0]}")
    looked = "".join(f"\n  {line}" for line in _folded(tried)) or " (nowhere to look)"
    raise InputError(
        f"No tokenizer was found:{looked}\nName a repository or folder that has one with --tokenizer, or give token "
        "ids with --calibration tokens:FILE.npy."
    )


def load_tokenizer(source: TokenizerSource, hub: Hub, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of one folder or repository; of a repository only its tokenizer files are fetched.

    Raises:
        InputError: It has none, or transformers cannot load it.
    """
    folder = source.place if isinstance(source.place, Path) else _fetched(source, hub, code=trust_remote_code)
    if not folder.is_dir():
        raise _NoTokenizer(source, "is no folder.")
    present = sorted(path.name for path in folder.iterdir())
    if not any(name in present for name in _VOCABULARIES):
        raise _NoTokenizer(source, _NONE_OF)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file raises whatever its parser does
        try:
            # Original OLMo names a class of its own code; the file beside it says all that such a class would.
            with _quiet():
                plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
                return plain
        except Exception:
            reason = f"has a tokenizer that transformers cannot load: {first_line(error)}"
            raise _NoTokenizer(source, reason) from error


def prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The special tokens that the tokenizer itself puts in front of a text: BOS for Llama, none for Pythia."""
    bare = encode(tokenizer, "a")
    full: list[int] = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens."""
    # Not verbose: the text may be longer than the model's positions, the sequences cut from it are not.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _final_model(repo: str) -> str:
    """The repository of the finished model that one of checkpoints is named after (bloom-7b1-intermediate, say)."""
    return re.sub(r"(-intermediate)?(-checkpoints)?$", "", repo, flags=re.IGNORECASE)


@contextmanager
def _quiet() -> Iterator[None]:
    """No remarks of transformers on a config that it does not know: its tokenizer may be as good as any."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _folded(errors: Sequence[InputError]) -> list[str]:
    """One line for each reason, however many places it holds for."""
    places: dict[str, list[str]] = {}
    for error in errors:
        if isinstance(error, _NoTokenizer):
            places.setdefault(error.reason, []).append(error.place)
        else:  # says itself which repository it is about
            places.setdefault(str(error), [])
    lines = []
    for reason, (first, *others) in ((reason, found or [""]) for reason, found in places.items()):
        named = ", ".join(others[:_PLACES_TOLD]) + (" …" if len(others) > _PLACES_TOLD else "")
        also = f" The same holds of {len(others)} more: {named}" if others else ""
        lines.append(f"{first} {reason}{also}".strip())
    return lines


def _fetched(source: TokenizerSource, hub: Hub, *, code: bool) -> Path:
    """The folder in the user's Hub cache that holds the tokenizer files of a repository."""
    repo = str(source.place)
    commit = hub.resolve(repo, source.revision)
    inside = f"{source.subfolder}/" if source.subfolder else ""
    files = [
        replace(file, path=file.path[len(inside) :]) for file in hub.files(repo, commit) if file.path.startswith(inside)
    ]
    wanted = [file.path for file in (*tokenizer_files(files), *_beside(files, code=code))]
    if not any(path in _VOCABULARIES for path in wanted):
        raise _NoTokenizer(source, _NONE_OF)
    paths = [hub.cached_file(repo, inside + path, commit) for path in wanted]
    hub.keep_ref(repo, source.revision, commit)
    return paths[wanted.index(next(path for path in wanted if path in _VOCABULARIES))].parent


def _beside(files: Sequence[RepoFile], *, code: bool) -> list[RepoFile]:
    # transformers asks the config which class of tokenizer an old repository means.
    return [file for file in files if file.path == "config.json" or (code and file.path.endswith(".py"))]
