"""Corpora as documents: the topics of pydoc, a text file, lines of JSON, columns of parquet."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

from redundancy_trace.errors import InputError

# A longer text is tokenised in pieces that end with a line, so that a huge file is neither read nor held whole.
PIECE_CHARACTERS = 1_000_000
_FIRST_ROWS = 1024
_MOST_ROWS = 65_536


class Piece(NamedTuple):
    """A stretch of text, and whether a document ends with it."""

    text: str
    ends_document: bool


def pydoc_topics() -> Iterator[str]:
    """Every topic of `pydoc_data.topics`, by name: the English text (about 465,000 characters) in every CPython."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def whole(documents: Iterable[str]) -> Iterator[Piece]:
    """Each document in one piece, or in pieces if it is huge; documents without text are left out.

    Example:
        >>> list(whole(["one", " ", "two"]))
        [Piece(text='one', ends_document=True), Piece(text='two', ends_document=True)]
    """
    for document in documents:
        if document.strip():
            yield from _pieces(iter(re.findall(rf"(?s).{{1,{PIECE_CHARACTERS}}}", document)))


def text_file(path: Path) -> Iterator[Piece]:
    """The text of one UTF-8 file, as one document: blank lines part paragraphs, not documents.

    Raises:
        InputError: It cannot be read, or is not UTF-8 text.
    """
    with _told(path), _opened(path) as file:
        yield from _pieces(iter(lambda: file.read(PIECE_CHARACTERS), ""))


def column_of_file(path: Path, column: str, name: str) -> Iterator[Piece]:
    """The documents of one file of a dataset.

    Args:
        path: `.parquet`, or `.jsonl`, `.json` (lines or one array), `.txt`, and these three with `.gz`.
        column: The column with the text; a `.txt` is one document.
        name: How the file is called in an error.

    Raises:
        InputError: It cannot be read, or has no such column of text; names the columns there are.
    """
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix == "txt":
        return text_file(path)
    rows = _parquet_rows if suffix == "parquet" else _json_rows
    return whole(rows(path, column, name))


def _pieces(parts: Iterator[str]) -> Iterator[Piece]:
    """Parts of one document, put together so that each piece but the last ends with a line where it can."""
    ready, rest = "", ""
    for part in parts:
        rest += part
        if len(rest) < PIECE_CHARACTERS:
            continue
        if ready:
            yield Piece(ready, ends_document=False)
        end = rest.rfind("\n") + 1 or len(rest)
        ready, rest = rest[:end], rest[end:]
    if ready and rest:
        yield Piece(ready, ends_document=False)
    if last := rest or ready:
        yield Piece(last, ends_document=True)


def _parquet_rows(path: Path, column: str, name: str) -> Iterator[str]:
    import polars as pl

    try:
        frame = pl.scan_parquet(path)
        schema = frame.collect_schema()
        if schema.get(column) != pl.String:
            known = [key for key, dtype in schema.items() if dtype == pl.String]
            raise InputError(_no_column(name, column, known))
        start, rows = 0, _FIRST_ROWS
        while len(part := frame.select(column).slice(start, rows).collect()):
            yield from (text for text in part[column] if text is not None)
            start, rows = start + rows, min(2 * rows, _MOST_ROWS)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{name} cannot be read as parquet: {error}") from error


def _json_rows(path: Path, column: str, name: str) -> Iterator[str]:
    with _told(path, name), _opened(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        rows = json.loads(start + file.read()) if start == "[" else _json_lines(start, file)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise InputError(f'Row {number} of {name} is no JSON object; a row looks like {{"text": "..."}}.')
            text = row.get(column, "")
            if column not in row or not isinstance(text, str | None):
                raise InputError(_no_column(name, column, [key for key in row if isinstance(row[key], str)]))
            yield text or ""


def _json_lines(start: str, file: IO[str]) -> Iterator[object]:
    for line in chain([start + file.readline()], file):
        if text := line.strip():
            yield json.loads(text)


def _no_column(name: str, column: str, known: list[str]) -> str:
    there = f"with text: {', '.join(known)}" if known else "and none with text"
    return f"{name} has no column of text {column!r}; {there}. Name one: --calibration hf:NAME:CONFIG:SPLIT:COLUMN."


@contextmanager
def _told(path: Path, name: str | None = None) -> Iterator[None]:
    """Turn what a broken text file raises into one error of ours."""
    name = name or str(path)
    try:
        yield
    except UnicodeDecodeError as error:
        at = f"byte 0x{error.object[error.start]:02x}"
        raise InputError(f"{name} is not UTF-8 text ({at}); convert it, or name another with --calibration.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON ({error}).") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be read: {reason}.") from error


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")
