"""`trace plot`: figures from the store."""

from pathlib import Path
from typing import Annotated

import typer


def plot_command(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder that a sweep wrote, or folder of an evaluated checkpoint.")
    ],
    figure: Annotated[
        list[str] | None, typer.Option("--figure", help="Only this figure; may be given again [default: all].")
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="png, pdf, svg, or several with commas.")] = "png,pdf",
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="As the rows name it, such as 'pydoc 64x512' [default: the first]."),
    ] = None,
) -> int:
    """Redraw a run's figures from its stored scores and evaluations."""
    from redundancy_trace.analysis import one_calibration
    from redundancy_trace.figures import EVALUATION_FIGURES, FIGURES, draw_evaluations, draw_figures, refuse_unknown
    from redundancy_trace.store import holds_evaluations, read_duplicates, read_evaluations, read_run, read_scores

    wanted = [form.strip() for form in formats.split(",") if form.strip()]
    names = figure or [*FIGURES, *EVALUATION_FIGURES]
    refuse_unknown("figure", names, [*FIGURES, *EVALUATION_FIGURES])
    folder = run_folder / "figures"
    of_scores = [name for name in names if name in FIGURES] if figure else None
    of_evaluations = [name for name in names if name in EVALUATION_FIGURES] if figure else None
    drawn: list[Path] = []
    # A checkpoint that was evaluated alone has no scores.
    if of_scores or (of_scores is None and (read_run(run_folder) or not holds_evaluations(run_folder))):
        scores = one_calibration(read_scores(run_folder), calibration)
        drawn += draw_figures(scores, folder, of_scores, wanted, read_duplicates(run_folder))
    if of_evaluations or (of_evaluations is None and holds_evaluations(run_folder)):
        drawn += draw_evaluations(read_evaluations(run_folder), folder, of_evaluations, wanted)
    for path in drawn:
        typer.echo(path)
    return 0
