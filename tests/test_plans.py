"""Plans: what goes, in which order; and what cannot be planned, told with what to do instead."""

import json

import numpy as np
import polars as pl
import pytest
from fake_scores import fake_scores
from hypothesis import given
from hypothesis import strategies as st

import redundancy_trace as rt
from redundancy_trace.pruning import DroppedComponent, parse_spec
from redundancy_trace.pruning.plans import plan_from_json

# Layer 1 and 2 tie in attention; every MLP but the last is more important than every attention but the first.
ATTN = [0.5, 0.02, 0.02, 0.01]
MLP = [0.9, 0.03, 0.2, 0.015]
BLOCK = [0.8, 0.3, 0.1, 0.2]


def scores(attn=ATTN, mlp=MLP, block=BLOCK, steps=(8,)):
    """Made-up scores of a run, with the importance that is given."""
    frame = fake_scores(list(steps), len(attn))
    values = {"attn": attn, "mlp": mlp, "block": block}
    wanted = pl.struct("component", "layer").map_elements(
        lambda row: None if row["layer"] is None else 1 - values[row["component"]][row["layer"]],
        return_dtype=pl.Float64,
    )
    is_similarity = pl.col("metric") == "cosine_similarity"
    return frame.with_columns(value=pl.when(is_similarity).then(wanted).otherwise("value"))


def dropped(plan):
    return [(one.component, one.layer) for one in plan.components]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"attn": 3}, [("attn", 3), ("attn", 1), ("attn", 2)]),  # a tie goes by layer
        ({"attn": "50%"}, [("attn", 3), ("attn", 1)]),
        ({"attn": "<0.02"}, [("attn", 3)]),
        ({"mlp": "25%"}, [("mlp", 3)]),
        ({"mlp": 4}, [("mlp", 3), ("mlp", 1), ("mlp", 2), ("mlp", 0)]),
        ({"block": "<0.25"}, [("block", 2), ("block", 3)]),
        ({"joint": 5}, [("attn", 3), ("mlp", 3), ("attn", 1), ("attn", 2), ("mlp", 1)]),
        ({"joint": "25%"}, [("attn", 3), ("mlp", 3)]),  # of eight
        ({"names": "mlp:2,attn:0,block:1"}, [("mlp", 2), ("attn", 0), ("block", 1)]),
        ({"names": ["attn:0"]}, [("attn", 0)]),
        ({"drop": "attn = 1"}, [("attn", 3)]),
        ({"attn": 2, "order": "deepest"}, [("attn", 2), ("attn", 1)]),  # the last layer is kept
        ({"joint": 3, "order": "deepest"}, [("mlp", 2), ("attn", 2), ("mlp", 1)]),
    ],
)
def test_what_goes_and_in_which_order(asked, expected):
    plan = rt.plan_drop(scores(), **asked)
    assert dropped(plan) == expected
    importance = {"attn": ATTN, "mlp": MLP, "block": BLOCK}
    for one in plan.components:
        assert one.importance == pytest.approx(importance[one.component][one.layer])


def test_random_orders_repeat_and_shorter_ones_begin_longer_ones():
    orders = {seed: dropped(rt.plan_drop(scores(), joint=7, order=f"random:{seed}")) for seed in range(5)}
    assert len({tuple(order) for order in orders.values()}) == 5
    for seed, order in orders.items():
        assert dropped(rt.plan_drop(scores(), joint=3, order=f"random:{seed}")) == order[:3]
    shuffled = np.random.default_rng(3).permutation(4).tolist()
    assert [layer for _, layer in dropped(rt.plan_drop(scores(), attn=4, order="random:3"))] == shuffled


@given(st.lists(st.floats(0, 2), min_size=2, max_size=12), st.data())
def test_what_goes_is_never_more_important_than_what_stays(importance, data):
    count = data.draw(st.integers(1, len(importance)))
    plan = rt.plan_drop(scores(importance, importance, importance), attn=count)
    gone = [layer for _, layer in dropped(plan)]
    kept = sorted(set(range(len(importance))) - set(gone))
    exact = [1 - (1 - value) for value in importance]
    assert gone == sorted(gone, key=lambda layer: (exact[layer], layer))
    assert not kept or max(exact[layer] for layer in gone) <= min(exact[layer] for layer in kept)
    assert len(set(gone)) == count


def distances(gaps, n_layers=4):
    """Block distances whose cosine is 1 − gaps[i, j], 0.5 elsewhere."""
    rows = [
        ("step8", f"{0:040x}", "pydoc", i, j, metric, 1 - gaps.get((i, j), 0.5))
        for i in range(n_layers)
        for j in range(i + 1, n_layers + 1)
        for metric in ("cosine_similarity", "angular_distance")
    ]
    names = ["revision", "commit", "calibration", "layer", "to_layer", "metric", "value"]
    return pl.DataFrame(rows, schema=names, orient="row")


def test_consecutive_blocks_are_chosen_by_the_gap_that_they_leave():
    # By the gap of three, which the published code reads for two blocks, layers 0 and 1 would go.
    held = distances({(0, 3): 0.01, (1, 3): 0.1, (2, 4): 0.2, (0, 2): 0.3})
    plan = rt.plan_drop(scores(), block=2, order="consecutive", distances=held)
    assert dropped(plan) == [("block", 1), ("block", 2)]
    assert [one.importance for one in plan.components] == pytest.approx([0.1, 0.1])
    assert dropped(rt.plan_drop(scores(), block="75%", order="consecutive", distances=held))[0] == ("block", 0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"block": 4}, "all 4 blocks would be dropped"),
        ({"joint": "100%"}, "all 4 blocks would be dropped"),
        ({"names": "block:0,block:1,block:2,attn:3,mlp:3"}, "All 4 blocks would be dropped"),
        ({"attn": 5}, "there are only 4"),
        ({"attn": "101%"}, "there are only 4"),
        ({"attn": 4, "order": "deepest"}, r"3 can be dropped at most \(the last layer is kept\)"),
        ({"attn": 0}, "Ask for at least one"),
        ({"attn": "1%"}, "that is none of 4"),
        ({"attn": "<0.001"}, "the least important is attn 3 with 0.01"),
        ({"attn": "<0.02", "order": "random:1"}, "takes a number or a share"),
        ({"names": "attn:4"}, "there is no layer 4; the layers are 0 to 3"),
        ({"names": "attn:1,block:1"}, "block:1 is dropped already"),
        ({"names": "attn:1", "order": "deepest"}, "leave out --order deepest"),
        ({"attn": "2.5"}, "a share is written 25%"),
        ({"drop": "atn=3"}, "'atn=3' is not understood.*attn=8"),
        ({"drop": ""}, "not understood"),
        ({"attn": 1, "mlp": 1}, r"2 are given \(attn=1, mlp=1\)"),
        ({}, "nothing is given"),
        ({"attn": 1, "order": "depest"}, "Did you mean deepest"),
        ({"attn": 1, "order": "random"}, "random:SEED"),
        ({"attn": 1, "order": "iterative"}, "model=load_model"),
        ({"block": 1, "order": "consecutive"}, "read_distances"),
        ({"attn": 1, "order": "consecutive", "distances": distances({})}, "number or share of blocks"),
        ({"attn": 1, "revision": "step9"}, "There are no scores of 'step9'.*step8"),
    ],
)
def test_what_cannot_be_planned_is_refused(asked, message):
    with pytest.raises(rt.InputError, match=message):
        rt.plan_drop(scores(), **asked)


def test_revision_must_be_named_where_there_are_several():
    both = scores(steps=(8, 16))
    with pytest.raises(rt.InputError, match=r"2 checkpoints, step8 to step16\. Name one"):
        rt.plan_drop(both, attn=1)
    plan = rt.plan_drop(both, "step16", attn=1)
    assert (plan.model, plan.revision, plan.commit) == ("org/model", "step16", f"{1:040x}")
    assert (plan.calibration, plan.identity, plan.n_layers) == ("pydoc", "x", 4)


def test_a_score_that_is_no_number_is_no_rank():
    for broken in (float("nan"), float("inf"), None):
        held = scores().with_columns(
            value=pl.when((pl.col("component") == "attn") & (pl.col("layer") == 2)).then(broken).otherwise("value")
        )
        with pytest.raises(rt.InputError, match="lack the importance of attn in layer 2"):
            rt.plan_drop(held, attn=1)
        assert dropped(rt.plan_drop(held, mlp=1)) == [("mlp", 3)]


def test_plan_is_read_back_as_it_was_written(tmp_path):
    plan = rt.plan_drop(scores(), joint=5)
    file = plan.write(tmp_path / "made" / "plan.json")
    assert rt.read_plan(file) == plan
    first = {"component": "attn", "layer": 3, "importance": plan.components[0].importance}
    assert json.loads(file.read_text())["components"][0] == first
    assert plan.by_layer() == {1: {"attn", "mlp"}, 2: {"attn"}, 3: {"attn", "mlp"}}
    assert plan.blocks == (1, 3)
    assert plan.layers_of("mlp") == (1, 3)
    assert plan.told() == "joint=5 of org/model at step8 (4 layers), order importance: attn 3 1 2; mlp 3 1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is not 1"),
        ({"n_layers": "4"}, "'n_layers' is missing or of another kind"),
        ({"drop": None}, "'drop'"),
        ({"components": []}, "drops nothing"),
        ({"components": [{"component": "head", "layer": 1}]}, "names no component"),
        ({"components": [{"component": "attn", "layer": "1"}]}, "names no layer"),
        ({"components": [{"component": "attn", "layer": 4}]}, "no layer 4"),
        ({"components": [{"component": "attn", "layer": 1, "importance": "low"}]}, "no number"),
        ({"components": [{"component": "attn", "layer": 1, "importance": float("nan")}]}, "no number"),
    ],
)
def test_plans_that_are_none_are_refused(tmp_path, change, message):
    file = rt.plan_drop(scores(), attn=1).write(tmp_path / "plan.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(rt.InputError, match=f"plan.json is no plan.*{message}"):
        rt.read_plan(file)


def test_files_that_are_no_plans_are_refused(tmp_path):
    with pytest.raises(rt.InputError, match="There is no plan"):
        rt.read_plan(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"version": 1,')
    with pytest.raises(rt.InputError, match="no valid JSON"):
        rt.read_plan(tmp_path / "torn.json")
    with pytest.raises(rt.InputError, match="version"):
        plan_from_json([])
    (tmp_path / "file").touch()
    with pytest.raises(rt.InputError, match="cannot be written"):
        rt.plan_drop(scores(), attn=1).write(tmp_path / "file" / "plan.json")


def test_spec_grammar():
    assert parse_spec("block<1e-2").below == 0.01
    assert parse_spec("attn=12.5%").share == 0.125
    assert parse_spec(" attn:3, mlp:5 ,block:7").named == (("attn", 3), ("mlp", 5), ("block", 7))
    assert parse_spec("joint=6").count == 6
    for wrong in ("attn", "attn=-1", "attn<", "attn:x", "head=3", "attn=3;mlp=2", "attn=3,mlp=2"):
        with pytest.raises(rt.InputError, match="not understood"):
            parse_spec(wrong)


def test_dropped_component_is_shown_as_it_is_named():
    assert str(DroppedComponent("mlp", 3)) == "mlp:3"
