"""One calibration, from its name to the ids that are kept in the run.

`token_ids.npy` (the run's first calibration) or `token_ids-<hash12>.npy` (any other) holds the ids; the `.json`
of the same name beside it says what they were made from, so that the same call takes them up again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redundancy_trace.calibration.batches import cut_sequences, first_sequences, token_hash
from redundancy_trace.calibration.datasets import C4, DatasetName, dataset_pieces
from redundancy_trace.calibration.texts import Piece, pydoc_topics, text_file, whole
from redundancy_trace.calibration.tokenizers import TokenizerSource, encode, find_tokenizer, prefix_ids
from redundancy_trace.errors import InputError, TraceError
from redundancy_trace.hub import Hub
from redundancy_trace.writing import write_whole

DEFAULT_SEQUENCE_LENGTH = 512
_KNOWN = "pydoc, c4, FILE.txt, tokens:FILE.npy, hf:NAME[:config][:split][:column]"


@dataclass(frozen=True)
class Calibration:
    """What every checkpoint of a run is scored on.

    Attributes:
        name: As the user typed it; the column `calibration`.
        token_ids: Shape (N, T), int64.
        sha256: `token_hash` of the ids; part of every row's identity.
    """

    name: str
    token_ids: np.ndarray
    sha256: str


def load_calibration(
    name: str,
    *,
    samples: int,
    sequence_length: int | None = None,
    tokenizer: str | None = None,
    candidates: Sequence[TokenizerSource] = (),
    hub: Hub | None = None,
    run: Path | None = None,
    trust_remote_code: bool = False,
) -> Calibration:
    """Token ids to score on; those that the run has, else made from the text and kept in the run.

    Documents are joined by the tokenizer's EOS (without, if it has none) and cut without padding; each sequence
    starts with the special tokens that the tokenizer puts in front.

    Args:
        name: `pydoc` (every topic of `pydoc_data.topics`), `c4` (allenai/c4, English, validation), `hf:NAME[:config]
            [:split][:column]`, `tokens:FILE.npy` (the first rows and columns of an integer array, or a flat one, cut
            into sequences), or the path of a UTF-8 text (one document).
        samples: N, number of sequences.
        sequence_length: T, tokens in each; None = as long as the rows of `tokens:FILE.npy`, 512 of anything else.
        tokenizer: Repository or folder that the user named; then no other place is looked at.
        candidates: Where the tokenizer may be, in order.
        hub: Where repositories come from.
        run: The run folder; None keeps nothing. Ids that it has need neither text nor tokenizer, so any machine can
            go on from them; a local file that has changed since, or another `tokenizer`, makes them anew.
        trust_remote_code: Whether a tokenizer's own code may be run.

    Returns:
        The calibration, ids of shape (N, T).

    Raises:
        InputError: The text, the tokenizer or enough tokens are not there; says what is, and what would fit.
    """
    hub = hub or Hub()
    if sequence_length is None:
        sequence_length = _own_length(name)
    made_from: dict[str, Any] = {
        "calibration": name,
        "samples": samples,
        "sequence_length": sequence_length,
        "tokenizer": tokenizer,
        "file_sha256": _file_hash(name),
    }
    if run is not None and (kept := _kept(run, made_from)) is not None:
        return Calibration(name, kept, token_hash(kept))
    if name.startswith("tokens:"):
        path = _path(name)
        assert sequence_length is not None  # the file is there
        ids = first_sequences(_array(path), samples=samples, sequence_length=sequence_length, name=str(path))
    else:
        assert sequence_length is not None
        pieces = corpus_pieces(name, hub)
        loaded = find_tokenizer(candidates, named=tokenizer, hub=hub, trust_remote_code=trust_remote_code)
        ids = cut_sequences(
            pieces,
            lambda text: encode(loaded, text),
            samples=samples,
            sequence_length=sequence_length,
            prefix=prefix_ids(loaded),
            eos=loaded.eos_token_id,
            name=f"The calibration {name}",
        )
    if run is not None:
        _keep(run, ids, made_from)
    return Calibration(name, ids, token_hash(ids))


def corpus_pieces(name: str, hub: Hub) -> Iterator[Piece]:
    """The documents of a text, named as for `load_calibration`, in pieces.

    Raises:
        InputError: There is no such text.
    """
    if name == "pydoc":
        return whole(pydoc_topics())
    if name == "c4":
        return _c4(hub)
    if name.startswith("hf:"):
        return dataset_pieces(DatasetName.parse(name), hub)
    return text_file(_path(name))


def _c4(hub: Hub) -> Iterator[Piece]:
    """The default text: whoever did not ask for it must hear what it is, and what may stand in its place."""
    try:
        yield from dataset_pieces(DatasetName.parse(C4), hub)
    except InputError as error:
        raise InputError(
            f"The calibration c4, the default for Hub models, cannot be had. {error}\nGive another: --calibration "
            "pydoc (text that every Python carries, no download), or --calibration FILE.txt (text of your own)."
        ) from error


def token_array(name: str) -> np.ndarray:
    """The array that `tokens:FILE.npy` names, mapped, as it is.

    Raises:
        InputError: There is no such file, or it is no array.
    """
    return _array(_path(name))


def _path(name: str) -> Path:
    """The existing local file that a calibration names."""
    path = Path(name.removeprefix("tokens:")).expanduser()
    if path.is_dir():
        raise InputError(f"--calibration {name} is a folder; name a file in it.")
    if not path.exists():
        raise InputError(f"--calibration {name}: there is no file {path}. A calibration is one of {_KNOWN}.")
    if not name.startswith("tokens:") and path.suffix == ".npy":
        raise InputError(f"--calibration {name} is an array, not text. Try --calibration tokens:{name}.")
    return path


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is no .npy array ({error}); write one with numpy.save.") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} holds several arrays; write the ids alone with numpy.save.")
    return array


def _own_length(name: str) -> int | None:
    """T where the user gave none; None if it is that of a file that is not here, though the run may have its ids."""
    if not name.startswith("tokens:"):
        return DEFAULT_SEQUENCE_LENGTH
    if not Path(name.removeprefix("tokens:")).expanduser().exists():
        return None
    array = _array(_path(name))
    return max(2, array.shape[1]) if array.ndim == 2 else DEFAULT_SEQUENCE_LENGTH


def _file_hash(name: str) -> str | None:
    """Hash of the local file that the ids come from, so that a changed one is not mistaken for it."""
    if name in ("pydoc", "c4") or name.startswith("hf:"):
        return None
    path = Path(name.removeprefix("tokens:")).expanduser()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None  # not on this machine; the run may have its ids


def _kept(run: Path, made_from: dict[str, Any]) -> np.ndarray | None:
    """The ids in the run that were made from the same."""
    known = {key: value for key, value in made_from.items() if value is not None}
    records = [(file, found) for file in sorted(run.glob("token_ids*.json")) if (found := _record(file))]
    # A tokenizer that is not named, and a file that is not on this machine, may be any; exact matches come first.
    for asked in (made_from, known):
        for file, found in records:
            if all(key in found and found[key] == value for key, value in asked.items()):
                try:
                    ids: np.ndarray = np.load(file.with_suffix(".npy"), allow_pickle=False)
                except (OSError, ValueError, EOFError):
                    continue
                if token_hash(ids) == found.get("sha256"):
                    return ids
    return None


def made_from(run: Path, sha256: str) -> dict[str, Any] | None:
    """What a run's token ids of this hash were made from: `calibration`, `samples`, `sequence_length`, `tokenizer`."""
    records = (_record(file) for file in sorted(run.glob("token_ids*.json")))
    return next((found for found in records if found and found.get("sha256") == sha256), None)


def _record(file: Path) -> dict[str, Any] | None:
    """What a `.json` beside token ids says; None if it is damaged."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _keep(run: Path, ids: np.ndarray, made_from: dict[str, Any]) -> None:
    """Write ids and record into the run, each under another name first."""
    sha256 = token_hash(ids)
    try:
        file = run / "token_ids.npy"
        if not _is_first(file, ids, sha256):
            file = run / f"token_ids-{sha256[:12]}.npy"
            write_whole(file, lambda path: _save(path, ids))
        text = json.dumps({**made_from, "sha256": sha256}, indent=2) + "\n"
        write_whole(file.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"The token ids cannot be kept in {run}: {error.strerror or error}.") from error


def _is_first(file: Path, ids: np.ndarray, sha256: str) -> bool:
    """Whether `token_ids.npy` holds these ids, written now unless another calibration (or process) has it."""
    if not file.exists():
        write_whole(file, lambda path: _save(path, ids), replace=False)
    try:
        return token_hash(np.load(file, allow_pickle=False)) == sha256
    except (ValueError, EOFError):
        return False


def _save(path: Path, ids: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, ids)
