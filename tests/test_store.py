"""The run folder: files whole or not there, rows that read back in training order, runs that do not mix."""

import errno
import json
import os
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from redundancy_trace import store, writing
from redundancy_trace.errors import InputError
from redundancy_trace.metrics import COMPONENTS, Distance, ModelScores, Value
from redundancy_trace.store import DISTANCE_SCHEMA, SCORE_SCHEMA, CalibrationRecord, Labels, Run

PYDOC = CalibrationRecord("pydoc 4x8", "a" * 64, "token_ids.npy")
OTHER = CalibrationRecord("text.txt 4x8", "b" * 64, "token_ids-bbbbbbbbbbbb.npy")
SETTINGS = {"dtype": "float32", "trust_remote_code": False}


def scores(value=0.5):
    values = [
        Value(layer, component, "cosine_similarity", value + layer / 100, 0.01, 4, 32)
        for layer in (0, 1)
        for component in COMPONENTS
    ]
    loss = Value(None, "model", "loss", 3.5, None, 4, 28)
    return ModelScores((*values, loss), (Distance(0, 1, "angular_distance", 0.25, 32),))


def labels(revision="step1", *, commit=None, calibration=PYDOC, **more):
    commit = commit or revision.encode().hex().ljust(40, "0")[:40]
    identity = store.row_identity(commit, calibration.sha256, SETTINGS)
    return Labels(
        model="me/model", revision=revision, commit=commit, kind="branch", calibration=calibration.label,
        identity=identity, **more,
    )  # fmt: skip


def part(given):
    return store.part_name(given.commit, given.identity)


def begin(folder, **changes):
    run = Run(folder, "me/model", "float32", False, None, (PYDOC,))
    return store.write_run(replace(run, **changes), {"model": "me/model"})


def write_listing(folder, checkpoints):
    rows = [{"name": name, "commit": commit, "tokens": tokens} for name, commit, tokens in checkpoints]
    store.write_json(folder / "listing.json", {"model": "me/model", "checkpoints": rows})


def open_again(folder, **changes):
    asked = {"model": "me/model", "trust_remote_code": False, "dtype": None, "tokens_per_step": None}
    return store.open_run(folder, **(asked | changes))


def revisions(folder):
    return store.read_scores(folder)["revision"].unique(maintain_order=True).to_list()


def test_what_is_written_is_read_back(tmp_path):
    begin(tmp_path)
    given = labels("stage1-step5-tokens1B", stage=1, step=5, tokens=10**9, seed="seed-1", ingredient=2)
    store.write_part(tmp_path, given, scores())
    assert store.finished_parts(tmp_path) == {part(given)}
    read = store.read_scores(tmp_path)
    assert dict(read.schema) == SCORE_SCHEMA
    assert list(read.columns) == [
        "model", "revision", "commit", "kind", "stage", "ingredient", "seed", "step", "tokens", "calibration", "layer",
        "component", "metric", "value", "stderr", "n_sequences", "n_tokens", "identity",
    ]  # fmt: skip
    assert_frame_equal(read, store.scores_frame(given, scores().values), check_row_order=False)
    loss = read.row(by_predicate=pl.col("metric") == "loss", named=True)
    assert (loss["layer"], loss["component"], loss["value"], loss["stderr"]) == (None, "model", 3.5, None)
    distances = store.read_distances(tmp_path)
    assert dict(distances.schema) == DISTANCE_SCHEMA
    assert_frame_equal(store.read_scores(str(tmp_path)), read)
    assert_frame_equal(store.read_distances(str(tmp_path)), distances)
    assert distances.select("layer", "to_layer", "metric", "value", "n_tokens").rows() == [
        (0, 1, "angular_distance", 0.25, 32)
    ]
    assert_frame_equal(pl.scan_parquet(tmp_path / "scores" / "*.parquet").collect(), read, check_row_order=False)


def test_all_columns_have_their_type_where_nothing_is_known(tmp_path):
    begin(tmp_path)
    store.write_part(tmp_path, labels("main"), ModelScores((), ()))
    store.write_part(tmp_path, labels("step1", step=1), scores())
    assert dict(store.read_scores(tmp_path).schema) == SCORE_SCHEMA
    assert dict(store.read_distances(tmp_path).schema) == DISTANCE_SCHEMA


def test_identity_follows_all_that_changes_a_number(monkeypatch):
    given = ("c" * 40, "a" * 64, SETTINGS)
    identity = store.row_identity(*given)
    assert identity == store.row_identity("c" * 40, "a" * 64, dict(reversed(SETTINGS.items())))
    others = [
        store.row_identity("d" * 40, *given[1:]),
        store.row_identity(given[0], "b" * 64, SETTINGS),
        store.row_identity(*given[:2], {**SETTINGS, "dtype": "bfloat16"}),
        store.row_identity(*given[:2], {**SETTINGS, "trust_remote_code": True}),
    ]
    monkeypatch.setattr(store.scores, "metric_versions", lambda: {"cosine_similarity": 2})
    others.append(store.row_identity(*given))
    assert len({identity, *others}) == 6
    assert {len(text) for text in others} == {64}


def test_rows_come_in_the_order_of_the_listing(tmp_path):
    """Names without a step too: their place in training is in the listing alone."""
    begin(tmp_path)
    for name, more in (("epoch10", {}), ("epoch2", {}), ("step3", {"step": 3}), ("epoch1", {})):
        store.write_part(tmp_path, labels(name, **more), scores())
    assert revisions(tmp_path) == ["epoch1", "epoch10", "epoch2", "step3"], "without a listing: by step, then name"
    write_listing(tmp_path, [("step3", None, None), ("epoch1", None, None), ("epoch2", None, None)])
    assert revisions(tmp_path) == ["step3", "epoch1", "epoch2", "epoch10"], "what is not listed comes last"
    (tmp_path / "listing.json").write_text('{"checkpoints": 5')
    assert len(revisions(tmp_path)) == 4


def test_of_a_revision_that_moved_the_present_commit_is_read(tmp_path):
    begin(tmp_path)
    old, new = labels("main", commit="1" * 40), labels("main", commit="2" * 40)
    for given in (old, new, labels("step1", step=1)):
        store.write_part(tmp_path, given, scores())
    for present in (old, new):
        write_listing(tmp_path, [("step1", None, None), ("main", present.commit, None)])
        read = store.read_scores(tmp_path)
        assert read.filter(revision="main")["commit"].unique().to_list() == [present.commit]
        assert store.read_distances(tmp_path).filter(revision="main")["commit"].to_list() == [present.commit]
        assert read["revision"].n_unique() == 2
    write_listing(tmp_path, [("main", "3" * 40, None)])
    assert store.read_scores(tmp_path).filter(revision="main")["commit"].n_unique() == 2, "the present one is not there"
    assert len(store.finished_parts(tmp_path)) == 3, "nothing is deleted"


def test_tokens_follow_what_the_run_was_told_last(tmp_path):
    run = begin(tmp_path)
    store.write_part(tmp_path, labels("step1", step=1, tokens=7), scores())
    store.write_part(tmp_path, labels("step2", step=2), scores())
    store.write_part(tmp_path, labels("main"), scores())

    def tokens():
        return dict(store.read_scores(tmp_path).select("revision", "tokens").unique().rows())

    assert tokens() == {"step1": 7, "step2": None, "main": None}
    store.write_run(replace(run, tokens_per_step=100), {})
    assert tokens() == {"step1": 7, "step2": 200, "main": None}
    # 7 was one step by an earlier --tokens-per-step; the listing has it by the present one.
    write_listing(tmp_path, [("step1", None, 100), ("step2", None, 200), ("main", None, None)])
    assert tokens() == {"step1": 100, "step2": 200, "main": None}


def test_calibrations_are_read_in_the_order_they_came(tmp_path):
    begin(tmp_path, calibrations=(OTHER, PYDOC))
    for calibration in (PYDOC, OTHER):
        for name in ("step2", "step1"):
            store.write_part(tmp_path, labels(name, step=int(name[4:]), calibration=calibration), scores())
    read = store.read_scores(tmp_path).select("calibration", "revision").unique(maintain_order=True).rows()
    assert read == [(c.label, name) for c in (OTHER, PYDOC) for name in ("step1", "step2")]


def test_calibrations_of_another_process_stay_on_record(tmp_path):
    begin(tmp_path)
    run = begin(tmp_path, calibrations=(OTHER,))
    assert run.calibrations == (PYDOC, OTHER)
    assert store.read_run(tmp_path) == run
    assert begin(tmp_path).calibrations == (PYDOC, OTHER)


def test_readers_pass_over_files_that_are_being_written(tmp_path):
    begin(tmp_path)
    store.write_part(tmp_path, labels(), scores())
    before = store.read_scores(tmp_path)
    (tmp_path / "scores" / ".0123-4567.parquet.89ab.part").write_bytes(b"PAR1 half")
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / ".0123-4567.json.89ab.part").write_text("{")
    assert_frame_equal(store.read_scores(tmp_path), before)
    assert store.finished_parts(tmp_path) == {part(labels())}
    assert store.read_failures(tmp_path) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("?"), OSError(errno.ENOSPC, "No space left")])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, fault):
    begin(tmp_path)
    store.write_part(tmp_path, labels("step0"), scores(0.1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def half(frame, path):
        path.write_bytes(b"PAR1")
        raise fault

    monkeypatch.setattr(pl.DataFrame, "write_parquet", half)
    told = InputError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(told) as raised:
        store.write_part(tmp_path, labels(), scores())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    if told is InputError:
        assert "No space left" in str(raised.value)
        assert "bytes free" in str(raised.value)
        assert "same command again" in str(raised.value)


def test_half_written_files_of_killed_processes_are_removed(tmp_path):
    begin(tmp_path)
    store.write_part(tmp_path, labels(), scores())
    store.write_failure(tmp_path, labels("step2"), "?")
    whole = {path for path in tmp_path.rglob("*") if path.is_file()}
    old, fresh = [], []
    for number, folder in enumerate(("scores", "distances", "failures", "figures", ".")):
        (tmp_path / folder).mkdir(exist_ok=True)
        for age, left in ((3601.0, old), (3000.0, fresh)):
            left.append(writing.part_of(tmp_path / folder / f"{number}.parquet"))
            left[-1].write_bytes(b"PAR1")
            os.utime(left[-1], (time.time() - age,) * 2)
    store.tidy_run(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == whole | set(fresh)
    store.tidy_run(tmp_path / "nowhere")


def test_a_file_that_is_there_stays_where_it_is_not_to_be_replaced(tmp_path):
    file = tmp_path / "a" / "file"
    assert writing.write_whole(file, lambda part: part.write_text("first"), replace=False) == file
    writing.write_whole(file, lambda part: part.write_text("second"), replace=False)
    assert file.read_text() == "first"
    writing.write_whole(file, lambda part: part.write_text("third"))
    assert file.read_text() == "third"
    assert list(file.parent.iterdir()) == [file]


def test_the_scores_are_the_mark_of_done(tmp_path, monkeypatch):
    """A kill between the two files leaves a checkpoint that is not done, never one without distances."""
    begin(tmp_path)
    written = []
    monkeypatch.setattr(store.scores, "write_parquet", lambda path, frame: written.append(path.parent.name))
    store.write_part(tmp_path, labels(), scores())
    assert written == ["distances", "scores"]


def test_failures_are_noted_and_cleared_by_success(tmp_path):
    begin(tmp_path)
    first, second = labels("step1", step=1), labels("step2", step=2)
    store.write_failure(tmp_path, first, "truncated")
    store.write_failure(tmp_path, second, "no config.json")
    store.write_failure(tmp_path, first, "still truncated")
    noted = {failure["revision"]: failure for failure in store.read_failures(tmp_path)}
    assert noted["step1"]["reason"] == "still truncated"
    assert noted["step2"]["commit"] == second.commit
    assert noted["step2"]["time"].endswith("+00:00")
    assert (tmp_path / "failures" / f"{part(first)}.json").is_file()
    # A repaired local checkpoint has another commit; its failure goes all the same, that of another calibration stays.
    store.write_failure(tmp_path, labels("step1", calibration=OTHER), "not finite")
    store.write_part(tmp_path, labels("step1", commit="9" * 40), scores())
    left = [(f["revision"], f["calibration"]) for f in store.read_failures(tmp_path)]
    assert sorted(left) == [("step1", OTHER.label), ("step2", PYDOC.label)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "me/other"}, ["model 'me/model'", "'me/other'"]),
        ({"dtype": "bfloat16"}, ["dtype 'float32'", "'bfloat16'"]),
        ({"trust_remote_code": True}, ["trust_remote_code False", "True"]),
    ],
)
def test_another_run_is_refused_by_field(tmp_path, changes, words):
    begin(tmp_path)
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(InputError) as raised:
        open_again(tmp_path, **changes)
    for word in (*words, str(tmp_path), "Name another --out"):
        assert word in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    assert (tmp_path / "settings.json").read_bytes() == before


def test_other_metric_versions_are_refused(tmp_path, monkeypatch):
    begin(tmp_path)
    monkeypatch.setattr(store.scores, "metric_versions", lambda: {"loss": 9})
    with pytest.raises(InputError, match="metric_versions"):
        open_again(tmp_path)


def test_what_may_change_freely_is_no_hindrance(tmp_path):
    run = begin(tmp_path)
    assert open_again(tmp_path) == run
    assert open_again(tmp_path, dtype="float32") == run
    assert open_again(tmp_path, tokens_per_step=5) == replace(run, tokens_per_step=5)
    begin(tmp_path, tokens_per_step=5)
    assert open_again(tmp_path).tokens_per_step == 5, "remembered where it is left out"


def test_opening_a_free_folder_makes_nothing(tmp_path):
    assert open_again(tmp_path / "a" / "b") is None
    assert not (tmp_path / "a").exists()
    assert open_again(tmp_path) is None
    assert not list(tmp_path.iterdir())
    np.save(tmp_path / "token_ids.npy", np.zeros((1, 2)))
    (tmp_path / ".fetched").mkdir()
    assert open_again(tmp_path) is None, "what a sweep killed early left is no hindrance"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"not empty and holds no run \(thesis\.tex\)"):
        open_again(tmp_path)
    for out in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "run"):
        with pytest.raises(InputError, match=r"cannot be written to \(Not a directory\); try another --out"):
            open_again(out)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": "me/model"}'])
def test_damaged_settings_are_told(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    for act in (store.read_scores, store.read_run, open_again):
        with pytest.raises(InputError, match=r"settings\.json cannot be read .*Restore it"):
            act(tmp_path)


def test_a_folder_without_scores_is_told(tmp_path):
    with pytest.raises(InputError, match=r"is no run: it has no settings\.json"):
        store.read_scores(tmp_path)
    begin(tmp_path)
    with pytest.raises(InputError, match=r"holds no scores yet; run trace --model me/model --out"):
        store.read_scores(tmp_path)


def test_a_run_that_nothing_went_through_is_withdrawn(tmp_path):
    folder = tmp_path / "run"
    settings = {"model": "me/model"}

    def started():
        run = begin(folder)
        np.save(folder / "token_ids.npy", np.zeros((1, 2), dtype=np.int64))
        write_listing(folder, [])
        return run

    store.withdraw_run(started(), settings)
    assert not folder.exists()
    run = started()
    store.withdraw_run(run, {"model": "me/model", "samples": 5})
    assert (folder / "settings.json").is_file(), "another process goes on with it"
    store.write_failure(folder, labels(), "truncated")
    store.withdraw_run(run, settings)
    assert (folder / "settings.json").is_file()


def test_settings_are_kept_with_the_versions_of_the_libraries(tmp_path):
    begin(tmp_path)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept["settings"] == {"model": "me/model"}
    assert kept["calibrations"] == [vars(PYDOC)]
    assert set(kept["versions"]) >= {"redundancy-trace", "torch", "transformers", "polars"}
    assert all(kept["versions"].values())
