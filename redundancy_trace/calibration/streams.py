"""A text as one stream of token ids, each with the bytes of text that it stands for. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from redundancy_trace.calibration.loading import corpus_pieces, token_array
from redundancy_trace.calibration.texts import Piece
from redundancy_trace.calibration.tokenizers import TokenizerSource, encode, find_tokenizer, prefix_ids
from redundancy_trace.errors import InputError
from redundancy_trace.hub import Hub


@dataclass(frozen=True)
class TokenStream:
    """A text, or the beginning of one, as a model reads it.

    Attributes:
        name: As the user typed it.
        ids: Shape (n,), int64: documents joined by EOS, without special tokens in front.
        n_bytes: Shape (n,), int64: bytes of UTF-8 text from the end of the token before to the end of this one, so
            that they add up to the text; 0 for an EOS. None where there is no text, or its tokenizer tells no places.
        prefix: Special tokens that the tokenizer puts in front of a sequence.
        row_length: Where the ids were stored in rows, the tokens in each; a window must not reach across two.
    """

    name: str
    ids: np.ndarray
    n_bytes: np.ndarray | None
    prefix: tuple[int, ...] = ()
    row_length: int | None = None


def load_stream(
    name: str,
    *,
    at_most: int | None = None,
    tokenizer: str | None = None,
    candidates: Sequence[TokenizerSource] = (),
    hub: Hub | None = None,
    trust_remote_code: bool = False,
) -> TokenStream:
    """Read a text, named as for `load_calibration`, until there are enough tokens.

    Args:
        name: `pydoc`, `c4`, `hf:NAME…`, `tokens:FILE.npy` or the path of a UTF-8 text.
        at_most: Stop once there are so many tokens; None reads to the end.
        tokenizer: Repository or folder that the user named.
        candidates: Where the tokenizer may be, in order.
        hub: Where repositories come from.
        trust_remote_code: Whether a tokenizer's own code may be run.

    Raises:
        InputError: The text or the tokenizer cannot be had.
    """
    hub = hub or Hub()
    if name.startswith("tokens:"):
        return _stored(name)
    pieces = corpus_pieces(name, hub)
    loaded = find_tokenizer(candidates, named=tokenizer, hub=hub, trust_remote_code=trust_remote_code)
    ids, n_bytes = joined(pieces, loaded, at_most)
    return TokenStream(name, ids, n_bytes, prefix_ids(loaded))


def joined(pieces: Iterable[Piece], tokenizer: Any, at_most: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids of documents joined by EOS, and the bytes of each, as `TokenStream` has them."""
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    n_bytes: list[int] = []
    joint: list[int] = []
    for piece in pieces:
        found = tokens_and_bytes(tokenizer, piece.text) if tokenizer.is_fast else (encode(tokenizer, piece.text), [])
        ids += joint + found[0]
        n_bytes += [0] * len(joint) + found[1]
        joint = [eos] if piece.ends_document and eos is not None else []
        if at_most is not None and len(ids) >= at_most:
            break
    end = len(ids) if at_most is None else at_most
    counted = np.array(n_bytes[:end], dtype=np.int64) if tokenizer.is_fast else None
    return np.array(ids[:end], dtype=np.int64), counted


def tokens_and_bytes(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text without special tokens, and the bytes from the end of each token to the end of the next."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = found["input_ids"]
    # Some tokens stand for part of a character: each ends where the furthest before it does, or later.
    ends = np.maximum.accumulate([end for _, end in found["offset_mapping"]], dtype=np.int64)
    if ids:
        ends[-1] = len(text)  # what a tokenizer strips at the end is text all the same
    places = [0, *_bytes_before(text)[ends].tolist()]
    return ids, [after - before for before, after in pairwise(places)]


def _bytes_before(text: str) -> np.ndarray:
    """Bytes of UTF-8 in front of each character, and of the whole text: shape (characters + 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate(([0], np.cumsum(widths)))


def _stored(name: str) -> TokenStream:
    array = token_array(name)
    path = Path(name.removeprefix("tokens:"))
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise InputError(
            f"{path} is {array.dtype} of shape {array.shape}; token ids are an integer array of shape "
            "(sequences, length), or a flat one."
        )
    ids = np.array(array, dtype=np.int64).ravel()
    if ids.size and int(ids.min()) < 0:
        raise InputError(f"{path} holds the token id {int(ids.min())}; ids count from 0.")
    return TokenStream(name, ids, None, (), array.shape[1] if array.ndim == 2 else None)
