"""The pictures of a run, drawn from its scores alone; no torch, no network.

Every `plot_` function that takes `ax` draws there and returns it; without one it draws in a figure outside pyplot
(`.figure` of what it returns), which a notebook shows where it is the last value of a cell. rcParams and pyplot's
figures stay as the caller left them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from redundancy_trace.analysis import Axis, blank_duplicates, leave_out_duplicates, metric_values, training_axis
from redundancy_trace.errors import InputError, nearest
from redundancy_trace.figures.curves import plot_depth, plot_depths, plot_loss
from redundancy_trace.figures.heatmaps import plot_heatmap, plot_training_heatmaps
from redundancy_trace.figures.style import FORMATS, paper_style
from redundancy_trace.metrics import IMPORTANCE, LOSS
from redundancy_trace.writing import write_whole

__all__ = [
    "FIGURES",
    "FORMATS",
    "FigureKind",
    "draw_figures",
    "plot_depth",
    "plot_depths",
    "plot_heatmap",
    "plot_loss",
    "plot_training_heatmaps",
]


@dataclass(frozen=True)
class FigureKind:
    """One figure that a run has: how it is drawn, the metric whose values it shows, and whether it shows gaps."""

    draw: Callable[[pl.DataFrame, pl.DataFrame | None], Figure]
    metric: str
    shows_gaps: bool = False

    def numbers(self, scores: pl.DataFrame, duplicates: pl.DataFrame | None = None) -> pl.DataFrame:
        """What the figure shows, one row a value; `position` is where the checkpoint stands on the axis."""
        scores = (blank_duplicates if self.shows_gaps else leave_out_duplicates)(scores, duplicates)
        repeats = pl.DataFrame(schema={"revision": pl.String, "duplicate_of": pl.String, "partial": pl.Boolean})
        if duplicates is not None:
            repeats = duplicates.select(repeats.columns)
        axis: Axis = training_axis(scores)
        places = pl.DataFrame(
            {"order": range(len(axis.values)), "position": axis.values},
            schema={"order": pl.UInt32, "position": pl.Float64},
        )
        return (
            metric_values(scores, self.metric)
            .join(places, on="order", maintain_order="left")
            .join(repeats, on="revision", how="left", maintain_order="left")
            .with_columns(position_of=pl.lit(axis.column))
            .select(
                "model", "revision", "commit", "stage", "ingredient", "seed", "step", "tokens", "position_of",
                "position", "component", "layer", "metric", "value", "stderr",
                "duplicate_of", "partial",
            )
        )  # fmt: skip


def _draw_heatmaps(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> Figure:
    return plot_training_heatmaps(scores, duplicates=duplicates)


def _draw_depths(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> Figure:
    return plot_depths(leave_out_duplicates(scores, duplicates))


def _draw_loss(scores: pl.DataFrame, duplicates: pl.DataFrame | None) -> Figure:
    figure = plot_loss(leave_out_duplicates(scores, duplicates)).get_figure(root=True)
    assert figure is not None
    return figure


FIGURES: dict[str, FigureKind] = {
    "importance": FigureKind(_draw_heatmaps, IMPORTANCE.name, shows_gaps=True),
    "similarity-depth": FigureKind(_draw_depths, "cosine_similarity"),
    "loss": FigureKind(_draw_loss, LOSS.name),
}


def draw_figures(
    scores: pl.DataFrame,
    folder: str | Path,
    names: Iterable[str] | None = None,
    formats: Iterable[str] = ("png", "pdf"),
    duplicates: pl.DataFrame | None = None,
) -> list[Path]:
    """Draw figures into a folder, each with a CSV of the numbers that it shows. The same scores give the same bytes.

    Args:
        scores: Scores of one model.
        folder: Where to write, made if need be; a file that is there already is replaced whole.
        names: Keys of `FIGURES`; None = all whose metric is in the scores.
        formats: `png` (300 dots per inch), `pdf`, `svg`.
        duplicates: Checkpoints that repeat another's weights, as `read_duplicates` gives them: hatched in heatmaps,
            left out of curves.

    Returns:
        The pictures and, behind those of each figure, its CSV.

    Raises:
        InputError: If a name or format is unknown (names the known ones), the scores lack a figure's metric, or the
            folder cannot be written.
    """
    formats = list(formats)
    if names is None:
        stored = scores["metric"].unique().to_list() if "metric" in scores.columns else []
        names = [name for name, kind in FIGURES.items() if kind.metric in stored or kind.metric == IMPORTANCE.name]
    names = list(names)
    _refuse_unknown("figure", names, FIGURES)
    _refuse_unknown("format", formats, FORMATS)
    folder = Path(folder).expanduser()
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            kind = FIGURES[name]
            numbers = kind.numbers(scores, duplicates)
            with paper_style():
                figure = kind.draw(scores, duplicates)
                for form in formats:
                    save = partial(figure.savefig, format=form, metadata=FORMATS[form])
                    written.append(write_whole(folder / f"{name}.{form}", save))
            written.append(write_whole(folder / f"{name}.csv", numbers.write_csv))
    except OSError as error:
        raise InputError(
            f"Figures cannot be written to {folder}: {error.strerror or error}. Name a folder that can be written."
        ) from error
    return written


def _refuse_unknown(what: str, wanted: list[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in wanted:
        if name not in known:
            near = nearest(name, known, count=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"There is no {what} {name!r}. Known: {', '.join(known)}.{hint}")
