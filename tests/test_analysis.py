import numpy as np
import polars as pl
import pytest
from fake_scores import PYTHIA_STEPS, fake_scores
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from redundancy_trace.analysis import (
    CHECKPOINT_COLUMNS,
    blank_duplicates,
    checkpoint_order,
    is_log_spaced,
    leave_out_duplicates,
    mark_repeats,
    metric_values,
    one_calibration,
    training_axis,
    training_summary,
)
from redundancy_trace.errors import InputError

# --- values ---------------------------------------------------------------------------------------------------------


def test_importance_is_one_minus_similarity_with_its_error():
    scores = fake_scores([0, 1, 2])
    similarity = metric_values(scores, "cosine_similarity", "mlp")
    importance = metric_values(scores, "importance", "mlp")
    np.testing.assert_array_equal(importance["value"], 1 - similarity["value"].to_numpy())
    assert importance["stderr"].equals(similarity["stderr"])
    assert importance["metric"].unique().to_list() == ["importance"]


def test_values_stand_in_training_order_then_component_then_layer_whatever_the_order_of_the_rows():
    scores = fake_scores([0, 1, 2, 10], n_layers=3)
    values = metric_values(scores.sample(fraction=1, shuffle=True, seed=1), "relative_norm")
    assert values.equals(metric_values(scores, "relative_norm"))
    expected = [(k, c, layer) for k in range(4) for c in ("attn", "mlp", "block") for layer in range(3)]
    assert values.select("order", "component", "layer").rows() == expected


def test_loss_is_a_metric_of_the_model():
    values = metric_values(fake_scores([0, 4]), "loss", "model")
    assert values["value"].to_list() == [4.0, 3.5]
    assert values["layer"].null_count() == 2


def test_what_is_not_a_number_is_null():
    scores = fake_scores([0, 1]).with_columns(
        value=pl.when(pl.col("layer") == 2).then(float("nan")).otherwise(pl.col("value"))
    )
    values = metric_values(scores, "importance", "attn")
    assert values.filter(pl.col("layer") == 2)["value"].null_count() == 2
    assert values["value"].null_count() == 2


def test_a_frame_without_commits_steps_or_calibration_is_enough():
    scores = fake_scores([None], names=["model"]).select("revision", "layer", "component", "metric", "value")
    assert metric_values(scores, "importance", "attn").height == 4
    assert training_summary(scores).height == 1


@pytest.mark.parametrize(
    ("metric", "component", "message"),
    [
        ("importence", None, r"no metric 'importence'.*cosine_similarity, loss, relative_norm, importance\. Did you"),
        ("importance", "mpl", r"no importance of component 'mpl'.*attn, block, mlp"),
        ("loss", "attn", r"no loss of component 'attn'.*: model\."),
    ],
)
def test_an_unknown_metric_or_component_is_told_with_those_that_exist(metric, component, message):
    with pytest.raises(InputError, match=message):
        metric_values(fake_scores([0]), metric, component)


def test_frames_that_cannot_be_used_are_refused():
    scores = fake_scores([0, 1])
    with pytest.raises(InputError, match="lack the column 'metric'; the columns are: model"):
        metric_values(scores.drop("metric"), "importance")
    with pytest.raises(InputError, match="There are no scores"):
        training_axis(scores.clear())
    with pytest.raises(InputError, match="of 2 models: org/model, b"):
        checkpoint_order(pl.concat([scores, scores.with_columns(model=pl.lit("b"))]))
    with pytest.raises(InputError, match=r"2 values stand .* cosine_similarity of attn in layer 0 at step0"):
        training_summary(pl.concat([scores, scores.head(1)]))


def test_the_first_calibration_is_taken_unless_told():
    first, second = fake_scores([0, 1], seed=1), fake_scores([0, 1], calibration="c4", seed=2)
    both = pl.concat([first, second])
    assert metric_values(both, "importance").equals(metric_values(first, "importance"))
    told = one_calibration(both, "c4")
    assert metric_values(told, "importance").equals(metric_values(second, "importance"))
    with pytest.raises(InputError, match=r"calibrated on 'c5'\. There are: pydoc, c4"):
        one_calibration(both, "c5")


def test_cells_that_fewer_sequences_count_in_are_kept():
    scores = fake_scores([0, 1]).with_columns(n_sequences=pl.when(pl.col("layer") == 0).then(3).otherwise(8))
    assert metric_values(scores, "importance")["value"].equals(
        metric_values(fake_scores([0, 1]), "importance")["value"]
    )


# --- order and axis -------------------------------------------------------------------------------------------------


def test_order_goes_by_stage_then_step_and_what_has_no_step_comes_last():
    names = ["main", "stage2-step10", "step150", "stage1-step2000"]
    scores = fake_scores([None, 10, 150, 2000], names=names, stages=[None, 2, None, 1])
    order = checkpoint_order(scores)
    assert order["revision"].to_list() == ["step150", "stage1-step2000", "stage2-step10", "main"]
    assert order["order"].to_list() == [0, 1, 2, 3]


def test_named_parts_follow_the_stages_whatever_their_steps():
    names = ["step50000-tokens210B", "step2627139-tokens15T", "longctx-step50", "longctx-step100"]
    steps = [50000, 2627139, 50, 100]
    order = checkpoint_order(fake_scores(steps[::-1], names=names[::-1]))
    assert order["revision"].to_list() == names


def test_names_keep_the_order_of_the_frame():
    names = ["kestrel", "ocelot", "jellyfish"]
    assert checkpoint_order(fake_scores([None] * 3, names=names))["revision"].to_list() == names


AXES = {
    "tokens of the labels": ([1000, 2000], [4_000, 8_000], "tokens", (4e3, 8e3)),
    "missing labels from steps": ([1, 2, 4], [10, None, 40], "tokens", (10, 20, 40)),
    "labels that rounding made equal": ([0, 100, 1000], [0, 0, 4000], "tokens", (0, 400, 4000)),
    "no labels": ([0, 512], None, "step", (0, 512)),
    "one label, at step 0": ([0, 512], [0, None], "step", (0, 512)),
    "a final model without step": ([0, 512, None], [0, 1024, None], "tokens", (0, 1024, None)),
    "tokens without steps": ([None, None], [5, 9], "tokens", (5, 9)),
    "names only": ([None, None], None, "index", (0, 1)),
    "one checkpoint": ([512], [1024], "index", (0,)),
    "one step and a name": ([512, None], None, "index", (0, 1)),
}


@pytest.mark.parametrize(("steps", "tokens", "column", "values"), AXES.values(), ids=AXES)
def test_axis(steps, tokens, column, values):
    axis = training_axis(fake_scores(steps, tokens=tokens, names=[f"r{k}" for k in range(len(steps))]))
    assert (axis.column, axis.values) == (column, values)
    assert axis.revisions == tuple(f"r{k}" for k in range(len(steps)))


def test_steps_that_start_anew_are_put_behind_and_cumulative_tokens_go_first():
    steps, stages, names = [10, 20, 10, 20], [1, 1, 2, 2], list("abcd")
    axis = training_axis(fake_scores(steps, stages=stages, names=names))
    assert (axis.column, axis.values) == ("step", (10, 20, 30, 40))
    assert axis.label == "optimizer steps, each stage behind the one before"
    unstaged = training_axis(fake_scores(steps, stages=[None, None, 2, 2], names=names))
    assert unstaged.values == (10, 20, 30, 40), "a name without a stage is of the first"
    parallel = fake_scores(steps, stages=[1, 1, 2, 2], names=names).with_columns(
        ingredient=pl.col("revision").replace_strict({"c": 1, "d": 2}, default=None, return_dtype=pl.Int64)
    )
    assert training_axis(parallel.with_columns(step=pl.min_horizontal("step", 20))).column == "step"
    same = parallel.with_columns(step=pl.when(pl.col("revision") == "c").then(20).otherwise("step"))
    assert training_axis(same).column == "index", "parallel ones stand at one place"
    axis = training_axis(fake_scores(steps, stages=stages, names=names, tokens=[1, 2, 3, 4]))
    assert (axis.column, axis.values) == ("tokens", (1, 2, 3, 4))
    # Tokens of one step cannot be told from stages that count anew: a missing label is not made up.
    assert training_axis(fake_scores(steps, stages=stages, names=names, tokens=[1, 2, 3, None])).column == "step"


@pytest.mark.parametrize(
    ("values", "log"),
    [
        (PYTHIA_STEPS, True),
        ([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512], True),
        ([0, 1000, 2000, 3000, 4000, 6000, 9000, 14000, 50000, 100000, 394000, 557000], True),
        ([100, 1000, 10000], True),
        (range(0, 144000, 1000), False),
        (range(1000, 1454000, 1000), False),
        ([1000, *range(76000, 1454000, 76000)], False),
        ([300, *range(10000, 1900000, 1000)], False),
        ([1, 2, 4], False),
        ([1, 1000], False),
        ([0], False),
        ([], False),
    ],
)
def test_log_axis_where_checkpoints_are_log_spaced(values, log):
    assert is_log_spaced(values) is log


@given(st.integers(3, 50), st.floats(1e-3, 1e9), st.floats(1.5, 10), st.booleans())
def test_even_spacing_is_linear_even_ratios_are_log_in_any_unit(count, unit, ratio, with_zero):
    zero = [0.0] * with_zero
    assert not is_log_spaced(zero + [unit * (k + 1) for k in range(count)])
    ratios = [unit * ratio**k for k in range(count)]
    assert is_log_spaced(zero + ratios) == (ratios[-1] >= 10 * ratios[0])


# --- summary --------------------------------------------------------------------------------------------------------


def test_summary_equals_plain_means():
    scores = fake_scores([0, 1, 8], n_layers=5)
    summary = training_summary(scores.sample(fraction=1, shuffle=True, seed=3))
    assert summary["revision"].to_list() == ["step0", "step1", "step8"]
    for component in ("attn", "mlp", "block"):
        values = metric_values(scores, "importance", component)["value"].to_numpy().reshape(3, 5)
        np.testing.assert_allclose(summary[component], values.mean(1), rtol=1e-12)
        np.testing.assert_allclose(summary[component + "_inner"], values[:, 1:-1].mean(1), rtol=1e-12)
    np.testing.assert_allclose(summary["loss"], [4, 4 - 1 / 3, 4 - 2 / 3])


def test_summary_has_no_mean_over_other_layers():
    missing = (pl.col("revision") == "step1") & (pl.col("layer") == 2) & (pl.col("component") == "mlp")
    summary = training_summary(fake_scores([0, 1, 8], loss=False).filter(~missing))
    assert [value is None for value in summary["mlp"]] == [False, True, False]
    assert summary["attn"].null_count() == 0
    assert summary["loss"].null_count() == 3


def test_summary_of_a_model_whose_layers_differ_takes_the_layers_that_have_the_component():
    summary = training_summary(fake_scores([0, 1]).filter((pl.col("component") != "attn") | (pl.col("layer") != 2)))
    assert summary["attn"].null_count() == 0


def test_summary_of_one_layer_has_no_inner_mean():
    summary = training_summary(fake_scores([0], n_layers=1))
    assert summary["attn_inner"].to_list() == [None]
    assert summary["attn"].null_count() == 0


# --- duplicates -----------------------------------------------------------------------------------------------------


def repeating(*rows):
    """What `read_duplicates` gives: revision, commit, stage, step of each."""
    schema = {"revision": pl.String, "commit": pl.String, "stage": pl.Int64, "step": pl.Int64}
    more = {"duplicate_of": "main", "partial": False, "seed": None, "ingredient": None, "tokens": None}
    columns = [*CHECKPOINT_COLUMNS, "duplicate_of", "partial"]
    kinds = {"seed": pl.String, "ingredient": pl.Int64, "tokens": pl.Int64, "duplicate_of": pl.String}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(pl.lit(v, kinds.get(k)).alias(k) for k, v in more.items()).select(columns)


def test_curves_leave_out_what_repeats_at_the_commit_that_was_scored():
    scores = fake_scores([0, 1, 2, 4])
    commit = scores.filter(pl.col("step") == 1)["commit"][0]
    left_out = leave_out_duplicates(scores, repeating(("step1", commit, None, 1), ("step2", "f" * 40, None, 2)))
    assert left_out["step"].unique().sort().to_list() == [0, 2, 4], "step2 was scored before it was replaced"
    assert_frame_equal(left_out, scores.filter(pl.col("step") != 1))
    assert leave_out_duplicates(scores, None) is scores
    assert leave_out_duplicates(scores, repeating()) is scores
    nameless = scores.drop("commit")
    assert set(leave_out_duplicates(nameless, repeating(("step1", commit, None, 1)))["step"]) == {0, 2, 4}


def test_gaps_stand_where_their_names_say_in_the_series_that_is_shown():
    scores = fake_scores([0, 1000, 3000], stages=[1, 1, 1], names=["stage1-step0", "step1000", "stage1-step3000"])
    duplicates = repeating(
        ("stage1-step2000", "a" * 40, 1, 2000),
        ("step2500", "b" * 40, None, 2500),
        ("stage1-step1000", "c" * 40, 1, 1000),
        ("stage2-step2000", "d" * 40, 2, 2000),
        ("longctx-step2000", "e" * 40, None, 2000),
        ("main", "f" * 40, None, None),
    )
    blanked = blank_duplicates(scores, duplicates)
    order = checkpoint_order(blanked)["revision"].to_list()
    assert order == ["stage1-step0", "step1000", "stage1-step2000", "step2500", "stage1-step3000"]
    assert training_axis(blanked).values == (0, 1000, 2000, 2500, 3000)
    assert blanked.filter(pl.col("value").is_null())["revision"].unique().sort().to_list() == [
        "stage1-step2000", "step2500"
    ]  # fmt: skip
    assert blanked.height == scores.height // 3 * 5, "each has every layer, component and metric"


def test_a_scored_duplicate_without_a_step_keeps_its_place_behind_the_others():
    scores = fake_scores([0, 1000, None], names=["step0", "step1000", "main"])
    commit = scores.filter(pl.col("revision") == "main")["commit"][0]
    blanked = blank_duplicates(scores, repeating(("main", commit, None, None)))
    assert checkpoint_order(blanked)["revision"].to_list() == ["step0", "step1000", "main"]
    assert blanked.filter(pl.col("revision") == "main")["value"].null_count() == scores.height // 3


def test_a_table_says_what_repeats():
    summary = training_summary(fake_scores([0, 1, 2]))
    commit = summary["commit"][1]
    marked = mark_repeats(summary, repeating(("step1", commit, None, 1), ("step2", "f" * 40, None, 2)))
    assert marked["duplicate_of"].to_list() == [None, "main", None]
    assert marked["partial"].to_list() == [None, False, None]
    assert_frame_equal(marked.drop("duplicate_of", "partial"), summary)
