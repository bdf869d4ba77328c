"""`trace plot`: figures from the store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import polars as pl

_FIGURES = (
    "importance, similarity-depth, loss, trends, agreement, overlap, order, order-training, decomposition, distances, "
    "calibrations; quality, joint, tradeoff, drop-along of evaluations; models of several runs"
)


def plot_command(
    run_folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run folder that a sweep wrote, or folder of an evaluated checkpoint; several are drawn side by side.",
        ),
    ],
    figure: Annotated[
        list[str] | None,
        typer.Option("--figure", help=f"Only this figure; may be given again: {_FIGURES} [default: all that it has]."),
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="png, pdf, svg, or several with commas.")] = "png,pdf",
    width: Annotated[
        str,
        typer.Option("--width", help="page (7 inches, panels side by side) or column (3.4, one above the other)."),
    ] = "page",
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="As the rows name it, such as 'pydoc 64x512' [default: the first]."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the figures [default: figures/ in the first RUN].")
    ] = None,
) -> int:
    """Redraw a run's figures from its stored scores and evaluations; of several runs, one figure of all."""
    wanted = [form.strip() for form in formats.split(",") if form.strip()]
    folder = out or run_folders[0] / "figures"
    if len(run_folders) > 1:
        drawn = _several(run_folders, figure, wanted, width, calibration, folder)
    else:
        drawn = _one(run_folders[0], figure, wanted, width, calibration, folder)
    for path in drawn:
        typer.echo(path)
    return 0


def _one(
    run_folder: Path, figure: list[str] | None, formats: list[str], width: str, calibration: str | None, folder: Path
) -> list[Path]:
    from redundancy_trace.analysis import calibration_first
    from redundancy_trace.figures import EVALUATION_FIGURES, FIGURES, draw_evaluations, draw_figures, refuse_unknown
    from redundancy_trace.store import holds_evaluations, read_duplicates, read_evaluations, read_run, read_scores

    names = figure or [*FIGURES, *EVALUATION_FIGURES]
    refuse_unknown("figure", names, [*FIGURES, *EVALUATION_FIGURES])
    of_scores = [name for name in names if name in FIGURES] if figure else None
    of_evaluations = [name for name in names if name in EVALUATION_FIGURES] if figure else None
    drawn: list[Path] = []
    # A checkpoint that was evaluated alone has no scores.
    if of_scores or (of_scores is None and (read_run(run_folder) or not holds_evaluations(run_folder))):
        scores = calibration_first(read_scores(run_folder), calibration)
        duplicates, distances = read_duplicates(run_folder), _distances(run_folder)
        drawn += draw_figures(scores, folder, of_scores, formats, duplicates, distances, width)  # type: ignore[arg-type]
    if of_evaluations or (of_evaluations is None and holds_evaluations(run_folder)):
        drawn += draw_evaluations(read_evaluations(run_folder), folder, of_evaluations, formats, width)  # type: ignore[arg-type]
    return drawn


def _several(
    run_folders: list[Path],
    figure: list[str] | None,
    formats: list[str],
    width: str,
    calibration: str | None,
    folder: Path,
) -> list[Path]:
    import polars as pl

    from redundancy_trace.analysis import leave_out_duplicates, one_calibration
    from redundancy_trace.errors import InputError
    from redundancy_trace.figures import MODELS, draw_models, refuse_unknown
    from redundancy_trace.store import read_duplicates, read_scores

    refuse_unknown("figure of several runs", figure or [], [MODELS])
    parts = [
        leave_out_duplicates(one_calibration(read_scores(run), calibration), read_duplicates(run))
        for run in run_folders
    ]
    models = [part["model"][0] for part in parts]
    if twice := next((model for model in models if models.count(model) > 1), None):
        raise InputError(f"Two of the runs are of {twice}; each line is a model, so name runs of different models.")
    return draw_models(pl.concat(parts), folder, formats, width)  # type: ignore[arg-type]


def _distances(run_folder: Path) -> "pl.DataFrame | None":
    from redundancy_trace.store import read_distances

    there = any((run_folder / "distances").glob("*.parquet"))
    return read_distances(run_folder) if there else None
