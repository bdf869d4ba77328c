"""`trace stats`: is the order of the layers the same throughout training? A table, and `stats.json` in the run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redundancy_trace.cli.printing import evenly, number, print_table

if TYPE_CHECKING:
    import polars as pl

    from redundancy_trace.analysis import TrainingStats

# Longest table; of more checkpoints evenly chosen ones are shown.
_TABLE_ROWS = 12
_NAMED = 4


def stats_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that a sweep wrote.")],
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="As the rows name it, such as 'pydoc 64x512' [default: the first]."),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print what stats.json holds.")] = False,
) -> int:
    """Say how far the order of the layers holds over training, and what else changes; writes RUN/stats.json."""
    from redundancy_trace.analysis import LeftOut, training_stats
    from redundancy_trace.store import (
        holds_evaluations,
        read_duplicates,
        read_evaluations,
        read_failures,
        read_scores,
        write_json,
    )

    folder = run_folder.expanduser()
    stats = training_stats(
        read_scores(folder),
        read_duplicates(folder),
        calibration=calibration,
        evaluations=read_evaluations(folder) if holds_evaluations(folder) else None,
        failed=[LeftOut(one["revision"], f"could not be scored: {one['reason']}") for one in read_failures(folder)],
    )
    content = stats.to_json()
    write_json(folder / "stats.json", content, indent=None)
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    else:
        _print_stats(stats)
        typer.echo(f"\nAll numbers: {folder / 'stats.json'}")
    return 0


def _print_stats(stats: "TrainingStats") -> None:
    components = list(stats.series.grids)
    _print_head(stats)
    _print_checkpoints(stats, components)
    _print_trends(stats, components)
    _print_calibrations(stats, components)
    typer.echo("\nWhat others found, asked of this run:")
    for check in stats.checks:
        typer.echo(f"{check.answer:9}  {check.question}\n{'':9}  {check.figure}")
    _print_published(stats)


def _print_head(stats: "TrainingStats") -> None:
    names = stats.series.checkpoints["revision"].to_list()
    span = f"{len(names)} checkpoints, {names[0]} to {names[-1]}" if len(names) > 1 else f"1 checkpoint, {names[0]}"
    series = f" ({stats.series.name}, the longest series)" if stats.series.name else ""
    on = f", on {stats.calibration}" if stats.calibration else ""
    typer.echo(f"{stats.model or 'Scores'}: {span}{series}{on}")
    reasons: dict[str, list[str]] = {}
    for one in stats.left_out:
        reasons.setdefault(one.reason, []).append(one.revision)
    for reason, revisions in reasons.items():
        more = f" and {len(revisions) - _NAMED} more" if len(revisions) > _NAMED else ""
        typer.echo(f"left out: {', '.join(revisions[:_NAMED])}{more}: {reason}")


def _print_checkpoints(stats: "TrainingStats", components: list[str]) -> None:
    """The order of the layers of each checkpoint against the last one's."""
    values = {(row["component"], row["statistic"], row["order"]): row for row in stats.curves.to_dicts()}
    joint = [name for name in ("attn_below_mlp", "attn_first") if ("joint", name, 0) in values]
    checkpoints = stats.series.checkpoints
    has_tokens = checkpoints["tokens"].null_count() == 0
    where = "tokens" if has_tokens else "step"
    n_layers = max(len(grid.layers) for grid in stats.series.grids.values())
    typer.echo(
        "\nOrder of the layers by importance against the last checkpoint's: Spearman (1 = the same), and overlap of "
        f"the most\nredundant quarter ({-(-n_layers // 4)} of {n_layers}; Jaccard). Then in what share of the layers "
        "the attention is less important than the\nMLP, and how many attentions are less important than every MLP:"
    )
    columns = ["checkpoint", where, *components, *(f"{name} overlap" for name in components)]
    columns += [{"attn_below_mlp": "attn < mlp", "attn_first": "attn first"}[name] for name in joint]
    cells = []
    for order in evenly(checkpoints.height, _TABLE_ROWS):
        row = checkpoints.row(order, named=True)
        cells.append(
            [
                str(row["revision"]),
                number(row[where]),
                *(_decimal(values[name, "spearman", order]["value"]) for name in components),
                *(_decimal(values[name, "overlap", order]["value"]) for name in components),
                *(_share(name, values["joint", name, order]["value"]) for name in joint),
            ]
        )
    chance = [_decimal(stats.chance(name)) for name in components]
    cells.append(["by chance", "", *("0.00" for _ in components), *chance, *("" for _ in joint)])
    print_table(columns, cells)
    if checkpoints.height > _TABLE_ROWS:
        typer.echo(f"({_TABLE_ROWS} of {checkpoints.height} checkpoints are shown)")


def _print_trends(stats: "TrainingStats", components: list[str]) -> None:
    """From the first checkpoint to the last, or of the one that there is."""
    several = stats.series.checkpoints.height > 1
    trends = {(row["component"], row["layers"]): row for row in stats.trends.to_dicts()}
    rows = _onset_rows(stats, components) if several else []
    for layers, what in (("all", "all layers"), ("inner", "without the first and last layer")):
        found = [trends[name, layers] for name in components]
        if all(one["first"] is None for one in found):
            continue
        rows.append(
            [f"mean importance, {what}", *(_from_to(one["first"], one["last"], several=several) for one in found)]
        )
        if any(one["slope"] is not None for one in found):
            per = next(one["per"] for one in found)
            per = {"tokens": "tokens", "step": "steps"}[per]
            rows.append([f"  per tenfold of {per}", *(_banded(one, "slope", "+#.2g") for one in found)])
        if several:
            rows.append(["  Spearman with training", *(_banded(one, "spearman", ".2f") for one in found)])
    for statistic, what in (("first_layer", "layer 0"), ("last_layer", "last layer")):
        ends = [_ends(stats.curves, name, statistic) for name in components]
        if any(one is not None for one in ends):
            cells = ["" if one is None else _from_to(*one, several=several) for one in ends]
            rows.append([f"{what} ÷ median of the inner ones", *cells])
    if several:
        typer.echo("\nOver training, first → last (in brackets what the standard errors leave open, 95 %):")
    else:
        typer.echo("\nOf this checkpoint:")
    print_table(["", *components], rows)


def _onset_rows(stats: "TrainingStats", components: list[str]) -> list[list[str]]:
    """From when on the most redundant quarter is that of the last checkpoint."""
    onsets = {name: stats.onset(name) for name in components}
    rows = [["most redundant quarter settled from", *((onsets[name] or {}).get("revision", "") for name in components)]]
    if any(one and one["low"] is not None for one in onsets.values()):
        rows.append(["  at the earliest, at the latest", *(_onset_band(onsets[name]) for name in components)])
    return rows


def _print_calibrations(stats: "TrainingStats", components: list[str]) -> None:
    """One line a pair of calibrations."""
    if stats.calibrations.is_empty():
        return
    import polars as pl

    k = max(stats.calibrations["k"].to_list())
    typer.echo(
        "\nHow far the order depends on the calibration: Spearman of the layers' order, and how many of the most "
        f"redundant\nquarter ({k}) are shared (means over checkpoints):"
    )
    keys = ["calibration", "other_calibration"]
    means = stats.calibrations.group_by([*keys, "component"], maintain_order=True).agg(
        pl.col("spearman", "shared", "chance").mean(), pl.len()
    )
    lines = []
    for pair in means.select(keys).unique(maintain_order=True).iter_rows():
        found = {
            row["component"]: row for row in means.filter(calibration=pair[0], other_calibration=pair[1]).to_dicts()
        }
        lines.append([
            *map(str, pair),
            number(max(row["len"] for row in found.values())),
            *(_decimal(found[name]["spearman"]) if name in found else "" for name in components),
            *(f"{found[name]['shared']:.3g}" if name in found else "" for name in components),
        ])  # fmt: skip
    print_table(["name", "name", "checkpoints", *components, *(f"{name} shared" for name in components)], lines)


def _print_published(stats: "TrainingStats") -> None:
    if not stats.published:
        return
    typer.echo(
        f"\nPublished drop orders of this model beside those of {stats.published[0].revision}, most redundant first:"
    )
    rows = []
    for one in stats.published:
        published, here = (" ".join(map(str, layers)) for layers in (one.published, one.here))
        shared = f"{one.shared} of {len(one.published)}"
        rows.append([one.component, published, here, shared, _decimal(one.overlap), _decimal(one.chance)])
    print_table(["", "published", "here", "shared", "overlap", "by chance"], rows)
    for source in dict.fromkeys(one.source for one in stats.published):
        typer.echo(f"({source}.)")


def _ends(curves: "pl.DataFrame", component: str, statistic: str) -> tuple[float | None, float | None] | None:
    values = curves.filter(component=component, statistic=statistic)["value"]
    return None if values.is_empty() else (values[0], values[-1])


def _onset_band(onset: dict[str, Any] | None) -> str:
    return f"{onset['low']}, {onset['high']}" if onset and onset["low"] is not None else ""


def _from_to(first: float | None, last: float | None, *, several: bool) -> str:
    if first is None or last is None:
        return ""
    return f"{first:.3g} → {last:.3g}" if several else f"{last:.3g}"


def _banded(row: dict[str, Any], name: str, form: str) -> str:
    if row[name] is None:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:.0%}" if name == "attn_below_mlp" else f"{value:.0f}"
