"""Token ids: joined, cut, hashed, checked. Pure numpy; N sequences of T tokens."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from redundancy_trace.calibration.texts import Piece
from redundancy_trace.errors import InputError


def cut_sequences(
    pieces: Iterable[Piece],
    encode: Callable[[str], Sequence[int]],
    *,
    samples: int,
    sequence_length: int,
    prefix: Sequence[int] = (),
    eos: int | None = None,
    name: str = "The calibration",
) -> np.ndarray:
    """Tokenise documents, join them by EOS, cut them without padding.

    A sequence may hold the end of one document and the beginning of the next. Reading stops as soon as there are
    enough tokens.

    Args:
        pieces: The documents, in order.
        encode: Text to ids, without special tokens.
        samples: N, the number of sequences.
        sequence_length: T, the tokens in each, prefix included.
        prefix: Ids that every sequence starts with.
        eos: Put between two documents; None joins them without.
        name: How the corpus is called in an error.

    Returns:
        Shape (N, T), int64.

    Raises:
        InputError: The corpus has fewer tokens; says how many, and what would fit.
    """
    fresh = sequence_length - len(prefix)
    if fresh < 1:
        raise InputError(
            f"--sequence-length {sequence_length} leaves no room behind the {len(prefix)} special tokens that the "
            f"tokenizer puts in front; it must be at least {len(prefix) + 2}."
        )
    needed = samples * fresh
    ids: list[int] = []
    joint: tuple[int, ...] = ()
    for piece in pieces:
        ids += joint
        ids += encode(piece.text)
        joint = (eos,) if piece.ends_document and eos is not None else ()
        if len(ids) >= needed:
            break
    else:
        raise InputError(_too_few(name, len(ids), samples, sequence_length, fresh))
    content = np.asarray(ids[:needed], dtype=np.int64).reshape(samples, fresh)
    front = np.tile(np.asarray(prefix, dtype=np.int64), (samples, 1))
    return np.hstack([front, content])


def first_sequences(array: np.ndarray, *, samples: int, sequence_length: int, name: str) -> np.ndarray:
    """The first N sequences of the user's own token ids, T of each.

    Args:
        array: Shape (sequences, length): the first rows and columns are taken; or flat: cut one after the other. Any
            integer dtype.
        samples: N.
        sequence_length: T.
        name: How the array is called in an error.

    Returns:
        Shape (N, T), int64.

    Raises:
        InputError: Not one or two axes of non-negative integers, or smaller than asked.
    """
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise InputError(
            f"{name} is {array.dtype} of shape {array.shape}; token ids are an integer array of shape "
            "(sequences, length), or a flat one that is cut into sequences."
        )
    if array.ndim == 1:
        array = _cut(array, samples, sequence_length, name)
    rows, columns = array.shape
    if rows < samples or columns < sequence_length:
        fits = f"--samples {min(rows, samples)} --sequence-length {min(columns, sequence_length)}"
        raise InputError(
            f"{name} has {rows:,} sequences of {columns:,} tokens, fewer than --samples {samples} "
            f"--sequence-length {sequence_length}. " + (f"{fits} would fit." if rows and columns > 1 else "")
        )
    ids = array[:samples, :sequence_length]
    if int(ids.min()) < 0 or int(ids.max()) > np.iinfo(np.int64).max:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise InputError(f"{name} holds the token id {wrong}; ids count from 0.")
    return np.array(ids, dtype=np.int64, order="C")  # a copy: the file is mapped read-only


def token_hash(ids: np.ndarray) -> str:
    """SHA-256 over shape and little-endian int64 bytes, so that it is the same on every machine.

    Example:
        >>> token_hash(np.zeros((2, 3), dtype=np.int64))[:12]
        'c12ff0c0f9f3'
    """
    digest = hashlib.sha256(np.asarray(ids.shape, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def check_ids(ids: np.ndarray, vocabulary_rows: int) -> None:
    """Refuse ids that the model's embedding has no row for.

    Args:
        ids: Token ids, any shape.
        vocabulary_rows: Rows of the embedding, padding rows included.

    Raises:
        InputError: The largest id is beyond; names both.
    """
    largest = int(ids.max())
    if largest >= vocabulary_rows:
        raise InputError(
            f"The calibration holds the token id {largest:,}, the model's embedding has {vocabulary_rows:,} rows: the "
            "ids come from another model's tokenizer. Name the right one with --tokenizer, or other ids with "
            "--calibration tokens:FILE.npy."
        )


def check_length(sequence_length: int, max_positions: int | None) -> None:
    """Refuse sequences longer than the model's positions.

    Args:
        sequence_length: T.
        max_positions: `max_position_embeddings` of the model; None where it has no limit.

    Raises:
        InputError: T is larger; names both.
    """
    if max_positions is not None and sequence_length > max_positions:
        raise InputError(
            f"--sequence-length {sequence_length:,} is longer than the model's {max_positions:,} positions. "
            f"Try --sequence-length {max_positions}."
        )


def _cut(flat: np.ndarray, samples: int, sequence_length: int, name: str) -> np.ndarray:
    """The first N sequences of T ids, of ids without rows."""
    count = flat.size // sequence_length
    if count < samples:
        fits = f"--samples {count}" if count else f"--samples 1 --sequence-length {flat.size}"
        raise InputError(
            f"{name} has {flat.size:,} token ids; --samples {samples} --sequence-length {sequence_length} needs "
            f"{samples * sequence_length:,}." + (f" {fits} would fit." if flat.size > 1 else "")
        )
    return flat[: samples * sequence_length].reshape(samples, sequence_length)


def _too_few(name: str, found: int, samples: int, sequence_length: int, fresh: int) -> str:
    message = (
        f"{name} gives {found:,} tokens; --samples {samples} --sequence-length {sequence_length} needs "
        f"{samples * fresh:,}. "
    )
    if found >= fresh:
        return message + f"--samples {found // fresh} would fit."
    shortest = found + sequence_length - fresh
    if found > 0 and shortest > 1:
        return message + f"Not one sequence fits; --samples 1 --sequence-length {shortest} would."
    return message + "Name a longer text with --calibration."
