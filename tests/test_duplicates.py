"""Checkpoints that are not what their names say: found from hashes, before a byte of weights moves."""

import json
import random
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import LoopbackHub
from polars.testing import assert_frame_equal
from tiny_runs import PYDOC, branches, checkpoint_files, leftovers, numbers

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.checkpoints import Checkpoint, list_checkpoints, listing
from redundancy_trace.checkpoints.duplicates import mark_duplicates
from redundancy_trace.checkpoints.ordering import in_training_order
from redundancy_trace.errors import InputError
from redundancy_trace.hub import RepoFile

PYTHIA = [0, *(2**n for n in range(10)), *range(1000, 144000, 1000)]


def bins(*contents: str) -> dict[str, bytes]:
    """A checkpoint of one torch file, or of several shards, with these contents."""
    count = len(contents)
    names = [f"pytorch_model-{n:05}-of-{count:05}.bin" for n in range(1, count + 1)]
    return {"config.json": b"{}"} | {
        name: content.encode()
        for name, content in zip(names if count > 1 else ["pytorch_model.bin"], contents, strict=True)
    }


def listed(hub: LoopbackHub, model: str, revisions: str = "all") -> dict[str, Checkpoint]:
    hub.forget_requests()
    found = list_checkpoints(model, revisions, endpoint=hub.url)
    assert hub.count("GET", "*/resolve/*") == 0, "no content was moved"
    return {checkpoint.name: checkpoint for checkpoint in found}


def chosen(found: dict[str, Checkpoint]) -> list[str]:
    return [name for name, checkpoint in found.items() if checkpoint.chosen]


# What was seen in published runs


@pytest.fixture
def pythia_2_8b(loopback_hub):
    """154 branches: 76 hold main's weights, 10 more share a second file, 68 are their own."""
    chance = random.Random(0)
    middle = [step for step in PYTHIA if step not in (0, 143000)]
    stale = set(chance.sample(middle, 86))
    second = set(chance.sample(sorted(stale), 10))
    contents = {s: "second" if s in second else "final" if s in stale else f"of step {s}" for s in PYTHIA}
    loopback_hub.add_repo(
        "EleutherAI/pythia-2.8b",
        revisions={"main": bins("final"), **{f"step{step}": bins(content) for step, content in contents.items()}},
    )
    return loopback_hub, stale, second


def test_pythia_2_8b(pythia_2_8b):
    hub, stale, second = pythia_2_8b
    found = listed(hub, "EleutherAI/pythia-2.8b")
    flagged = {checkpoint.step for checkpoint in found.values() if checkpoint.repeats}
    assert flagged == stale
    assert len(flagged) == 86
    assert len(chosen(found)) == 68
    assert all(found[f"step{step}"].duplicate_of == "main" for step in stale - second)
    first, other, *_ = sorted(second)
    assert found[f"step{first}"].duplicate_of == f"step{other}"
    assert {found[f"step{step}"].duplicate_of for step in second - {first}} == {f"step{first}"}
    assert (found["main"].bytes, found["main"].format, found["main"].duplicate_of) == (None, None, None)


def test_a_subsample_is_of_distinct_models(pythia_2_8b):
    hub, stale, _ = pythia_2_8b
    found = listed(hub, "EleutherAI/pythia-2.8b", "log:20")
    names = chosen(found)
    assert len(names) == 20
    assert names[0] == "step0"
    assert names[-1] == "step143000"
    hashes = [found[name].files[-1].sha256 for name in names]
    # Of the ten that share a second file one alone may have been looked at: nothing then tells.
    assert len(set(hashes)) == 20
    dropped = [c for c in found.values() if c.repeats]
    assert dropped
    for checkpoint in dropped:
        assert checkpoint.step in stale
        assert checkpoint.bytes
        assert not checkpoint.chosen
    untouched = [c for c in found.values() if c.files is None]
    assert len(untouched) > 60, "only what is selected is looked at"
    assert all((c.bytes, c.format, c.duplicate_of) == (None, None, None) for c in untouched)
    assert hub.count("GET", "*/tree/*") == sum(c.files is not None for c in found.values()) + 1, "and main"


def test_a_duplicate_may_be_named(pythia_2_8b, capsys):
    hub, stale, second = pythia_2_8b
    step = min(stale - second)
    found = listed(hub, "EleutherAI/pythia-2.8b", f"step{step},step0")
    assert set(chosen(found)) == {"step0", f"step{step}"}
    assert found[f"step{step}"].duplicate_of == "main"
    commit = hub.commit("EleutherAI/pythia-2.8b", f"step{step}")
    assert f"step{step}" in chosen(listed(hub, "EleutherAI/pythia-2.8b", f"{commit},step0"))
    low = min(stale - second)
    arguments = ["list", "--model", "EleutherAI/pythia-2.8b", "--endpoint", hub.url, "--revisions"]
    assert cli.run([*arguments, f"{low}..{low}"]) == 0, "one alone is compared with none"
    assert cli.run([*arguments, "all"]) == 0
    told = capsys.readouterr()
    assert f"86 repeat the weights of another and are left out: step{low} = main, step" in told.err
    assert "duplicate of" in told.out
    assert cli.run([*arguments, "all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["duplicate_of"] is not None for row in rows) == 86


def test_a_range_of_nothing_but_duplicates(loopback_hub, capsys):
    contents = {"main": bins("final"), "step0": bins("a"), **{f"step{n}": bins("final") for n in (10, 20)}}
    loopback_hub.add_repo("org/model", revisions=contents | {"step30": bins("b")})
    assert cli.run(["list", "--model", "org/model", "--endpoint", loopback_hub.url, "--revisions", "10..20"]) == 2
    told = capsys.readouterr().err
    assert "--revisions 10..20 selects nothing else of org/model. Of 2 checkpoints that were looked at, 2 rep" in told
    assert "step10 = main, step20 = main" in told
    assert "Name one" in told


def test_pythia_12b_shares_a_shard(loopback_hub):
    contents = {f"step{step}": bins(*(f"{step} {part}" for part in range(3))) for step in PYTHIA}
    for step in (50000, 58000):
        contents[f"step{step}"] = bins("143000 0", f"{step} 1", f"{step} 2")
    loopback_hub.add_repo("EleutherAI/pythia-12b", revisions=contents | {"main": contents["step143000"]})
    found = listed(loopback_hub, "EleutherAI/pythia-12b")
    partial = {name: c.partial_duplicate_of for name, c in found.items() if c.partial_duplicate_of}
    assert partial == {"step50000": "step143000", "step58000": "step143000"}
    assert not any(c.duplicate_of for c in found.values())
    assert len(chosen(found)) == 152


def test_olmo_2_7b_has_a_trio(loopback_hub):
    steps = [1000, 101000, 175000, 300000, 928646]
    contents = {
        f"stage1-step{step}-tokens{step // 238}B": bins("trio" if step in steps[1:4] else str(step)) for step in steps
    }
    loopback_hub.add_repo("allenai/OLMo-2-1124-7B", revisions={"main": bins("annealed"), **contents})
    found = listed(loopback_hub, "allenai/OLMo-2-1124-7B")
    first, second, third = (c for c in found.values() if c.repeats)
    assert (first.step, second.step, third.step) == tuple(steps[1:4])
    assert first.duplicate_of == second.name, "none of a trio in the middle can be trusted"
    assert second.duplicate_of == third.duplicate_of == first.name
    assert [found[name].step for name in chosen(found)] == [1000, 928646]


def test_the_first_steps_of_pythia_are_step_0(loopback_hub):
    contents = {f"step{n}": bins("initial" if n <= 2 else str(n)) for n in (0, 1, 2, 4, 8)}
    loopback_hub.add_repo("EleutherAI/pythia-14m", revisions={"main": contents["step8"], **contents})
    found = listed(loopback_hub, "EleutherAI/pythia-14m")
    assert {n: c.duplicate_of for n, c in found.items() if c.repeats} == {"step1": "step0", "step2": "step0"}
    assert chosen(found) == ["step0", "step4", "step8"]


def test_a_file_of_two_that_cannot_be_trusted_marks_a_third(loopback_hub):
    """Two of equal weights, and a third that has one of their files: none of the three can be trusted."""
    contents = {f"step{n}": bins(f"{n} a", f"{n} b") for n in (0, 1, 2, 3, 4)}
    contents["step1"] = contents["step2"] = bins("x", "y")
    contents["step3"] = bins("x", "3 b")
    loopback_hub.add_repo("org/model", revisions=contents)
    found = listed(loopback_hub, "org/model")
    marks = {name: (c.duplicate_of, c.partial_duplicate_of) for name, c in found.items() if c.repeats}
    assert marks == {"step1": ("step2", None), "step2": ("step1", None), "step3": (None, "step1")}
    assert chosen(found) == ["step0", "step4"]


def test_each_tenth_stays_each_tenth(loopback_hub):
    """Only a number of models is filled up: others would not stand where they are asked for."""
    steps = range(31)
    contents = {f"step{n}": bins("final" if n in (10, 30) else str(n)) for n in steps}
    loopback_hub.add_repo("org/model", revisions={"main": bins("final"), **contents})
    assert chosen(listed(loopback_hub, "org/model", "every:10")) == ["step0", "step20", "step30"]
    assert loopback_hub.count("GET", "*/tree/*") == 5
    assert chosen(listed(loopback_hub, "org/model", "5..25/5")) == ["step5", "step15", "step20", "step25"]
    assert chosen(listed(loopback_hub, "org/model", "linear:4")) == ["step0", "step9", "step20", "step30"]


def test_a_mistyped_selector_is_told_as_such_whatever_is_known(loopback_hub):
    contents = {f"step{n}": bins("same" if n in (1, 2) else str(n)) for n in range(5)}
    loopback_hub.add_repo("org/model", revisions=contents)
    known = list_checkpoints("org/model", "all", endpoint=loopback_hub.url)
    with pytest.raises(InputError, match=r"has no checkpoint 'stp3'; nearest: step"):
        list_checkpoints("org/model", "stp3", endpoint=loopback_hub.url, known=known)
    with pytest.raises(InputError, match=r"selects nothing else .* Of 2 .* step1 = step2, step2 = step1\. Name"):
        list_checkpoints("org/model", "1..2", endpoint=loopback_hub.url, known=known)


def test_what_was_found_once_is_not_forgotten(pythia_2_8b):
    """A smaller selection on the same run neither asks again nor takes for good what was found out before."""
    hub, stale, _ = pythia_2_8b
    everything = list_checkpoints("EleutherAI/pythia-2.8b", "all", endpoint=hub.url)
    hub.forget_requests()
    again = list_checkpoints("EleutherAI/pythia-2.8b", "log:20", endpoint=hub.url, known=everything)
    assert hub.count("GET", "*/tree/*") == 1, "main alone"
    assert len(again.chosen) == 20
    assert {c.step for c in again if c.repeats} == stale
    assert [c.duplicate_of for c in again] == [c.duplicate_of for c in everything]


def test_bloom_tags_of_one_model(loopback_hub):
    steps = (1000, 10000, 100000, 200000, 300000)
    tags = {f"global_step{n}": bins("same" if n in (100000, 200000) else str(n)) for n in steps}
    loopback_hub.add_repo("bigscience/bloom-7b1-intermediate", revisions={"main": bins("main")}, tags=tags)
    found = listed(loopback_hub, "bigscience/bloom-7b1-intermediate")
    assert found["global_step100000"].duplicate_of == "global_step200000"
    assert found["global_step200000"].duplicate_of == "global_step100000"
    assert len(chosen(found)) == 3


@pytest.fixture
def olmo_7b(loopback_hub, monkeypatch):
    """Forty branches of one weight file each, which are very many here; what a listing by trees alone says of them."""
    steps = range(0, 40000, 1000)
    contents = {f"step{n}-tokens{n // 250}B": bins("twice" if n in (5000, 6000) else str(n)) for n in steps}
    loopback_hub.add_repo("allenai/OLMo-7B", revisions={"main": bins("annealed"), **contents})
    by_tree = listed(loopback_hub, "allenai/OLMo-7B")
    monkeypatch.setattr(listing, "MANY_TREES", 30)
    return loopback_hub, by_tree


def weights_alone(found: dict[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Without the hashes of what is no weights."""
    return {
        name: replace(c, files=c.files and tuple(replace(file, git_sha1=None) for file in c.files))
        for name, c in found.items()
    }


@pytest.mark.parametrize("cdn", [False, True], ids=["plain", "redirects"])
def test_very_many_are_asked_for_by_their_weights_alone(olmo_7b, cdn):
    """Beyond the limit of the Hub's interface the hashes come from the larger allowance, and are the same."""
    hub, by_tree = olmo_7b
    hub.cdn = cdn
    by_head = listed(hub, "allenai/OLMo-7B")
    assert weights_alone(by_head) == weights_alone(by_tree)
    assert hub.count("HEAD", "*/pytorch_model.bin") == hub.count("HEAD") == 39
    assert hub.count("GET", "*/tree/*") == 2, "one for the names of the files, one for main"


def test_of_very_many_those_with_other_files_are_asked_for_by_tree(olmo_7b):
    hub, by_tree = olmo_7b
    name = "step9000-tokens36B"
    hub.set_revision("allenai/OLMo-7B", name, {"config.json": b"{}", "model.safetensors": b"another form"})
    found = listed(hub, "allenai/OLMo-7B")
    assert found[name].format == "safetensors"
    assert hub.count("GET", "*/tree/*") == 3
    hub.fault("*/pytorch_model.bin", method="HEAD", status=405, times=100)
    found = listed(hub, "allenai/OLMo-7B")
    assert {c.name: c.duplicate_of for c in found.values()} == {c.name: c.duplicate_of for c in by_tree.values()}
    assert hub.count("GET", "*/tree/*") == 41, "a server that does not answer this is asked as always"


def test_weights_in_many_files_are_asked_for_by_tree(loopback_hub, monkeypatch):
    contents = {f"step{n}": bins(*(f"{n} {part}" for part in range(5))) for n in range(8)}
    loopback_hub.add_repo("org/sharded", revisions=contents)
    monkeypatch.setattr(listing, "MANY_TREES", 4)
    assert len(chosen(listed(loopback_hub, "org/sharded"))) == 8
    assert loopback_hub.count("HEAD") == 0


# The rule


def checkpoint(step: int | None, *hashes: str | None) -> Checkpoint:
    name = "main" if step is None else f"step{step}"
    shards = len(hashes)
    names = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    files = tuple(RepoFile(name, 1, digest) for name, digest in zip(names, hashes, strict=True))
    return Checkpoint(name=name, kind="branch", step=step, files=files if shards else None)


@st.composite
def listings(draw):
    steps = draw(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12))
    shards = draw(st.integers(1, 3))
    contents = st.lists(st.sampled_from([*"abcdef", None]), min_size=shards, max_size=shards)
    found = [checkpoint(step, *draw(contents)) for step in steps]
    return [*found, *([checkpoint(None, *draw(contents))] if draw(st.booleans()) else [])]


@given(listings(), st.randoms())
def test_the_rule_holds_for_any_listing(found, chance):
    ordered = in_training_order(found)
    marked = mark_duplicates(ordered)
    assert mark_duplicates(marked) == marked
    chance.shuffle(found)
    assert mark_duplicates(in_training_order(found)) == marked
    by_name = {c.name: c for c in marked}
    last = [c for c in marked if c.step is not None][-1]

    def hashes(c):
        return [file.sha256 for file in c.files]

    for c in marked:
        known = None not in hashes(c)
        equals = [o for o in marked if o.name != c.name and known and hashes(o) == hashes(c)]
        shared = [o for o in marked if o.name != c.name and known and None not in hashes(o) and
                  set(hashes(o)) & set(hashes(c))]  # fmt: skip
        if c.duplicate_of is not None:
            assert hashes(by_name[c.duplicate_of]) == hashes(c)
            assert c.duplicate_of != c.name
        if c.partial_duplicate_of is not None:
            assert c.partial_duplicate_of in {o.name for o in shared}
            assert c.duplicate_of is None
        if equals and not c.repeats:
            assert c.step == 0 or c is last or c.name == "main"
            assert all(o.duplicate_of == c.name for o in equals)
        if not shared:
            assert not c.repeats
        if c.step == 0:
            assert c.duplicate_of is None


# End to end


def test_a_sweep_leaves_duplicates_out(loopback_hub, tiny_run, tmp_path, no_figures, capsys):
    hub, out = loopback_hub, tmp_path / "run"
    served = branches(tiny_run)
    stale = {"step3": served["step8"], "step5": served["step8"]}
    hub.add_repo("me/model", revisions=served | stale)
    arguments = ["--model", "me/model", "--endpoint", hub.url, *PYDOC, "--revisions"]
    assert cli.run([*arguments, "all", "--out", str(out)]) == 0
    assert "2 repeat the weights of another and are left out: step3 = step8, step5 = step8" in capsys.readouterr().err
    moved = {request.path.split("/")[4] for request in hub.matching("GET", "*/model.safetensors")}
    assert moved == {hub.commit("me/model", f"step{step}") for step in (0, 1, 2, 4, 8)}
    kept = json.loads((out / "listing.json").read_text())["checkpoints"]
    assert {c["name"]: c["duplicate_of"] for c in kept if c["duplicate_of"]} == {"step3": "step8", "step5": "step8"}
    hub.add_repo("me/clean", revisions=served)
    clean = ["--model", "me/clean", *arguments[2:]]
    assert cli.run([*clean, "all", "--out", str(tmp_path / "clean")]) == 0
    assert_frame_equal(numbers(rt.read_scores(out)), numbers(rt.read_scores(tmp_path / "clean")))
    assert not leftovers(out)
    left_out = rt.read_duplicates(out)
    assert left_out.select("revision", "step", "duplicate_of", "partial").rows() == [
        ("step3", 3, "step8", False), ("step5", 5, "step8", False)
    ]  # fmt: skip
    assert rt.read_duplicates(tmp_path / "clean").is_empty()
    assert rt.read_duplicates(tmp_path / "none").is_empty()
    assert cli.run(["plot", str(out), "--format", "png"]) == 0
    table = pl.read_csv(out / "figures" / "importance.csv")
    assert set(table.filter(pl.col("value").is_null())["revision"]) == {"step3", "step5"}
    assert set(pl.read_csv(out / "figures" / "loss.csv")["revision"]) == {f"step{step}" for step in (0, 1, 2, 4, 8)}


def local_run(folder, tiny_run, steps):
    """Folders named as these steps, each with the weights of one of the tiny run's."""
    for name, step in steps.items():
        (folder / name).mkdir(parents=True)
        for file, source in checkpoint_files(tiny_run, step).items():
            (folder / name / file).write_bytes(source.read_bytes())
    return folder


def test_local_duplicates_are_found_once_they_are_read(tiny_run, tmp_path, no_figures, capsys):
    steps = {"checkpoint-0": 0, "checkpoint-2": 2, "checkpoint-6": 8, "checkpoint-8": 8}
    run, out = local_run(tmp_path / "run", tiny_run, steps), tmp_path / "out"
    arguments = ["--model", str(run), "--out", str(out), *PYDOC, "--revisions"]
    assert cli.run([*arguments, "all"]) == 0
    assert "checkpoint-6 = checkpoint-8" in capsys.readouterr().err
    assert set(rt.read_scores(out)["revision"]) == {"checkpoint-0", "checkpoint-2", "checkpoint-8"}
    assert cli.run([*arguments, "checkpoint-6"]) == 0, "it may be named"


def test_local_duplicates_are_replaced_and_told_in_one_line(tiny_run, tmp_path, no_figures, capsys):
    steps = {f"checkpoint-{n}": 8 for n in (5, 6, 7, 8)} | {f"checkpoint-{n}": n for n in (0, 1, 2, 4)}
    run, out = local_run(tmp_path / "run", tiny_run, steps), tmp_path / "out"
    arguments = ["--model", str(run), "--out", str(out), *PYDOC, "--revisions", "linear:4"]
    assert cli.run(arguments) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(told) == 1
    assert "= checkpoint-8" in told[0]
    found = set(rt.read_scores(out)["revision"])
    assert len(found) == 4
    assert {"checkpoint-0", "checkpoint-8"} < found <= {f"checkpoint-{n}" for n in (0, 1, 2, 4, 8)}


def test_a_sweep_of_very_many_fetches_what_each_has(loopback_hub, tiny_run, tmp_path, no_figures, monkeypatch):
    """Their configs were not asked for while they were listed; one of them has another length."""
    hub, out = loopback_hub, tmp_path / "run"
    served = branches(tiny_run)
    config = served["step4"]["config.json"].read_bytes()
    hub.add_repo("me/model", revisions=served | {"step4": served["step4"] | {"config.json": config + b"\n"}})
    arguments = ["--endpoint", hub.url, "--revisions", "all", "--quiet", *PYDOC]
    assert cli.run(["--model", "me/model", "--out", str(tmp_path / "few"), *arguments]) == 0
    monkeypatch.setattr(listing, "MANY_TREES", 3)
    hub.forget_requests()
    assert cli.run(["--model", "me/model", "--out", str(out), *arguments]) == 0
    assert hub.count("HEAD", "*/model.safetensors") >= 4
    assert_frame_equal(rt.read_scores(out).drop("identity"), rt.read_scores(tmp_path / "few").drop("identity"))


def test_named_duplicates_are_scored_marked_and_hatched(loopback_hub, tiny_run, tmp_path, capsys):
    hub, out = loopback_hub, tmp_path / "run"
    served = branches(tiny_run)
    hub.add_repo("me/model", revisions=served | {"step3": served["step8"], "step5": served["step8"]})
    arguments = ["--model", "me/model", "--endpoint", hub.url, "--out", str(out), *PYDOC]
    assert cli.run([*arguments, "--revisions", "all,step3"]) == 0
    told = capsys.readouterr()
    assert "1 repeats the weights of another and is left out: step5 = step8" in told.err
    rows = {line.split()[0]: line.split() for line in told.out.splitlines() if line.startswith("step")}
    assert [row for row in rows if row != "step3"] == [f"step{step}" for step in (0, 1, 2, 4, 8)]
    assert rows["step3"][2:] == [*rows["step8"][2:], "step8"], "the same numbers, and whose they are"
    assert set(rt.read_scores(out)["step"]) == {0, 1, 2, 3, 4, 8}
    table = pl.read_csv(out / "figures" / "importance.csv")
    empty = (
        table.filter(pl.col("value").is_null()).select("revision", "duplicate_of", "partial").unique().sort("revision")
    )
    assert empty.rows() == [("step3", "step8", False), ("step5", "step8", False)]
    assert set(pl.read_csv(out / "figures" / "similarity-depth.csv")["step"]) == {0, 1, 2, 4, 8}
    assert cli.run([*arguments, "--revisions", "all,step3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert {row["revision"]: row["duplicate_of"] for row in rows if row["duplicate_of"]} == {"step3": "step8"}
    drawn = (out / "figures" / ".drawn.json").stat().st_mtime_ns
    assert cli.run([*arguments, "--revisions", "all"]) == 0
    assert (out / "figures" / ".drawn.json").stat().st_mtime_ns == drawn, "nothing has changed"
    hub.set_revision("me/model", "step5", served["step4"] | {"note": b"repaired, and wrong again"})
    assert cli.run([*arguments, "--revisions", "all"]) == 0
    assert (out / "figures" / ".drawn.json").stat().st_mtime_ns != drawn
    assert dict(rt.read_duplicates(out).select("revision", "duplicate_of").rows()) == {
        "step3": "step8", "step4": "step5", "step5": "step4"
    }  # fmt: skip
