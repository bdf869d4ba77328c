"""`trace eval --along RUN`: what each drop adds at each checkpoint, against a hand-made skip; what is done once."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file, save_file
from skipping_by_hand import logits_without
from tiny_runs import PYDOC, STEPS, branches, leftovers, weights_asked, without_figures

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.analysis import along_values
from redundancy_trace.calibration import load_calibration
from redundancy_trace.settings import DEFAULT_DROPS, listed

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*generation flags.*")]
FEW = ("--drops", "attn=1,joint=2", "--orders", "importance,random:0")
LAST = f"checkpoint-{STEPS[-1]}"


def swept(model, out, *arguments):
    with without_figures():
        assert cli.run(["--model", str(model), "--out", str(out), "--quiet", *PYDOC, *arguments]) == 0
    return out


def along(run, *arguments):
    return cli.run(["eval", "--along", str(run), "--quiet", *map(str, arguments)])


def undrawn(monkeypatch):
    monkeypatch.setattr("redundancy_trace.sweep.along._draw", lambda *_: ())


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run that was evaluated along as the defaults have it."""
    out = swept(tiny_run, tmp_path_factory.mktemp("along") / "run")
    assert along(out) == 0
    return out


@pytest.fixture
def swept_copy(tiny_run, run, tmp_path):
    """A run of its own, swept but not evaluated, of a copy of the checkpoints."""
    models = shutil.copytree(tiny_run, tmp_path / "tiny-run")
    return models, swept(models, tmp_path / "run")


def held_out(tiny_run):
    """The rows of the text behind the calibration's 4 x 32 tokens."""
    ids = load_calibration("pydoc", samples=8, sequence_length=32, tokenizer=str(tiny_run / LAST)).token_ids
    return torch.from_numpy(ids[4:])


def losses_by_hand(model, ids, lost):
    """Of each window."""
    logits = logits_without(model, ids, lost)[:, :-1].double()
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.reshape(len(ids), -1).mean(dim=1).numpy()


def loss_by_hand(model, ids, lost):
    return float(losses_by_hand(model, ids, lost).mean())


def losses(run):
    return rt.read_evaluations(run).filter(pl.col("metric") == "loss")


def test_losses_are_those_of_a_hand_made_skip_under_the_checkpoints_own_plans(run, tiny_run):
    rows, scores, ids = losses(run), rt.read_scores(run), held_out(tiny_run)
    assert rows["purpose"].unique().to_list() == ["along"]
    assert rows["dataset"].unique().to_list() == ["pydoc 4x32 behind token 128"]
    for name in ("checkpoint-2", LAST):
        model = rt.load_model(tiny_run, name)
        here = rows.filter(pl.col("revision") == name)
        assert here.filter(pl.col("plan").is_null())["value"].to_list() == [
            pytest.approx(loss_by_hand(model, ids, {}), abs=1e-6)
        ]
        for drop in ("attn=50%", "block=25%", "joint=25%"):
            for order in ("importance", "random:3", "deepest"):
                plan = rt.plan_drop(scores, name, drop=drop, order=order)
                word, _, seed = order.partition(":")
                found = here.filter(
                    (pl.col("plan") == drop) & (pl.col("order") == word) & (pl.col("plan_revision") == name)
                )
                if seed:
                    found = found.filter(pl.col("order_seed") == int(seed))
                assert found["value"].to_list() == [pytest.approx(loss_by_hand(model, ids, plan.by_layer()), abs=1e-6)]
                assert found["n_dropped"].to_list() == [len(plan.components)]


def test_every_plan_is_applied_to_the_last_checkpoint_too(run, tiny_run):
    rows, scores, ids = losses(run), rt.read_scores(run), held_out(tiny_run)
    model = rt.load_model(tiny_run, LAST)
    others = rows.filter((pl.col("revision") == LAST) & (pl.col("plan_revision") != LAST))
    assert set(others["order"]) == {"importance"}
    assert len(others) == (len(STEPS) - 1) * len(listed(DEFAULT_DROPS))
    for step in STEPS[:-1]:
        plan = rt.plan_drop(scores, f"checkpoint-{step}", drop="mlp=25%")
        one = others.filter((pl.col("plan") == "mlp=25%") & (pl.col("plan_revision") == plan.revision))
        assert one["value"].to_list() == [pytest.approx(loss_by_hand(model, ids, plan.by_layer()), abs=1e-6)]


def test_what_a_drop_adds_is_told_with_the_error_of_the_difference(run, tiny_run):
    rows, ids = rt.read_evaluations(run), held_out(tiny_run)
    plan, model = rt.plan_drop(rt.read_scores(run), LAST, drop="attn=50%"), rt.load_model(tiny_run, LAST)
    added = losses_by_hand(model, ids, plan.by_layer()) - losses_by_hand(model, ids, {})
    own = (pl.col("order") == "importance") & (pl.col("plan_revision") == LAST) & (pl.col("plan") == "attn=50%")
    (row,) = rows.filter(own & (pl.col("metric") == "added_loss") & (pl.col("revision") == LAST)).rows(named=True)
    error = added.std(ddof=1) / len(added) ** 0.5
    assert (row["value"], row["stderr"]) == (pytest.approx(added.mean(), abs=1e-6), pytest.approx(error, abs=1e-6))
    shown = along_values(rows).filter((pl.col("plan") == "attn=50%") & (pl.col("order") == "importance"))
    assert shown.filter(revision=LAST)["added_stderr"].to_list() == [row["stderr"]] * 2


def test_there_are_five_random_orders_and_the_deepest_of_every_drop_at_every_checkpoint(run):
    rows = losses(run)
    own = rows.filter(pl.col("plan").is_not_null() & (pl.col("plan_revision") == pl.col("revision")))
    counted = own.group_by("revision", "plan").agg(
        orders=pl.col("order").sort(), seeds=pl.col("order_seed").drop_nulls().sort()
    )
    assert len(counted) == len(STEPS) * len(listed(DEFAULT_DROPS))
    for row in counted.iter_rows(named=True):
        assert row["orders"] == ["deepest", "importance", *["random"] * 5]
        assert row["seeds"] == [0, 1, 2, 3, 4]
    assert rows["revision"].unique(maintain_order=True).to_list() == [f"checkpoint-{step}" for step in STEPS]
    assert rows["token_sha256"].n_unique() == 1


def test_the_curve_is_drawn_with_its_numbers(run):
    figures = sorted(path.name for path in (run / "figures").iterdir() if path.name.startswith("drop-along"))
    assert figures == ["drop-along.csv", "drop-along.pdf", "drop-along.png"]
    shown, rows = along_values(rt.read_evaluations(run)), losses(run)
    written = pl.read_csv(run / "figures" / "drop-along.csv")
    assert written["added_stderr"].null_count() == 0
    assert written["added"].to_list() == pytest.approx(shown["added"].to_list())
    whole = dict(rows.filter(pl.col("plan").is_null()).select("revision", "value").iter_rows())
    for row in shown.iter_rows(named=True):
        assert row["added"] == pytest.approx(row["value"] - whole[row["measured"]])
        assert (row["applied"] == "own") == (row["measured"] == row["revision"]) or row["revision"] == LAST
    for drop in listed(DEFAULT_DROPS):
        at_last = shown.filter((pl.col("plan") == drop) & (pl.col("applied") == "last"))
        assert at_last["revision"].to_list() == [f"checkpoint-{step}" for step in STEPS]


def test_what_is_measured_is_not_measured_again(run, capsys):
    before = rt.read_evaluations(run)
    capsys.readouterr()
    assert along(run, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["measured"], told["kept"], told["failures"]) == (0, len(STEPS), {})
    assert len(told["rows"]) == len(before)
    assert along(run) == 0
    table = capsys.readouterr().out
    assert all(f"checkpoint-{step}" in table for step in STEPS)
    assert "attn=25%" in table
    assert_frame_equal(rt.read_evaluations(run), before)


def test_interrupted_it_goes_on_where_it_was(swept_copy, monkeypatch):
    from redundancy_trace.sweep import along as module

    undrawn(monkeypatch)
    _, run = swept_copy
    real, measured = module._measured, []

    def measuring(settings, made, windows, step, *rest):
        if len(measured) == 2 and interruptions:
            raise interruptions.pop()
        measured.append(step.task.checkpoint.name)
        return real(settings, made, windows, step, *rest)

    interruptions = [KeyboardInterrupt()]
    monkeypatch.setattr(module, "_measured", measuring)
    assert along(run, *FEW) == cli.INTERRUPTED
    assert rt.read_evaluations(run)["revision"].n_unique() == 2
    assert along(run, *FEW) == 0
    assert measured == [f"checkpoint-{step}" for step in STEPS], "each once"
    assert not leftovers(run)


def test_a_checkpoint_that_fails_is_told_and_tried_again(swept_copy, monkeypatch, capsys):
    undrawn(monkeypatch)
    models, run = swept_copy
    weights = models / "checkpoint-2" / "model.safetensors"
    state = load_file(weights)
    missing = next(iter(state))
    save_file({name: value for name, value in state.items() if name != missing}, weights, metadata={"format": "pt"})
    assert along(run, *FEW) == 1
    assert "checkpoint-2" in capsys.readouterr().err
    assert "checkpoint-2" not in rt.read_evaluations(run)["revision"].to_list()
    save_file(state, weights, metadata={"format": "pt"})
    assert along(run, *FEW, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["measured"], told["kept"]) == (1, len(STEPS) - 1)


def test_of_a_repository_each_checkpoint_is_fetched_and_let_go(loopback_hub, tiny_run, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    loopback_hub.add_repo("me/model", revisions=branches(tiny_run))
    where = ("--endpoint", loopback_hub.url)
    run = swept("me/model", tmp_path / "run", *where)
    asked = len(weights_asked(loopback_hub))
    assert along(run, *FEW, *where) == 0
    assert len(weights_asked(loopback_hub)) == 2 * asked
    rows = rt.read_evaluations(run)
    assert rows["revision"].unique(maintain_order=True).to_list() == [f"step{step}" for step in STEPS]
    assert rows["commit"].n_unique() == len(STEPS)
    assert not leftovers(run)


def test_from_python_the_same(swept_copy, monkeypatch):
    undrawn(monkeypatch)
    _, run = swept_copy
    rows = rt.evaluate_along(run, drops="mlp=1", orders="importance", text="pydoc", samples=2, quiet=True)
    assert rows["n_tokens"].unique().to_list() == [2 * 31]
    whole = rows.filter(pl.col("plan").is_null())
    assert len(whole) == len(STEPS)
    assert np.isfinite(rows["value"].to_numpy()).all()
    with pytest.raises(rt.InputError, match="drop"):
        rt.evaluate_along(run, drop="mlp=1", quiet=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere is no run"]),
        (["MODELS"], ["is no run"]),
        (["EMPTY"], ["no scores yet"]),
        (["GONE"], ["were in /nowhere/tiny-run", "no folder any more"]),
        (["RUN", "--drops", "attn=9"], ["--drops attn=9", "only 3"]),
        (["RUN", "--drops", "soup=1"], ["--drops 'soup=1'"]),
        (["RUN", "--orders", "consecutive"], ["--orders 'consecutive'"]),
        (["RUN", "--measure", "speed"], ["leave out --measure"]),
        (["RUN", "--dtype", "bfloat16"], ["leave out --dtype"]),
        (["RUN", "--drops", ""], ["--drops"]),
        (["RUN", "--orders", "random"], ["random"]),
        (["RUN", "--model", "me/model"], ["leave out --model"]),
        (["RUN", "--plan", "plan.json"], ["leave out --plan"]),
        (["RUN", "--text", "nowhere.txt"], ["--text nowhere.txt"]),
        (["RUN", "--sequence-length", "65"], ["--sequence-length", "64"]),
    ],
)
def test_what_cannot_be_used_is_refused(arguments, words, run, tiny_run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("settings.json", "listing.json", "token_ids.json", "token_ids.npy"):
        shutil.copy(run / name, empty)
    gone = shutil.copytree(empty, tmp_path / "gone")
    listing = (run / "listing.json").read_text()
    (gone / "listing.json").write_text(listing.replace(f'"{tiny_run}"', '"/nowhere/tiny-run"'))
    places = {"RUN": run, "MODELS": tiny_run, "EMPTY": empty, "GONE": gone}
    before = sorted(path.name for path in (run / "evaluations").iterdir())
    assert along(*(places.get(one, one) for one in arguments)) == 2
    told = capsys.readouterr().err
    for word in words:
        assert word in told
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == before
    assert not (empty / "evaluations").exists()
