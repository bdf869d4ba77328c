"""The console script `trace`. Flags are the fields of the settings; results go to stdout, everything else to stderr."""

import inspect
import json
import os
import sys
import threading
import traceback
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from redundancy_trace.errors import InputError, TraceError
from redundancy_trace.settings import TraceSettings, flag_of

if TYPE_CHECKING:
    import polars as pl

    from redundancy_trace.checkpoints import Listing
    from redundancy_trace.sweep import SweepResult

INTERRUPTED = 130
_INTERRUPTED_TEXT = "trace: interrupted; what was finished is stored. Give the same command again to go on."
# Longest table of a sweep; of more checkpoints evenly chosen ones are shown.
_TABLE_ROWS = 24

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 some checkpoints failed or a fault, 2 bad input, 130 interrupted."""
    # Before torch is loaded: threads that wait for each other busily are many times slower where others compute too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(sys.argv[1:] if arguments is None else arguments)
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        # A download that waits for a busy server: what it fetched is deleted, and the interpreter would wait for it.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        result = app(arguments, standalone_mode=False, prog_name="trace")
    except TraceError as error:
        _say(f"trace: {error}")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say(_INTERRUPTED_TEXT)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone; nothing is left to flush to
        return 0
    except Exception as error:
        if (show := getattr(error, "show", None)) is not None:  # what the command-line parser refuses
            show()
            if "No such command" in str(error) and "Did you mean" not in str(error):
                _say("To sweep a model, name it: trace --model REPO or trace --model FOLDER.")
            return int(getattr(error, "exit_code", 2))
        traceback.print_exc()
        _say("trace: this is a fault of the program, not of your input; please report it with the lines above.")
        return 1
    if result == INTERRUPTED:  # the parser turns a KeyboardInterrupt into this
        _say(_INTERRUPTED_TEXT)
    return result if isinstance(result, int) else 0


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
    elif result.scored or result.kept:
        _print_result(result)
    if result.failures:
        _say(failure_summary(result, told=not settings.quiet))
        return 1
    return 0


def _print_versions(wanted: bool) -> None:  # noqa: FBT001 - called by the parser
    if not wanted:
        return
    from redundancy_trace.versions import library_versions

    package, *libraries = library_versions().items()
    typer.echo(", ".join(f"{name} {number}" for name, number in (("redundancy_trace", package[1]), *libraries)))
    raise typer.Exit


def _with_settings_as_options() -> Any:
    """The sweep with one option for each field of the settings, so that a flag is defined in one place."""
    hints = get_type_hints(TraceSettings)
    parameters = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    kind = inspect.Parameter.KEYWORD_ONLY
    for field in fields(TraceSettings):
        option = typer.Option(flag_of(field.name), help=field.metadata["help"], show_default=bool(field.default))
        # Built by call: written with brackets it would be a type to the checker, and the hint is a value.
        annotation = Annotated.__class_getitem__((hints[field.name], option))  # type: ignore[attr-defined]
        parameters.append(inspect.Parameter(field.name, kind, default=field.default, annotation=annotation))
    told = typer.Option(
        "--version",
        help="Print the versions of this program and its libraries.",
        is_eager=True,
        callback=_print_versions,
    )
    shown = Annotated.__class_getitem__((bool, told))  # type: ignore[attr-defined]
    parameters.append(inspect.Parameter("version", kind, default=False, annotation=shown))
    _sweep.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _sweep.__annotations__ = {p.name: p.annotation for p in parameters}
    return _sweep


app.callback(
    invoke_without_command=True,
    help="See how redundancy arises in a language model while it trains: score attention, MLP and block of every "
    "layer at every checkpoint, store the scores, draw the heatmaps.",
)(_with_settings_as_options())


@app.command("list")
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
        _say(note)
    return 0


@app.command("plot")
def plot_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that a sweep wrote.")],
    figure: Annotated[
        list[str] | None, typer.Option("--figure", help="Only this figure; may be given again [default: all].")
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="png, pdf, svg, or several with commas.")] = "png,pdf",
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="As the rows name it, such as 'pydoc 64x512' [default: the first]."),
    ] = None,
) -> int:
    """Redraw a run's figures from its stored scores."""
    from redundancy_trace.analysis import one_calibration
    from redundancy_trace.figures import draw_figures
    from redundancy_trace.store import read_duplicates, read_scores

    wanted = [form.strip() for form in formats.split(",") if form.strip()]
    scores = one_calibration(read_scores(run_folder), calibration)
    duplicates = read_duplicates(run_folder)
    for path in draw_figures(scores, run_folder / "figures", figure or None, wanted, duplicates):
        typer.echo(path)
    return 0


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _summary(result: "SweepResult") -> "pl.DataFrame":
    from redundancy_trace.analysis import mark_repeats, one_calibration, training_summary
    from redundancy_trace.store import read_duplicates, read_scores

    summary = training_summary(one_calibration(read_scores(result.folder), result.calibration))
    return mark_repeats(summary, read_duplicates(result.folder))


def _result_as_json(result: "SweepResult") -> dict[str, Any]:
    return {
        "run": str(result.folder),
        "calibration": result.calibration,
        "scored": result.scored,
        "kept": result.kept,
        "failures": result.failures,
        "figures": [str(path) for path in result.figures],
        "checkpoints": _summary(result).to_dicts() if result.scored or result.kept else [],
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


def _print_result(result: "SweepResult") -> None:
    """Importance over training in a short table, then where the figures are."""
    summary = _summary(result)
    rows = summary.rows(named=True)
    if len(rows) > _TABLE_ROWS:
        picked = [round(i * (len(rows) - 1) / (_TABLE_ROWS - 1)) for i in range(_TABLE_ROWS)]
        rows = [rows[i] for i in picked]
    has_tokens = any(row["tokens"] is not None for row in rows)
    columns = ["checkpoint", "tokens" if has_tokens else "step", "attn", "mlp", "block", "loss"]
    cells = [
        [
            row["revision"],
            _number(row["tokens" if has_tokens else "step"]),
            *(_decimal(row[name]) for name in ("attn", "mlp", "block", "loss")),
            _repeated(row["duplicate_of"], partial=row["partial"]),
        ]
        for row in rows
    ]
    if any(row["duplicate_of"] for row in rows):
        columns.append("duplicate of")
    else:
        cells = [cell[:-1] for cell in cells]
    typer.echo(
        f"Mean importance 1 - cos over all layers (0 = redundant), loss in nats per token, on {result.calibration}:"
    )
    _print_table(columns, cells)
    if len(rows) < len(summary):
        typer.echo(f"({len(rows)} of {len(summary)} checkpoints are shown)")
    pictures = [path for path in result.figures if path.suffix == ".png"]
    if pictures:
        typer.echo(f"Figures: {', '.join(str(path) for path in pictures)}")


def _print_listing(listing: "Listing") -> None:
    columns = ["", "name", "commit", "stage", "step", "tokens", "bytes", "format", "kind", "duplicate of"]
    cells = [
        [
            "*" if checkpoint.chosen else "",
            checkpoint.name,
            (checkpoint.commit or "")[:12],
            _number(checkpoint.stage),
            _number(checkpoint.step if checkpoint.step is not None else checkpoint.index),
            _number(checkpoint.tokens),
            _number(checkpoint.bytes),
            checkpoint.format or "",
            checkpoint.kind,
            _repeated(
                checkpoint.duplicate_of or checkpoint.partial_duplicate_of, partial=checkpoint.duplicate_of is None
            ),
        ]
        for checkpoint in listing
    ]
    _print_table(columns, cells)
    chosen = listing.chosen
    known = [checkpoint.bytes for checkpoint in chosen if checkpoint.bytes is not None]
    size = f", {sum(known):,} bytes of weights" if known else ""
    typer.echo(f"{len(listing)} refs, {len(chosen)} chosen (*){size}")


def _print_table(columns: list[str], cells: list[list[str]]) -> None:
    """Plain columns, words to the left and numbers to the right, never cut: the output may be piped."""
    left = {"", "checkpoint", "name", "commit", "format", "kind", "duplicate of"}
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    for row in [columns, *cells]:
        typer.echo(
            "  ".join(
                cell.ljust(width) if name in left else cell.rjust(width)
                for cell, width, name in zip(row, widths, columns, strict=True)
            ).rstrip()
        )


def _repeated(name: str | None, *, partial: bool | None) -> str:
    return "" if name is None else f"partly {name}" if partial else name


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
