"""The windows of a text in which a model's predictions are counted, each token once. Pure numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from redundancy_trace.calibration import TokenStream, token_hash
from redundancy_trace.errors import InputError


@dataclass(frozen=True)
class Windows:
    """W windows of T tokens, and where in each the tokens begin whose prediction counts.

    Attributes:
        name: What the text is called in the rows.
        ids: Shape (W, T), int64.
        first: Shape (W,): place of the first token that counts in each window; from there on, all do.
        n_bytes: Shape (W,): bytes of text that the counted tokens stand for; None where that is not known.
        stride: Tokens from the start of a window to the start of the next.
        bos: Whether every window starts with the tokenizer's special tokens.
        sha256: `token_hash` of the ids.
    """

    name: str
    ids: np.ndarray
    first: np.ndarray
    n_bytes: np.ndarray | None
    stride: int
    bos: bool
    sha256: str

    @property
    def n_tokens(self) -> int:
        """Tokens whose prediction counts."""
        return int((self.ids.shape[1] - self.first).sum())


def tokens_needed(*, samples: int, sequence_length: int, stride: int | None, skip: int = 0) -> int | None:
    """Tokens of text that `cut_windows` takes at most; None where it takes all (`samples` = 0)."""
    return None if samples == 0 else skip + (samples - 1) * (stride or sequence_length) + sequence_length


def cut_windows(
    stream: TokenStream,
    *,
    samples: int,
    sequence_length: int | None,
    stride: int | None = None,
    skip: int = 0,
) -> Windows:
    """Cut a text into windows of one length, without padding.

    Every window starts with the tokenizer's special tokens, where it puts any in front. A window that overlaps the one
    before counts only what that has not counted; else all of its tokens count but the first, which nothing predicts.

    Args:
        stream: The text; it may be longer than needed.
        samples: W; 0 = the whole text, of which the last window ends with the last token.
        sequence_length: T, special tokens included; None = 512, or as long as the rows of stored ids.
        stride: Tokens of text from the start of a window to that of the next; None = no overlap.
        skip: So many tokens at the beginning of the text are left out: those of a calibration.

    Raises:
        InputError: The text is too short (says what would fit), or stride and length do not go together.
    """
    prefix = np.asarray(stream.prefix, dtype=np.int64)
    length = sequence_length or stream.row_length or 512
    fresh = length - prefix.size
    if fresh < 1 or length < 2:
        raise InputError(
            f"Windows of {length} leave nothing to predict: one needs {max(2, prefix.size + 1)} tokens at least "
            f"({prefix.size} special ones stand in front). Give a greater --sequence-length, or longer rows."
        )
    step = fresh if stride is None else stride
    if not 1 <= step <= fresh:
        raise InputError(f"--stride is {step}; it must be between 1 and the {fresh} tokens of text in a window.")
    starts = _starts(stream, samples, length, fresh, step, skip)
    places = starts[:, None] + np.arange(fresh)
    ids = np.hstack([np.tile(prefix, (len(starts), 1)), stream.ids[places]])
    before = np.concatenate(([starts[0]], starts[:-1] + fresh))
    counted_from = np.maximum(before - starts, 0 if prefix.size else 1)
    label = f"{stream.name} {len(starts)}x{length}" + (f" behind token {skip}" if skip else "")
    counted = np.arange(fresh) >= counted_from[:, None]
    n_bytes = None if stream.n_bytes is None else np.where(counted, stream.n_bytes[places], 0).sum(axis=1)
    return Windows(label, ids, prefix.size + counted_from, n_bytes, step, bool(prefix.size), token_hash(ids))


def _starts(stream: TokenStream, samples: int, length: int, fresh: int, step: int, skip: int) -> np.ndarray:
    """Where each window's text begins in the stream."""
    row = stream.row_length
    if row is not None and (length > row or step != fresh):
        raise InputError(
            f"{stream.name} holds rows of {row} tokens; --sequence-length is at most that, and --stride only for text."
        )
    starts: np.ndarray
    if row is not None:
        starts = np.arange(-(-skip // row), stream.ids.size // row) * row
    else:
        last = stream.ids.size - fresh
        starts = np.arange(skip, last + 1, step)
        if samples == 0 and starts.size and starts[-1] < last:
            starts = np.append(starts, last)
    if starts.size < max(1, samples):
        several = f"{samples} windows" if samples > 1 else "one window"
        fits = f" {starts.size} would fit." if starts.size else ""
        behind = f" behind the first {skip:,}" if skip else ""
        raise InputError(
            f"{stream.name} has {stream.ids.size:,} tokens, too few for {several} of {length}{behind}.{fits} "
            "Give fewer --samples, a shorter --sequence-length, or a longer text."
        )
    return starts[:samples] if samples else starts


def counted_sequences(ids: Sequence[Sequence[int]] | np.ndarray, name: str = "token_ids") -> Windows:
    """Windows of given token ids, shape (W, T): all tokens count but the first of each."""
    rows = np.asarray(ids)
    if rows.ndim != 2 or rows.dtype.kind not in "iu" or rows.shape[0] < 1 or rows.shape[1] < 2:
        raise InputError(
            f"{name} has shape {rows.shape} and dtype {rows.dtype}; integers of shape (W, T >= 2) are needed."
        )
    rows = rows.astype(np.int64)
    label = f"{name} {rows.shape[0]}x{rows.shape[1]}"
    return Windows(
        label, rows, np.ones(len(rows), dtype=np.int64), None, rows.shape[1], bos=False, sha256=token_hash(rows)
    )
