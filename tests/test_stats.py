import json
import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import scipy.stats
from fake_scores import fake_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from made_scores import ranked, scores_of

from redundancy_trace import cli
from redundancy_trace.analysis import (
    LeftOut,
    checkpoint_statistics,
    importance_trends,
    metric_values,
    published_orders,
    training_stats,
)
from redundancy_trace.errors import InputError
from redundancy_trace.store import EVALUATION_SCHEMA, read_scores, write_evaluations

STEPS = [0, 1, 2, 4, 8, 16, 32]


def checks_of(scores, **options):
    return {check.name: check for check in training_stats(scores, **options).checks}


def rising(size, n_layers=8, steps=STEPS, start=0.1):
    """Importances of equal layers that grow by `size` per tenfold of steps."""
    return [[start + size * np.log10(max(step, 1))] * n_layers for step in steps]


# --- trends ---------------------------------------------------------------------------------------------------------


@given(st.floats(-0.05, 0.05), st.floats(0.05, 0.4))
def test_a_planted_drift_is_found_exactly(size, start):
    trends = importance_trends(scores_of({"mlp": rising(size, start=start)}, STEPS))
    assert trends["slope"].to_list() == pytest.approx([size] * 2, abs=1e-12)
    assert trends["layers"].to_list() == ["all", "inner"]
    assert set(trends["per"]) == {"step"}
    assert trends["slope_low"].null_count() == 2, "nothing is made up where no standard error is known"


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(1, 7), st.integers(0, 2**32 - 1), st.booleans())
def test_trends_are_least_squares_and_scipys_spearman(count, n_layers, seed, with_tokens):
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(10**6, count, replace=False)).tolist()
    values = rng.uniform(0, 1, (count, n_layers)).round(2)
    tokens = {"tokens": [step * 1000 for step in steps]} if with_tokens else {}
    trends = importance_trends(scores_of({"block": values}, steps, **tokens))
    parts = {"all": values, "inner": values[:, 1:-1]}
    assert trends.height == 2
    for row in trends.to_dicts():
        part = parts[row["layers"]]
        if part.shape[1] == 0:
            assert row["first"] is row["slope"] is row["spearman"] is None
            continue
        mean = part.mean(1)
        assert (row["first"], row["last"]) == pytest.approx((mean[0], mean[-1]))
        x = np.array([step for step in steps if step > 0])
        if x.size > 1:
            line = scipy.stats.linregress(np.log10(x), mean[-x.size :])
            assert row["slope"] == pytest.approx(line.slope, abs=1e-12)
            assert row["per"] == ("tokens" if with_tokens else "step")
        if np.ptp((1 - (1 - part)) @ np.ones(part.shape[1])) > 1e-9 and len(set(mean.round(9))) == count:
            assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(steps, mean)[0])


def test_trends_have_intervals_that_hold_the_value_and_narrow_with_the_errors():
    wide, narrow = (
        importance_trends(scores_of({"mlp": rising(0.02)}, STEPS, errors=e)).row(0, named=True) for e in (0.02, 0.002)
    )
    for row in (wide, narrow):
        assert row["slope_low"] < 0.02 < row["slope_high"]
    assert 5 * (narrow["slope_high"] - narrow["slope_low"]) < wide["slope_high"] - wide["slope_low"]


def test_names_without_numbers_have_an_order_but_no_slope():
    scores = scores_of({"mlp": rising(0.1)}, [None] * 7, names=[f"r{k}" for k in "abcdefg"])
    row = importance_trends(scores).row(0, named=True)
    assert (row["slope"], row["per"]) == (None, None)
    assert row["spearman"] > 0.9


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32 - 1), st.booleans())
def test_statistics_of_checkpoints_are_plain_numpy(count, n_layers, seed, tied):
    rng = np.random.default_rng(seed)
    values = {name: rng.uniform(0.01, 1, (count, n_layers)) for name in ("attn", "mlp")}
    if tied:
        values = {name: np.ceil(4 * one) / 8 for name, one in values.items()}
    scores = scores_of(values, list(range(count)), errors=0.01)
    found = checkpoint_statistics(scores)
    one = {
        name: metric_values(scores, "importance", name)["value"].to_numpy().reshape(count, n_layers) for name in values
    }
    expected = {}
    for name, part in one.items():
        expected[name, "importance"] = part.mean(1)
        if n_layers > 2:
            middle = np.median(part[:, 1:-1], axis=1)
            expected[name, "importance_inner"] = part[:, 1:-1].mean(1)
            expected[name, "first_layer"], expected[name, "last_layer"] = part[:, 0] / middle, part[:, -1] / middle
    expected["joint", "attn_below_mlp"] = (one["attn"] < one["mlp"]).mean(1)
    first = []
    for attn, mlp in zip(one["attn"], one["mlp"], strict=True):
        order = np.argsort(np.concatenate([attn, mlp]), kind="stable")
        first.append(int(np.flatnonzero(order >= n_layers)[0]))
    expected["joint", "attn_first"] = first
    there = set(found.select("component", "statistic").unique().rows())
    assert there - set(expected) == {
        (name, s) for name in values for s in ("spearman", "kendall", "weighted_tau", "overlap")
    }
    for (component, statistic), numbers in expected.items():
        rows = found.filter(component=component, statistic=statistic)
        assert rows["order"].to_list() == list(range(count))
        np.testing.assert_allclose(rows["value"], numbers, rtol=1e-12)
        assert (rows["low"] <= rows["high"]).all()


def test_a_layer_over_a_median_of_nothing_is_unknown():
    scores = scores_of({"attn": [[0.5, 0.0, 0.0, 0.25]] * 2}, [0, 1], errors=0.0)
    ratios = checkpoint_statistics(scores).filter(pl.col("statistic").is_in(["first_layer", "last_layer"]))
    assert ratios.height == ratios["value"].null_count() == 4
    json.dumps(training_stats(scores).to_json(), allow_nan=False)


# --- what others found ----------------------------------------------------------------------------------------------


def planted(attn, mlp, *, block=None, errors=0.0001, steps=STEPS):
    """A run whose layer 0 stands apart."""
    parts = {"attn": np.array(attn), "mlp": np.array(mlp), "block": np.array(mlp if block is None else block)}
    for values in parts.values():
        values[:, 0] += 1.0
    return scores_of(parts, steps, errors=errors)


def test_a_run_as_the_paper_describes_it_is_confirmed():
    order = np.linspace(0, 0.02, 8)
    checks = checks_of(
        planted(rising(0.001) + order, rising(0.1, start=0.2) + order, block=rising(0.1, start=0.3) + order)
    )
    assert {name: check.answer for name, check in checks.items()} == {
        "attention-below-mlp": "yes",
        "mlp-rises": "yes",
        "block-rises": "yes",
        "attention-moves-less": "yes",
        "first-layer-apart": "yes",
        "last-layer-jumps": "no",
        "attn-from-the-start": "yes",
        "mlp-from-the-start": "yes",
        "block-from-the-start": "yes",
        "attn-settles-early": "yes",
        "mlp-settles-early": "yes",
        "block-settles-early": "yes",
        "attention-drops-free": "undecided",
        "importance-beats-others": "undecided",
        "attention-first": "yes",
        "calibration-matters-little": "undecided",
    }
    assert checks["attention-below-mlp"].figure.startswith("100% of the cells")
    assert "7 of 8 at the last" in checks["attention-first"].figure


def test_a_run_that_is_the_other_way_round_contradicts_it():
    falls = np.array(rising(-0.02, start=0.3))
    early, late = ranked([1, 2], 8), ranked([5, 6], 8)
    orders = np.array([early] * 6 + [late]) / 100
    attn, mlp = np.array(rising(0.2, start=0.5)) + orders, falls + orders
    scores = scores_of({"attn": attn, "mlp": mlp, "block": mlp}, STEPS, errors=1e-6)
    answers = {name: check.answer for name, check in checks_of(scores).items()}
    undecided = {"attention-drops-free", "importance-beats-others", "calibration-matters-little", "last-layer-jumps"}
    assert {name for name, answer in answers.items() if answer == "no"} == set(answers) - undecided


def test_what_the_errors_leave_open_is_undecided():
    attn, mlp = rising(0.01), rising(0.01)
    sure = checks_of(scores_of({"attn": attn, "mlp": np.array(mlp) + 0.01}, STEPS, errors=1e-4))
    open_ = checks_of(scores_of({"attn": attn, "mlp": np.array(mlp) + 0.01}, STEPS, errors=0.05))
    for name in ("attention-below-mlp", "mlp-rises"):
        assert (sure[name].answer, open_[name].answer) == ("yes", "undecided")


def measured(added, *, error=0.01, at=STEPS[-1], purpose="along", order="importance"):
    """What `trace eval` stores at one checkpoint: `added` says what each number of a kind adds, {"attn": {2: 0.1}}."""
    place = {"revision": f"step{at}", "commit": f"{STEPS.index(at):040x}", "step": at, "purpose": purpose}
    shared = {**place, "model": "org/model", "dataset": "emma 4x8", "identity": f"{purpose}{order}"}
    rows = [{**shared, "metric": "loss", "value": 3.0, "n_dropped": 0}]
    word, _, seed = order.partition(":")
    for kind, costs in added.items():
        for count, cost in costs.items():
            plan = {"plan": f"{kind}={count}", "plan_revision": f"step{at}", "plan_sha256": f"{kind}{count}{order}"}
            drop = {**shared, **plan, "component": kind, "n_dropped": count, "order": word}
            drop["order_seed"] = int(seed) if seed else None
            rows.append({**drop, "metric": "loss", "value": 3.0 + cost})
            rows.append({**drop, "metric": "added_loss", "value": cost, "stderr": error})
    return pl.DataFrame(rows, schema=EVALUATION_SCHEMA)


def droppable(*rows):
    scores = planted(rising(0.001), rising(0.1, start=0.2))
    checks = checks_of(scores, evaluations=pl.concat(rows))
    return checks["attention-drops-free"], checks["importance-beats-others"]


@pytest.mark.parametrize(
    ("attn", "mlp", "block", "error", "answer"),
    [
        (0.02, 0.5, 0.7, 0.01, "yes"),
        (0.24, 0.5, 0.7, 0.01, "undecided"),  # half of 0.5 is within 1.96 errors
        (0.24, 0.5, 0.7, 0.001, "yes"),
        (0.24, 0.5, 0.3, 0.001, "undecided"),  # less than a block, but not half of it
        (0.6, 0.5, 0.7, 0.01, "no"),
        (0.6, 0.5, 0.7, 0.1, "undecided"),
        (0.6, 0.5, 0.7, None, "no"),
    ],
)
def test_whether_attention_drops_free_is_answered_by_what_was_measured(attn, mlp, block, error, answer):
    rows = measured({"attn": {2: attn, 4: 9.0}, "mlp": {2: mlp}, "block": {2: block}}, error=error)
    check, other = droppable(rows)
    assert check.answer == answer
    assert check.figure.startswith(f"2 dropped at step32 on emma 4x8 add attention {attn:+.3f}")
    assert (other.answer, other.figure) == (
        "undecided",
        "not measured: scores do not tell it, trace eval --along RUN does",
    )


def test_the_last_checkpoint_counts_and_how_many_are_like_it_is_told():
    early = measured({"attn": {2: 0.9}, "mlp": {2: 0.5}, "block": {2: 0.7}}, at=STEPS[-2])
    late = measured({"attn": {2: 0.1}, "mlp": {2: 0.5}, "block": {2: 0.7}})
    # What another plan, or a plan of another checkpoint, cost there is no answer.
    foreign = measured({"attn": {2: 5.0}}).with_columns(plan_revision=pl.lit("step1"))
    named = measured({"attn": {2: 5.0}}, order="named", purpose="model")
    check, _ = droppable(early, late, foreign, named)
    assert check.answer == "yes"
    assert check.figure.endswith("; less than half at 1 of 2 checkpoints")
    assert droppable(early)[0].answer == "no"
    assert droppable(measured({"attn": {2: 0.1}}))[0].answer == "undecided"
    as_curve = measured({"attn": {1: 9.0, 2: 0.1, 3: 9.0}, "mlp": {1: 0.5, 2: 0.5, 3: 0.5}}, purpose="curve")
    assert droppable(as_curve)[0].answer == "yes", "without blocks, and from trace eval --curve"


def test_of_equal_drops_on_two_texts_the_one_of_more_checkpoints_counts():
    drops = {"attn": {2: 0.1}, "mlp": {2: 0.5}, "block": {2: 0.7}}
    along = [measured(drops, at=step) for step in STEPS[-2:]]
    curve = measured({**drops, "attn": {2: 0.4}, "joint": {2: 0.1}}, purpose="curve").with_columns(
        dataset=pl.lit("another 4x8")
    )
    for rows in ([curve, *along], [*along, curve]):
        check, _ = droppable(*rows)
        assert check.answer == "yes"
        assert "on emma 4x8 add" in check.figure
        assert check.figure.endswith("; less than half at 2 of 2 checkpoints")


def test_whether_importance_beats_other_orders():
    best, deepest = measured({"attn": {4: 0.1, 8: 0.1}}), measured({"attn": {4: 0.3, 8: 0.1}}, order="deepest")
    seeds = [measured({"attn": {4: cost}}, order=f"random:{seed}") for seed, cost in enumerate((0.2, 0.6, 0.4))]
    _, check = droppable(best, deepest, *seeds)
    error = np.sqrt(np.var([0.2, 0.6, 0.4], ddof=1) / 3 + 0.01**2)
    assert check.answer == "yes"
    assert f"by importance +0.100 ± 0.01, at random +0.400 ± {error:.2g}, deepest first +0.300 ± 0.01" in check.figure
    worse = measured({"attn": {4: 0.05}}, order="deepest")
    assert droppable(best, worse, *seeds)[1].answer == "no"
    assert droppable(best, *seeds)[1].answer == "undecided"


def test_few_checkpoints_make_no_trend_and_one_says_what_it_can():
    few = checks_of(planted(rising(0.001, steps=STEPS[:4]), rising(0.1, steps=STEPS[:4], start=0.2), steps=STEPS[:4]))
    for name in ("mlp-rises", "attention-moves-less", "attn-settles-early"):
        assert few[name].answer == "undecided"
    stats = training_stats(fake_scores([512], n_layers=6))
    answers = {check.name: check.answer for check in stats.checks}
    assert answers["attention-below-mlp"] == answers["first-layer-apart"] == "yes"
    assert answers["mlp-rises"] == answers["attn-from-the-start"] == answers["attn-settles-early"] == "undecided"
    content = json.loads(json.dumps(stats.to_json(), allow_nan=False))
    assert content["checkpoints"] == 1
    assert content["onset"]["attn"] == {
        "k": 2, "step": 512, "revision": "step512", "tokens": None, "low": "step512", "high": "step512"
    }  # fmt: skip
    assert content["trend"]["mlp"]["inner"]["slope"] is None


def test_the_calibration_matters_little_where_three_of_four_layers_are_the_same():
    values = np.linspace(0.1, 0.9, 16)[None, :].repeat(5, 0)
    swapped, moved = values.copy(), values.copy()
    swapped[:, [3, 4]] = values[:, [4, 3]]
    moved[:, [2, 3, 4, 5]] = values[:, [4, 5, 2, 3]]
    for other, answer in ((swapped, "yes"), (moved, "no")):
        both = [scores_of({"mlp": v}, STEPS[:5], calibration=name) for v, name in ((values, "a"), (other, "b"))]
        check = checks_of(pl.concat(both))["calibration-matters-little"]
        assert check.answer == answer
    assert "2 of 4 shared (MLP, a and b)" in check.figure


def test_a_model_of_one_component_or_layer_has_no_statistics_of_others():
    for scores in (fake_scores(STEPS, n_layers=1), fake_scores(STEPS).filter(pl.col("component") == "mlp")):
        content = training_stats(scores).to_json()
        json.dumps(content, allow_nan=False)
    assert list(content["onset"]) == ["mlp"]
    assert "joint" not in content["statistics"][0]


# --- the command ----------------------------------------------------------------------------------------------------


def write_run(folder, scores, calibrations=("pydoc",)):
    """A run folder as a sweep leaves it, with one file of scores."""
    (folder / "scores").mkdir(parents=True)
    scores.write_parquet(folder / "scores" / "part.parquet")
    records = [{"label": name, "sha256": name, "file": f"{name}.npy"} for name in calibrations]
    settings = {"model": "org/model", "dtype": "float32", "trust_remote_code": False, "tokens_per_step": None}
    (folder / "settings.json").write_text(json.dumps({**settings, "calibrations": records, "metric_versions": {}}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    frames = [fake_scores(STEPS, n_layers=8), fake_scores(STEPS, n_layers=8, calibration="c4", seed=1)]
    folder = write_run(tmp_path_factory.mktemp("stats") / "run", pl.concat(frames), ("pydoc", "c4"))
    (folder / "failures").mkdir()
    failure = {"revision": "step64", "calibration": "pydoc", "reason": "layer 2 is not finite"}
    (folder / "failures" / "x.json").write_text(json.dumps(failure))
    return folder


def test_stats_prints_a_table_and_writes_what_json_prints(run, capsys):
    assert cli.run(["stats", str(run)]) == 0
    told = capsys.readouterr().out
    assert "org/model: 7 checkpoints, step0 to step32, on pydoc" in told
    assert "left out: step64: could not be scored: layer 2 is not finite" in told
    assert "most redundant quarter settled from" in told
    assert "pydoc  c4" in told
    written = json.loads((run / "stats.json").read_text(encoding="utf-8"))
    assert cli.run(["stats", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written
    assert set(written["onset"]["attn"]) == {"k", "step", "revision", "tokens", "low", "high"}
    assert written["onset"]["attn"]["k"] == 2
    assert written["checks"][0]["name"] == "attention-below-mlp"
    assert {check["answer"] for check in written["checks"]} <= {"yes", "no", "undecided"}
    assert len(written["calibrations"]) == 3 * 7
    assert len(written["statistics"]) == 7
    assert cli.run(["stats", str(run), "--calibration", "c4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == "c4"


def test_stats_says_what_it_cannot_use_and_writes_nothing(run, tmp_path, capsys):
    assert cli.run(["stats", str(tmp_path / "none")]) == 2
    assert cli.run(["stats", str(run), "--calibration", "c5"]) == 2
    assert "There are: pydoc, c4" in capsys.readouterr().err
    spoilt = fake_scores(STEPS).with_columns(value=pl.when(pl.col("layer") != 1).then("value").otherwise(float("nan")))
    folder = write_run(tmp_path / "run", spoilt)
    assert cli.run(["stats", str(folder)]) == 2
    assert "is no number at step0 (layer 1)" in capsys.readouterr().err
    assert not (folder / "stats.json").exists()


def test_stats_reads_what_was_measured_in_the_run(tmp_path, capsys):
    folder = write_run(tmp_path / "run", fake_scores(STEPS))
    at = read_scores(folder).filter(step=STEPS[-1]).row(0, named=True)
    rows = measured({"attn": {2: 0.02}, "mlp": {2: 0.5}, "block": {2: 0.7}})
    rows = rows.with_columns(revision=pl.lit(at["revision"]), commit=pl.lit(at["commit"]))
    rows = rows.with_columns(plan_revision=pl.when(pl.col("plan").is_not_null()).then("revision"))
    write_evaluations(folder / "evaluations" / "made.parquet", rows)
    assert cli.run(["stats", str(folder)]) == 0
    assert f"2 dropped at {at['revision']} on emma 4x8 add attention +0.020 ± 0.01" in capsys.readouterr().out
    (folder / "evaluations" / "made.parquet").write_text("no parquet")
    assert cli.run(["stats", str(folder)]) == 2
    assert "made.parquet" in capsys.readouterr().err


def test_stats_of_one_checkpoint_and_of_many(tmp_path, capsys):
    assert cli.run(["stats", str(write_run(tmp_path / "one", fake_scores([7])))]) == 0
    assert "1 checkpoint, step7" in capsys.readouterr().out
    assert cli.run(["stats", str(write_run(tmp_path / "many", fake_scores(range(40))))]) == 0
    assert "(12 of 40 checkpoints are shown)" in capsys.readouterr().out


def test_stats_imports_neither_torch_nor_matplotlib(run):
    code = f"import sys\nfrom redundancy_trace import cli\ncode = cli.run(['stats', {str(run)!r}, '--json'])\n"
    code += (
        "print(code, *sorted({'torch', 'transformers', 'matplotlib', 'seaborn'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "0"


def test_failed_checkpoints_are_named_as_given():
    left = training_stats(fake_scores([0, 1]), failed=[LeftOut("step9", "could not be scored: no room")]).left_out
    assert [(one.revision, one.reason) for one in left] == [("step9", "could not be scored: no room")]
    with pytest.raises(InputError, match="calibrated on 'x'"):
        training_stats(fake_scores([0, 1]), calibration="x")


def test_published_orders_are_those_of_the_paper():
    mistral = published_orders("mistralai/Mistral-7B-v0.1")
    assert mistral.attn == (25, 26, 24, 22, 27, 28, 23, 21)
    assert mistral.n_layers == 32
    llama = published_orders("llama-2-13b-hf")
    assert (llama.mlp[0], llama.block[-1]) == (31, 28)
    assert published_orders("EleutherAI/pythia-70m") is None
    for orders in (mistral, llama):
        for layers in (orders.attn, orders.mlp, orders.block):
            assert len(set(layers)) == 8
            assert all(0.6 < layer / orders.n_layers < 0.95 for layer in layers)
    short = published_orders("meta-llama/Llama-2-7b-hf")
    assert (short.attn, short.mlp, short.block[:3]) == ((), (), (27, 26, 25))


def published_run(model="mistralai/Mistral-7B-v0.1", n_layers=32):
    """The last checkpoint has the published order of attention but for two layers, and none of that of the MLPs."""
    attn = ranked([25, 26, 24, 22, 27, 28, 1, 2], n_layers)
    mlp, block = ranked(range(8), n_layers), ranked([21, 28, 22, 23, 27, 24, 25, 26], n_layers)
    first = ranked([0], n_layers)
    return scores_of(
        {name: [first, last] for name, last in (("attn", attn), ("mlp", mlp), ("block", block))}, [0, 8], model=model
    )


def test_published_orders_stand_beside_those_of_the_last_checkpoint(tmp_path, capsys):
    attn, mlp, block = training_stats(published_run()).published
    assert (attn.here, attn.shared, attn.overlap) == ((25, 26, 24, 22, 27, 28, 1, 2), 6, 6 / 10)
    assert attn.chance == pytest.approx(expected_jaccard(8, 32), abs=1e-12)
    assert (mlp.shared, mlp.overlap, mlp.revision) == (0, 0.0, "step8")
    assert (block.here, block.overlap) == ((21, 28, 22, 23, 27, 24, 25, 26), 1.0)
    run = write_run(tmp_path / "run", published_run())
    assert cli.run(["stats", str(run)]) == 0
    told = capsys.readouterr().out
    assert "Published drop orders of this model beside those of step8" in told
    (line,) = (line for line in told.splitlines() if line.startswith("attn   25"))
    assert " ".join(line.split()) == "attn 25 26 24 22 27 28 23 21 25 26 24 22 27 28 1 2 6 of 8 0.60 0.15"
    assert "2406.15786" in told
    for other in (published_run("org/other"), published_run(n_layers=31)):
        assert training_stats(other).published == ()


def expected_jaccard(k, n_layers):
    """By counting: the mean overlap of a set of k with all sets of k."""
    ways = {shared: math.comb(k, shared) * math.comb(n_layers - k, k - shared) for shared in range(k + 1)}
    return sum(count * shared / (2 * k - shared) for shared, count in ways.items()) / math.comb(n_layers, k)
