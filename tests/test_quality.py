"""`trace eval --curve`, and the figures of what dropping costs: the losses behind them, and what is drawn of them."""

import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import numpy as np
import polars as pl
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from skipping_by_hand import logits_without
from tiny_runs import PYDOC, token_file

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.analysis import along_values
from redundancy_trace.evaluation.dropping import beginnings, dropped_kind, most_that_can_go
from redundancy_trace.figures import EVALUATION_FIGURES, draw_evaluations
from redundancy_trace.figures.quality import LINEAR_UP_TO, curve_values, tradeoff_values
from redundancy_trace.pruning import DroppedComponent, DropPlan
from redundancy_trace.store import Evaluated, Labels, evaluations_frame

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*generation flags.*")]
LAYERS = 3
ORDERS = ("importance", "deepest", *(f"random:{seed}" for seed in range(5)))


@pytest.fixture(scope="module")
def measured(tiny_run, tmp_path_factory):
    """A checkpoint folder that `--curve` was asked of, and its text."""
    folder = shutil.copytree(tiny_run / "checkpoint-8", tmp_path_factory.mktemp("curve") / "model")
    text = token_file(folder.parent / "ids.npy")
    given = ["eval", str(folder), "--curve", "attn,mlp,block,joint", "--text", text, "--quiet"]
    with redirect_stdout(StringIO()) as printed:
        assert cli.run(given) == 0
    heading, _, *lines = printed.getvalue().splitlines()
    assert heading.endswith(", by importance / random (mean) / deepest first:")
    assert lines[3].split()[4:6] == ["/", "–"], "deepest first never drops all three attentions"
    return folder, torch.from_numpy(np.load(folder.parent / "ids.npy"))


def test_every_number_dropped_costs_what_a_hand_made_skip_costs(measured):
    folder, ids = measured
    rows, model = rt.read_evaluations(folder).filter(pl.col("metric") == "loss"), rt.load_model(folder)
    scores = rt.score_model(model, ids)

    def by_hand(lost):
        logits = logits_without(model, ids, lost)[:, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    assert rows.filter(pl.col("plan").is_null())["value"].to_list() == [pytest.approx(by_hand({}), abs=1e-6)]
    most = {"attn": 3, "mlp": 3, "block": 2, "joint": 5}
    for component, count in most.items():
        for order in ("importance", "deepest", "random:2"):
            word, _, seed = order.partition(":")
            one = rows.filter((pl.col("component") == component) & (pl.col("order") == word)).sort("n_dropped")
            one = one.filter(pl.col("order_seed") == int(seed)) if seed else one
            whole = count if word != "deepest" else {"attn": 2, "mlp": 2, "block": 2, "joint": 4}[component]
            assert one["n_dropped"].to_list() == list(range(1, whole + 1))
            plan = rt.plan_drop(scores, drop=f"{component}={whole}", order=order)
            for row, part in zip(one.iter_rows(named=True), beginnings(plan), strict=True):
                assert row["value"] == pytest.approx(by_hand(part.by_layer()), abs=1e-6)
                last = plan.components[row["n_dropped"] - 1]
                assert (row["last_component"], row["last_layer"]) == (last.component, last.layer)


def test_the_figures_are_drawn_from_the_command_line_with_their_numbers(measured, capsys):
    folder, _ = measured
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {f"{name}.{form}" for name in ("quality", "joint") for form in ("png", "pdf", "csv")}
    rows = rt.read_evaluations(folder)
    csv = pl.read_csv(folder / "figures" / "quality.csv")
    assert csv["value"].to_list() == pytest.approx(curve_values(rows)["value"].to_list())
    assert set(pl.read_csv(folder / "figures" / "joint.csv")["order"].drop_nulls()) == {"importance"}
    (folder / "figures" / "joint.pdf").unlink()
    assert cli.run(["plot", str(folder), "--figure", "joint", "--format", "pdf"]) == 0
    assert (folder / "figures" / "joint.pdf").is_file()
    assert cli.run(["plot", str(folder), "--figure", "tradeoff"]) == 2
    assert "trace eval" in capsys.readouterr().err
    assert cli.run(["plot", str(folder), "--figure", "qualiti"]) == 2
    assert "quality" in capsys.readouterr().err


def test_scores_of_a_run_decide_where_they_are_given(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("redundancy_trace.sweep.running._draw", lambda *_: ())
    monkeypatch.setattr("redundancy_trace.sweep.evaluating._draw", lambda *_: ())
    run = str(tmp_path / "run")
    assert cli.run(["--model", str(tiny_run), "--revisions", "checkpoint-8", "--out", run, "--quiet", *PYDOC]) == 0
    given = ["--model", str(tiny_run), "--revision", "checkpoint-8", "--scores", run, "--out", run]
    text = ["--text", token_file(tmp_path / "ids.npy"), "--orders", "importance"]
    assert cli.run(["eval", *given, "--curve", "joint", *text, "--quiet"]) == 0
    rows = rt.read_evaluations(run).filter(pl.col("metric") == "added_loss").sort("n_dropped")
    plan = rt.plan_drop(run, "checkpoint-8", joint=5)
    assert list(rows.select("last_component", "last_layer").iter_rows()) == [
        (one.component, one.layer) for one in plan.components
    ]


def test_what_can_go_at_most():
    assert [most_that_can_go(one, "importance", 4) for one in ("attn", "mlp", "block", "joint")] == [4, 4, 3, 7]
    assert [most_that_can_go(one, "deepest", 4) for one in ("attn", "mlp", "block", "joint")] == [3, 3, 3, 6]
    assert most_that_can_go("block", "importance", 1) == 0


def test_kinds_of_plans():
    def plan(*components, drop="named"):
        found = tuple(DroppedComponent(name, layer) for name, layer in components)
        return DropPlan(None, None, None, None, None, drop, "named", 4, found)

    assert dropped_kind(plan(("attn", 1), ("attn", 2))) == "attn"
    assert dropped_kind(plan(("attn", 1), ("mlp", 2))) == "joint"
    assert dropped_kind(plan(("attn", 1), drop="joint=1")) == "joint"
    assert dropped_kind(plan(("attn", 1), ("block", 2))) == "mixed"


# Made rows, whose places in the figures are known.


def made(purpose, numbers, revision="step8", step=8):
    labels = Labels(model="me/model", revision=revision, commit=f"{step:040d}", step=step, identity=f"{revision}")
    return evaluations_frame(labels, purpose, numbers)


def number(value, plan=None, **more):
    kind, _, count = (plan or "").partition("=")
    base = Evaluated(metric="loss", value=value, dataset="text", n_dropped=int(count or 0), plan=plan)
    if plan:
        base = replace(base, component=kind, order="importance", plan_sha256=plan, plan_revision="step8")
    return replace(base, **more)


def curve():
    rows = [number(2.0)]
    for kind, slope in (("attn", 0.1), ("mlp", 0.5), ("joint", 0.2)):
        for count in (1, 2, 3):
            last = {"last_component": "mlp" if count == 2 else "attn"} if kind == "joint" else {}
            rows.append(number(2 + slope * count, f"{kind}={count}", **last))
            for seed in (0, 1):
                rows.append(
                    number(2 + (slope + seed) * count, f"{kind}={count}", order="random", order_seed=seed, **last)
                )
    return made("curve", rows)


def line_of(ax, style="-", marker=None):
    """(x, y) of the lines of a style, in the order in which they were drawn."""
    chosen = [one for one in ax.get_lines() if one.get_linestyle() == style and (marker in (None, one.get_marker()))]
    return [(list(one.get_xdata()), list(one.get_ydata())) for one in chosen]


def test_quality_shows_importance_and_the_reach_of_random_orders():
    ax = rt.plot_quality(curve(), component="mlp")
    assert ([0, 1, 2, 3], pytest.approx([2, 2.5, 3, 3.5])) in line_of(ax, marker="o")
    assert ([0, 1, 2, 3], pytest.approx([2, 3, 4, 5])) in line_of(ax)  # the mean of 0.5 and 1.5 a component
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(2 + 1.5 * 3)
    assert ax.get_xlabel() == "number dropped"
    assert "nats" in ax.get_ylabel()
    added = curve().filter(pl.col("plan").is_not_null())
    added = added.with_columns(metric=pl.lit("added_loss"), value=pl.col("value") - 2)
    ax = rt.plot_quality(added, component="mlp", metric="added_loss")
    assert ([0, 1, 2, 3], pytest.approx([0, 0.5, 1, 1.5])) in line_of(ax, marker="o")
    with pytest.raises(rt.InputError, match="'block' dropped; dropped were attn, mlp, joint"):
        rt.plot_quality(curve(), component="block")
    with pytest.raises(rt.InputError, match="no_such_text"):
        rt.plot_quality(curve(), dataset="no_such_text")


def test_stars_and_squares_say_what_each_step_drops():
    ax = rt.plot_joint(curve())
    squares, stars = (line_of(ax, "None", marker)[0] for marker in ("s", "*"))
    assert squares == ([1, 3], pytest.approx([2.2, 2.6]))
    assert stars == ([2], pytest.approx([2.4]))
    with pytest.raises(rt.InputError, match="joint"):
        rt.plot_joint(curve().filter(pl.col("component").ne_missing("joint")))


def tradeoff(prompt=64, plans=("attn=1", "attn=2", "mlp=1")):
    load = {"batch_size": 1, "prompt_tokens": prompt, "new_tokens": 8, "dataset": None}
    rows = [number(2.0), number(80.0, metric="weight_bytes", **load), number(20.0, metric="kv_cache_bytes", **load)]
    for plan in plans:
        count = int(plan[-1])
        rows += [
            number(2 + 0.1 * count, plan),
            number(1 + 0.1 * count, plan, metric="decode_speedup", **load),
            number(80.0 - 5 * count, plan, metric="weight_bytes", **load),
            number(20.0 - 5 * count, plan, metric="kv_cache_bytes", **load),
        ]
    return made("model", rows)


def test_speed_and_memory_against_quality():
    ax = rt.plot_tradeoff(tradeoff())
    assert ([1, 1.1, 1.2], pytest.approx([2, 2.1, 2.2])) in line_of(ax, marker="o")
    ax = rt.plot_tradeoff(tradeoff(), against="memory")
    assert (pytest.approx([1, 0.9, 0.8]), pytest.approx([2, 2.1, 2.2])) in line_of(ax, marker="o")
    assert [text.get_text() for text in ax.texts] == ["1", "2", "1"]


def test_speeds_and_bytes_at_other_lengths_are_not_mixed_in():
    other = tradeoff(prompt=8, plans=("attn=1",)).with_columns(
        value=pl.when(pl.col("metric") == "loss").then("value").otherwise(pl.col("value") * 7), identity=pl.lit("x")
    )
    both = tradeoff_values(pl.concat([other, tradeoff()]))
    assert both["memory_share"].to_list() == pytest.approx([1, 0.9, 0.9, 0.8])
    assert both["speedup"].to_list() == pytest.approx([1, 1.1, 1.1, 1.2])
    with pytest.raises(rt.InputError, match="--plan"):
        tradeoff_values(tradeoff(plans=()))


def along(added=0.05):
    rows = []
    for step, whole in ((1, 5.0), (10, 4.0), (100, 3.0)):
        name = f"step{step}"
        numbers = [number(whole)]
        for order, seed, extra in (
            ("importance", None, 0.0),
            ("random", 0, 0.1),
            ("random", 1, 0.3),
            ("deepest", None, 1),
        ):
            given = {"order": order, "order_seed": seed, "plan_revision": name}
            numbers.append(number(whole + added * step / 100 + extra, "attn=1", **given))
        if step == 100:
            numbers += [number(3.5, "attn=1", plan_revision=f"step{other}") for other in (1, 10)]
        rows.append(made("along", numbers, name, step))
    return pl.concat(rows)


def test_along_training_the_own_plan_and_the_same_plan_at_the_end():
    rows = along()
    table = along_values(rows)
    assert table.filter(pl.col("applied") == "last")["added"].to_list() == pytest.approx([0.5, 0.5, 0.05])
    ax = rt.plot_drop_along(rows, drop="attn=1")
    assert [y for _, y in line_of(ax, marker="o")] == [pytest.approx([0.0005, 0.005, 0.05])]
    assert pytest.approx([0.5, 0.5, 0.05]) in [y for _, y in line_of(ax, "--")]
    assert pytest.approx([1.0005, 1.005, 1.05]) in [y for _, y in line_of(ax, ":")]
    assert ax.get_yscale() == "symlog"
    assert ax.yaxis.get_transform().linthresh == LINEAR_UP_TO
    with pytest.raises(rt.InputError, match="dropped were attn=1"):
        rt.plot_drop_along(rows, drop="attn=2")


def test_of_one_checkpoint_every_order_is_a_point_that_is_seen():
    alone = along().filter((pl.col("step") == 100) & (pl.col("plan_revision").fill_null("step100") == "step100"))
    ax = rt.plot_drop_along(alone, drop="attn=1")
    for style, marker, added in (("-", "o", 0.05), (":", "v", 1.05), ("-", "D", 0.25)):
        assert [y for _, y in line_of(ax, style, marker)] == [pytest.approx([added])]
    (reach,) = (one for one in ax.collections if isinstance(one, LineCollection))
    assert reach.get_segments()[0][:, 1].tolist() == pytest.approx([0.15, 0.35])
    named = {"own plan, by importance": "o", "deepest first": "v", "random (band: all seeds)": "D"}
    for figure in (ax.figure, rt.plot_drops_along(alone)):
        legend = figure.legends[0] if figure.legends else figure.axes[-1].get_legend()
        handles = zip(legend.texts, legend.legend_handles, strict=True)
        assert {text.get_text(): line.get_marker() for text, line in handles} == named


@pytest.mark.parametrize("draw", [
    lambda: rt.plot_quality(curve()), lambda: rt.plot_joint(curve()), lambda: rt.plot_tradeoff(tradeoff()),
    lambda: rt.plot_drop_along(along(), drop="attn=1"), lambda: rt.plot_qualities(curve(), width="column"),
    lambda: rt.plot_drops_along(along(), width="column"), lambda: rt.plot_tradeoffs(tradeoff(), width="column"),
    lambda: rt.plot_drops_along(along()), lambda: rt.plot_qualities(curve()),
])  # fmt: skip
def test_titles_and_legends_end_within_the_figure(draw):
    drawn = draw()
    figure = drawn.get_figure(root=True)
    FigureCanvasAgg(figure).draw()
    parts = [*figure.legends, *(ax.title for ax in figure.axes), *([figure._suptitle] if figure._suptitle else [])]
    for part in parts:
        box = part.get_window_extent()
        assert figure.bbox.x0 <= box.x0, part
        assert box.x1 <= figure.bbox.x1, part


def test_ticks_of_added_loss_tell_more_than_its_sign():
    own = pl.col("plan").is_null() | (pl.col("order") == "importance") & (pl.col("plan_revision") == pl.col("revision"))
    near = along().filter(own)
    assert {-0.01, 0, 0.01, 0.02, 0.05} <= set(rt.plot_drop_along(near, drop="attn=1").get_yticks())
    assert {-0.01, 0, 0.01, 0.1, 0.3, 1} <= set(rt.plot_drop_along(along(), drop="attn=1").get_yticks())


def test_a_run_that_grew_shows_each_drop_once_and_one_last_checkpoint():
    grown = along()
    before = grown.filter(step=10)
    before = pl.concat(
        [before, before.filter(pl.col("plan").is_not_null()).head(1).with_columns(plan_revision=pl.lit("step1"))]
    ).with_columns(identity=pl.lit("of the shorter run"))
    both = pl.concat([before, grown]).sort("step", maintain_order=True)  # as they are read
    assert along_values(both).equals(along_values(grown))


def test_figures_of_what_was_not_measured_are_left_out_unless_they_are_named(tmp_path):
    drawn = draw_evaluations(pl.concat([curve(), along()]), tmp_path, formats=["svg"])
    assert [path.name for path in drawn] == [
        f"{name}.{form}" for name in ("quality", "joint", "drop-along") for form in ("svg", "csv")
    ]
    with pytest.raises(rt.InputError, match="trace eval"):
        draw_evaluations(curve(), tmp_path, ["tradeoff"])
    assert set(EVALUATION_FIGURES) == {"quality", "joint", "tradeoff", "drop-along"}


def test_rows_of_several_checkpoints_are_no_curve():
    both = pl.concat([curve(), curve().with_columns(revision=pl.lit("step9"))])
    with pytest.raises(rt.InputError, match="2 checkpoints, step8 to step9"):
        rt.plot_quality(both)
