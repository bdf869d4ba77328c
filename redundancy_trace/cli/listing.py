"""`trace list`: what there is to sweep."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from redundancy_trace.cli.printing import number, print_table, repeated, say

if TYPE_CHECKING:
    from redundancy_trace.checkpoints import Listing


def list_command(
    model: Annotated[
        str, typer.Option("--model", help="Hub repository (org/name), run of one repository a checkpoint, or folder.")
    ],
    revisions: Annotated[str, typer.Option("--revisions", help="Which are chosen.")] = "log:20",
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="Hub endpoint [default: HF_ENDPOINT].")] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option("--tokens-per-step", help="Tokens in one optimizer step.", min=1)
    ] = None,
    *,
    offline: Annotated[bool, typer.Option("--offline", help="Local folders and the Hub cache only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> int:
    """Show a model's checkpoints, which are chosen and how large they are; moves no weights."""
    from redundancy_trace.checkpoints import list_checkpoints

    listing = list_checkpoints(model, revisions, endpoint=endpoint, offline=offline, tokens_per_step=tokens_per_step)
    if as_json:
        typer.echo(json.dumps(listing.to_json_rows(), indent=1))
    else:
        _print_listing(listing)
    for note in listing.notes:
        say(note)
    return 0


def _print_listing(listing: "Listing") -> None:
    columns = ["", "name", "commit", "stage", "step", "tokens", "bytes", "format", "kind", "duplicate of"]
    cells = [
        [
            "*" if checkpoint.chosen else "",
            checkpoint.name,
            (checkpoint.commit or "")[:12],
            number(checkpoint.stage),
            number(checkpoint.step if checkpoint.step is not None else checkpoint.index),
            number(checkpoint.tokens),
            number(checkpoint.bytes),
            checkpoint.format or "",
            checkpoint.kind,
            repeated(
                checkpoint.duplicate_of or checkpoint.partial_duplicate_of, partial=checkpoint.duplicate_of is None
            ),
        ]
        for checkpoint in listing
    ]
    print_table(columns, cells)
    chosen = listing.chosen
    known = [checkpoint.bytes for checkpoint in chosen if checkpoint.bytes is not None]
    size = f", {sum(known):,} bytes of weights" if known else ""
    typer.echo(f"{len(listing)} refs, {len(chosen)} chosen (*){size}")
