"""The pictures of a run, drawn from its scores and evaluations alone; no torch, no network.

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
from redundancy_trace.figures.quality import (
    along_values,
    curve_values,
    joint_values,
    plot_drop_along,
    plot_drops_along,
    plot_joint,
    plot_qualities,
    plot_quality,
    plot_tradeoff,
    plot_tradeoffs,
    tradeoff_values,
)
from redundancy_trace.figures.style import FORMATS, paper_style
from redundancy_trace.metrics import IMPORTANCE, LOSS
from redundancy_trace.writing import write_whole

__all__ = [
    "EVALUATION_FIGURES",
    "FIGURES",
    "FORMATS",
    "EvaluationFigure",
    "FigureKind",
    "draw_evaluations",
    "draw_figures",
    "plot_depth",
    "plot_depths",
    "plot_drop_along",
    "plot_drops_along",
    "plot_heatmap",
    "plot_joint",
    "plot_loss",
    "plot_qualities",
    "plot_quality",
    "plot_tradeoff",
    "plot_tradeoffs",
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


@dataclass(frozen=True)
class EvaluationFigure:
    """One figure of evaluations: how it is drawn, and the numbers that it shows, one row a value."""

    draw: Callable[[pl.DataFrame], Figure]
    numbers: Callable[[pl.DataFrame], pl.DataFrame]
    purpose: str
    of_one_checkpoint: bool = True

    def rows(self, evaluations: pl.DataFrame) -> pl.DataFrame:
        """The rows that it is drawn from: of the last checkpoint that has them, where it shows one alone."""
        rows = evaluations.filter(pl.col("purpose") == self.purpose)
        if not self.of_one_checkpoint or rows.is_empty():
            return rows
        planned = rows.filter(pl.col("plan").is_not_null())
        last = (planned if len(planned) else rows).row(-1, named=True)
        return rows.filter(
            (pl.col("revision") == last["revision"]) & pl.col("commit").eq_missing(pl.lit(last["commit"], pl.String))
        )


def _draw_joint(evaluations: pl.DataFrame) -> Figure:
    figure = plot_joint(evaluations).get_figure(root=True)
    assert figure is not None
    return figure


EVALUATION_FIGURES: dict[str, EvaluationFigure] = {
    "quality": EvaluationFigure(plot_qualities, curve_values, "curve"),
    "joint": EvaluationFigure(_draw_joint, joint_values, "curve"),
    "tradeoff": EvaluationFigure(plot_tradeoffs, tradeoff_values, "model"),
    "drop-along": EvaluationFigure(plot_drops_along, along_values, "along", of_one_checkpoint=False),
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
    refuse_unknown("figure", names, FIGURES)
    refuse_unknown("format", formats, FORMATS)
    return [
        file
        for name in names
        for file in _written(
            Path(folder).expanduser(),
            name,
            formats,
            FIGURES[name].numbers(scores, duplicates),
            partial(FIGURES[name].draw, scores, duplicates),
        )
    ]


def draw_evaluations(
    evaluations: pl.DataFrame,
    folder: str | Path,
    names: Iterable[str] | None = None,
    formats: Iterable[str] = ("png", "pdf"),
) -> list[Path]:
    """Draw figures of evaluations into a folder, each with a CSV, as `draw_figures` does those of scores.

    Args:
        evaluations: As `read_evaluations` gives them; of several checkpoints, figures of one show the last.
        folder: Where to write, made if need be.
        names: Keys of `EVALUATION_FIGURES`; None = all that can be drawn.
        formats: `png`, `pdf`, `svg`.

    Returns:
        The pictures and, behind those of each figure, its CSV.

    Raises:
        InputError: As `draw_figures`; or what a figure shows was not measured (says how to).
    """
    formats = list(formats)
    wanted = list(EVALUATION_FIGURES if names is None else names)
    refuse_unknown("figure", wanted, EVALUATION_FIGURES)
    refuse_unknown("format", formats, FORMATS)
    written: list[Path] = []
    for name in wanted:
        kind = EVALUATION_FIGURES[name]
        rows = kind.rows(evaluations)
        draw = partial(kind.draw, rows)
        try:
            numbers = kind.numbers(rows)
        except InputError:
            if names is None:
                continue  # not measured
            raise
        written += _written(Path(folder).expanduser(), name, formats, numbers, draw)
    return written


def _written(
    folder: Path, name: str, formats: list[str], numbers: pl.DataFrame, draw: Callable[[], Figure]
) -> list[Path]:
    """Draw one figure and write it in each format, then the CSV of its numbers."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with paper_style():
            figure = draw()
            for form in formats:
                save = partial(figure.savefig, format=form, metadata=FORMATS[form])
                written.append(write_whole(folder / f"{name}.{form}", save))
        written.append(write_whole(folder / f"{name}.csv", numbers.write_csv))
    except OSError as error:
        raise InputError(
            f"Figures cannot be written to {folder}: {error.strerror or error}. Name a folder that can be written."
        ) from error
    return written


def refuse_unknown(what: str, wanted: list[str], known: Iterable[str]) -> None:
    """Refuse names that are not known, with the nearest that is.

    Raises:
        InputError: One is not.
    """
    known = list(known)
    for name in wanted:
        if name not in known:
            near = nearest(name, known, count=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"There is no {what} {name!r}. Known: {', '.join(known)}.{hint}")
