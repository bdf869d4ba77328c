"""`trace --model …`: the sweep. Its flags are the fields of the settings."""

import inspect
import json
from typing import TYPE_CHECKING, Any

import typer

from redundancy_trace.cli.options import hinted, with_settings
from redundancy_trace.cli.printing import decimal, evenly, number, print_table, repeated, say
from redundancy_trace.errors import InputError
from redundancy_trace.settings import TraceSettings

if TYPE_CHECKING:
    import polars as pl

    from redundancy_trace.sweep import SweepResult

# Longest table of a sweep; of more checkpoints evenly chosen ones are shown.
_TABLE_ROWS = 24


def _sweep(ctx: typer.Context, *, version: bool = False, **options: Any) -> int | None:  # noqa: ARG001 - told before
    if ctx.invoked_subcommand is not None:
        return None
    if not any(options[name] for name in ("model", "demo")):
        raise InputError(
            "No model is named. Try `trace --model EleutherAI/pythia-70m`, or `trace --demo`, which needs no network; "
            "`trace --help` shows every option."
        )
    from redundancy_trace.progress import reporting
    from redundancy_trace.sweep import failure_summary, run_sweep

    settings = TraceSettings(**options)
    with reporting(quiet=settings.quiet) as reporter:
        result = run_sweep(settings, reporter)
    if settings.dry_run:
        typer.echo(json.dumps(_plan_as_json(result), indent=1) if settings.json else result.plan.told())
    elif settings.json:
        typer.echo(json.dumps(_result_as_json(result), indent=1))
    elif result.stored:
        print_result(result)
    if result.failures:
        say(failure_summary(result, told=not settings.quiet))
        return 1
    return 0


def _print_versions(wanted: bool) -> None:  # noqa: FBT001 - called by the parser
    if not wanted:
        return
    from redundancy_trace.versions import library_versions

    package, *libraries = library_versions().items()
    typer.echo(", ".join(f"{name} {number}" for name, number in (("redundancy_trace", package[1]), *libraries)))
    raise typer.Exit


_CONTEXT = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
_VERSION = typer.Option(
    "--version",
    help="Print the versions of this program and its libraries.",
    is_eager=True,
    callback=_print_versions,
)
sweep_command = with_settings(
    _sweep,
    TraceSettings,
    first=(_CONTEXT,),
    last=(
        inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hinted(bool, _VERSION)),
    ),
)


def _summary(result: "SweepResult") -> "pl.DataFrame":
    from redundancy_trace.analysis import mark_repeats, one_calibration, training_summary
    from redundancy_trace.store import read_duplicates, read_scores

    summary = training_summary(one_calibration(read_scores(result.folder), result.calibrations[0]))
    return mark_repeats(summary, read_duplicates(result.folder))


def _result_as_json(result: "SweepResult") -> dict[str, Any]:
    return {
        "run": str(result.folder),
        "calibration": result.calibrations[0],
        "calibrations": result.calibrations,
        "scored": result.scored,
        "kept": result.kept,
        "failures": result.failures,
        "figures": [str(path) for path in result.figures],
        "checkpoints": _summary(result).to_dicts() if result.stored else [],
    }


def _plan_as_json(result: "SweepResult") -> dict[str, Any]:
    plan = result.plan
    return {
        "run": str(result.folder),
        "checkpoints": plan.checkpoints,
        "stored": plan.stored,
        "bytes_to_move": plan.bytes_to_move,
        "bytes_on_disk": plan.bytes_on_disk,
        "bytes_per_second": plan.bytes_per_second,
        "seconds": plan.seconds,
        "chosen": [checkpoint.name for checkpoint in result.listing.chosen],
    }


def print_result(result: "SweepResult") -> None:
    """Importance over training in a short table, then where the figures are."""
    summary = _summary(result)
    rows = summary.rows(named=True)
    rows = [rows[i] for i in evenly(len(rows), _TABLE_ROWS)]
    has_tokens = any(row["tokens"] is not None for row in rows)
    columns = ["checkpoint", "tokens" if has_tokens else "step", "attn", "mlp", "block", "loss"]
    cells = [
        [
            row["revision"],
            number(row["tokens" if has_tokens else "step"]),
            *(decimal(row[name]) for name in ("attn", "mlp", "block", "loss")),
            repeated(row["duplicate_of"], partial=row["partial"]),
        ]
        for row in rows
    ]
    if any(row["duplicate_of"] for row in rows):
        columns.append("duplicate of")
    else:
        cells = [cell[:-1] for cell in cells]
    typer.echo(
        f"Mean importance 1 - cos over all layers (0 = redundant), loss in nats per token, on {result.calibrations[0]}:"
    )
    print_table(columns, cells)
    if len(rows) < len(summary):
        typer.echo(f"({len(rows)} of {len(summary)} checkpoints are shown)")
    if len(result.calibrations) > 1:
        others = ", ".join(result.calibrations[1:])
        typer.echo(f"Scored on {others} too; `trace stats {result.folder}` tells how far the order depends on it.")
    pictures = [path for path in result.figures if path.suffix == ".png"]
    if pictures:
        typer.echo(f"Figures: {', '.join(str(path) for path in pictures)}")
