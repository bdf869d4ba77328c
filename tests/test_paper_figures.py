"""The figures of orders, agreement, calibrations, distances and decomposition show what the frames and CSVs hold."""

import time

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from fake_scores import fake_distances, fake_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from made_scores import ranked, scores_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_rgba

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.cli import plotting
from redundancy_trace.errors import InputError
from redundancy_trace.figures import EVALUATION_FIGURES, FIGURES, draw_figures, draw_models
from redundancy_trace.figures.decomposition import importance_of
from redundancy_trace.figures.orders import DROPPED, RETAINED
from redundancy_trace.figures.style import COMPONENT_COLOURS

STEPS = (0, 1, 2, 4, 8, 16)
NEW = tuple(name for name in FIGURES if name not in ("importance", "similarity-depth", "loss"))


@pytest.fixture(scope="module")
def scores():
    both = [fake_scores(STEPS, 6, update_cosine=True, seed=k, calibration=f"text{k} 8x32") for k in range(2)]
    return pl.concat(both)


@pytest.fixture(autouse=True)
def _leaves_matplotlib_alone():
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


def mesh_of(ax):
    (mesh,) = [part for part in ax.collections if isinstance(part, QuadMesh)]
    return np.ma.filled(mesh.get_array().astype(float), np.nan)


def panels(figure):
    return {ax.get_title(): ax for ax in figure.axes if ax.get_title()}


# --- dropping orders ------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.permutations(range(6)))
def test_the_n_least_important_modules_are_red_in_row_n(order):
    made = scores_of({"attn": [ranked([], 6), ranked(order, 6)]}, [1, 2])
    cells = mesh_of(rt.plot_drop_order(made))
    assert cells.shape == (7, 6)
    for dropped in range(7):
        assert set(np.flatnonzero(cells[dropped])) == set(order[:dropped])
    np.testing.assert_array_equal(
        mesh_of(rt.plot_drop_order(made, revision="step1")), np.arange(7)[:, None] > np.arange(6)
    )


def test_yellow_is_retained_and_red_is_dropped():
    ax = rt.plot_drop_order(fake_scores([0, 1]))
    (mesh,) = ax.collections
    assert mesh.to_rgba(0.0) == to_rgba(RETAINED)
    assert mesh.to_rgba(1.0) == to_rgba(DROPPED)
    (legend,) = ax.get_figure(root=True).legends
    assert [text.get_text() for text in legend.get_texts()] == ["retained", "dropped"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("module index", "modules dropped")
    assert ax.get_title() == "org/model: Attention at step1"


@pytest.mark.parametrize(("width", "shape"), [("page", (3, 6)), ("column", (4, 3))])
def test_orders_over_training_stand_side_by_side(scores, width, shape):
    figure = rt.plot_drop_orders_over_training(scores, width=width)
    assert len(figure.axes) == shape[0] * shape[1]
    named = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert named == (["0", "1", "2", "4", "8", "16"] if width == "page" else ["Attention", "MLP", "Block"])
    last = figure.axes[shape[1] - 1] if width == "page" else figure.axes[-shape[1]]
    np.testing.assert_array_equal(mesh_of(last), mesh_of(rt.plot_drop_order(scores, component="attn")))


# --- agreement ------------------------------------------------------------------------------------------------------


def test_the_matrix_is_that_of_rank_agreement(scores):
    for coefficient in ("spearman", "weighted_tau"):
        matrix = mesh_of(rt.plot_agreement(scores, component="mlp", coefficient=coefficient))
        pairs = rt.rank_agreement(scores, component="mlp")
        place = {f"step{step}": k for k, step in enumerate(STEPS)}
        for one, other, value in pairs.select("revision", "other_revision", coefficient).rows():
            assert matrix[place[one], place[other]] == matrix[place[other], place[one]] == value
        np.testing.assert_array_equal(np.diagonal(matrix), 1)
    figure = rt.plot_agreements(scores)
    assert [*panels(figure)] == ["Attention", "MLP", "Block"]
    meshes = [ax.collections[0] for ax in panels(figure).values()]
    assert len({mesh.get_clim() for mesh in meshes}) == 1
    assert sum(meshes[0].to_rgba(1.0)[:3]) > 2.4, "light = the same order"


def test_of_very_many_checkpoints_the_ends_and_some_between_are_in_the_matrix():
    made = fake_scores(range(250), 2, loss=False).filter(pl.col("metric") == "cosine_similarity")
    ax = rt.plot_agreement(made)
    assert mesh_of(ax).shape[0] <= 400
    assert ax.get_xlim()[0] <= 0
    assert ax.get_xlim()[1] >= 249


def test_overlap_shows_every_k_with_chance(scores):
    ax = rt.plot_overlap(scores, component="block")
    values = rt.topk_overlap(scores, component="block")
    (lines,) = [part for part in ax.collections if isinstance(part, LineCollection)]
    drawn = lines.get_segments()[::-1]  # early ones are drawn last
    assert len(drawn) == len(STEPS) - 1
    for order, line in enumerate(drawn):
        rows = values.filter(order=order)
        np.testing.assert_array_equal(line, np.column_stack((rows["k"], rows["overlap"])))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), values.filter(order=0)["chance"])
    (legend,) = ax.get_figure(root=True).legends
    assert [text.get_text() for text in legend.get_texts()] == ["by chance", "reach of 95 of 100 random sets"]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == values.filter(order=0)["chance_high"].max()


# --- trends, several models -----------------------------------------------------------------------------------------


def test_trends_are_the_means_with_their_intervals(scores):
    ax = rt.plot_trends(scores)
    found = rt.checkpoint_statistics(scores).filter(statistic="importance_inner")
    for line, component in zip(ax.lines, ("attn", "mlp", "block"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), found.filter(component=component)["value"])
        np.testing.assert_allclose(line.get_xdata(), STEPS)
        assert line.get_color() == COMPONENT_COLOURS[component]
    assert len(ax.collections) == 3
    assert "without the first and last layer" in ax.get_ylabel()
    assert "all layers" in rt.plot_trends(fake_scores([0, 1], 2)).get_ylabel()


def test_several_models_share_relative_depth(tmp_path):
    sizes = {"org/large": 9, "org/small": 3}
    parts = [fake_scores([0, 7], n_layers, model=name) for name, n_layers in sizes.items()]
    ax = rt.plot_models(pl.concat(parts), component="mlp")
    small, large = ax.lines
    assert small.get_xdata().tolist() == [0, 0.5, 1]
    assert large.get_xdata().tolist() == (np.arange(9) / 8).tolist()
    values = parts[0].filter(pl.col("revision") == "step7", metric="cosine_similarity", component="mlp")
    np.testing.assert_allclose(large.get_ydata(), 1 - values["value"].to_numpy())
    assert [line.get_label() for line in ax.lines] == ["org/small at step7", "org/large at step7"]
    assert ax.get_yscale() == "log"
    written = draw_models(pl.concat(parts), tmp_path, formats=["svg"])
    assert [path.name for path in written] == ["models.svg", "models.csv"]
    table = pl.read_csv(tmp_path / "models.csv").filter(component="mlp", model="org/large")
    np.testing.assert_allclose(table["importance"], large.get_ydata())


# --- calibrations ---------------------------------------------------------------------------------------------------


def test_every_calibration_is_a_row_in_the_order_of_the_frame(scores):
    figure = rt.plot_calibrations(scores)
    ax = panels(figure)["MLP"]
    FigureCanvasAgg(figure).draw()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["text1 8x32", "text0 8x32"]
    assert figure.get_suptitle() == "org/model: importance by calibration at step16"
    body, first = [part.get_array() for part in ax.collections if isinstance(part, QuadMesh)]
    for row, name in enumerate(("text1 8x32", "text0 8x32")):
        own = scores.filter(
            pl.col("revision") == "step16", calibration=name, metric="cosine_similarity", component="mlp"
        ).sort("layer")
        np.testing.assert_array_equal(np.r_[first[row], body[row]], 1 - own["value"].to_numpy())
    one = rt.plot_calibration(scores, component="mlp")
    assert one.get_title() == "org/model: MLP at step16"
    for drawn, part in zip(
        [part for part in one.collections if isinstance(part, QuadMesh)], (body, first), strict=True
    ):
        np.testing.assert_array_equal(drawn.get_array(), part)
    with pytest.raises(InputError, match=r"no importance of component 'head' in these scores\. There are: attn"):
        rt.plot_calibration(scores, component="head")
    with pytest.raises(InputError, match="no scores of 'step5'"):
        rt.plot_calibrations(scores, revision="step5")
    apart = pl.concat([fake_scores([1], calibration="a"), fake_scores([2], calibration="b")])
    with pytest.raises(InputError, match="on all calibrations: a, b"):
        rt.plot_calibrations(apart)


# --- distances, decomposition ---------------------------------------------------------------------------------------


def test_the_triangle_has_blocks_by_first_layer_and_size():
    distances = fake_distances([0, 8], 5)
    ax = rt.plot_distances(distances)
    cells = mesh_of(ax)
    rows = distances.filter(pl.col("revision") == "step8", metric="angular_distance")
    for layer, to, value in rows.select("layer", "to_layer", "value").rows():
        assert cells[to - layer - 1, layer] == value
    assert np.isnan(cells).sum() == 25 - 15
    (dots,) = ax.lines
    assert dict(zip(dots.get_ydata(), dots.get_xdata(), strict=True)) == {n: 5 - n for n in range(1, 6)}
    assert [*panels(rt.plot_distances_over_training(fake_distances([0, 1, 2, 4, 8])))] == ["step0", "step2", "step8"]
    with pytest.raises(InputError, match="no block distances of 'step3'"):
        rt.plot_distances(distances, revision="step3")
    with pytest.raises(InputError, match="no metric of block distances"):
        rt.plot_distances(distances, metric="loss")


@given(st.integers(0, 2**32 - 1))
def test_lines_of_equal_importance_are_one_minus_the_cosine(seed):
    rng = np.random.default_rng(seed)
    x, update = rng.normal(size=(2, 8))
    y = x + update
    norm = np.linalg.norm(update) / np.linalg.norm(x)
    cosine = update @ x / np.linalg.norm(update) / np.linalg.norm(x)
    expected = 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert importance_of(np.array([norm]), np.array([cosine]))[0] == pytest.approx(expected, abs=1e-9)


def test_every_layer_is_a_point_of_size_and_direction(scores):
    ax = rt.plot_decomposition(scores, component="block")
    rows = scores.filter(pl.col("revision") == "step16", calibration="text0 8x32", component="block").sort("layer")
    line = ax.lines[-1]
    np.testing.assert_array_equal(line.get_xdata(), rows.filter(metric="relative_norm")["value"])
    np.testing.assert_array_equal(line.get_ydata(), rows.filter(metric="update_cosine")["value"])
    assert [text.get_text() for text in ax.texts][-2:] == ["0", "5"]


# --- files and the command ------------------------------------------------------------------------------------------


def test_a_long_name_ends_within_the_column():
    made = fake_scores(
        STEPS, 6, model="organisation/model-with-a-long-name-7b", names=["x" * 30 + str(k) for k in STEPS]
    )
    for ax in (rt.plot_drop_order(made), rt.plot_agreement(made), rt.plot_overlap(made), rt.plot_heatmap(made)):
        figure = ax.get_figure(root=True)
        FigureCanvasAgg(figure).draw()
        assert figure.bbox.x0 <= ax.title.get_window_extent().x0
        assert ax.title.get_window_extent().x1 <= figure.bbox.x1
        assert ax.get_title().replace("\n", " ").startswith("organisation/model-with-a-long-name-7b: Attention")


@pytest.mark.parametrize("width", ["page", "column"])
def test_all_are_drawn_with_their_numbers(scores, tmp_path, width):
    distances = fake_distances(STEPS, 6, calibration="text0 8x32")
    paths = draw_figures(scores, tmp_path, NEW, ["png"], distances=distances, width=width)
    assert [path.name for path in paths] == [f"{name}.{form}" for name in NEW for form in ("png", "csv")]
    for name in NEW:
        assert not pl.read_csv(tmp_path / f"{name}.csv", infer_schema_length=None).is_empty()
        pixels = int.from_bytes((tmp_path / f"{name}.png").read_bytes()[16:20])
        assert pixels == round(300 * (7.0 if width == "page" else 3.4))
    assert pl.read_csv(tmp_path / "overlap.csv").filter(component="attn")["overlap"].to_list() == (
        rt.topk_overlap(scores)["overlap"].to_list()
    )
    order = pl.read_csv(tmp_path / "order.csv").filter(component="attn")
    assert order.sort("place")["importance"].is_sorted()


def test_what_cannot_be_drawn_is_left_out_of_all_and_told_where_asked(tmp_path):
    one = fake_scores([5], 4)
    names = {path.stem for path in draw_figures(one, tmp_path, formats=["svg"])}
    assert names == {"importance", "similarity-depth", "order"}, "a curve of one point shows nothing"
    for name, words in (
        ("agreement", "two checkpoints or more"),
        ("overlap", "two checkpoints or more"),
        ("order-training", "--figure order"),
        ("calibrations", "Add another"),
        ("distances", "no block distances"),
        ("decomposition", "no metric 'update_cosine'"),
    ):
        with pytest.raises(InputError, match=words):
            draw_figures(one, tmp_path, [name])
    with pytest.raises(InputError, match=r"no width 'pages'\. Known: page, column\. Did you mean page\?"):
        draw_figures(one, tmp_path, width="pages")


def test_the_help_names_every_figure():
    named = plotting._FIGURES.replace(";", ",").replace(" of evaluations", "").replace(" of several runs", "")
    assert [name.strip() for name in named.split(",")] == [*FIGURES, *EVALUATION_FIGURES, "models"]


def test_plot_of_one_run_and_of_several(undisturbed_run, tmp_path, capsys):
    out = tmp_path / "figures"
    arguments = ["plot", str(undisturbed_run), "--out", str(out), "--format", "svg", "--width", "column"]
    assert cli.run([*arguments, "--figure", "distances", "--figure", "decomposition"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "decomposition.csv", "decomposition.svg", "distances.csv", "distances.svg"
    ]  # fmt: skip
    assert cli.run(["plot", str(undisturbed_run), str(undisturbed_run), "--out", str(out)]) == 2
    assert "Two of the runs are of tiny-run" in capsys.readouterr().err
    assert cli.run(["plot", str(undisturbed_run), "--figure", "modles", "--out", str(out)]) == 2


@pytest.mark.slow
def test_bytes_repeat(scores, tmp_path):
    first = draw_figures(scores, tmp_path / "a", NEW[:4], ["png", "svg"])
    time.sleep(1.1)
    again = draw_figures(scores, tmp_path / "b", NEW[:4], ["png", "svg"])
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
