"""`trace plot`: figures from the store."""

from pathlib import Path
from typing import Annotated

import typer


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
