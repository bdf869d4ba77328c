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

from redundancy_trace.analysis import (
    Axis,
    along_values,
    blank_duplicates,
    leave_out_duplicates,
    metric_values,
    training_axis,
)
from redundancy_trace.analysis.frames import complete
from redundancy_trace.errors import InputError, nearest
from redundancy_trace.figures.agreement import (
    agreement_values,
    draw_agreements,
    draw_overlaps,
    overlap_values,
    plot_agreement,
    plot_agreements,
    plot_overlap,
    plot_overlaps,
)
from redundancy_trace.figures.curves import plot_depth, plot_depths, plot_loss
from redundancy_trace.figures.decomposition import decomposition_values, plot_decomposition, plot_decompositions
from redundancy_trace.figures.distances import (
    distance_values,
    draw_distances,
    plot_distances,
    plot_distances_over_training,
    spread,
)
from redundancy_trace.figures.heatmaps import (
    calibration_values,
    plot_calibration,
    plot_calibrations,
    plot_heatmap,
    plot_training_heatmaps,
)
from redundancy_trace.figures.orders import (
    MOST_CHECKPOINTS,
    drop_order_values,
    plot_drop_order,
    plot_drop_orders,
    plot_drop_orders_over_training,
    spread_over_training,
)
from redundancy_trace.figures.quality import (
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
from redundancy_trace.figures.style import FORMATS, STYLE, WIDTHS, PaperFigure, Width, head, paper_style, title
from redundancy_trace.figures.training import over_training, training_scale
from redundancy_trace.figures.trends import (
    model_values,
    plot_models,
    plot_models_side_by_side,
    plot_trends,
    trend_values,
    trends_figure,
)
from redundancy_trace.metrics import IMPORTANCE, LOSS
from redundancy_trace.writing import write_whole

__all__ = [
    "EVALUATION_FIGURES",
    "FIGURES",
    "FORMATS",
    "MODELS",
    "WIDTHS",
    "EvaluationFigure",
    "FigureKind",
    "Stored",
    "draw_evaluations",
    "draw_figures",
    "draw_models",
    "plot_agreement",
    "plot_agreements",
    "plot_calibration",
    "plot_calibrations",
    "plot_decomposition",
    "plot_decompositions",
    "plot_depth",
    "plot_depths",
    "plot_distances",
    "plot_distances_over_training",
    "plot_drop_along",
    "plot_drop_order",
    "plot_drop_orders",
    "plot_drop_orders_over_training",
    "plot_drops_along",
    "plot_heatmap",
    "plot_joint",
    "plot_loss",
    "plot_models",
    "plot_models_side_by_side",
    "plot_overlap",
    "plot_overlaps",
    "plot_qualities",
    "plot_quality",
    "plot_tradeoff",
    "plot_tradeoffs",
    "plot_training_heatmaps",
    "plot_trends",
    "refuse_unknown",
]


@dataclass(frozen=True)
class Stored:
    """What a run holds for its figures.

    Attributes:
        scores: Of one model, the calibration that is looked at first.
        duplicates: Checkpoints that repeat another's weights, as `read_duplicates` gives them.
        distances: As `read_distances` gives them; None = none.
    """

    scores: pl.DataFrame
    duplicates: pl.DataFrame | None = None
    distances: pl.DataFrame | None = None


@dataclass(frozen=True)
class FigureKind:
    """One figure that a run has: the numbers that it shows, one row a value, and how it is drawn from them.

    Attributes:
        draw: Given what is stored, the numbers and the width.
        numbers: Refuses what the figure cannot be drawn of.
        shows: What is seen, in a line.
        of_one: Whether there is something to see of one checkpoint alone.
    """

    draw: Callable[[Stored, pl.DataFrame, Width], Figure]
    numbers: Callable[[Stored], pl.DataFrame]
    shows: str
    of_one: bool = True


def _metric_numbers(metric: str, stored: Stored, *, shows_gaps: bool = False) -> pl.DataFrame:
    """Values of a metric; `position` is where the checkpoint stands on the axis."""
    duplicates = stored.duplicates
    scores = (blank_duplicates if shows_gaps else leave_out_duplicates)(stored.scores, duplicates)
    repeats = pl.DataFrame(schema={"revision": pl.String, "duplicate_of": pl.String, "partial": pl.Boolean})
    if duplicates is not None:
        repeats = duplicates.select(repeats.columns)
    axis: Axis = training_axis(scores)
    places = pl.DataFrame(
        {"order": range(len(axis.values)), "position": axis.values},
        schema={"order": pl.UInt32, "position": pl.Float64},
    )
    return (
        metric_values(scores, metric)
        .join(places, on="order", maintain_order="left")
        .join(repeats, on="revision", how="left", maintain_order="left")
        .with_columns(position_of=pl.lit(axis.column))
        .select(
            "model", "revision", "commit", "stage", "ingredient", "seed", "step", "tokens", "position_of",
            "position", "component", "layer", "metric", "value", "stderr",
            "duplicate_of", "partial",
        )
    )  # fmt: skip


def _kept(stored: Stored) -> pl.DataFrame:
    return leave_out_duplicates(stored.scores, stored.duplicates)


def _loss_figure(stored: Stored, _: pl.DataFrame, width: Width) -> Figure:
    with paper_style():
        figure = PaperFigure(WIDTHS[width], 2.2)
        scores = _kept(stored)
        plot_loss(scores, ax=figure.add_subplot()).set_title("")
        head(figure, title(scores, over_training(scores, training_scale(training_axis(scores)), "loss")))
        return figure


def _order_spread(stored: Stored) -> pl.DataFrame:
    names = spread_over_training(stored.scores, stored.duplicates, MOST_CHECKPOINTS["page"])
    if len(names) == 1:
        raise InputError("These scores are of one checkpoint: --figure order shows it.")
    return drop_order_values(stored.scores, names, stored.duplicates)


def _two_calibrations(stored: Stored) -> pl.DataFrame:
    values = calibration_values(stored.scores)
    if values["calibration"].n_unique() == 1:
        raise InputError(
            "These scores are of one calibration. Add another with the same --out: trace --model … --calibration "
            "OTHER, or --samples OTHER."
        )
    return values


def _all_distances(stored: Stored) -> pl.DataFrame:
    if stored.distances is None:
        raise InputError("There are no block distances; give distances=read_distances(RUN).")
    calibration = complete(stored.scores)["calibration"][0]
    rows = stored.distances.filter(pl.col("calibration").eq_missing(pl.lit(calibration, pl.String)))
    names = _kept(stored)["revision"].unique().to_list()
    rows = rows.filter(pl.col("revision").is_in(names))
    return distance_values(rows, spread(rows))


FIGURES: dict[str, FigureKind] = {
    "importance": FigureKind(
        lambda stored, _, width: plot_training_heatmaps(stored.scores, duplicates=stored.duplicates, width=width),
        lambda stored: _metric_numbers(IMPORTANCE.name, stored, shows_gaps=True),
        "heatmaps of importance, layer × training (Fig. 7 of the paper)",
    ),
    "similarity-depth": FigureKind(
        lambda stored, _, width: plot_depths(_kept(stored), width=width),
        lambda stored: _metric_numbers("cosine_similarity", stored),
        "cosine similarity over depth, one line a checkpoint",
    ),
    "loss": FigureKind(
        _loss_figure,
        lambda stored: _metric_numbers(LOSS.name, stored),
        "loss on the calibration tokens over training",
        of_one=False,
    ),
    "trends": FigureKind(
        lambda stored, _, width: trends_figure(stored.scores, stored.duplicates, width),
        lambda stored: trend_values(stored.scores, stored.duplicates),
        "mean importance of each component over training, with intervals",
        of_one=False,
    ),
    "agreement": FigureKind(
        lambda stored, values, width: draw_agreements(stored.scores, values, stored.duplicates, width),
        lambda stored: agreement_values(stored.scores, stored.duplicates),
        "Spearman of the layers' order between every two checkpoints",
    ),
    "overlap": FigureKind(
        lambda stored, values, width: draw_overlaps(stored.scores, values, stored.duplicates, width),
        lambda stored: overlap_values(stored.scores, stored.duplicates),
        "overlap of the k most redundant layers with the last checkpoint's, and chance",
    ),
    "order": FigureKind(
        lambda stored, _, width: plot_drop_orders(_kept(stored), width=width),
        lambda stored: drop_order_values(_kept(stored)),
        "dropping order of the last checkpoint, retained and dropped (Fig. 6)",
    ),
    "order-training": FigureKind(
        lambda stored, _, width: plot_drop_orders_over_training(
            stored.scores, duplicates=stored.duplicates, width=width
        ),
        _order_spread,
        "the same of checkpoints spread over the training, side by side",
    ),
    "decomposition": FigureKind(
        lambda stored, _, width: plot_decompositions(_kept(stored), width=width),
        lambda stored: decomposition_values(_kept(stored)),
        "importance taken apart: size and direction of every layer's update",
    ),
    "distances": FigureKind(
        lambda _, values, width: draw_distances(values, "angular_distance", width),
        _all_distances,
        "angular distance over blocks of n layers, the triangle of Gromov et al.",
    ),
    "calibrations": FigureKind(
        lambda stored, _, width: plot_calibrations(stored.scores, width=width),
        _two_calibrations,
        "one checkpoint on every calibration and number of samples (Figs. 2, 3, 10)",
    ),
}
# Of several runs together.
MODELS = "models"


@dataclass(frozen=True)
class EvaluationFigure:
    """One figure of evaluations: how it is drawn, and the numbers that it shows, one row a value."""

    draw: Callable[[pl.DataFrame, Width], Figure]
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


def _draw_joint(evaluations: pl.DataFrame, _: Width) -> Figure:
    figure = plot_joint(evaluations).get_figure(root=True)  # one panel, which takes a column
    assert figure is not None
    return figure


EVALUATION_FIGURES: dict[str, EvaluationFigure] = {
    "quality": EvaluationFigure(lambda rows, width: plot_qualities(rows, width=width), curve_values, "curve"),
    "joint": EvaluationFigure(_draw_joint, joint_values, "curve"),
    "tradeoff": EvaluationFigure(lambda rows, width: plot_tradeoffs(rows, width=width), tradeoff_values, "model"),
    "drop-along": EvaluationFigure(
        lambda rows, width: plot_drops_along(rows, width=width), along_values, "along", of_one_checkpoint=False
    ),
}


def draw_figures(
    scores: pl.DataFrame,
    folder: str | Path,
    names: Iterable[str] | None = None,
    formats: Iterable[str] = ("png", "pdf"),
    duplicates: pl.DataFrame | None = None,
    distances: pl.DataFrame | None = None,
    width: Width = "page",
) -> list[Path]:
    """Draw figures into a folder, each with a CSV of the numbers that it shows. The same scores give the same bytes.

    Args:
        scores: Scores of one model. All but `calibrations` show the first calibration.
        folder: Where to write, made if need be; a file that is there already is replaced whole.
        names: Keys of `FIGURES`; None = all that these scores have the numbers for.
        formats: `png` (300 dots per inch), `pdf`, `svg`.
        duplicates: Checkpoints that repeat another's weights, as `read_duplicates` gives them: hatched in heatmaps,
            left out of the others.
        distances: As `read_distances` gives them, for the figure `distances`.
        width: `page` (7 inches, panels side by side) or `column` (3.4 inches, panels one above the other).

    Returns:
        The pictures and, behind those of each figure, its CSV.

    Raises:
        InputError: If a name or format is unknown (names the known ones), the scores lack what a figure shows, or the
            folder cannot be written.
    """
    formats = list(formats)
    wanted = list(FIGURES if names is None else names)
    refuse_unknown("figure", wanted, FIGURES)
    if names is None and scores["revision"].n_unique() == 1:
        wanted = [name for name in wanted if FIGURES[name].of_one]
    refuse_unknown("format", formats, FORMATS)
    refuse_unknown("width", [width], WIDTHS)
    stored = Stored(scores, duplicates, distances)
    complete(scores)
    written: list[Path] = []
    for name in wanted:
        try:
            numbers = FIGURES[name].numbers(stored)
        except InputError:
            if names is None and name != "importance":
                continue  # there is nothing to show
            raise
        draw = partial(FIGURES[name].draw, stored, numbers, width)
        written += _written(Path(folder).expanduser(), name, formats, numbers, draw)
    return written


def draw_models(
    scores: pl.DataFrame, folder: str | Path, formats: Iterable[str] = ("png", "pdf"), width: Width = "page"
) -> list[Path]:
    """Draw several models side by side, with a CSV, as `draw_figures` does the figures of one.

    Args:
        scores: Scores of several models, as `plot_models` takes them.
        folder: Where to write.
        formats: `png`, `pdf`, `svg`.
        width: `page` or `column`.

    Returns:
        The pictures and their CSV.

    Raises:
        InputError: As `draw_figures`.
    """
    formats = list(formats)
    refuse_unknown("format", formats, FORMATS)
    refuse_unknown("width", [width], WIDTHS)
    draw = partial(plot_models_side_by_side, scores, width=width)
    return _written(Path(folder).expanduser(), MODELS, formats, model_values(scores), draw)


def draw_evaluations(
    evaluations: pl.DataFrame,
    folder: str | Path,
    names: Iterable[str] | None = None,
    formats: Iterable[str] = ("png", "pdf"),
    width: Width = "page",
) -> list[Path]:
    """Draw figures of evaluations into a folder, each with a CSV, as `draw_figures` does those of scores.

    Args:
        evaluations: As `read_evaluations` gives them; of several checkpoints, figures of one show the last.
        folder: Where to write, made if need be.
        names: Keys of `EVALUATION_FIGURES`; None = all that can be drawn.
        formats: `png`, `pdf`, `svg`.
        width: `page` or `column`.

    Returns:
        The pictures and, behind those of each figure, its CSV.

    Raises:
        InputError: As `draw_figures`; or what a figure shows was not measured (says how to).
    """
    formats = list(formats)
    wanted = list(EVALUATION_FIGURES if names is None else names)
    refuse_unknown("figure", wanted, EVALUATION_FIGURES)
    refuse_unknown("format", formats, FORMATS)
    refuse_unknown("width", [width], WIDTHS)
    written: list[Path] = []
    for name in wanted:
        kind = EVALUATION_FIGURES[name]
        rows = kind.rows(evaluations)
        draw = partial(kind.draw, rows, width)
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
            # Arranged once for all formats, as it is printed: that takes as long as drawing, and needs none.
            figure.set_dpi(STYLE["savefig.dpi"])
            if (engine := figure.get_layout_engine()) is not None:
                engine.execute(figure)
            figure.set_layout_engine("none")
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
