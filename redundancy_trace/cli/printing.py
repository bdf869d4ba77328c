"""How results are printed: plain tables, words for numbers; remarks go to stderr."""

import typer


def say(text: str) -> None:
    """A line that is no result: it goes to stderr."""
    typer.echo(text, err=True)


def print_table(columns: list[str], cells: list[list[str]]) -> None:
    """Plain columns, words to the left and numbers to the right, never cut: the output may be piped."""
    left = {"", "checkpoint", "name", "commit", "format", "kind", "duplicate of", "on"}
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    for row in [columns, *cells]:
        typer.echo(
            "  ".join(
                cell.ljust(width) if name in left else cell.rjust(width)
                for cell, width, name in zip(row, widths, columns, strict=True)
            ).rstrip()
        )


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, the first and the last among them."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def repeated(name: str | None, *, partial: bool | None) -> str:
    """Whose weights a checkpoint repeats; empty where none's."""
    return "" if name is None else f"partly {name}" if partial else name


def number(value: int | None) -> str:
    """A count with thousands apart; empty where unknown."""
    return "" if value is None else f"{value:,}"


def decimal(value: float | None) -> str:
    """A score with four decimals; empty where unknown."""
    return "" if value is None else f"{value:.4f}"
