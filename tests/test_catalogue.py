"""Every way in which training checkpoints are published: listed, ordered, selected, fetched and scored right."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from polars.testing import assert_frame_equal
from tiny_runs import PYDOC, STEPS, checkpoint_files, leftovers, numbers, weights_asked

import redundancy_trace as rt
from redundancy_trace import cli
from redundancy_trace.checkpoints import Checkpoint, list_checkpoints, parse_name
from redundancy_trace.checkpoints.ordering import in_training_order, training_positions
from redundancy_trace.checkpoints.tokens import with_tokens
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.fetching import discard, fetch
from redundancy_trace.hub import Hub

B, T = 10**9, 10**12


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model is published: real names, in training order, and what is to come of them.

    Attributes:
        names: The checkpoints; where the reference tells first, last and interval, all by that rule.
        others: What is shown and never chosen by `all`; of `main`, whether it has weights.
        kind: Of the checkpoints.
        first: Fields of the first checkpoint.
        last: Fields of the last one.
        log20: What `log:20` begins with; of up to twenty names it chooses all.
        picks: Selector -> what it chooses: names, or how many.
        suffix: Of the one weight file.
    """

    repo: str
    names: list[str]
    others: dict[str, bool] = field(default_factory=lambda: {"main": True})
    kind: str = "branch"
    first: dict[str, object]
    last: dict[str, object]
    log20: list[str] = field(default_factory=list)
    picks: dict[str, list[str] | int] = field(default_factory=dict)
    weights: str = "model.safetensors"


EMPTY_MAIN = {"main": False}
PYTHIA = ["step0", *(f"step{2**n}" for n in range(10)), *(f"step{n}" for n in range(1000, 144000, 1000))]
PYTHIA_20 = ["step0", *(f"step{2**n}" for n in range(10))]
OLMO_7B = [f"step{n}-tokens{round(n * 4.424 / 1000)}B" for n in range(0, 558000, 1000)]
CHUNKS = [f"ckpt_{n:03}" for n in range(360)]
FAMILIES = [
    Family(
        repo="EleutherAI/pythia-70m", names=PYTHIA, first={"step": 0}, last={"step": 143000}, log20=PYTHIA_20,
        picks={"step5?2": ["step512"], "1000..3000": ["step1000", "step2000", "step3000"]},
    ),
    Family(
        repo="EleutherAI/pythia-12b", names=PYTHIA, first={"step": 0}, last={"step": 143000}, log20=PYTHIA_20,
        weights="pytorch_model.bin",
    ),
    Family(repo="EleutherAI/pythia-160m-v0", names=PYTHIA[11:], first={"step": 1000}, last={"step": 143000}),
    Family(
        repo="EleutherAI/pythia-70m-seed7", names=PYTHIA, others=EMPTY_MAIN, first={"step": 0},
        last={"step": 143000}, log20=PYTHIA_20,
    ),
    Family(
        repo="allenai/OLMo-7B", names=OLMO_7B, first={"step": 0, "tokens": 0},
        last={"step": 557000, "tokens": 2464 * B}, log20=OLMO_7B[:5] + OLMO_7B[6:7],
        picks={"tokens:0..5B": OLMO_7B[:2], "every:10": 57},
    ),
    Family(
        repo="allenai/OLMo-1B", names=["step20000-tokens84B", "step117850-tokens494B"], weights="pytorch_model.bin",
        first={"step": 20000, "tokens": 84 * B}, last={"step": 117850, "tokens": 494 * B},
    ),
    Family(
        repo="allenai/OLMo-1B-hf", names=["step1000-tokens4B", "step738020-tokens3094B"],
        first={"step": 1000, "tokens": 4 * B}, last={"step": 738020, "tokens": 3094 * B},
    ),
    Family(
        repo="allenai/OLMo-1B-0724-hf", names=["step0-tokens0B", "step1000-tokens2B", "step1454000-tokens3048B"],
        first={"step": 0, "tokens": 0}, last={"step": 1454000, "tokens": 3048 * B},
    ),
    Family(
        repo="allenai/OLMo-2-0425-1B", names=["stage1-step300-tokens1B", "stage2-ingredient3-step23852-tokens51B"],
        first={"stage": 1, "step": 300, "tokens": B},
        last={"stage": 2, "ingredient": 3, "step": 23852, "tokens": 51 * B},
        picks={"stage:2": ["stage2-ingredient3-step23852-tokens51B"]},
    ),
    Family(
        repo="allenai/OLMo-2-1124-7B",
        names=["step150-tokens1B", "stage1-step928646-tokens3896B", "stage2-ingredient1-step11931-tokens50B"],
        first={"stage": 1, "step": 150, "tokens": B},
        last={"stage": 2, "ingredient": 1, "step": 11931, "tokens": 50 * B},
        picks={"stage:1": ["step150-tokens1B", "stage1-step928646-tokens3896B"]},
    ),
    Family(
        repo="allenai/OLMo-2-1124-13B", names=["stage1-step596057-tokens5001B"],
        first={"stage": 1, "step": 596057}, last={"tokens": 5001 * B},
    ),
    Family(
        repo="allenai/OLMo-2-0325-32B", names=["stage1-step721901-tokens6056B"],
        first={"stage": 1, "step": 721901}, last={"tokens": 6056 * B},
    ),
    Family(
        repo="allenai/Olmo-3-1025-7B", names=["stage1-step0", "stage1-step1413814", "stage3-step11921"],
        first={"stage": 1, "step": 0, "tokens": None}, last={"stage": 3, "step": 11921},
        picks={"stage:3": ["stage3-step11921"]},
    ),
    Family(
        repo="allenai/Olmo-3-1125-32B", names=["stage1-step656000"], first={"stage": 1}, last={"step": 656000},
    ),
    Family(repo="allenai/Olmo-3-7B-Think", names=["step_1375"], first={"step": 1375}, last={"stage": None}),
    Family(
        repo="allenai/OLMoE-1B-7B-0924", names=["step5000-tokens20B", "step1220000-tokens5117B"],
        others={"fp32": True, "main": True}, first={"step": 5000, "tokens": 20 * B},
        last={"step": 1220000, "tokens": 5117 * B},
    ),
    Family(
        repo="allenai/DataDecide-dolma1_7-1B", names=["step1250-seed-default", "step38750-seed-small-aux-3"],
        first={"step": 1250, "seed": "default"}, last={"step": 38750, "seed": "small-aux-3"},
        picks={"*-seed-default": ["step1250-seed-default"]},
    ),
    Family(
        repo="LLM360/Amber", names=CHUNKS[:359], first={"index": 0, "step": None}, last={"index": 358},
        log20=["ckpt_000", "ckpt_001", "ckpt_002", "ckpt_003"], weights="pytorch_model.bin",
        picks={"350..": CHUNKS[350:359]},
    ),
    Family(
        repo="LLM360/CrystalCoder", weights="pytorch_model.bin",
        names=[f"CrystalCoder_phase{p}_checkpoint_{n:06}" for p, n in ((1, 55500), (2, 214387), (3, 27728))],
        first={"stage": 1, "step": 55500}, last={"stage": 3, "step": 27728},
        picks={"stage:2": ["CrystalCoder_phase2_checkpoint_214387"]},
    ),
    Family(repo="LLM360/K2", names=CHUNKS, first={"index": 0}, last={"index": 359}, log20=CHUNKS[:4]),
    Family(
        repo="HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints",
        names=[f"step-{n}" for n in range(125000, 5125001, 125000)],
        first={"step": 125000}, last={"step": 5125000}, log20=["step-125000", "step-250000"],
    ),
    Family(
        repo="HuggingFaceTB/SmolLM3-3B-checkpoints",
        names=[
            *(f"stage1-step-{n}" for n in range(40000, 3440001, 40000)), "stage3-step-4720000",
            "lc-4k-to-32k-step-4000", "lc-4k-to-32k-step-20000", "lc-32k-to-64k-step-4000",
        ],
        others={"it-SFT": True, "main": False}, first={"stage": 1, "step": 40000},
        last={"stage": None, "step": 4000}, log20=["stage1-step-40000", "stage1-step-80000"],
        picks={"stage:1": 86, "it-*": ["it-SFT"]},
    ),
    Family(
        repo="HuggingFaceFW/ablation-model-fineweb-v1", names=["step-001000-2BT"],
        first={"step": 1000, "tokens": 2 * B}, last={},
    ),
    Family(
        repo="bigscience/bloom-7b1-intermediate", kind="tag", weights="pytorch_model.bin",
        names=["global_step1000", "global_step100000", "global_step200000"],
        first={"step": 1000}, last={"step": 200000},
    ),
    Family(
        repo="marin-community/marin-8b-base",
        names=["kestrel", "ocelot", "jellyfish", "phoenix", "starling", "deeper-starling"],
        first={"index": 0, "step": None}, last={"index": 5}, picks={"*starling": ["starling", "deeper-starling"]},
    ),
    Family(
        repo="swiss-ai/Apertus-8B-2509",
        names=["step50000-tokens210B", "step2627139-tokens15T", "longctx-step50", "longctx-step100"],
        first={"step": 50000, "tokens": 210 * B}, last={"step": 100, "tokens": None},
        picks={"tokens:1T..": ["step2627139-tokens15T"]},
    ),
    Family(
        repo="common-pile/comma-v0.1-1t", names=["stage1-step010000-tokens21B", "stage2-step018000-tokens1002B"],
        first={"stage": 1, "step": 10000, "tokens": 21 * B}, last={"stage": 2, "step": 18000, "tokens": 1002 * B},
    ),
    Family(
        repo="OpenLLM-France/Lucie-7B", names=["step0005000", "step0753851", "extension_step0001220"],
        first={"step": 5000}, last={"step": 1220},
    ),
    Family(
        repo="jhu-clsp/ettin-decoder-17m", names=["step2999", "step140884"],
        first={"step": 2999}, last={"step": 140884},
    ),
    Family(
        repo="m-a-p/neo_scalinglaw_250M", kind="subfolder", names=["hf_ckpt/16.78B"], others=EMPTY_MAIN,
        first={"tokens": 16_780_000_000, "subfolder": "hf_ckpt/16.78B"}, last={"step": None},
    ),
    Family(
        repo="BAAI/Aquila-135M-Intermediate", kind="subfolder", names=["hf_ckpt/16.78B"], others=EMPTY_MAIN,
        first={"tokens": 16_780_000_000}, last={}, picks={"hf_ckpt/*": ["hf_ckpt/16.78B"]},
    ),
    Family(
        repo="bs-modeling-metadata/checkpoints_v0.4", kind="subfolder", names=["checkpoint-10000step"],
        others=EMPTY_MAIN, first={"step": 10000}, last={}, weights="pytorch_model.bin",
    ),
    Family(
        repo="baichuan-inc/Baichuan2-7B-Intermediate-Checkpoints", weights="pytorch_model.bin", others=EMPTY_MAIN,
        names=[f"train_{n:05}B" for n in range(220, 2421, 220)], first={"tokens": 220 * B}, last={"tokens": 2420 * B},
        picks={"tokens:0..500B": ["train_00220B", "train_00440B"]},
    ),
    Family(
        repo="togethercomputer/RedPajama-INCITE-7B-Base", weights="pytorch_model.bin",
        names=["240b_tokens", "960b_tokens", "1t_tokens"], first={"tokens": 240 * B}, last={"tokens": T},
    ),
    Family(
        repo="stabilityai/stablelm-2-1_6b", names=["global_step420000"], first={"step": 420000}, last={},
    ),
    Family(
        repo="stanford-crfm/alias-gpt2-small-x21", names=["checkpoint-10", "checkpoint-400000"],
        first={"step": 10}, last={"step": 400000}, weights="pytorch_model.bin",
    ),
    Family(
        repo="stanford-crfm/battlestar-gpt2-small-x49", kind="tag", names=["checkpoint-10", "checkpoint-400000"],
        first={"step": 10}, last={"step": 400000}, weights="pytorch_model.bin",
    ),
    Family(
        repo="BabyLM-community/babylm-baseline-100m-gpt2",
        names=[f"chck_{n}M" for n in (*range(1, 10), *range(10, 101, 10))],
        first={"index": 1, "tokens": None}, last={"index": 100},
    ),
]  # fmt: skip


def publish(hub: LoopbackHub, family: Family) -> None:
    """Put a family on the Hub, in an order that is not that of the training."""

    def model(name: str) -> dict[str, bytes]:
        return {"config.json": b"{}", family.weights: name.encode(), "zero_pp_rank_0_mp_rank_00_optim_states.pt": b"o"}

    named = {name: model(name) for name in sorted(family.names, key=lambda name: name[::-1])}
    content = {n: model(n) if full else {"README.md": b"", ".gitattributes": b""} for n, full in family.others.items()}
    if family.kind == "subfolder":
        content["main"] |= {f"{folder}/{path}": data for folder, own in named.items() for path, data in own.items()}
        content["main"] |= {"pretrain/iter_0002000/mp_rank_00/model_optim_rng.pt": b"raw"}
    tags = named if family.kind == "tag" else {}
    hub.add_repo(family.repo, revisions=content | (named if family.kind == "branch" else {}), tags=tags)


def names_of(checkpoints: object) -> list[str]:
    return [checkpoint.name for checkpoint in checkpoints]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.repo)
def test_a_family_is_listed_ordered_and_selected(loopback_hub: LoopbackHub, family: Family) -> None:
    publish(loopback_hub, family)
    listing = list_checkpoints(family.repo, "all", endpoint=loopback_hub.url)
    assert names_of(listing) == [*family.names, *family.others]
    assert names_of(listing.chosen) == family.names
    assert {c.kind for c in listing.chosen} == {family.kind}
    suffix = {"model.safetensors": "safetensors", "pytorch_model.bin": "bin"}[family.weights]
    assert all((c.format, c.bytes) == (suffix, len(c.name)) for c in listing.chosen), "of optimizer states nothing"
    for checkpoint, fields in ((listing.checkpoints[0], family.first), (listing.chosen[-1], family.last)):
        assert {name: getattr(checkpoint, name) for name in fields} == fields
    log20 = names_of(list_checkpoints(family.repo, endpoint=loopback_hub.url, known=listing).chosen)
    assert len(log20) == min(20, len(family.names))
    assert log20[: len(family.log20)] == family.log20
    assert (log20[0], log20[-1]) == (family.names[0], family.names[-1])
    for selector, expected in family.picks.items():
        chosen = names_of(list_checkpoints(family.repo, selector, endpoint=loopback_hub.url, known=listing).chosen)
        assert (len(chosen) if isinstance(expected, int) else chosen) == expected
    if not family.others["main"]:
        with pytest.raises(
            InputError, match=r"main of .* has no weights that can be read; it holds .*README.md.*Checkpoints"
        ):
            list_checkpoints(family.repo, "main", endpoint=loopback_hub.url)


# Names without a place in the training


@pytest.mark.parametrize(
    ("repo", "refs"),
    {
        "allenai/OLMo-7B-hf": ["main"],
        "EleutherAI/gpt-neox-20b": ["float16", "main"],
        "cerebras/Cerebras-GPT-111M": ["main"],
        "Zyphra/Zamba-7B-v1-phase1": ["main"],
        "utter-project/EuroLLM-1.7B": ["main"],
        "someone/marin-8b-copy": ["deeper-starling", "kestrel", "main"],
    }.items(),
)
def test_names_that_tell_nothing_are_shown_and_never_chosen(
    loopback_hub: LoopbackHub, repo: str, refs: list[str]
) -> None:
    one = {"config.json": b"{}", "model.safetensors": b"weights"}
    loopback_hub.add_repo(repo, revisions=dict.fromkeys(refs, one))
    for selector in ("all", "log:20"):
        with pytest.raises(
            InputError, match=rf"no checkpoints whose names tell a step.*: {', '.join(refs)}\. To score"
        ):
            list_checkpoints(repo, selector, endpoint=loopback_hub.url)
    loopback_hub.forget_requests()
    listing = list_checkpoints(repo, refs[0], endpoint=loopback_hub.url)
    assert (names_of(listing), names_of(listing.chosen)) == (refs, refs[:1])


# One repository a checkpoint

TINY = [
    "TinyLlama-1.1B-step-50K-105b",
    "TinyLlama-1.1B-intermediate-step-955k-token-2T",
    "TinyLlama-1.1B-intermediate-step-1431k-3T",
]
SEED_0 = [f"multiberts-seed_0-step_{k}k" for k in (*range(0, 201, 20), *range(300, 2001, 100))]


def own_repositories(hub: LoopbackHub, owner: str, names: list[str]) -> None:
    for name in names:
        hub.add_repo(f"{owner}/{name}", revisions={"main": {"config.json": b"{}", "pytorch_model.bin": name.encode()}})


def test_tinyllama_is_a_run_of_repositories(loopback_hub: LoopbackHub) -> None:
    hub = loopback_hub
    own_repositories(hub, "TinyLlama", [*reversed(TINY), "TinyLlama-1.1B-Chat-v1.0"])
    listing = list_checkpoints("TinyLlama/TinyLlama-1.1B", "log:2", endpoint=hub.url)
    assert [(c.name, c.kind, c.repo, c.step, c.tokens, c.chosen) for c in listing] == [
        (TINY[0], "repo", f"TinyLlama/{TINY[0]}", 50_000, 105 * B, True),
        (TINY[1], "repo", f"TinyLlama/{TINY[1]}", 955_000, 2 * T, False),
        (TINY[2], "repo", f"TinyLlama/{TINY[2]}", 1_431_000, 3 * T, True),
    ]
    commits = [hub.commit(f"TinyLlama/{name}", "main") for name in TINY]
    assert [c.commit for c in listing] == [commits[0], None, commits[2]], "asked of the chosen ones only"
    assert [c.bytes for c in listing.chosen] == [len(TINY[0]), len(TINY[2])]
    assert hub.count() == 1 + 2 + 2, "one search; main and tree of the chosen ones"
    assert listing.notes == ()
    assert names_of(list_checkpoints("TinyLlama/TinyLlama-1.1B", "all", endpoint=hub.url).chosen) == TINY
    assert names_of(list_checkpoints("PY007/TinyLlama-1.1B", "all", endpoint=hub.url).chosen) == TINY
    with pytest.raises(InputError, match=f"nearest: .*{TINY[0]}"):
        list_checkpoints("TinyLlama/TinyLlama-1.1B", "TinyLlama-1.1B-step-50K", endpoint=hub.url)


def test_a_run_may_be_named_by_any_one_of_its_repositories(loopback_hub: LoopbackHub) -> None:
    """The Hub may know more of them than the table."""
    hub = loopback_hub
    more = "TinyLlama-1.1B-intermediate-step-480k-1T"
    own_repositories(hub, "TinyLlama", [*TINY, more, "TinyLlama-1.1B-Chat-v1.0"])
    listing = list_checkpoints(f"TinyLlama/{more}", "all", endpoint=hub.url)
    assert names_of(listing) == [TINY[0], more, *TINY[1:], "main"]
    assert names_of(listing.chosen) == names_of(listing)[:-1]
    assert listing.notes == (
        f"TinyLlama/{more} is one checkpoint of a run of 4; --revisions main means it alone.",
    )  # fmt: skip
    alone = list_checkpoints(f"TinyLlama/{more}", "main", endpoint=hub.url).chosen
    assert [(c.kind, c.bytes) for c in alone] == [("branch", len(more))]
    # One with checkpoints of its own means these.
    one = {"config.json": b"{}", "model.safetensors": b"w"}
    hub.add_repo(f"TinyLlama/{TINY[0]}", revisions=dict.fromkeys(["main", "step1", "step2"], one))
    assert names_of(list_checkpoints(f"TinyLlama/{TINY[0]}", "all", endpoint=hub.url)) == ["step1", "step2", "main"]
    with pytest.raises(InputError, match="no checkpoints whose names tell a step"):
        list_checkpoints("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "all", endpoint=hub.url)


@pytest.mark.parametrize("fault", [{"status": 404}, {"body": b'{"error": "no"}'}, {"body": b"<html>"}, {"status": 403}])
def test_a_search_without_a_sensible_answer_leaves_what_is_known(
    loopback_hub: LoopbackHub, fault: dict[str, object]
) -> None:
    own_repositories(loopback_hub, "TinyLlama", TINY)
    loopback_hub.fault("/api/models", **fault)
    listing = list_checkpoints("TinyLlama/TinyLlama-1.1B", "all", endpoint=loopback_hub.url)
    assert names_of(listing.chosen) == TINY
    assert [note[:36] for note in listing.notes] == ["The Hub was not to be asked which re"]


def test_a_repository_that_is_gone_is_told_and_the_others_stay(loopback_hub: LoopbackHub) -> None:
    own_repositories(loopback_hub, "TinyLlama", TINY[1:])
    listing = list_checkpoints("TinyLlama/TinyLlama-1.1B", "all", endpoint=loopback_hub.url)
    assert [c.commit is None for c in listing.chosen] == [True, False, False]
    assert [note.split(" was not found")[0] for note in listing.notes] == [f"TinyLlama/{TINY[0]}"]
    with pytest.raises(InputError, match=f"{TINY[0]} was not found"):
        list_checkpoints("TinyLlama/TinyLlama-1.1B", TINY[0], endpoint=loopback_hub.url)


def test_offline_a_run_is_what_the_cache_has_of_it(loopback_hub: LoopbackHub) -> None:
    from huggingface_hub import snapshot_download

    own_repositories(loopback_hub, "TinyLlama", TINY)
    snapshot_download(f"TinyLlama/{TINY[1]}", endpoint=loopback_hub.url)
    loopback_hub.forget_requests()
    listing = list_checkpoints("TinyLlama/TinyLlama-1.1B", "all", offline=True, endpoint=loopback_hub.url)
    assert [(c.name, c.commit, c.format) for c in listing] == [
        (TINY[1], loopback_hub.commit(f"TinyLlama/{TINY[1]}", "main"), "bin")
    ]
    assert loopback_hub.count() == 0


def test_multiberts_are_five_series_of_repositories(loopback_hub: LoopbackHub) -> None:
    names = [name.replace("seed_0", f"seed_{seed}") for seed in range(5) for name in SEED_0]
    own_repositories(loopback_hub, "google", names)
    listing = list_checkpoints("google/multiberts", "log:20", endpoint=loopback_hub.url)
    assert names_of(listing) == names
    assert len(names) == 5 * 29
    steps = {seed: [c.step for c in listing.chosen if c.seed == seed] for seed in "01234"}
    assert list(steps.values()) == [[0, 20_000, 200_000, 2_000_000]] * 5, "each seed its share, at equal steps"
    assert loopback_hub.count() == 20 + 20, "nothing is asked of the others, and no search"
    assert ["encoders" in note for note in listing.notes] == [True]
    one_seed = list_checkpoints("google/multiberts", "multiberts-seed_3-*", endpoint=loopback_hub.url)
    assert names_of(one_seed.chosen) == names[87:116]
    few = list_checkpoints("google/multiberts", "log:2", endpoint=loopback_hub.url)
    assert names_of(few.chosen) == [names[0], names[-1]]
    named_alone = list_checkpoints(f"google/{names[5]}", "every:28", endpoint=loopback_hub.url)
    assert [(c.seed, c.step) for c in named_alone.chosen] == [(s, n) for s in "01234" for n in (0, 2_000_000)]


# Repositories that moved, and what is told of some


@pytest.mark.parametrize("redirected", [True, False], ids=["redirect", "not found"])
def test_the_old_name_of_a_repository_that_moved(
    loopback_hub: LoopbackHub, tmp_path: Path, *, redirected: bool
) -> None:
    hub = loopback_hub
    files = {"config.json": b"{}", "pytorch_model.bin": b"weights"}
    last = files | {"pytorch_model.bin": b"final weights"}
    hub.add_repo("IFM/Amber", revisions={"main": last, "ckpt_000": files, "ckpt_358": last})
    if redirected:
        hub.rename("LLM360/Amber", "IFM/Amber")
    listing = list_checkpoints("LLM360/Amber", "all", endpoint=hub.url)
    assert names_of(listing.chosen) == ["ckpt_000", "ckpt_358"]
    assert listing.model == "LLM360/Amber"
    assert listing.notes == ("LLM360/Amber is IFM/Amber now.",), "once, whether the Hub leads on or not"
    fetched = fetch("LLM360/Amber", listing.chosen[0], Hub(hub.url), tmp_path / "into")
    assert (fetched.folder / "pytorch_model.bin").read_bytes() == b"weights"
    with pytest.raises(InputError, match="LLM360/Ambre was not found"):
        list_checkpoints("LLM360/Ambre", "all", endpoint=hub.url)


def test_notes_on_runs_whose_labels_mislead(loopback_hub: LoopbackHub) -> None:
    first, last = ({"config.json": b"{}", "model.safetensors": content} for content in (b"v", b"w"))
    for repo, told in {
        "EleutherAI/pythia-160m-weight-seed1": "do not descend from their step0",
        "EleutherAI/pythia-410m-deduped-v0": "step1000 was step 500",
        "EleutherAI/pythia-160m": None,
    }.items():
        loopback_hub.add_repo(repo, revisions={"main": last, "step1000": first, "step2000": last})
        notes = list_checkpoints(repo, "all", endpoint=loopback_hub.url).notes
        assert told in notes[0] if told else notes == ()


# What cannot be read is refused

RAW = {
    "m-a-p/neo_7b_intermediate": [
        f"{folder}/mp_rank_{rank:02}/model_optim_rng.pt"
        for folder in ("iter_0002384", "iter_0444213")
        for rank in (0, 1)
    ],
    "someone/deepspeed-run": [
        "global_step1000/mp_rank_00_model_states.pt",
        "global_step1000/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
    "NeelNanda/SoLU_1L512W_C4_Code": ["checkpoints/SoLU_1L_0.pth", "checkpoints/SoLU_1L_5000000000.pth"],
}
PROGRAMS = dict(zip(RAW, ("Megatron-LM", "DeepSpeed", "the project's own"), strict=True))


@pytest.mark.parametrize("repo", RAW)
def test_state_of_a_training_program_is_refused(loopback_hub: LoopbackHub, tmp_path: Path, repo: str) -> None:
    message = (
        f"{repo.rpartition('/')[2]} holds no checkpoint that can be read: {RAW[repo][0]} is training state in "
        f"{PROGRAMS[repo]} format, which transformers cannot load. Convert it with the project's own script"
    )
    content = {"README.md": b"", "config.json": b"{}", **dict.fromkeys(RAW[repo], b"pickle")}
    loopback_hub.add_repo(repo, revisions={"main": content})
    for revisions in ("log:20", "all", "main"):
        with pytest.raises(InputError) as refused:
            list_checkpoints(repo, revisions, endpoint=loopback_hub.url)
        assert message in str(refused.value)
    folder = tmp_path / repo.rpartition("/")[2]
    for path in RAW[repo]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"pickle")
    with pytest.raises(InputError) as refused:
        list_checkpoints(str(folder), "all")
    assert message in str(refused.value)


def test_a_branch_of_training_state_fails_alone(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    raw = dict.fromkeys(RAW["someone/deepspeed-run"], b"pickle")
    loopback_hub.add_repo("me/model", revisions={"main": {}, "step1": raw, "step2": raw})
    first = list_checkpoints("me/model", "all", endpoint=loopback_hub.url).chosen[0]
    assert (first.format, first.bytes) == (None, None)
    with pytest.raises(CheckpointError, match=r"step1 of me/model has no weights .* in DeepSpeed format.* Convert it"):
        fetch("me/model", first, Hub(loopback_hub.url), tmp_path / "into")


def test_a_finished_model_beside_training_state_may_be_named(loopback_hub: LoopbackHub) -> None:
    content = {"config.json": b"{}", "model.safetensors": b"w", "iter_0002384/mp_rank_00/model_optim_rng.pt": b"p"}
    loopback_hub.add_repo("me/model", revisions={"main": content})
    assert names_of(list_checkpoints("me/model", "main", endpoint=loopback_hub.url).chosen) == ["main"]


# Folders


def test_folders_of_one_commit(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    hub = loopback_hub
    one = {"config.json": b"{}", "model.safetensors": b"weights", "sub/model.safetensors": b"no"}
    folders = ["iter_0002384", "gpt2-checkpoint-70", "step10-tokens3B", "runs/checkpoint-5"]
    content = {f"{folder}/{path}": data + folder.encode() for folder in folders for path, data in one.items()}
    content |= {"checkpoint-1/config.json": b"{}", "checkpoint-2/model.safetensors": b"w", "final/config.json": b"{}"}
    hub.add_repo("me/model", revisions={"main": {"README.md": b"", **content}, "checkpoint-9": one})
    listing = list_checkpoints("me/model", "all", endpoint=hub.url)
    assert hub.count() == 1 + 1 + 1, "refs, the tree of main, that of the branch"
    assert [(c.name, c.kind, c.step, c.seed) for c in listing] == [
        ("checkpoint-9", "branch", 9, None), ("step10-tokens3B", "subfolder", 10, None),
        ("gpt2-checkpoint-70", "subfolder", 70, None), ("iter_0002384", "subfolder", 2384, None),
        ("runs/checkpoint-5", "subfolder", 5, "runs"), ("main", "branch", None, None),
    ]  # fmt: skip
    # Where the listing does not know the files, they are asked for; what is fetched is deleted whole.
    folder = replace(listing.chosen[1], files=None)
    fetched = fetch("me/model", folder, Hub(hub.url), tmp_path / "into")
    assert fetched.folder.is_relative_to(tmp_path / "into")
    assert fetched.folder.name == "step10-tokens3B"
    assert sorted(path.name for path in fetched.folder.iterdir()) == ["config.json", "model.safetensors"]
    discard(fetched)
    assert not (tmp_path / "into").exists()


def test_two_runs_in_one_repository_are_two_series(loopback_hub: LoopbackHub) -> None:
    one = {"config.json": b"{}", "model.safetensors": b"w"}
    folders = [f"{run}/checkpoint-{step}" for run in ("html", "url") for step in (500, 10000)]
    content = {f"{folder}/{path}": data + folder.encode() for folder in folders for path, data in one.items()}
    loopback_hub.add_repo("me/runs", revisions={"main": content})
    listing = list_checkpoints("me/runs", "all", endpoint=loopback_hub.url)
    assert [(c.name, c.seed) for c in listing.chosen] == [(f, f.partition("/")[0]) for f in folders]
    assert training_positions(listing.chosen) == [500, 10000, 500, 10000]


# Stages, ingredients, seeds, tokens


def training(*names: str) -> tuple[Checkpoint, ...]:
    """Checkpoints of these names, in training order."""
    found = []
    for name in names:
        said = parse_name(name)
        assert said is not None
        fields = {key: getattr(said, key) for key in ("stage", "ingredient", "seed", "step", "tokens", "index")}
        found.append(Checkpoint(name=name, kind="branch", **fields))
    return in_training_order(found)


@pytest.mark.parametrize(
    "placed",
    [
        # OLMo-2: unprefixed names are stage 1, every ingredient starts where it ends
        {
            "step150-tokens1B": 150,
            "stage1-step928646-tokens3896B": 928646,
            "stage2-ingredient1-step11931-tokens50B": 940577,
            "stage2-ingredient3-step23852-tokens51B": 952498,
        },
        {"stage1-step0": 0, "stage1-step1413814": 1413814, "stage3-step11921": 1425735},  # OLMo-3 starts anew
        {"stage1-step010000-tokens21B": 10000, "stage2-step018000-tokens1002B": 18000},  # as if it went on
        {
            "CrystalCoder_phase1_checkpoint_055500": 55500,
            "CrystalCoder_phase2_checkpoint_214387": 214387,
            "CrystalCoder_phase3_checkpoint_027728": 242115,
        },
        # SmolLM3 counts on over its stages, and anew in each part of longer context, 4k before 32k
        {
            "stage1-step-3440000": 3440000,
            "stage3-step-4720000": 4720000,
            "lc-4k-to-32k-step-4000": 4724000,
            "lc-4k-to-32k-step-20000": 4740000,
            "lc-32k-to-64k-step-4000": 4744000,
        },
        {"step50000-tokens210B": 50000, "step2627139-tokens15T": 2627139, "longctx-step50": 2627189},  # Apertus
        {"step0005000": 5000, "step0753851": 753851, "extension_step0001220": 755071},  # Lucie
        {"step1250-seed-default": 1250, "step38750-seed-small-aux-3": 38750},
        {"train_00220B": 220 * B, "train_02420B": 2420 * B},
    ],
    ids=["OLMo-2", "OLMo-3", "Comma, two names", "Crystal", "SmolLM3", "Apertus", "Lucie", "DataDecide", "Baichuan"],
)
def test_places_on_the_axis_of_the_training(placed: dict[str, int]) -> None:
    ordered = training(*reversed(placed))
    assert dict(zip(names_of(ordered), training_positions(ordered), strict=True)) == placed
    assert names_of(ordered) == list(placed)


def test_comma_starts_its_steps_anew_and_its_tokens_not() -> None:
    """Stage 1 is every 10,000 steps, 46 of them: then the first of stage 2 stands before its end."""
    stage1 = [f"stage1-step{n:06}-tokens{n * 21 // 10000}B" for n in range(10000, 460001, 10000)]
    ordered = training(*stage1, "stage2-step018000-tokens1002B")
    assert training_positions(ordered)[-2:] == [460000, 478000]
    by_tokens = [replace(checkpoint, step=None) for checkpoint in ordered]
    assert training_positions(by_tokens)[-2:] == [966 * B, 1002 * B]


def test_a_local_folder_of_gaperons_names(tmp_path: Path) -> None:
    folder = tmp_path / "step-024000_tokens-0100B-phase1"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")
    found = list_checkpoints(str(tmp_path), "all").chosen
    assert [(c.step, c.tokens, c.stage) for c in found] == [(24000, 100 * B, 1)]


def test_tokens_are_fitted_from_the_labels_of_the_stage_if_these_agree() -> None:
    names = [*OLMO_7B[:3], *OLMO_7B[100::50]]
    bare = {"step1000": 1000, "step557500": 557500}
    found = {c.name: c.tokens for c in with_tokens(training(*names, *bare), None)}
    assert all(found[name] == parse_name(name).tokens for name in names), "a label stays as it is"
    assert all(found[name] == pytest.approx(step * 4_424_000, rel=0.003) for name, step in bare.items())
    # Told by the labels, the user's number is not needed; it is for a stage without any.
    other = training(*names, "step557500", "longctx-step10")
    assert [c.tokens for c in with_tokens(other, 10**6)][-2:] == [found["step557500"], 557510 * 10**6]


def test_tokens_are_not_fitted_where_a_step_does_not_stay_as_long() -> None:
    apertus = [f"step{n}-tokens{n * 42 // 10**4}B" for n in range(50000, 950001, 50000)]  # to step950000-tokens3990B
    by_name = {c.name: c.tokens for c in with_tokens(training(*apertus, "step525000"), None)}
    assert by_name["step525000"] == 525000 * 4_200_000
    doubled = with_tokens(training(*apertus, "step525000", "step2627139-tokens15T"), None)
    assert {c.name: c.tokens for c in doubled}["step525000"] is None
    assert with_tokens(training("step1000-tokens4B", "step2000-tokens8B", "step3000"), None)[2].tokens is None


# The whole way


def test_a_sweep_over_folders_of_one_commit(loopback_hub, tiny_run, undisturbed, tmp_path, no_figures, hub_cache):
    """The tokenizer, too, is in the folders; nothing of one collides with another, and none is fetched twice."""
    hub, out = loopback_hub, tmp_path / "run"
    inside = {f"hf_ckpt/checkpoint-{step}": checkpoint_files(tiny_run, step) for step in STEPS}
    content = {f"{folder}/{name}": file for folder, files in inside.items() for name, file in files.items()}
    hub.add_repo("me/scaling", revisions={"main": {"README.md": b"six folders", **content}})
    arguments = ["--model", "me/scaling", "--revisions", "all", "--endpoint", hub.url, "--quiet", *PYDOC]
    assert cli.run([*arguments, "--out", str(out)]) == 0
    scores = rt.read_scores(out)
    assert_frame_equal(numbers(scores), numbers(undisturbed))
    assert scores["revision"].unique(maintain_order=True).to_list() == list(inside)
    assert set(scores["kind"]) == {"subfolder"}
    assert set(scores["commit"]) == {hub.commit("me/scaling", "main")}
    assert scores["identity"].n_unique() == len(STEPS)
    assert not leftovers(out)
    fetched = weights_asked(hub)
    assert len(fetched) == len(set(fetched)) == len(STEPS)
    listed = json.loads((out / "listing.json").read_text())["checkpoints"]
    assert {file["path"] for file in listed[0]["files"]} == {
        file.name for file in (tiny_run / "checkpoint-0").iterdir()
    }
    hub.forget_requests()
    assert cli.run([*arguments, "--out", str(out)]) == 0
    assert hub.count("GET", "*/resolve/*") == 0

    # What the user has in his own cache is used from there.
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download("me/scaling", endpoint=hub.url)
    hub.forget_requests()
    last = list_checkpoints("me/scaling", "all", endpoint=hub.url).chosen[-1]
    assert str(fetch("me/scaling", last, Hub(hub.url), tmp_path / "into").folder) == f"{snapshot}/{last.name}"
    assert cli.run([*arguments, "--out", str(tmp_path / "offline"), "--offline"]) == 0
    assert_frame_equal(numbers(rt.read_scores(tmp_path / "offline")), numbers(undisturbed))
    assert hub.count("GET", "*/resolve/*") == 0


def test_a_sweep_over_a_run_of_repositories(loopback_hub, tiny_run, undisturbed, tmp_path, no_figures, capsys):
    """Only the last repository has the tokenizer; one is gone and fails alone."""
    hub, out = loopback_hub, tmp_path / "run"
    names = {step: f"TinyLlama-1.1B-intermediate-step-{1000 + step}k-{step + 1}T" for step in STEPS}
    for step, name in names.items():
        files = checkpoint_files(tiny_run, step, tokenizer=step == STEPS[-1])
        hub.add_repo(f"TinyLlama/{name}", revisions={"main": files})
    arguments = ["--model", "TinyLlama/TinyLlama-1.1B", "--endpoint", hub.url, "--out", str(out), *PYDOC]
    assert cli.run([*arguments, "--revisions", "*T"]) == 1
    told = capsys.readouterr().err
    for gone in TINY[1:]:
        assert f"TinyLlama/{gone} was not found" in told
        assert f"{gone}: not scored: TinyLlama/{gone} gave no commit" in told
    scores = rt.read_scores(out)
    assert scores["revision"].unique(maintain_order=True).to_list() == list(names.values())
    assert set(scores["kind"]) == {"repo"}
    assert set(scores["model"]) == {"TinyLlama/TinyLlama-1.1B"}
    kilosteps = scores.with_columns(step=scores["step"] // 1000 - 1000)
    assert_frame_equal(numbers(kilosteps), numbers(undisturbed))
    assert not leftovers(out)
    fetched = weights_asked(hub)
    assert sorted(fetched) == sorted(
        f"/TinyLlama/{name}/resolve/{hub.commit(f'TinyLlama/{name}', 'main')}/model.safetensors"
        for name in names.values()
    )
