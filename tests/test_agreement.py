import itertools
import warnings

import numpy as np
import polars as pl
import pytest
import scipy.stats
from fake_scores import fake_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_scores import ranked, scores_of

from redundancy_trace.analysis import (
    calibration_agreement,
    drop_onset,
    leave_out_duplicates,
    main_series,
    metric_values,
    rank_agreement,
    topk_overlap,
)
from redundancy_trace.analysis.ranks import chance_overlap, drop_places, jaccard, settled_from, shared_layers
from redundancy_trace.analysis.series import RESAMPLES
from redundancy_trace.errors import InputError

SCIPYS = {
    "spearman": scipy.stats.spearmanr,
    "kendall": scipy.stats.kendalltau,
    "weighted_tau": lambda one, other: scipy.stats.weightedtau(-one, -other),
}


@st.composite
def matrices(draw, least=1):
    """Importances of checkpoints × layers: any values, or few, so that many are equal."""
    shape = draw(st.integers(least, 5)), draw(st.integers(1, 9))
    values = draw(st.sampled_from([st.floats(0, 1, width=32), st.integers(0, 2).map(lambda n: n / 4)]))
    return draw(arrays(np.float64, shape, elements=values))


def one_by_one(name, one, other):
    """scipy's own value; NaN where an order has no spread."""
    if one.size < 2:
        return np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        with np.errstate(invalid="ignore", divide="ignore"):
            return SCIPYS[name](one, other)[0]


# --- every two checkpoints ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(matrices(least=2))
def test_agreement_is_scipys_own_for_every_pair(values):
    steps = list(range(len(values)))
    found = rank_agreement(scores_of({"attn": values}, steps))
    pairs = list(itertools.combinations(steps, 2))
    assert found.select("step", "other_step").rows() == pairs
    assert found["revision"].to_list() == [f"step{a}" for a, _ in pairs]
    assert set(found["n_layers"]) == {values.shape[1]}
    importance = 1 - (1 - values)
    for name in SCIPYS:
        expected = [one_by_one(name, importance[a], importance[b]) for a, b in pairs]
        np.testing.assert_allclose(found[name].fill_null(np.nan).to_numpy(), expected, atol=1e-12, err_msg=name)


def test_agreement_has_the_columns_that_are_promised_and_one_checkpoint_no_pair():
    columns = ["revision", "other_revision", "step", "other_step", "spearman", "kendall", "weighted_tau", "n_layers"]
    assert rank_agreement(fake_scores([4]), component="mlp").columns == columns
    assert rank_agreement(fake_scores([4])).is_empty()


def test_agreement_is_of_one_component_with_the_earlier_checkpoint_first():
    scores = fake_scores([8, 2, 0], n_layers=12)
    found = rank_agreement(scores.sample(fraction=1, shuffle=True, seed=0), "block")
    assert found.select("step", "other_step").rows() == [(0, 2), (0, 8), (2, 8)]
    values = metric_values(scores, "importance", "block")["value"].to_numpy().reshape(3, 12)
    assert found["spearman"][1] == pytest.approx(scipy.stats.spearmanr(values[0], values[2])[0])


@pytest.mark.parametrize("of", [rank_agreement, topk_overlap, drop_onset])
def test_what_is_missing_or_no_number_is_refused_by_name(of):
    scores = fake_scores([0, 1, 2])
    hole = (pl.col("layer") == 2) & (pl.col("revision") == "step1") & (pl.col("component") == "mlp")
    with pytest.raises(InputError, match=r"of mlp is missing at step1 \(layer 2\), so the order .* != 'step1'\)"):
        of(scores.filter(~hole), "mlp")
    for wrong in (float("nan"), None):
        spoilt = scores.with_columns(value=pl.when(hole).then(wrong).otherwise(pl.col("value")))
        with pytest.raises(InputError, match=r"of mlp is no number at step1 \(layer 2\)"):
            of(spoilt, "mlp")
    with pytest.raises(InputError, match=r"component 'mpl'.*: attn, mlp, block"):
        of(scores, "mpl")
    with pytest.raises(InputError, match="no cosine_similarity"):
        of(scores.filter(pl.col("metric") == "loss"), "mlp")


def test_layers_without_the_component_are_no_gap():
    scores = fake_scores([0, 1, 2], n_layers=6).filter((pl.col("component") != "attn") | (pl.col("layer") % 2 == 0))
    assert set(rank_agreement(scores, "attn")["n_layers"]) == {3}
    assert set(rank_agreement(scores, "mlp")["n_layers"]) == {6}


# --- sets that would be dropped -------------------------------------------------------------------------------------


@given(matrices())
def test_overlap_and_onset_are_those_of_sets(values):
    places = drop_places(values)
    order = np.argsort(values, axis=1, kind="stable")
    assert (np.take_along_axis(places, order, 1) == np.arange(values.shape[1])).all()
    shared = shared_layers(places, places[-1])
    overlap, onset = jaccard(shared), settled_from(shared)
    for k in range(1, values.shape[1] + 1):
        sets = [set(row[:k].tolist()) for row in order]
        last = sets[-1]
        np.testing.assert_allclose(overlap[:, k - 1], [len(one & last) / len(one | last) for one in sets])
        holds = [all(one == last for one in sets[start:]) for start in range(len(sets))]
        assert onset[k - 1] == holds.index(True)


@pytest.mark.parametrize("n_layers", [1, 2, 5, 8])
def test_chance_is_that_of_all_sets(n_layers):
    expected, high = chance_overlap(n_layers)
    for k in range(1, n_layers + 1):
        first = set(range(k))
        overlaps = [len(first & set(o)) / len(first | set(o)) for o in itertools.combinations(range(n_layers), k)]
        assert expected[k - 1] == pytest.approx(np.mean(overlaps))
        assert np.mean(np.array(overlaps) <= high[k - 1] + 1e-12) >= 0.95
        smaller = [o for o in overlaps if o < high[k - 1] - 1e-12]
        assert len(smaller) < 0.95 * len(overlaps)


def test_the_frames_hold_every_checkpoint_and_k():
    scores = fake_scores([0, 1, 2, 4], n_layers=6)
    overlap = topk_overlap(scores, "mlp")
    assert overlap.select("order", "k").rows() == [(s, k) for s in range(4) for k in range(1, 7)]
    assert overlap.filter(order=3)["overlap"].to_list() == [1.0] * 6
    assert (overlap["low"] <= overlap["high"]).all()
    assert overlap.filter(k=2)["chance"].to_list() == pytest.approx([chance_overlap(6)[0][1]] * 4)
    onset = drop_onset(scores, "mlp")
    assert onset.columns == ["k", "order", "revision", "step", "tokens", "low_order", "high_order"]
    assert onset["k"].to_list() == [1, 2, 3, 4, 5]
    unknown = topk_overlap(scores.with_columns(stderr=pl.lit(None, pl.Float64)))
    assert unknown["low"].null_count() == unknown.height


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_planted_onset_is_found(at):
    steps = [0, 1, 2, 4, 8, 16, 32]
    early, late = ranked([0, 1], 8), ranked([5, 3], 8)
    values = [late if k >= at or k == at - 2 else early for k in range(len(steps))]  # a look that did not last
    onset = drop_onset(scores_of({"attn": values}, steps, errors=1e-6)).filter(k=2).row(0, named=True)
    assert (onset["step"], onset["low_order"], onset["high_order"]) == (steps[at], at, at)


def test_bands_are_what_errors_of_that_size_do():
    """Two layers whose importances differ by one standard error of the difference swap with probability Φ(−1)."""
    values = np.array([[0.1, 0.2, 0.9], [0.1, 0.2, 0.9]])
    errors = {"attn": np.array([[0.1, 0.0, 0.0], [0.0, 0.0, 0.0]])}
    series = main_series(scores_of({"attn": values}, [1, 2], errors=errors))
    swapped = (series.draw_places["attn"][:, 0, 0] == 1).mean()
    assert swapped == pytest.approx(scipy.stats.norm.cdf(-1), abs=3 * 0.37 / RESAMPLES**0.5)
    draws = series.draws["attn"]
    assert draws[:, 0, 0].std() == pytest.approx(0.1, rel=0.2)
    np.testing.assert_allclose(draws[:, 1], np.broadcast_to(values[1], (RESAMPLES, 3)))
    overlap = topk_overlap(scores_of({"attn": values}, [1, 2], errors=errors)).filter(order=0, k=1).row(0, named=True)
    assert (overlap["overlap"], overlap["low"], overlap["high"]) == (1, 0, 1)
    np.testing.assert_array_equal(draws, main_series(scores_of({"attn": values}, [1, 2], errors=errors)).draws["attn"])


# --- series ---------------------------------------------------------------------------------------------------------


def test_the_longest_series_is_taken_and_what_is_left_out_is_named():
    names = ["stage1-step1", "stage1-step2", "stage2-ingredient1-step1", "stage2-ingredient1-step2", "main"]
    names += [f"stage2-ingredient2-step{k}" for k in (1, 2, 3)]
    scores = scores_of(
        {"attn": np.arange(32).reshape(8, 4) / 64},
        [1, 2, 1, 2, None, 1, 2, 3],
        names=names,
        stage=[1, 1, 2, 2, None, 2, 2, 2],
        ingredient=[None, None, 1, 1, None, 2, 2, 2],
    )
    series = main_series(scores)
    assert series.name == "stage 2, ingredient 2"
    assert series.checkpoints["revision"].to_list() == names[5:]
    assert series.checkpoints["order"].to_list() == [0, 1, 2]
    reasons = {one.revision: one.reason for one in series.left_out}
    assert reasons["stage1-step2"] == "of another series (stage 1, no ingredient)"
    assert reasons["stage2-ingredient1-step1"] == "of another series (stage 2, ingredient 1)"
    assert reasons["main"] == "its name tells no place in training"
    assert len(reasons) == 5
    np.testing.assert_array_equal(series.grids["attn"].values, np.arange(20, 32).reshape(3, 4) / 64)


def test_of_equal_seeds_the_first_and_of_names_without_steps_all():
    values = {"mlp": np.arange(16).reshape(4, 4) / 64}
    seeds = scores_of(values, [0, 1, 0, 1], names=["a-0", "a-1", "b-0", "b-1"], seed=["1", "1", "2", "2"])
    assert main_series(seeds).checkpoints["revision"].to_list() == ["a-0", "a-1"]
    assert main_series(seeds).name == "seed 1"
    names = ["kestrel", "ocelot", "main", "x"]
    unnamed = main_series(scores_of(values, [None] * 4, names=names))
    assert (unnamed.checkpoints["revision"].to_list(), unnamed.name, unnamed.left_out) == (names, "", ())
    assert main_series(fake_scores([7])).checkpoints.height == 1


def test_a_planted_duplicate_is_left_out_and_named_and_changes_nothing():
    scores = fake_scores([0, 1, 2, 4, 8], n_layers=8)
    commit = scores.filter(pl.col("step") == 2)["commit"][0]
    duplicates = pl.DataFrame(
        {
            "revision": ["step2", "step3"],
            "commit": [commit, "f" * 40],
            "duplicate_of": ["step8"] * 2,
            "partial": [False, True],
        }
    )
    series = main_series(scores, duplicates)
    assert series.checkpoints["step"].to_list() == [0, 1, 4, 8]
    assert [(one.revision, one.reason) for one in series.left_out] == [
        ("step2", "repeats the weights of step8"),
        ("step3", "repeats a part of the weights of step8"),
    ]
    without = topk_overlap(leave_out_duplicates(scores, duplicates))
    assert topk_overlap(scores, "attn", duplicates).drop("low", "high").equals(without.drop("low", "high"))


# --- calibrations ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(matrices(), st.randoms(use_true_random=False))
def test_calibrations_are_compared_checkpoint_by_checkpoint(values, random):
    other = np.array([random.sample(row.tolist(), len(row)) for row in values])
    steps = list(range(len(values)))
    first, second = scores_of({"attn": values}, steps), scores_of({"attn": other}, steps, calibration="c4")
    found = calibration_agreement(pl.concat([first, second.filter(pl.col("step") > 0)]))
    assert found["step"].to_list() == steps[1:]
    k = -(-values.shape[1] // 4)
    for row, one, two in zip(found.iter_rows(named=True), 1 - (1 - values[1:]), 1 - (1 - other[1:]), strict=True):
        for name in SCIPYS:
            expected = one_by_one(name, one, two)
            assert (row[name] is None) if np.isnan(expected) else row[name] == pytest.approx(expected, abs=1e-12)
        sets = [set(np.argsort(layers, kind="stable")[:k].tolist()) for layers in (one, two)]
        assert (row["k"], row["shared"]) == (k, len(sets[0] & sets[1]))
        assert row["overlap"] == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        assert (row["calibration"], row["other_calibration"]) == ("pydoc", "c4")


def test_three_calibrations_are_three_pairs_and_one_is_none():
    frames = [fake_scores([0, 1], calibration=name, seed=seed) for seed, name in enumerate("abc")]
    found = calibration_agreement(pl.concat(frames))
    pairs = found.select("calibration", "other_calibration").unique(maintain_order=True).rows()
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found.height == 3 * 3 * 2
    assert calibration_agreement(frames[0]).is_empty()
    assert calibration_agreement(frames[0]).columns == found.columns
