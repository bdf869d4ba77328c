"""Every figure, drawn from the frames in `figures/`, is the picture that was looked at.

`figures/*/NAME.png` are the pictures as wide as a page; after a change `python -m figures --redraw` draws them again.
As wide as a column they are in `tests/baseline`, small, drawn again by
`pytest tests/test_figure_images.py --mpl-generate-path=tests/baseline`. Look at them before you commit them.
"""

from functools import cache
from pathlib import Path

import polars as pl
import pytest
from matplotlib.testing.compare import compare_images

from redundancy_trace.figures import EVALUATION_FIGURES, FIGURES, Stored, plot_models_side_by_side
from redundancy_trace.figures.style import STYLE, paper_style

ROOT = Path(__file__).parent.parent
SETS = ("demo", "smollm2")
# Root mean square of the differences of 8-bit pixels. On another machine with the same matplotlib, which brings font
# and rasteriser along, it is 0 or rounding; a line in another colour is above.
TOLERANCE = 0.5
COLUMN_DPI = 100


@cache
def frames(name):
    """Scores, distances and evaluations that the figures of a set are drawn from."""
    return [
        pl.read_parquet(ROOT / "figures" / name / f"{part}.parquet") for part in ("scores", "distances", "evaluations")
    ]


def drawn(name, figure, width):
    """One figure of a set."""
    scores, distances, evaluations = frames(name)
    if figure in FIGURES:
        stored, kind = Stored(scores, None, distances), FIGURES[figure]
        return kind.draw(stored, kind.numbers(stored), width)
    if figure == "models":
        return plot_models_side_by_side(pl.concat([frames(one)[0] for one in SETS]), width=width)
    kind = EVALUATION_FIGURES[figure]
    return kind.draw(kind.rows(evaluations), width)


def names(name):
    return sorted(path.stem for path in (ROOT / "figures" / name).glob("*.png"))


def compared(name, figure, width, folder, file, dpi):
    style = ["default", {**STYLE, "savefig.dpi": dpi}]
    mark = pytest.mark.mpl_image_compare(
        baseline_dir=str(folder),
        filename=file,
        tolerance=TOLERANCE,
        style=style,
        backend="agg",
        savefig_kwargs={"dpi": dpi},
    )
    return pytest.param(name, figure, width, marks=mark, id=f"{name}-{figure}-{width}")


PAGES = [
    compared(name, figure, "page", ROOT / "figures" / name, f"{figure}.png", 300)
    for name in SETS
    for figure in names(name)
]
COLUMNS = [
    compared(name, figure, "column", ROOT / "tests" / "baseline", f"{name}-{figure}.png", COLUMN_DPI)
    for name, figure in [
        *(("demo", figure) for figure in names("demo") if figure not in ("joint", "loss")),
        ("smollm2", "calibrations"),
        ("demo", "models"),
    ]
]


@pytest.mark.parametrize(("name", "figure", "width"), [*PAGES, *COLUMNS])
def test_it_is_the_picture_that_was_looked_at(name, figure, width):
    return drawn(name, figure, width)


def test_every_figure_is_among_them():
    """But for `tradeoff`, which shows speeds, and those of several checkpoints where there is one."""
    assert {*FIGURES, *EVALUATION_FIGURES} - {"tradeoff"} == set(names("demo")) | set(names("smollm2"))
    assert {*FIGURES, *EVALUATION_FIGURES} - set(names("demo")) == {"calibrations", "tradeoff"}


def changed(kind):
    """One value, one colour or one word of a figure is another."""
    scores, distances, _ = frames("demo")
    if kind == "value":
        at = (pl.col("revision") == "checkpoint-8") & (pl.col("layer") == 3) & (pl.col("component") == "attn")
        scores = scores.with_columns(value=pl.when(at).then(pl.col("value") - 0.05).otherwise("value"))
    figure = FIGURES["importance"].draw(Stored(scores, None, distances), scores, "page")
    if kind == "word":
        figure.suptitle(figure.get_suptitle().replace("training", "time"))
    if kind == "colour":
        figure.axes[1].collections[0].set_cmap("viridis")
    return figure


@pytest.mark.parametrize("kind", [None, "value", "word", "colour"])
def test_what_differs_is_told_and_what_does_not_is_not(kind, tmp_path):
    """The comparison that the others rest on, at their tolerance."""
    with paper_style():
        changed(kind).savefig(tmp_path / "importance.png")
    told = compare_images(ROOT / "figures" / "demo" / "importance.png", tmp_path / "importance.png", TOLERANCE)
    assert (told is None) == (kind is None), told
