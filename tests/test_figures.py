import subprocess
import sys
import time

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
from fake_scores import PYTHIA_STEPS, fake_distances, fake_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, QuadMesh

from redundancy_trace.analysis import metric_values, training_axis
from redundancy_trace.errors import InputError
from redundancy_trace.figures import (
    draw_figures,
    plot_depth,
    plot_depths,
    plot_heatmap,
    plot_loss,
    plot_training_heatmaps,
)
from redundancy_trace.figures.style import REPEATED, beyond, colour_limits, layer_ticks, model_name, shortened
from redundancy_trace.figures.training import cell_bounds, mesh_columns, tick_label, training_scale, training_ticks
from redundancy_trace.metrics import IMPORTANCE, METRICS

WITH_HOLES = [step for step in range(0, 21000, 1000) if step not in (5000, 12000, 13000)]
FRAMES = {
    "pythia": lambda: fake_scores(PYTHIA_STEPS, n_layers=6),
    "twelve log-spaced": lambda: fake_scores([0, *(2**k for k in range(11))], n_layers=8),
    "linear with tokens": lambda: fake_scores(range(1000, 21000, 1000), tokens=[4_200_000 * k for k in range(1, 21)]),
    "one checkpoint": lambda: fake_scores([143000]),
    "two checkpoints": lambda: fake_scores([0, 143000]),
    "one layer": lambda: fake_scores([0, 1, 2], n_layers=1),
    "one layer beyond 0": lambda: fake_scores([0, 1, 2], n_layers=2),
    "one layer, one checkpoint": lambda: fake_scores([5], n_layers=1),
    "names": lambda: fake_scores([None] * 3, names=["kestrel", "a $dollar$ _name_", "x" * 60]),
    "holes and a final model": lambda: fake_scores(
        [*WITH_HOLES, None], names=[*(f"step{step}" for step in WITH_HOLES), "main"]
    ),
    "missing cells": lambda: fake_scores([0, 1, 2]).filter((pl.col("layer") != 2) | (pl.col("revision") != "step1")),
    "values that are null": lambda: fake_scores([0, 1]).with_columns(
        value=pl.when(pl.col("layer") != 1).then(pl.col("value"))
    ),
    "no loss, no errors": lambda: fake_scores([0, 1, 2], loss=False).with_columns(stderr=pl.lit(None, pl.Float64)),
    "exactly redundant": lambda: fake_scores([0, 1]).with_columns(
        value=pl.when(pl.col("metric") == "cosine_similarity").then(1.0).otherwise(pl.col("value"))
    ),
    "many layers": lambda: fake_scores(range(0, 50000, 1000), n_layers=80),
    "of no named model": lambda: fake_scores([0, 1, 2]).drop("model"),
}
frames = pytest.mark.parametrize("scores", [pytest.param(make(), id=name) for name, make in FRAMES.items()])


@pytest.fixture(autouse=True)
def _leaves_matplotlib_alone():
    before = dict(mpl.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before


def meshes(ax):
    return [part for part in ax.collections if isinstance(part, QuadMesh)]


def shown(ax, training="x"):
    """Cells of a heatmap as drawn, layer 0 first, shape (layers, columns); NaN = nothing."""
    parts = [np.ma.filled(mesh.get_array(), np.nan) for mesh in reversed(meshes(ax))]
    return np.concatenate([part if training == "x" else part.T for part in parts])


# --- the training axis ----------------------------------------------------------------------------------------------

increasing = st.lists(st.integers(0, 10**7), min_size=1, max_size=40, unique=True).map(sorted)


@given(increasing)
def test_cells_hold_their_checkpoint_and_never_overlap(positions):
    positions = np.array(positions, dtype=float)
    starts, ends = cell_bounds(positions)
    assert (starts < positions).all()
    assert (positions < ends).all()
    assert (ends[:-1] <= starts[1:] + 1e-6).all()


@given(st.integers(2, 60), st.integers(1, 10**6), st.integers(0, 10**6))
def test_evenly_spaced_cells_are_equal_and_touch(count, gap, first):
    positions = first + gap * np.arange(count, dtype=float)
    starts, ends = cell_bounds(positions)
    np.testing.assert_allclose(ends - starts, gap)
    np.testing.assert_allclose(ends[:-1], starts[1:])


@given(st.integers(7, 40), st.data())
def test_a_checkpoint_that_is_missing_leaves_a_hole_of_one_cell(count, data):
    missing = data.draw(st.integers(1, count - 2))
    positions = np.delete(np.arange(count, dtype=float), missing)
    starts, ends = cell_bounds(positions)
    np.testing.assert_allclose(ends - starts, 1)
    gaps = starts[1:] - ends[:-1]
    np.testing.assert_allclose(gaps.sum(), 1)
    np.testing.assert_allclose(gaps[missing - 1], 1)


@settings(deadline=None, max_examples=30)
@given(increasing, st.booleans())
def test_drawn_edges_grow_and_every_checkpoint_lies_in_its_column(steps, final):
    names = [f"step{step}" for step in steps]
    scores = fake_scores([*steps, None] if final else steps, n_layers=1, names=[*names, "main"] if final else names)
    scale = training_scale(training_axis(scores))
    edges, columns = mesh_columns(scale)
    assert (np.diff(edges) > 0).all()
    assert [k for k in columns if k is not None] == list(range(len(names) + final))
    for column, k in enumerate(columns):
        if k is not None:
            assert edges[column] <= scale.values[k] <= edges[column + 1]


def test_zero_stands_one_gap_left_of_the_smallest_on_a_log_axis():
    ax = plot_loss(fake_scores([0, 1, 2, 4, 8, 16, 32]))
    places = ax.transData.transform([(x, 0.0) for x in (0, 1, 2, 4, 32)])[:, 0]
    np.testing.assert_allclose(np.diff(places)[:3], np.diff(places)[0])
    np.testing.assert_allclose(places[4] - places[3], 3 * np.diff(places)[0])


def test_log_cells_end_at_geometric_means():
    scale = training_scale(training_axis(fake_scores([1, 10, 100, 1000])))
    np.testing.assert_allclose(scale.ends[:-1], 10 ** np.array([0.5, 1.5, 2.5]))
    np.testing.assert_allclose(scale.starts[0], 10**-0.5)


@frames
def test_ticks_are_few_within_range_and_do_not_touch(scores):
    figure = plot_training_heatmaps(scores)
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    scale = training_scale(training_axis(scores))
    for ax in figure.axes:
        for side in (ax.xaxis, ax.yaxis):
            ticks = [tick for tick in side.get_major_ticks() if tick.label1.get_visible() and tick.label1.get_text()]
            assert len(ticks) <= 9
            boxes = [tick.label1.get_window_extent(renderer) for tick in ticks]
            if all(tick.label1.get_rotation() % 90 == 0 for tick in ticks):
                assert sum(a.overlaps(b) for a in boxes for b in boxes) == len(boxes)
    ticks = figure.axes[0].xaxis.get_majorticklocs()
    assert 1 <= len(ticks) <= 8
    assert scale.starts[0] <= min(ticks)
    assert max(ticks) <= scale.ends[-1]


def test_ticks_name_what_has_no_number():
    scale = training_scale(training_axis(FRAMES["holes and a final model"]()))
    labels = [tick_label(scale, tick) for tick in training_ticks(scale, 6)]
    assert labels == ["0", "5k", "10k", "15k", "20k", "main"]


@pytest.mark.parametrize("draw", [plot_training_heatmaps, plot_heatmap, plot_loss])
def test_a_final_model_leaves_room_for_powers_of_ten(draw):
    steps = [*PYTHIA_STEPS[:11], 2000, 8000, 32000, 143000]
    names = [*(f"step{step}" for step in steps), "main"]
    drawn = draw(fake_scores([*steps, None], names=names, n_layers=12))
    figure = drawn.get_figure(root=True)
    FigureCanvasAgg(figure).draw()
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert labels[0] == "0"
    assert labels[-1] == "main"
    powers = [label for label in labels if label in ("1", "10", "100", "1k", "10k", "100k")]
    assert len(powers) == len(labels) - 2 >= 2
    exponents = [("1", "10", "100", "1k", "10k", "100k").index(label) for label in powers]
    assert len(set(np.diff(exponents))) == 1 or len(exponents) == 2


# --- heatmaps -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=9, unique=True),
    st.integers(1, 6),
    st.sampled_from(["attn", "mlp", "block"]),
    st.sampled_from(["importance", "cosine_similarity", "relative_norm"]),
    st.sampled_from(["x", "y"]),
    st.randoms(),
)
def test_cells_are_the_values_of_the_frame_in_order(steps, n_layers, component, metric, training, random):
    scores = fake_scores(steps, n_layers, loss=False)
    kept = scores.filter(pl.Series([random.random() > 0.1 for _ in range(scores.height)]) | (pl.col("layer") == 0))
    if (kept["layer"] == n_layers - 1).sum() == 0 or kept.filter(pl.col("component") == component).is_empty():
        kept = scores
    ax = plot_heatmap(kept, component=component, metric=metric, training=training)
    scale = training_scale(training_axis(kept))
    _, columns = mesh_columns(scale)
    cells = shown(ax, training)
    values = {
        (row["order"], row["layer"]): row["value"]
        for row in metric_values(kept, metric, component).iter_rows(named=True)
    }
    for layer in range(cells.shape[0]):
        for column, k in enumerate(columns):
            expected = values.get((k, layer), np.nan)
            np.testing.assert_equal(cells[layer, column], expected)


def test_the_three_panels_share_one_scale_and_layer_0_has_another():
    figure = plot_training_heatmaps(fake_scores([0, 1, 2, 4, 8]))
    panels = [ax for ax in figure.axes if meshes(ax) and ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["Attention", "MLP", "Block"]
    limits = [[mesh.get_clim() for mesh in meshes(ax)] for ax in panels]
    assert limits[0] == limits[1] == limits[2]
    body, first = limits[0]
    assert body[0] == first[0] == 0
    assert first[1] > 0.5 > body[1]
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert "importance 1 − cos(X, Y)\nlayers 1–3" in labels
    assert "layer 0" in labels
    assert figure.get_suptitle() == "org/model: importance over training"


def test_titles_of_one_checkpoint_name_it():
    one = fake_scores([143000])
    assert plot_training_heatmaps(one).get_suptitle() == "org/model: importance at step143000"
    assert plot_depths(one).get_suptitle() == "org/model: cosine similarity over depth at step143000"
    assert plot_loss(one).get_title() == "org/model: loss at step143000"
    named = fake_scores([7], names=["model"], model="model")
    assert plot_training_heatmaps(named).get_suptitle() == "model: importance", "a name is told once"
    assert plot_loss(fake_scores([0, 1])).get_title() == "org/model: loss over training"


def test_light_is_redundant_for_every_metric_that_has_a_redundant_value():
    for metric in ("importance", "cosine_similarity", "relative_norm"):
        mesh = meshes(plot_heatmap(fake_scores([0, 1]), metric=metric))[0]
        near, far = mesh.norm.vmin, mesh.norm.vmax
        if METRICS[metric].redundant == METRICS[metric].high:
            near, far = far, near
        assert sum(mesh.to_rgba(near)[:3]) > 2.4
        assert sum(mesh.to_rgba(far)[:3]) < 0.6


def test_an_outlier_does_not_wash_the_rest_out_and_the_bar_says_so():
    scores = fake_scores([0, *(2**k for k in range(9))], n_layers=8).with_columns(
        value=pl.when((pl.col("layer") == 7) & (pl.col("revision") == "step0") & (pl.col("component") == "attn"))
        .then(-0.37)
        .otherwise(pl.col("value"))
    )
    figure = plot_training_heatmaps(scores)
    assert meshes(figure.axes[0])[0].get_clim()[1] < 0.4
    assert any("(arrow: to 1.4)" in ax.get_ylabel() for ax in figure.axes)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=200))
def test_limits_hold_all_or_all_but_a_twentieth(values):
    values = np.array(values)
    low, high = colour_limits(values, IMPORTANCE)
    assert low == 0 < high
    assert (values <= high).mean() >= 0.95 - 1 / len(values)
    assert beyond(values, (low, high)) == ("max" if values.max() > high else "neither")


def test_limits_can_be_given():
    ax = plot_heatmap(fake_scores([0, 1]), limits=(0.0, 0.3), first_layer_limits=(0.0, 1.0))
    assert [mesh.get_clim() for mesh in meshes(ax)] == [(0.0, 0.3), (0.0, 1.0)]


def test_what_was_not_scored_is_hatched_and_said():
    assert "hatched" not in plot_heatmap(FRAMES["pythia"]()).get_xlabel()
    assert plot_heatmap(FRAMES["missing cells"]()).get_xlabel() == "optimizer steps (hatched: not scored)"
    missing = (pl.col("component") == "attn") & (pl.col("layer") == 2) & (pl.col("revision") == "step1")
    figure = plot_training_heatmaps(fake_scores([0, 1, 2]).filter(~missing))
    assert figure.get_supxlabel() == "optimizer steps (hatched: not scored)"
    ax = plot_heatmap(FRAMES["holes and a final model"]())
    assert "hatched: not scored" in ax.get_xlabel()
    assert np.isnan(shown(ax)).all(axis=0).sum() == 3  # two holes, and the gap before the final model


def repeats(steps):
    """What `read_duplicates` gives, of checkpoints at these steps."""
    rows = [(f"step{step}", None, step, "main", False) for step in steps]
    schema = {"revision": pl.String, "commit": pl.String, "step": pl.Int64, "duplicate_of": pl.String, "partial": bool}
    return pl.DataFrame(rows, schema=schema, orient="row")


def hatched(ax):
    """Start and end along x of each stretch that is drawn as repeating other weights."""
    patches = [part for part in ax.patches if part.get_hatch() == REPEATED["hatch"]]
    return [(part.get_x(), part.get_x() + part.get_width()) for part in patches]


def test_what_repeats_other_weights_is_hatched_in_its_place_scored_or_not(tmp_path):
    scores = fake_scores([0, 1000, 2000, 3000, 5000, 6000])
    duplicates = repeats([2000, 4000])
    ax = plot_heatmap(scores, component="mlp", duplicates=duplicates)
    assert hatched(ax) == [(1500, 2500), (3500, 4500)]
    assert ax.get_xlabel() == "optimizer steps", "nothing is missing"
    (legend,) = ax.get_figure(root=True).legends
    assert [text.get_text() for text in legend.get_texts()] == ["repeats other weights"]
    assert np.isnan(shown(ax)).all(axis=0).tolist() == [False, False, True, False, True, False, False]
    draw_figures(scores, tmp_path, ["importance", "loss", "similarity-depth"], ["png"], duplicates=duplicates)
    table = pl.read_csv(tmp_path / "importance.csv").filter((pl.col("component") == "mlp") & (pl.col("layer") == 1))
    assert table["step"].to_list() == [0, 1000, 2000, 3000, 4000, 5000, 6000]
    assert table["duplicate_of"].to_list() == [None, None, "main", None, "main", None, None]
    assert table["partial"].to_list() == [None, None, False, None, False, None, None]
    assert table["value"].is_null().to_list() == [False, False, True, False, True, False, False]
    assert 2000 not in pl.read_csv(tmp_path / "loss.csv")["step"].to_list()
    assert 2000 not in pl.read_csv(tmp_path / "similarity-depth.csv")["step"].to_list()


def test_neighbours_that_repeat_other_weights_are_one_stretch():
    scores = fake_scores([0, 1000, 5000, 6000, 8000, 9000])
    ax = plot_heatmap(scores, duplicates=repeats([2000, 3000, 4000]))
    assert hatched(ax) == [(1500, 4500)]
    assert "hatched: not scored" in ax.get_xlabel(), "step 7000 is"
    across = plot_heatmap(scores, duplicates=repeats([2000, 3000, 4000]), training="y")
    (patch,) = [part for part in across.patches if part.get_hatch() == REPEATED["hatch"]]
    assert (patch.get_y(), patch.get_height()) == (1500, 3000)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=20, unique=True), st.data())
def test_stretches_cover_what_repeats_and_nothing_that_is_shown(steps, data):
    left_out = data.draw(st.lists(st.sampled_from(steps), max_size=len(steps) - 1, unique=True))
    scores = fake_scores([0, *steps], n_layers=2, loss=False)
    duplicates = repeats(left_out)
    scale = training_scale(training_axis(scores))
    found = hatched(plot_heatmap(scores.filter(~pl.col("step").is_in(left_out)), duplicates=duplicates))
    assert len(found) <= len(left_out)
    for name, value in zip(scale.axis.revisions, scale.values, strict=True):
        inside = [low for low, high in found if low < value < high]
        assert len(inside) == (name in duplicates["revision"].to_list())


def test_the_legend_of_axes_of_ones_own_is_theirs_and_stands_beside_the_title():
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    plot_heatmap(fake_scores([0, 1000, 3000, 4000]), ax=axes[0], duplicates=repeats([2000]))
    plot_heatmap(fake_scores([0, 1000, 3000, 4000]), ax=axes[1])
    figure.canvas.draw()
    assert axes[0].get_legend() is not None
    assert axes[1].get_legend() is None
    assert axes[0].get_title(loc="left") == "Attention"
    title = axes[0]._left_title.get_window_extent()
    assert not title.overlaps(axes[0].get_legend().get_window_extent())
    plt.close(figure)
    panels = plot_training_heatmaps(fake_scores([0, 1000, 3000, 4000]), duplicates=repeats([2000]))
    FigureCanvasAgg(panels).draw()
    (legend,) = panels.legends
    assert not panels._suptitle.get_window_extent().overlaps(legend.get_window_extent())
    assert [len(hatched(ax)) for ax in panels.axes[:3]] == [1, 1, 1]
    assert not plot_training_heatmaps(fake_scores([0, 1000]), duplicates=repeats([])).legends


def test_duplicates_alone_are_shown_all_the_same():
    scores = fake_scores([1000, 2000])
    ax = plot_heatmap(scores, duplicates=repeats([1000, 2000]))
    body = next(c for c in ax.collections if isinstance(c, QuadMesh))
    assert not np.ma.getmaskarray(body.get_array()).any()


def test_axes_in_axes_out():
    figure, axes = plt.subplots(1, 3)
    scores = fake_scores([0, 1, 2, 4])
    assert plot_heatmap(scores, component="mlp", ax=axes[0], colorbar=False) is axes[0]
    assert plot_depth(scores, ax=axes[1], colorbar=False) is axes[1]
    assert plot_loss(scores, ax=axes[2]) is axes[2]
    assert figure.axes == list(axes)
    figure.canvas.draw()
    plt.close(figure)


@pytest.mark.parametrize("layout", ["constrained", "tight", None])
def test_in_axes_of_ones_own_nothing_lies_on_the_picture(layout):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout=layout)
    scores = fake_scores(PYTHIA_STEPS[:14], n_layers=12)
    plot_heatmap(scores, ax=axes[0])
    plot_depth(scores, ax=axes[1])
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [ax.get_window_extent(renderer) for ax in figure.axes]
    assert len(boxes) == 5, "two pictures, two bars of the heatmap and one of the curves"
    assert sum(a.overlaps(b) for a in boxes for b in boxes) == len(boxes)
    for ax in figure.axes[2:]:  # what names a bar lies on none of the pictures
        words = [ax.yaxis.label, *(tick.label2 for tick in ax.yaxis.get_major_ticks())]
        extents = [word.get_window_extent(renderer) for word in words if word.get_text()]
        assert not any(extent.overlaps(box) for extent in extents for box in boxes)
    assert boxes[0].width > 0.5 * figure.bbox.width / 3
    plt.close(figure)


def test_axes_placed_by_hand_have_their_bars():
    figure = plt.figure()
    ax = plot_heatmap(fake_scores([0, 1, 2]), ax=figure.add_axes((0.1, 0.1, 0.8, 0.8)))
    figure.canvas.draw()
    boxes = [one.get_window_extent() for one in figure.axes]
    assert ax is figure.axes[0]
    assert sum(a.overlaps(b) for a in boxes for b in boxes) == len(boxes) == 3
    plt.close(figure)


@pytest.mark.parametrize(
    ("draw", "inches"), [(plot_heatmap, 3.4), (plot_depth, 3.4), (plot_loss, 3.4), (plot_training_heatmaps, 7.0)]
)
def test_what_is_drawn_shows_itself_in_a_notebook(draw, inches):
    drawn = draw(fake_scores([0, 1, 2]))
    png, size = drawn._repr_png_()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert size["width"] == round(100 * inches)
    pixels = [int.from_bytes(png[at : at + 4]) for at in (16, 20)]
    assert pixels == [2 * size["width"], 2 * size["height"]], "sharp on a screen of twice the density"


def test_unknown_metrics_and_components_are_refused():
    scores = fake_scores([0])
    with pytest.raises(InputError, match=r"'loss' is no metric of layers\. Those are: cosine_similarity"):
        plot_heatmap(scores, metric="loss")
    with pytest.raises(InputError, match="no importance of component 'head'"):
        plot_heatmap(scores, component="head")
    with pytest.raises(InputError, match="no metric 'angular_distance'"):
        plot_depths(scores, metric="angular_distance")
    with pytest.raises(InputError, match="no metric 'loss' in these scores"):
        plot_loss(fake_scores([0], loss=False))


# --- curves ---------------------------------------------------------------------------------------------------------


def test_depth_has_one_line_a_checkpoint_with_its_values():
    scores = fake_scores([0, 1, 2], n_layers=5)
    ax = plot_depth(scores, component="block")
    (lines,) = [part for part in ax.collections if isinstance(part, LineCollection)]
    values = metric_values(scores, "cosine_similarity", "block")["value"].to_numpy().reshape(3, 5)
    for segment, expected in zip(lines.get_segments(), values, strict=True):
        np.testing.assert_array_equal(segment[:, 1], expected)
    assert (np.diff([sum(colour[:3]) for colour in lines.get_colors()]) < 0).all()  # early is light, late is dark


def test_depth_panels_share_an_axis_that_holds_all_values():
    scores = fake_scores([0, 1, 2], n_layers=5)
    figure = plot_depths(scores)
    low, high = figure.axes[0].get_ylim()
    values = metric_values(scores, "cosine_similarity")["value"]
    assert all(ax.get_ylim() == (low, high) for ax in figure.axes[:3])
    assert low < values.min()
    assert values.max() < high
    assert "log axis of distance from 1" in figure.axes[0].get_ylabel()


def test_loss_line_shows_the_values_and_stops_before_what_has_no_step():
    scores = FRAMES["holes and a final model"]()
    ax = plot_loss(scores)
    values = metric_values(scores, "loss")["value"].to_numpy()
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), values[:-1])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), WITH_HOLES)


# --- files ----------------------------------------------------------------------------------------------------------


@frames
def test_every_frame_can_be_drawn(scores, tmp_path):
    with_loss = "loss" in scores["metric"].to_list()
    names = ["importance", "similarity-depth", *(["loss"] if with_loss else [])]
    paths = draw_figures(scores, tmp_path, names, formats=["png"])
    assert [path.name for path in paths] == [f"{name}.{form}" for name in names for form in ("png", "csv")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_the_csv_holds_exactly_what_is_shown(tmp_path):
    scores = FRAMES["holes and a final model"]()
    written = draw_figures(scores, str(tmp_path), ["importance", "similarity-depth", "loss"], formats=["png"])
    assert all(path.parent == tmp_path for path in written)
    for name, metric in (("importance", "importance"), ("similarity-depth", "cosine_similarity"), ("loss", "loss")):
        table = pl.read_csv(tmp_path / f"{name}.csv", infer_schema_length=None)
        values = metric_values(scores, metric)
        np.testing.assert_array_equal(table["value"], values["value"])
        np.testing.assert_array_equal(table["stderr"], values["stderr"])
        for column in ("revision", "component", "layer"):
            assert table[column].cast(pl.String).to_list() == values[column].cast(pl.String).to_list()
        assert table["position"].unique(maintain_order=True).to_list() == [*WITH_HOLES, None]
        assert table["position_of"].unique().to_list() == ["step"]
    cells = shown(plot_heatmap(scores, component="mlp"))
    table = pl.read_csv(tmp_path / "importance.csv", infer_schema_length=None).filter(pl.col("component") == "mlp")
    np.testing.assert_array_equal(cells.T[~np.isnan(cells.T)], table["value"])


def test_redrawing_gives_the_same_bytes(tmp_path):
    scores, options = fake_scores([0, 1, 2, 4]), {"names": ["importance", "loss"], "formats": ["png", "pdf", "svg"]}
    first = draw_figures(scores, tmp_path / "a", **options)
    time.sleep(1.1)  # a date of creation has a resolution of seconds
    with mpl.rc_context({"font.size": 20, "figure.facecolor": "red", "pdf.fonttype": 3}):
        again = draw_figures(scores, tmp_path / "b", **options)
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_pdf_fonts_are_type_42(tmp_path):
    draw_figures(fake_scores([0, 1, 2]), tmp_path, names=["importance"], formats=["pdf"])
    content = (tmp_path / "importance.pdf").read_bytes()
    assert b"/FontFile2" in content
    assert b"/Subtype /Type3" not in content
    assert b"/CreationDate" not in content


def test_a_figure_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    scores = fake_scores([0, 1])
    (path, table) = draw_figures(scores, tmp_path, names=["loss"], formats=["png"])
    before = path.read_bytes()

    def full(_figure, to, **_options):
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(InputError, match=r"cannot be written to .*: No space left on device\. Name a folder"):
        draw_figures(scores, tmp_path, names=["loss"], formats=["png"])
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted([path, table])


def test_unknown_figures_and_formats_are_told_with_the_known(tmp_path):
    scores = fake_scores([0], loss=False)
    with pytest.raises(InputError, match=r"no figure 'importanc'\. Known: importance, similarity-depth, .* Did"):
        draw_figures(scores, tmp_path / "out", names=["importanc"])
    with pytest.raises(InputError, match=r"no format 'jpg'\. Known: png, pdf, svg\."):
        draw_figures(scores, tmp_path / "out", formats=["jpg"])
    with pytest.raises(InputError, match="no metric 'loss'"):
        draw_figures(scores, tmp_path / "out", names=["loss"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Figures cannot be written to .*file"):
        draw_figures(scores, tmp_path / "file")


def test_drawing_needs_no_torch(tmp_path):
    fake_scores([0, 1, 2]).write_parquet(tmp_path / "scores.parquet")
    # A loader that fails: scipy, which seaborn loads, takes sys.modules["torch"] = None for a torch that is there.
    code = (
        "import sys\n"
        "from importlib.machinery import ModuleSpec\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'transformers', 'huggingface_hub'): return ModuleSpec(name, self)\n"
        "    def create_module(self, spec): raise ImportError(spec.name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import polars as pl\nfrom pathlib import Path\n"
        "from redundancy_trace.figures import draw_figures\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "print(len(draw_figures(pl.read_parquet(folder / 'scores.parquet'), folder, formats=['svg'])))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "16"), done.stderr


@pytest.mark.slow
def test_a_long_run_of_a_deep_model(tmp_path):
    scores = fake_scores(range(0, 558000, 1000), n_layers=32)
    last = fake_distances([556000, 557000], n_layers=32)
    start = time.perf_counter()
    draw_figures(scores, tmp_path, distances=last)
    print(f"558 checkpoints x 32 layers x 3 components: {time.perf_counter() - start:.1f} s")


# --- texts ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200))
def test_layer_ticks_are_few_and_name_the_last(n_layers):
    ticks = layer_ticks(1, n_layers)
    assert ticks == sorted(set(ticks))
    assert ticks[-1] == n_layers
    assert len(ticks) <= 9


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
        ("/home/me/runs/tiny", "tiny"),
        ("./tiny/", "tiny"),
        ("gpt2", "gpt2"),
        ("a/b$c", r"a/b\$c"),
        (None, ""),
    ],
)
def test_titles_name_the_model(model, name):
    assert model_name(fake_scores([0], model=model)) == name


@given(st.text(max_size=60), st.integers(5, 30))
def test_shortened_texts_keep_both_ends(text, length):
    short = shortened(text, length)
    assert len(short) <= length
    if len(text) > length:
        assert short.startswith(text[:2])
        assert short.endswith(text[-2:])
