import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import LoopbackHub

from redundancy_trace.checkpoints import (
    Checkpoint,
    Listing,
    ParsedName,
    is_local,
    list_checkpoints,
    listing_from_json,
    listing_to_json,
    local_commit,
    needed_files,
    parse_name,
    remembered_from_json,
    tokenizer_files,
    weight_files,
)
from redundancy_trace.checkpoints.ordering import in_training_order, training_positions
from redundancy_trace.checkpoints.selection import select, spread
from redundancy_trace.errors import InputError
from redundancy_trace.hub import RepoFile

B, T = 10**9, 10**12
PYTHIA = ["step0", *(f"step{2**n}" for n in range(10)), *(f"step{n}" for n in range(1000, 144000, 1000))]
OLMO_7B = [f"step{n}-tokens{round(n * 4.424 / 1000)}B" for n in range(0, 558000, 1000)]


# Names: real ones of every family

NAMES = {
    "step512": {"step": 512},
    "step0-tokens0B": {"step": 0, "tokens": 0},
    "step557000-tokens2464B": {"step": 557000, "tokens": 2464 * B},
    "stage1-step0": {"stage": 1, "step": 0},
    "stage1-step928646-tokens3896B": {"stage": 1, "step": 928646, "tokens": 3896 * B},
    "stage2-ingredient3-step23852-tokens51B": {
        "stage": 2, "ingredient": 3, "step": 23852, "tokens": 51 * B,
    },
    "stage3-step11921": {"stage": 3, "step": 11921},
    "step2627139-tokens15T": {"step": 2627139, "tokens": 15 * T},
    "step0753851": {"step": 753851},
    "stage1-step010000-tokens21B": {"stage": 1, "step": 10000, "tokens": 21 * B},
    "step1250-seed-default": {"step": 1250, "seed": "default"},
    "step38750-seed-small-aux-3": {"step": 38750, "seed": "small-aux-3"},
    "step-5125000": {"step": 5125000},
    "stage1-step-3440000": {"stage": 1, "step": 3440000},
    "step-001000-2BT": {"step": 1000, "tokens": 2 * B},
    "step-024000_tokens-0100B-phase1": {"step": 24000, "tokens": 100 * B, "stage": 1},
    "global_step1000": {"step": 1000},
    "global_step420000": {"step": 420000},
    "CrystalCoder_phase1_checkpoint_055500": {"stage": 1, "step": 55500},
    "ckpt_358": {"index": 358},
    "ckpt_000": {"index": 0},
    "checkpoint-400000": {"step": 400000},
    "step_1375": {"step": 1375},
    "extension_step0001220": {"tag": "extension", "step": 1220},
    "train_00220B": {"tokens": 220 * B},
    "240b_tokens": {"tokens": 240 * B},
    "1t_tokens": {"tokens": T},
    "chck_1M": {"index": 1},
}  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), NAMES.items())
def test_names_of_branches_and_tags(name: str, fields: dict[str, object]) -> None:
    assert parse_name(name) == ParsedName(**fields)
    assert parse_name(name, "folder") == ParsedName(**fields)


@pytest.mark.parametrize(
    ("name", "fields"),
    {
        "TinyLlama-1.1B-step-50K-105b": {"step": 50_000, "tokens": 105 * B},
        "TinyLlama-1.1B-intermediate-step-955k-token-2T": {"step": 955_000, "tokens": 2 * T},
        "multiberts-seed_0-step_2000k": {"step": 2_000_000, "seed": "0"},
        "multiberts-seed_4-step_20k": {"step": 20_000, "seed": "4"},
    }.items(),
)
def test_names_of_repositories(name: str, fields: dict[str, object]) -> None:
    assert parse_name(name, "repo") == ParsedName(**fields)
    assert parse_name(name) is None


@pytest.mark.parametrize(
    ("name", "fields"),
    {
        "hf_ckpt/16.78B": {"tokens": 16_780_000_000},
        "iter_0002384": {"step": 2384},
        "my.run_v2-checkpoint-70": {"step": 70},
        "bert_global_step12step": {"step": 12},
    }.items(),
)
def test_names_of_folders(name: str, fields: dict[str, object]) -> None:
    assert parse_name(name, "folder") == ParsedName(**fields)
    assert parse_name(name) is None


NO_CHECKPOINTS = """
    main latest fp32 fp16 float16 bf16 onnx gguf flax refs/pr/1 refs/convert/parquet kestrel deeper-starling it-SFT
    step stepx 1000 step1000-old v1.0
"""


@pytest.mark.parametrize("name", NO_CHECKPOINTS.split())
def test_names_of_other_things(name: str) -> None:
    assert parse_name(name) is None
    assert parse_name(name, "folder") is None


# Order


def refs(*names: str) -> tuple[Checkpoint, ...]:
    found = []
    for name in names:
        parsed = parse_name(name) or ParsedName()
        fields = {key: getattr(parsed, key) for key in ["stage", "ingredient", "seed", "step", "tokens", "index"]}
        found.append(Checkpoint(name=name, kind="branch", commit=hashlib.sha1(name.encode()).hexdigest(), **fields))
    return in_training_order(found)


def names_of(checkpoints: object) -> list[str]:
    return [checkpoint.name for checkpoint in checkpoints]


def test_order_of_stages_ingredients_and_steps() -> None:
    ordered = refs(
        "main",
        "stage2-ingredient2-step1000-tokens5B",
        "stage1-step928646-tokens3896B",
        "stage2-ingredient1-step11931-tokens50B",
        "stage1-step1000-tokens5B",
        "step150-tokens1B",
        "stage2-ingredient1-step1000-tokens5B",
    )
    assert names_of(ordered) == [
        "step150-tokens1B",
        "stage1-step1000-tokens5B",
        "stage1-step928646-tokens3896B",
        "stage2-ingredient1-step1000-tokens5B",
        "stage2-ingredient1-step11931-tokens50B",
        "stage2-ingredient2-step1000-tokens5B",
        "main",
    ]
    assert ordered[0].stage == 1, "early OLMo-2 names carry no stage"
    assert ordered[-1].stage is None
    assert training_positions(ordered[:-1]) == [150, 1000, 928646, 929646, 940577, 929646]


def test_cumulative_steps_are_not_moved() -> None:
    smollm3 = refs("stage3-step-4720000", "stage1-step-40000", "stage1-step-3440000", "stage2-step-3450000")
    assert training_positions(smollm3) == [40000, 3440000, 3450000, 4720000]


def test_named_parts_follow_the_stages() -> None:
    ordered = refs("longctx-step1000", "step50000-tokens210B", "step2627139-tokens15T", "it-SFT", "main")
    assert names_of(ordered)[:3] == ["step50000-tokens210B", "step2627139-tokens15T", "longctx-step1000"]
    assert training_positions(ordered[:3]) == [50000, 2627139, 2628139]


def test_seeds_are_series_of_their_own() -> None:
    ordered = refs("step1250-seed-small-aux-10", "step0-seed-small-aux-9", "step0-seed-default", "step5-seed-default")
    assert names_of(ordered) == [
        "step0-seed-default", "step5-seed-default", "step0-seed-small-aux-9", "step1250-seed-small-aux-10",
    ]  # fmt: skip
    assert training_positions(ordered) == [0, 5, 0, 1250]


def test_index_and_tokens_order_where_names_tell_no_step() -> None:
    assert names_of(refs("ckpt_358", "main", "ckpt_000", "ckpt_012")) == ["ckpt_000", "ckpt_012", "ckpt_358", "main"]
    assert names_of(refs("1t_tokens", "960b_tokens", "240b_tokens")) == ["240b_tokens", "960b_tokens", "1t_tokens"]
    assert training_positions(refs("step100", "ckpt_005")) == [0, 1], "different units share no axis"


# Selection


def chosen(checkpoints: tuple[Checkpoint, ...], revisions: str) -> list[str]:
    return [checkpoints[index].name for index in select(checkpoints, revisions, "org/model")]


def steps(checkpoints: tuple[Checkpoint, ...], revisions: str) -> list[int | None]:
    return [checkpoints[index].step for index in select(checkpoints, revisions, "org/model")]


@pytest.fixture(scope="module")
def pythia() -> tuple[Checkpoint, ...]:
    return refs("main", *PYTHIA)


def test_all_leaves_out_what_is_not_parsed(pythia: tuple[Checkpoint, ...]) -> None:
    assert len(pythia) == 155
    assert chosen(pythia, "all") == PYTHIA


def test_log_on_pythia(pythia: tuple[Checkpoint, ...]) -> None:
    found = steps(pythia, "log:20")
    assert len(found) == 20
    assert found[:11] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert found[-1] == 143000


def test_log_on_olmo_7b() -> None:
    found = steps(refs(*OLMO_7B), "log:20")
    assert len(found) == 20
    assert found[:6] == [0, 1000, 2000, 3000, 4000, 6000]
    assert found[-2:] == [394000, 557000]


def test_every_keeps_first_and_last(pythia: tuple[Checkpoint, ...]) -> None:
    assert chosen(pythia, "every:50") == [PYTHIA[0], PYTHIA[50], PYTHIA[100], PYTHIA[150], PYTHIA[153]]
    assert chosen(pythia, "every:1000") == ["step0", "step143000"]


def test_linear(pythia: tuple[Checkpoint, ...]) -> None:
    assert steps(pythia, "linear:12") == [0, *range(13000, 144000, 13000)]


@pytest.mark.parametrize(
    ("selector", "expected"),
    {
        "1000..4000": [1000, 2000, 3000, 4000],
        "1_000..4k": [1000, 2000, 3000, 4000],
        "1000..6000/2": [1000, 3000, 5000, 6000],
        "..4": [0, 1, 2, 4],
        "142000..": [142000, 143000],
        "step1,step2": [1, 2],
        "step2, step1 ,step2": [1, 2],
        "step14?000": [140000, 141000, 142000, 143000],
        "step[12]": [1, 2],
        "every:1000,step64": [0, 64, 143000],
    }.items(),
)
def test_selectors(pythia: tuple[Checkpoint, ...], selector: str, expected: list[int]) -> None:
    assert steps(pythia, selector) == expected


def test_names_globs_and_commits_reach_unparsed_refs(pythia: tuple[Checkpoint, ...]) -> None:
    main = pythia[-1]
    assert main.name == "main"
    assert chosen(pythia, "main") == ["main"]
    assert chosen(pythia, "ma*") == ["main"]
    assert chosen(pythia, "log:2,main") == ["step0", "step143000", "main"]
    assert chosen(pythia, main.commit) == ["main"]
    assert chosen(pythia, main.commit[:7]) == ["main"]
    assert chosen(pythia, main.commit[:10].upper()) == ["main"]


def test_commit_of_two_refs_means_the_one_in_the_training() -> None:
    both = refs("main", "step5")
    both = tuple(replace(checkpoint, commit="ab" * 20) for checkpoint in both)
    assert chosen(both, "abababa") == ["step5"]


def test_abbreviated_commit_must_be_unique() -> None:
    found = tuple(
        replace(checkpoint, commit=f"abcdef0{number}" + "0" * 32)
        for number, checkpoint in enumerate(refs("step1", "step2"))
    )
    assert chosen(found, "abcdef01") == ["step2"]
    with pytest.raises(InputError, match=r"Several commits .* Give more digits"):
        chosen(found, "abcdef0")


def test_tokens_and_stages() -> None:
    olmo2 = refs(
        "stage1-step1000-tokens5B",
        "stage1-step20000-tokens84B",
        "stage1-step40000-tokens168B",
        "stage2-step1000-tokens5B",
    )
    assert chosen(olmo2, "tokens:5B..100B") == [
        "stage1-step1000-tokens5B", "stage1-step20000-tokens84B", "stage2-step1000-tokens5B",
    ]  # fmt: skip
    assert chosen(olmo2, "tokens:0..0.1T/2") == ["stage1-step1000-tokens5B", "stage2-step1000-tokens5B"]
    assert chosen(olmo2, "stage:2") == ["stage2-step1000-tokens5B"]
    assert chosen(olmo2, "stage:1,stage:2") == names_of(olmo2)


def test_range_counts_what_the_names_count() -> None:
    assert chosen(refs("ckpt_000", "ckpt_100", "ckpt_358"), "50..200") == ["ckpt_100"]
    assert chosen(refs("240b_tokens", "1t_tokens"), "0..500B") == ["240b_tokens"]


def test_names_from_a_file(pythia: tuple[Checkpoint, ...], tmp_path: Path) -> None:
    listed = tmp_path / "names.txt"
    listed.write_text("# two of them\nstep64\n\nstep128  # the later one\n")
    assert chosen(pythia, f"@{listed}") == ["step64", "step128"]
    assert chosen(pythia, f"@{listed},step1") == ["step1", "step64", "step128"]
    listed.write_text("# nothing\n")
    with pytest.raises(InputError, match="the file names nothing"):
        chosen(pythia, f"@{listed}")
    with pytest.raises(InputError, match=r"@nope.txt: the file cannot be read \(No such file"):
        chosen(pythia, "@nope.txt")
    listed.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InputError, match="it is no text"):
        chosen(pythia, f"@{listed}")


@pytest.mark.parametrize(
    ("selector", "message"),
    {
        "": "names nothing. Examples: all, every:10",
        " , ": "names nothing",
        "every:0": "a whole number from 1 on",
        "log:1": "a whole number from 2 on",
        "log:many": "a whole number from 2 on",
        "linear:": "a whole number from 2 on",
        "stage:x": "a whole number from 0 on",
        "stage:2": "its names tell no stage",
        "5000..1000": "is an empty range; write it like",
        "..": "is an empty range",
        "1..5/0": "is an empty range",
        "200000..300000": r"selects nothing of org/model; its steps go from 0 to 143,000",
        "tokens:0..5B": "tell no tokens. Give --tokens-per-step",
        "step1500": "has no checkpoint 'step1500'; nearest: step15000",
        "zzz": "there are 155, such as step0, step1, step2",
        "zzz*": "has no checkpoint 'zzz",
        "0000000": "has no checkpoint '0000000'",
    }.items(),
)
def test_selectors_that_cannot_be_used(pythia: tuple[Checkpoint, ...], selector: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen(pythia, selector)


def test_stage_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="--revisions stage:3 selects nothing of org/model; its stages: 1, 2"):
        chosen(refs("stage1-step0", "stage2-step0"), "stage:3")


@pytest.mark.parametrize("selector", ["all", "log:20", "every:2", "0..5"])
def test_nothing_parses(selector: str) -> None:
    with pytest.raises(
        InputError, match=r"no checkpoints whose names tell a step.* There is: kestrel, main.* --revisions main"
    ):
        chosen(refs("main", "kestrel"), selector)


ticks = st.lists(st.integers(0, 10**7), min_size=1, max_size=60, unique=True).map(
    lambda numbers: refs("main", *(f"step{number}" for number in numbers))
)


@given(ticks, st.integers(2, 70), st.sampled_from(["log", "linear"]))
def test_spread_selections(checkpoints: tuple[Checkpoint, ...], count: int, word: str) -> None:
    parsed = [checkpoint for checkpoint in checkpoints if checkpoint.is_parsed]
    found = select(checkpoints, f"{word}:{count}", "org/model")
    assert len(found) == min(count, len(parsed))
    assert list(found) == sorted(set(found)), "in training order, nothing twice"
    assert {0, len(parsed) - 1} <= set(found) <= set(range(len(parsed)))


@given(ticks, st.integers(1, 70))
def test_every_nth(checkpoints: tuple[Checkpoint, ...], count: int) -> None:
    last = len(checkpoints) - 2
    found = select(checkpoints, f"every:{count}", "org/model")
    assert set(found) == {*range(0, last + 1, count), last}


@given(ticks, st.integers(0, 10**7), st.integers(0, 10**7), st.integers(1, 9))
def test_ranges(checkpoints: tuple[Checkpoint, ...], low: int, high: int, every: int) -> None:
    inside = [i for i, c in enumerate(checkpoints) if c.step is not None and low <= c.step <= high]
    selector = f"{low}..{high}/{every}"
    if not inside:
        with pytest.raises(InputError, match=r"range|selects nothing"):
            select(checkpoints, selector, "org/model")
        return
    found = select(checkpoints, selector, "org/model")
    assert set(found) <= set(inside)
    assert {inside[0], inside[-1]} <= set(found)
    assert len(found) in (math.ceil(len(inside) / every), math.ceil(len(inside) / every) + 1)


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(2, 45))
def test_spread_of_any_points(positions: list[float], count: int) -> None:
    found = spread(positions, count)
    assert found == sorted(set(found))
    assert len(found) == min(count, len(positions))
    if positions:
        assert {0, len(positions) - 1} <= set(found)


# Files


def files(*paths: str) -> list[RepoFile]:
    return [RepoFile(path, 10, None) for path in paths]


def test_safetensors_go_before_bin() -> None:
    weights = weight_files(files("config.json", "pytorch_model.bin", "model.safetensors", "tf_model.h5"))
    assert (weights.format, [file.path for file in weights.files], weights.bytes) == (
        "safetensors", ["model.safetensors"], 10,
    )  # fmt: skip


def test_shards_come_with_their_index() -> None:
    shards = [f"pytorch_model-0000{number}-of-00003.bin" for number in (3, 1, 2)]
    found = files("config.json", "generation_config.json", "pytorch_model.bin.index.json", *shards, "tokenizer.json")
    weights = weight_files(found)
    assert weights.format == "bin"
    assert [file.path for file in weights.files] == sorted(shards)
    assert weights.bytes == 30
    assert [file.path for file in needed_files(found)] == [
        "config.json", "generation_config.json", "pytorch_model.bin.index.json", *sorted(shards),
    ]  # fmt: skip
    assert [file.path for file in tokenizer_files(found)] == ["tokenizer.json"]


def test_complete_set_goes_before_a_broken_one() -> None:
    broken = files("model-00001-of-00002.safetensors", "pytorch_model.bin")
    assert weight_files(broken).format == "bin"
    weights = weight_files(broken[:1])
    assert weights.format == "safetensors"
    assert weights.missing == ("model-00002-of-00002.safetensors",)


def test_other_files_are_no_weights() -> None:
    weights = weight_files(
        files(
            "optimizer.pt",
            "training_args.bin",
            "scheduler.pt",
            "rng_state_0.pth",
            "tf_model.h5",
            "flax_model.msgpack",
            "model.gguf",
            "onnx/model.onnx",
            "consolidated.00.pth",
            "consolidated.safetensors",
            "adapter_model.safetensors",
            "iter_0002384/mp_rank_00/model_optim_rng.pt",
            "checkpoint-1/model.safetensors",
        )
    )
    assert (weights.format, weights.files, weights.bytes) == (None, (), None)


# Listing over the Hub


def one_checkpoint(number: int = 0) -> dict[str, bytes]:
    return {"config.json": b"{}", "model.safetensors": f"weights {number}".encode(), "pytorch_model.bin": b"same"}


def test_listing_of_branches(loopback_hub: LoopbackHub) -> None:
    revisions = {name: one_checkpoint(number) for number, name in enumerate(reversed(PYTHIA))}
    loopback_hub.add_repo("EleutherAI/pythia-70m", revisions={"main": one_checkpoint()} | revisions)
    listing = list_checkpoints("EleutherAI/pythia-70m", endpoint=loopback_hub.url)
    assert len(listing) == 155
    assert names_of(listing) == [*PYTHIA, "main"]
    assert len(listing.chosen) == 20
    first = listing.chosen[0]
    assert (first.name, first.format, first.bytes) == ("step0", "safetensors", len("weights 153"))
    assert first.commit == loopback_hub.commit("EleutherAI/pythia-70m", "step0")
    assert all(c.bytes is None and c.files is None for c in listing if not c.chosen)
    assert loopback_hub.count("GET", "*/refs") == 1
    assert loopback_hub.count("GET", "*/tree/*") == 21, "main is looked at, for the chosen ones might repeat it"
    assert loopback_hub.count() == 22, "no weights are moved"


def test_listing_of_tags_and_converts(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo(
        "bigscience/bloom-560m-intermediate",
        revisions={"main": {"config.json": b"{}"}, "global_step1000": one_checkpoint(7)},
        tags={f"global_step{n}": one_checkpoint(n) for n in (10000, 1000, 100000)},
        converts={"step5": one_checkpoint(5)},
    )
    listing = list_checkpoints("bigscience/bloom-560m-intermediate", "all", endpoint=loopback_hub.url)
    assert [(c.name, c.kind, c.chosen) for c in listing] == [
        ("global_step1000", "branch", True),
        ("global_step10000", "tag", True),
        ("global_step100000", "tag", True),
        ("main", "branch", False),
        ("refs/convert/step5", "other", False),
    ]


def test_rows_and_frame(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo(
        "org/model", revisions={"main": {"README.md": b""}, "stage1-step2-tokens5B": one_checkpoint()}
    )
    listing = list_checkpoints("org/model", "all", endpoint=loopback_hub.url)
    rows = listing.to_json_rows()
    assert json.loads(json.dumps(rows)) == rows
    assert rows[0] == {
        "name": "stage1-step2-tokens5B",
        "kind": "branch",
        "commit": loopback_hub.commit("org/model", "stage1-step2-tokens5B"),
        "stage": 1,
        "ingredient": None,
        "seed": None,
        "step": 2,
        "tokens": 5 * B,
        "bytes": 9,
        "format": "safetensors",
        "duplicate_of": None,
        "partial_duplicate_of": None,
        "chosen": True,
    }
    assert list(rows[0]) == list(listing.to_frame().columns)
    assert listing.to_frame().schema["step"] == pl.Int64
    assert listing.to_frame().rows(named=True) == rows
    assert Listing("org/model", "hub", ()).to_frame().height == 0


def test_a_listing_is_short_in_a_notebook(run: Path) -> None:
    for revisions, shown in (
        ("log:2", f"Listing({str(run)!r}: 3 refs, 2 chosen, checkpoint-3 … checkpoint-100)"),
        ("checkpoint-20", f"Listing({str(run)!r}: 3 refs, 1 chosen, checkpoint-20)"),
    ):
        listing = list_checkpoints(str(run), revisions)
        assert repr(listing) == shown
        html = listing._repr_html_()
        assert html.count("<tr>") == 2 + len(listing)  # names and types of the columns, rows
        assert "checkpoint-100" in html


def test_listing_survives_json(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/model", revisions={"main": {}, "step1": one_checkpoint(1), "step2": one_checkpoint(2)})
    listing = list_checkpoints("org/model", "step2", endpoint=loopback_hub.url)
    remembered = {("/a/b", 3, 5): "f" * 64}
    text = json.dumps(listing_to_json(listing, remembered))
    assert listing_from_json(json.loads(text)) == listing
    assert remembered_from_json(json.loads(text)) == remembered
    with pytest.raises(InputError, match=r"listing.json is not one of this program"):
        listing_from_json({"model": "x"})


def test_listing_under_faults(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/model", revisions={f"step{n}": one_checkpoint(n) for n in range(30)})
    undisturbed = list_checkpoints("org/model", "all", endpoint=loopback_hub.url)
    loopback_hub.fault("*/refs", status=503, times=2)
    loopback_hub.fault("*/tree/*", status=429, times=20)
    assert list_checkpoints("org/model", "all", endpoint=loopback_hub.url) == undisturbed


def test_commits_that_no_ref_points_at(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/model", revisions={"main": {}, "step1": one_checkpoint(1)})
    old = loopback_hub.commit("org/model", "step1")
    loopback_hub.set_revision("org/model", "step1", one_checkpoint(2))
    listing = list_checkpoints("org/model", f"{old},step1", endpoint=loopback_hub.url)
    assert [(c.name, c.kind, c.commit) for c in listing.chosen][1] == (old, "other", old)
    with pytest.raises(InputError, match="has no commit 0000000"):
        list_checkpoints("org/model", "0" * 40, endpoint=loopback_hub.url)


def test_listing_of_main_only(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/model", revisions={"main": one_checkpoint()})
    with pytest.raises(InputError, match="--revisions main"):
        list_checkpoints("org/model", endpoint=loopback_hub.url)
    assert names_of(list_checkpoints("org/model", "main", endpoint=loopback_hub.url).chosen) == ["main"]


def test_tokens_per_step(loopback_hub: LoopbackHub) -> None:
    names = ["stage1-step0", "stage1-step1000", "stage2-step500", "stage2-step600-tokens7B"]
    loopback_hub.add_repo(
        "org/model", revisions={"main": {}} | {name: one_checkpoint(n) for n, name in enumerate(names)}
    )
    listing = list_checkpoints("org/model", "tokens:0..3B", endpoint=loopback_hub.url, tokens_per_step=2 * 10**6)
    assert [c.tokens for c in listing] == [0, 2 * B, 3 * B, 7 * B, None]
    assert names_of(listing.chosen) == names[:3]


def test_offline_listing(loopback_hub: LoopbackHub) -> None:
    from huggingface_hub import snapshot_download

    loopback_hub.add_repo("org/model", revisions={"main": {}, "step1": one_checkpoint(1), "step2": one_checkpoint(2)})
    snapshot_download("org/model", revision="step2", endpoint=loopback_hub.url)
    loopback_hub.forget_requests()
    listing = list_checkpoints("org/model", offline=True)
    assert [(c.name, c.format) for c in listing.chosen] == [("step2", "safetensors")]
    commit = loopback_hub.commit("org/model", "step2")
    assert list_checkpoints("org/model", commit, offline=True).chosen[0].name == "step2"
    assert loopback_hub.count() == 0


def test_what_the_cache_held_of_a_commit_is_not_taken_for_all_of_it(loopback_hub: LoopbackHub) -> None:
    from huggingface_hub import snapshot_download

    loopback_hub.add_repo("org/model", revisions={"main": {}, "step1": one_checkpoint(1)})
    snapshot_download("org/model", revision="step1", allow_patterns=["config.json"], endpoint=loopback_hub.url)
    cached = list_checkpoints("org/model", "step1", offline=True)
    assert [c.format for c in cached.chosen] == [None]
    recorded = listing_from_json(json.loads(json.dumps(listing_to_json(cached))))
    listed = list_checkpoints("org/model", "step1", endpoint=loopback_hub.url, known=recorded)
    assert [c.format for c in listed.chosen] == ["safetensors"]


def test_offline_listing_of_commits_without_a_name(loopback_hub: LoopbackHub, hub_cache: Path) -> None:
    from huggingface_hub import snapshot_download

    loopback_hub.add_repo("org/model", revisions={"main": one_checkpoint(1)})
    commit = loopback_hub.commit("org/model", "main")
    snapshot_download("org/model", revision=commit, endpoint=loopback_hub.url)
    with pytest.raises(InputError, match=rf"no named revision of org/model, only the commits {commit}.*--offline"):
        list_checkpoints("org/model", offline=True)
    assert [c.commit for c in list_checkpoints("org/model", commit, offline=True).chosen] == [commit]
    shutil.rmtree(hub_cache / "models--org--model" / "snapshots")
    with pytest.raises(InputError, match="holds no files of org/model"):
        list_checkpoints("org/model", offline=True)


# Local folders


def write(folder: Path, content: dict[str, bytes] | None = None) -> Path:
    for path, data in (content or one_checkpoint()).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (100, 20, 3):
        write(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "runs").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("model", "local"),
    {
        "org/model": False, "gpt2": False, "./org": True, "/tmp/x": True, "a/b/c": True, "~/x": True, "..": True,
    }.items(),
)  # fmt: skip
def test_what_is_a_folder(model: str, *, local: bool) -> None:
    assert is_local(model) is local


def test_existing_folder_goes_before_a_repository(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    run.rename(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    listing = list_checkpoints("org/model", "all")
    assert listing.source == "local"
    assert listing.checkpoints[0].path == (tmp_path / "org" / "model" / "checkpoint-3").resolve()


def test_folder_of_checkpoints(run: Path) -> None:
    listing = list_checkpoints(run, "log:20")
    assert listing == list_checkpoints(str(run))
    assert [(c.name, c.kind, c.step, c.commit, c.format) for c in listing] == [
        (f"checkpoint-{step}", "local", step, None, "safetensors") for step in (3, 20, 100)
    ]
    assert all(c.chosen and c.bytes == len(b"weights 0") for c in listing)


def test_final_model_beside_the_checkpoints(run: Path) -> None:
    write(run)
    listing = list_checkpoints(str(run), "all")
    assert [(c.name, c.chosen) for c in listing] == [
        ("checkpoint-3", True), ("checkpoint-20", True), ("checkpoint-100", True), ("run", False),
    ]  # fmt: skip
    assert names_of(list_checkpoints(str(run), "run").chosen) == ["run"]


@pytest.mark.parametrize(("name", "step"), [("checkpoint-500", 500), ("my-model", None)])
def test_single_checkpoint(tmp_path: Path, name: str, step: int | None) -> None:
    folder = write(tmp_path / name)
    listing = list_checkpoints(str(folder))
    assert [(c.name, c.step, c.path, c.chosen) for c in listing] == [(name, step, folder.resolve(), True)]


def test_other_names_of_folders(tmp_path: Path) -> None:
    for name in ("step10-tokens3B", "gpt2-checkpoint-5step", "final"):
        write(tmp_path / name)
    listing = list_checkpoints(str(tmp_path), "all")
    assert [(c.name, c.step, c.tokens) for c in listing] == [
        ("gpt2-checkpoint-5step", 5, None), ("step10-tokens3B", 10, 3 * B), ("final", None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["tmp-checkpoint-40", "checkpoint-40.tmp", ".checkpoint-40", "step40-tmp", "checkpoint-40.part", "TMP_step40"],
)
def test_what_is_still_being_saved_is_no_checkpoint(run: Path, tmp_path: Path, name: str) -> None:
    write(run / name)
    assert [c.step for c in list_checkpoints(str(run), "all")] == [3, 20, 100]
    write(tmp_path / "fresh" / name)
    with pytest.raises(InputError, match=r"holds no checkpoint.*unfinished saves"):
        list_checkpoints(str(tmp_path / "fresh"))
    assert names_of(list_checkpoints(str(run / name)).chosen) == [name], "unless it is what the user names"


def test_local_commit_follows_content_and_is_remembered(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: dict[tuple[str, int, int], str] = {}
    folder = run / "checkpoint-3"
    commit = local_commit(folder, remembered)
    assert len(remembered) == 2, "config and the weights of one format"
    assert len(commit) == 40
    assert commit == local_commit(run / "checkpoint-20", dict(remembered)), "equal content, equal commit"
    listing = list_checkpoints(str(run), "all", remembered=remembered)
    assert [c.commit for c in listing] == [commit, None, None]
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert local_commit(folder, remembered) == commit, "no file is read again"
    (folder / "training_args.bin").write_bytes(b"x")
    assert local_commit(folder, remembered) == commit
    (folder / "model.safetensors").write_bytes(b"weights 9")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert local_commit(folder, remembered) != commit
    manual = "".join(
        f"{name}\t{(folder / name).stat().st_size}\t{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert local_commit(folder, {}) == hashlib.sha256(manual.encode()).hexdigest()[:40]


def test_broken_local_checkpoint_is_listed(run: Path) -> None:
    shutil.rmtree(run / "checkpoint-20")
    (run / "checkpoint-20").mkdir()
    listing = list_checkpoints(str(run), "all")
    assert [c.format for c in listing] == ["safetensors", None, "safetensors"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: run.parent / "rum", r"There is no folder .*rum; did you mean .*run\? A Hub repository is"),
        (lambda run: run / "trainer_state.json", "is a file; name the folder"),
        (lambda run: run / "runs", "holds no checkpoint. It is empty. Expected is"),
        (lambda run: write(run / "x", {"notes.txt": b"", "a/b.txt": b""}), r"In it: a, notes.txt\. Expected"),
        (lambda run: write(run / "y", {"config.json": b"{}"}), r"holds no weights \(y\). In it: config.json"),
        (lambda run: write(run / "z", {"checkpoint-1/optimizer.pt": b""}), r"holds no weights \(checkpoint-1\)"),
    ],
)
def test_folders_that_cannot_be_used(run: Path, make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list_checkpoints(str(make(run)))
