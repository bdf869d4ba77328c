"""Every way in which training checkpoints are published: listed, ordered, selected, fetched and scored right."""

import json

import pytest
from polars.testing import assert_frame_equal
from tiny_runs import PYDOC, STEPS, checkpoint_files, leftovers, numbers

import redundancy_trace as rt
from redundancy_trace import cli, sweep
from redundancy_trace.checkpoints import list_checkpoints
from redundancy_trace.fetching import fetch
from redundancy_trace.hub import Hub


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory):
    """The table of a sweep of the local files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.running, "_draw", lambda *_: ())
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        assert cli.run(["--model", str(tiny_run), "--out", str(out), "--quiet", *PYDOC]) == 0
    return rt.read_scores(out)


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
    fetched = [request.path for request in hub.matching("GET", "*/model.safetensors")]
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
