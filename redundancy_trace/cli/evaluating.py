"""`trace eval`: what a checkpoint can do, how fast, in how much memory; what dropping costs, once or along a run."""

import inspect
import json
from typing import TYPE_CHECKING, Any

import typer

from redundancy_trace.cli.options import hinted, with_settings
from redundancy_trace.cli.printing import print_table, say
from redundancy_trace.errors import InputError
from redundancy_trace.settings import CURVES, EvaluationSettings

if TYPE_CHECKING:
    import polars as pl

    from redundancy_trace.sweep.evaluating import EvaluationResult


def _evaluate(folder: str | None = None, **options: Any) -> int:
    """Measure a checkpoint, whole and under a plan: loss, speed, memory, KV cache, tasks; or dropping along a run."""
    if folder is not None and options["model"] is not None:
        raise InputError(f"{folder} and --model {options['model']} both name a model; leave out one of them.")
    settings = EvaluationSettings(**{**options, "model": options["model"] or folder})
    from redundancy_trace.progress import reporting
    from redundancy_trace.sweep import evaluation_failures
    from redundancy_trace.sweep.along import run_along
    from redundancy_trace.sweep.evaluating import run_evaluation

    with reporting(quiet=settings.quiet) as reporter:
        result = (run_evaluation if settings.along is None else run_along)(settings, reporter)
    if settings.json:
        typer.echo(json.dumps(_as_json(result), indent=1))
    elif not result.rows.is_empty():
        _print_along(result) if settings.along else _print_curve(result) if settings.curve else _print_model(result)
        if result.figures:
            typer.echo(f"Figures: {', '.join(str(path) for path in result.figures if path.suffix == '.png')}")
    if result.failures:
        say(evaluation_failures(result))
        return 1
    return 0


_FOLDER = typer.Argument(metavar="DIR", help="Folder of a checkpoint; or name it with --model.", show_default=False)
eval_command = with_settings(
    _evaluate,
    EvaluationSettings,
    first=(
        inspect.Parameter(
            "folder",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=hinted(str | None, _FOLDER),
        ),
    ),
)


def _as_json(result: "EvaluationResult") -> dict[str, Any]:
    return {
        "place": str(result.place),
        "measured": result.measured,
        "kept": result.kept,
        "failures": result.failures,
        "rows": result.rows.to_dicts(),
    }


def _print_model(result: "EvaluationResult") -> None:
    """One line a metric: the whole model, and the model under the plan."""
    from redundancy_trace.metrics import EVALUATION_METRICS

    rows = result.rows.to_dicts()
    places = {metric: place for place, metric in enumerate(EVALUATION_METRICS)}
    rows.sort(key=lambda row: places.get(row["metric"], len(places)))
    names = list(dict.fromkeys(_column(row) for row in sorted(rows, key=lambda row: row["n_dropped"])))
    shown: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        key = row["metric"].replace("_", " "), _conditions(row)
        shown.setdefault(key, {})[_column(row)] = _number(row["value"], row["stderr"])
    typer.echo(f"{_checkpoint(rows[0])}, {rows[0]['dtype']} on {rows[0]['device']}:")
    print_table(
        ["name", *names, "on"],
        [[metric, *(cells.get(name, "") for name in names), where] for (metric, where), cells in shown.items()],
    )
    typer.echo(f"Stored in {result.place}")


def _checkpoint(row: dict[str, Any]) -> str:
    model, revision = row["model"], row["revision"]
    return str(model) if model == revision else f"{model} at {revision}"


def _column(row: dict[str, Any]) -> str:
    return "whole model" if row["plan"] is None else str(row["plan"])


def _conditions(row: dict[str, Any]) -> str:
    if row["prompt_tokens"] is not None:
        return f"batch {row['batch_size']}, {row['prompt_tokens']} + {row['new_tokens']} tokens"
    return str(row["dataset"] or "")


def _number(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return text if stderr is None else f"{text} ± {stderr:.2g}"


def _print_curve(result: "EvaluationResult") -> None:
    """One line a number dropped, one column a kind of component."""
    import polars as pl

    from redundancy_trace.metrics import LOSS

    first = result.rows.row(0, named=True)
    losses = result.rows.filter(pl.col("metric") == LOSS.name)
    planned = losses.filter(pl.col("plan").is_not_null())
    kinds = [kind for kind in CURVES if kind in planned["component"].to_list()]
    whole = losses.filter(pl.col("plan").is_null())["value"][0]
    orders = _orders(planned)
    typer.echo(f"Loss in nats per token of {_checkpoint(first)} on {first['dataset']}, {_told(orders)}:")
    lines = [["0", *(f"{whole:.3f}" for _ in kinds)]]
    for count in sorted(planned["n_dropped"].unique()):
        at = planned.filter(pl.col("n_dropped") == count)
        cells = (at.filter(pl.col("component") == kind) for kind in kinds)
        lines.append([str(count), *(_by_order(cell, orders, "{:.3f}") for cell in cells)])
    print_table(["dropped", *kinds], lines)
    typer.echo(f"Stored in {result.place}")


def _print_along(result: "EvaluationResult") -> None:
    """One line a checkpoint, one column a drop: under its own plans, then its plan on the last checkpoint."""
    from redundancy_trace.analysis import along_values

    rows = result.rows
    values = along_values(rows)
    first = rows.row(0, named=True)
    drops = values["plan"].unique(maintain_order=True).to_list()
    orders = _orders(values)
    baseline = rows.filter(rows["plan"].is_null())
    typer.echo(
        f"Loss in nats per token of {first['model']} on {first['dataset']}, and what dropping adds, {_told(orders)}; "
        "behind the arrow what this checkpoint's plan by importance adds on the last one:"
    )
    lines = []
    for revision, loss in baseline.select("revision", "value").iter_rows():
        at = values.filter(values["revision"] == revision)
        lines.append([revision, f"{loss:.3f}", *(_along_cell(at.filter(at["plan"] == drop), orders) for drop in drops)])
    print_table(["checkpoint", "loss", *drops], lines)


_ORDERS = {"importance": "by importance", "random": "random (mean)", "deepest": "deepest first"}


def _orders(rows: "pl.DataFrame") -> list[str]:
    return [order for order in _ORDERS if order in rows["order"].to_list()]


def _told(orders: list[str]) -> str:
    return " / ".join(_ORDERS[order] for order in orders)


def _along_cell(at: "pl.DataFrame", orders: list[str]) -> str:
    own = at.filter(at["applied"] == "own").with_columns(value="added")
    last = at.filter(at["applied"] == "last")["added"]
    return _by_order(own, orders, "{:+.3f}") + (f" → {last[0]:+.3f}" if len(last) else "")


def _by_order(at: "pl.DataFrame", orders: list[str], form: str) -> str:
    """A value for each order, in their order; of one that cannot go so far, a dash."""
    if at.is_empty():
        return ""
    means = [at.filter(at["order"] == order)["value"].mean() for order in orders]
    return " / ".join("–" if mean is None else form.format(mean) for mean in means)
