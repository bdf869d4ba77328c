"""`trace report`: one self-contained HTML page of a run."""

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that a sweep wrote.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write [default: RUN/report.html].")] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="As the rows name it, such as 'pydoc 64x512' [default: the first]."),
    ] = None,
) -> int:
    """Write one HTML page of a run that loads nothing: words, interactive heatmaps, agreement, trends, checkpoints."""
    from redundancy_trace.report import write_report

    typer.echo(write_report(run_folder, out, calibration=calibration))
    return 0
