"""Text to fixed token batches: joining and cutting, every source, every message."""

import gzip
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from huggingface_hub import snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import LoopbackHub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from redundancy_trace.calibration import (
    Calibration,
    TokenizerSource,
    check_ids,
    check_length,
    find_tokenizer,
    load_calibration,
    load_tokenizer,
    prefix_ids,
    token_hash,
)
from redundancy_trace.calibration import texts as texts_module
from redundancy_trace.calibration.batches import cut_sequences, first_sequences
from redundancy_trace.calibration.datasets import DatasetName, chosen_files, layout_declared, layout_of
from redundancy_trace.calibration.texts import Piece, pydoc_topics, text_file, whole
from redundancy_trace.errors import InputError, TraceError
from redundancy_trace.hub import Hub

EOS, BOS = 0, 1
LINES = ["The cat sat on the mat.", "A dog barked at the moon.", "Rain fell on the quiet town."]


def build_tokenizer(*, bos: bool = False, eos: bool = True, suffix: bool = False) -> PreTrainedTokenizerFast:
    """A real byte-level BPE; with `bos` it puts <s> in front, with `suffix` also </s> behind."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*LINES, "the town and the moon and the mat"],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["</s>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if suffix else "<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        model_max_length=8,  # shorter than every text: nothing may warn of it
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that puts nothing in front, as Pythia's."""
    folder = tmp_path_factory.mktemp("plain")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with_bos")
    build_tokenizer(bos=True).save_pretrained(folder)
    return folder


def load(name: str | Path, folder: Path, n: int = 2, t: int = 8, **more: object) -> Calibration:
    return load_calibration(str(name), samples=n, sequence_length=t, candidates=[TokenizerSource(folder)], **more)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


# Joining and cutting


documents = st.lists(st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=12), max_size=12)
prefixes = st.lists(st.integers(500, 510), max_size=3)


@given(documents, prefixes, st.sampled_from([None, 7]), st.integers(1, 5), st.integers(4, 9))
def test_sequences_are_the_joined_documents_in_order(
    texts: list[str], prefix: list[int], eos: int | None, n: int, t: int
) -> None:
    joined: list[int] = []
    for number, text in enumerate(texts):
        joined += ([eos] if number and eos is not None else []) + letters(text)
    fresh = t - len(prefix)

    def cut(samples: int) -> np.ndarray:
        return cut_sequences(
            whole(texts), letters, samples=samples, sequence_length=t, prefix=prefix, eos=eos, name="x"
        )

    if len(joined) < n * fresh:
        with pytest.raises(InputError, match=rf"x gives {len(joined)} tokens.* needs {n * fresh}\.") as told:
            cut(n)
        if fits := re.search(r"--samples (\d+) would fit", str(told.value)):
            assert cut(int(fits[1])).shape == (len(joined) // fresh, t)
        return
    ids = cut(n)
    assert ids.shape == (n, t)
    assert ids.dtype == np.int64
    assert (ids[:, : len(prefix)] == prefix).all()
    assert ids[:, len(prefix) :].ravel().tolist() == joined[: n * fresh]


@given(documents, st.integers(1, 20))
def test_fewer_samples_are_the_first_of_more(texts: list[str], n: int) -> None:
    total = sum(map(len, texts))
    if total >= n:
        most = cut_sequences(whole(texts), letters, samples=total // 1, sequence_length=1)
        assert (cut_sequences(whole(texts), letters, samples=n, sequence_length=1) == most[:n]).all()


def test_reading_stops_with_the_last_token() -> None:
    def endless() -> object:
        yield "a" * 10
        raise AssertionError("read on although there were enough tokens")

    assert cut_sequences(whole(endless()), letters, samples=2, sequence_length=5).shape == (2, 5)


@settings(deadline=None)
@given(st.text("ab\n", max_size=60), st.integers(1, 9))
def test_pieces_of_a_long_text_are_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_module, "PIECE_CHARACTERS", size)
        pieces = list(whole([text]))
    assert "".join(piece.text for piece in pieces) == (text if text.strip() else "")
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    assert all(piece.text for piece in pieces)


def test_pieces_end_with_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(texts_module, "PIECE_CHARACTERS", 10)
    file = tmp_path / "long.txt"
    file.write_text("".join(f"line {number}\n" for number in range(9)))
    pieces = list(text_file(file))
    assert len(pieces) > 3
    assert all(piece.text.endswith("\n") for piece in pieces)
    assert "".join(piece.text for piece in pieces) == file.read_text()


def test_a_sequence_must_hold_more_than_the_prefix() -> None:
    with pytest.raises(InputError, match="--sequence-length 2 leaves no room behind the 2 special tokens"):
        cut_sequences([], letters, samples=1, sequence_length=2, prefix=[1, 2])


def test_too_few_tokens_for_one_sequence_say_which_length_fits() -> None:
    with pytest.raises(InputError, match=r"gives 5 tokens.*--samples 1 --sequence-length 6 would"):
        cut_sequences(whole(["abcde"]), letters, samples=3, sequence_length=9, prefix=[1])
    with pytest.raises(InputError, match=r"gives 0 tokens.*Name a longer text"):
        cut_sequences([], letters, samples=3, sequence_length=9)


# Hash and checks


def test_hash_is_of_shape_and_values() -> None:
    ids = np.arange(6).reshape(2, 3)
    known = "f37c80c6d35cd489"
    assert token_hash(ids) == token_hash(ids.astype(">i4")) == token_hash(np.asfortranarray(ids))
    assert token_hash(ids) != token_hash(ids.reshape(3, 2))
    assert token_hash(ids) != token_hash(ids + 1)
    assert token_hash(ids)[:16] == known


def test_ids_beyond_the_embedding_are_refused() -> None:
    check_ids(np.array([[0, 9]]), 10)
    with pytest.raises(InputError, match=r"token id 10, the model's embedding has 10 rows.*--tokenizer"):
        check_ids(np.array([[0, 10]]), 10)


def test_sequences_beyond_the_positions_are_refused() -> None:
    check_length(512, 512)
    check_length(100_000, None)
    with pytest.raises(InputError, match=r"512 is longer than the model's 256 positions. Try --sequence-length 256"):
        check_length(512, 256)


# pydoc, text files, token files


def test_pydoc_is_every_topic_by_name(plain: Path) -> None:
    from pydoc_data.topics import topics

    first = min(topics)
    ids = load("pydoc", plain, n=1, t=4000).token_ids[0].tolist()
    tokenizer = load_tokenizer(TokenizerSource(plain), Hub())
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.split("</s>")[0].startswith(topics[first][:1000])
    assert list(pydoc_topics()) == [topics[name] for name in sorted(topics)]


def test_a_text_file_is_one_document(tmp_path: Path, plain: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\ufeffThe cat.\r\n\r\nThe town — café.\r\n" * 9, encoding="utf-8", newline="")
    ids = load(file, plain, n=3, t=16).token_ids
    tokenizer = load_tokenizer(TokenizerSource(plain), Hub())
    assert EOS not in ids
    assert tokenizer.decode(ids.ravel()).startswith("The cat.\n\nThe town — café.\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "café".encode("latin-1"), r"latin.txt is not UTF-8 text \(byte 0xe9\)"),
        ("short.txt", b"The cat", r"short.txt gives \d+ tokens; --samples 2 --sequence-length 64 needs 128"),
        ("empty.txt", b"", r"empty.txt gives 0 tokens"),
        ("ids.npy", b"", r"ids.npy is an array, not text. Try --calibration tokens:.*ids.npy"),
        ("broken.txt.gz", b"no gzip", r"broken.txt.gz cannot be read: Not a gzipped file"),
    ],
)
def test_text_files_that_cannot_be_used(name: str, content: bytes, message: str, tmp_path: Path, plain: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name, plain, t=64)


@pytest.mark.parametrize("name", ["c5", "no/such/file.txt", "tokens:none.npy"])
def test_an_unknown_calibration_names_the_known_ones(name: str, plain: Path) -> None:
    with pytest.raises(InputError, match=rf"--calibration {name}: there is no file.*pydoc, c4, FILE.txt"):
        load(name, plain)


def test_a_folder_is_no_calibration(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        load(tmp_path, plain)


@pytest.mark.parametrize("dtype", ["<i2", ">i8", "<u4"])
def test_token_files_give_their_first_rows_and_columns(dtype: str, tmp_path: Path) -> None:
    array = np.arange(60, dtype=dtype).reshape(5, 12)
    np.save(tmp_path / "ids.npy", array)
    loaded = load_calibration(f"tokens:{tmp_path}/ids.npy", samples=2, sequence_length=8)
    assert loaded.name == f"tokens:{tmp_path}/ids.npy"
    assert loaded.token_ids.dtype == np.int64
    assert (loaded.token_ids == array[:2, :8]).all()
    assert loaded.sha256 == token_hash(loaded.token_ids)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((3, 3, 3), dtype=int),
            r"int64 of shape \(3, 3, 3\); token ids are an integer array of shape \(sequences, length\), or a flat",
        ),
        (np.zeros(9, dtype=int), r"has 9 token ids; --samples 2 .* needs 16\. --samples 1 would fit"),
        (np.zeros(5, dtype=int), r"has 5 token ids.*--samples 1 --sequence-length 5 would fit"),
        (np.zeros(0, dtype=int), r"has 0 token ids.* needs 16\.$"),
        (np.zeros(16), r"float64 of shape \(16,\)"),
        (np.zeros((9, 9)), "float64 of shape"),
        (np.zeros((9, 9), dtype=bool), "bool of shape"),
        (np.zeros((1, 9), dtype=int), r"1 sequences of 9 tokens.*--samples 1 --sequence-length 8 would fit"),
        (np.zeros((2, 7), dtype=int), r"2 sequences of 7 tokens.*--samples 2 --sequence-length 7 would fit"),
        (np.zeros((0, 9), dtype=int), "0 sequences of 9 tokens"),
        (np.full((2, 8), -3), "token id -3; ids count from 0"),
        (np.full((2, 8), 2**63, dtype=np.uint64), "token id 9223372036854775808"),
    ],
)
def test_token_files_that_cannot_be_used(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        first_sequences(array, samples=2, sequence_length=8, name="ids.npy")


def test_flat_token_files_are_cut_into_sequences(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(50, dtype=np.uint16))
    loaded = load_calibration(f"tokens:{tmp_path}/ids.npy", samples=3, sequence_length=16)
    assert (loaded.token_ids == np.arange(48).reshape(3, 16)).all()
    with pytest.raises(InputError, match="has 50 token ids; --samples 2 --sequence-length 512 needs 1,024"):
        load_calibration(f"tokens:{tmp_path}/ids.npy", samples=2)


def test_token_files_have_a_length_of_their_own(tmp_path: Path) -> None:
    file, run = tmp_path / "ids.npy", tmp_path / "run"
    np.save(file, np.arange(60).reshape(5, 12))
    short = load_calibration(f"tokens:{file}", samples=4, sequence_length=8, run=run)
    own = load_calibration(f"tokens:{file}", samples=4, run=run)
    assert (short.token_ids.shape, own.token_ids.shape) == ((4, 8), (4, 12))
    assert load_calibration(f"tokens:{file}", samples=4, sequence_length=12, run=run).sha256 == own.sha256
    file.unlink()
    assert load_calibration(f"tokens:{file}", samples=4, sequence_length=12, run=run).sha256 == own.sha256
    assert load_calibration(f"tokens:{file}", samples=4, run=run).sha256 in (own.sha256, short.sha256)
    with pytest.raises(InputError, match="there is no file"):
        load_calibration(f"tokens:{file}", samples=5, run=run)


def test_token_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "many.npz", a=np.zeros(1))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    for name, message in (("text.npy", "no .npy array"), ("many.npz", "several"), ("objects.npy", "no .npy array")):
        with pytest.raises(InputError, match=message):
            load_calibration(f"tokens:{tmp_path / name}", samples=1, sequence_length=2)


# Tokenizers


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [({}, ()), ({"bos": True}, (BOS,)), ({"bos": True, "suffix": True}, (BOS,)), ({"eos": False}, ())],
)
def test_the_prefix_is_what_the_tokenizer_puts_in_front(kind: dict[str, bool], prefix: tuple[int, ...]) -> None:
    assert prefix_ids(build_tokenizer(**kind)) == prefix


def test_every_sequence_starts_with_bos_and_documents_end_with_eos(with_bos: Path, loopback_hub: LoopbackHub) -> None:
    rows = "\n".join(json.dumps({"text": line}) for line in LINES).encode()
    loopback_hub.add_repo("org/data", {"main": {"train.jsonl": rows}}, kind="dataset")
    ids = load("hf:org/data", with_bos, n=3, t=6, hub=Hub(loopback_hub.url)).token_ids
    tokenizer = load_tokenizer(TokenizerSource(with_bos), Hub())
    assert (ids[:, 0] == BOS).all()
    assert not (ids[:, 1:] == BOS).any()
    assert tokenizer.decode(ids[:, 1:].ravel()).startswith(f"{LINES[0]}</s>"[:20])


def test_a_tokenizer_without_eos_joins_without(tmp_path: Path, loopback_hub: LoopbackHub) -> None:
    tokenizer = build_tokenizer(eos=False)
    tokenizer.save_pretrained(tmp_path)
    rows = "\n".join(json.dumps({"text": line}) for line in LINES).encode()
    loopback_hub.add_repo("org/data", {"main": {"train.jsonl": rows}}, kind="dataset")
    ids = load("hf:org/data", tmp_path, n=1, t=20, hub=Hub(loopback_hub.url)).token_ids
    joined = [token for line in LINES for token in tokenizer(line, verbose=False)["input_ids"]]
    assert ids[0].tolist() == joined[:20]


def test_the_first_place_that_has_a_tokenizer_is_used(
    tmp_path: Path, plain: Path, with_bos: Path, loopback_hub: LoopbackHub
) -> None:
    (tmp_path / "config.json").write_text("{}")
    loopback_hub.add_repo(
        "org/model", {"main": with_bos, "step1": {"config.json": b"{}", "tokenizer_config.json": b"{}"}}
    )
    hub = Hub(loopback_hub.url)
    commit = loopback_hub.commit("org/model", "step1")
    places = [TokenizerSource(tmp_path), TokenizerSource("org/model", commit), TokenizerSource("org/model")]
    assert find_tokenizer([*places, TokenizerSource(plain)], hub=hub).bos_token_id == BOS
    assert find_tokenizer([TokenizerSource(plain), *places], hub=hub).bos_token_id is None
    assert find_tokenizer([TokenizerSource(plain)], named="org/model", hub=hub).bos_token_id == BOS
    assert find_tokenizer(places, named=str(plain), hub=hub).bos_token_id is None


def test_only_tokenizer_files_are_fetched(plain: Path, loopback_hub: LoopbackHub) -> None:
    files = {file.name: file for file in plain.iterdir()} | {"model.safetensors": b"weights", "notes.md": b"#"}
    loopback_hub.add_repo("org/model", {"main": files})
    hub = Hub(loopback_hub.url)
    find_tokenizer([TokenizerSource("org/model")], hub=hub)
    fetched = {request.path.rpartition("/")[2] for request in loopback_hub.matching("GET", "*/resolve/*")}
    assert fetched == {"tokenizer.json", "tokenizer_config.json"}
    pinned = TokenizerSource("org/model", loopback_hub.commit("org/model", "main"))
    assert find_tokenizer([pinned], hub=Hub(loopback_hub.url, offline=True)).eos_token_id == EOS


def test_no_tokenizer_says_where_was_looked(tmp_path: Path, loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/model", {"main": {"config.json": b"{}"}})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    places = [
        TokenizerSource(tmp_path),
        TokenizerSource(tmp_path / "none"),
        TokenizerSource("org/model"),
        TokenizerSource("org/none"),
        TokenizerSource(tmp_path / "broken"),
    ]
    with pytest.raises(InputError, match="No tokenizer was found") as told:
        find_tokenizer(places, hub=Hub(loopback_hub.url))
    message = str(told.value)
    for part in (
        f"{tmp_path} has no tokenizer",
        f"{tmp_path / 'none'} is no folder",
        "The same holds of 1 more: org/model",
        "org/none was not found",
        f"{tmp_path / 'broken'} has a tokenizer that transformers cannot load",
        "--tokenizer",
        "tokens:FILE.npy",
    ):
        assert part in message
    with pytest.raises(InputError, match="nowhere to look"):
        find_tokenizer([])


def test_one_reason_of_many_places_is_told_once(tmp_path: Path, loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/gated", {"main": {"tokenizer.json": b"{}"}}, gated=True)
    commit = loopback_hub.commit("org/gated", "main")
    places = [TokenizerSource("org/gated", commit), TokenizerSource("org/gated")]
    for number in range(12):
        (tmp_path / f"step{number}").mkdir()
        places.append(TokenizerSource(tmp_path / f"step{number}"))
    with pytest.raises(InputError, match="No tokenizer was found") as told:
        find_tokenizer(places, hub=Hub(loopback_hub.url))
    _, gated, folders, hint = str(told.value).splitlines()
    assert gated.count("org/gated is gated") == 1
    assert folders.startswith(f"  {tmp_path / 'step0'} has no tokenizer")
    assert "The same holds of 11 more: " in folders
    assert str(tmp_path / "step2") in folders
    assert "--tokenizer" in hint


def test_a_tokenizer_beside_an_unknown_config_is_loaded_in_silence(tmp_path: Path, plain: Path) -> None:
    from transformers.utils import logging as theirs

    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append  # type: ignore[method-assign]
    theirs.add_handler(listener)
    try:
        assert find_tokenizer([TokenizerSource(folder)]).eos_token_id == EOS
    finally:
        theirs.remove_handler(listener)
    assert said == []


def test_a_tokenizer_with_a_class_of_its_own_needs_no_code_of_the_repository(tmp_path: Path, plain: Path) -> None:
    """As original OLMo has it: an auto_map beside a tokenizer.json."""
    from redundancy_trace.calibration.tokenizers import encode

    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "hf_olmo"}')
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "OLMoTokenizer"}
    told |= {"auto_map": {"AutoTokenizer": ["tokenization_olmo_fast.OLMoTokenizerFast", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "tokenization_olmo_fast.py").write_text("raise SystemExit('it ran')")
    found = find_tokenizer([TokenizerSource(folder)])
    assert found.eos_token_id == EOS
    assert encode(found, "a text") == encode(find_tokenizer([TokenizerSource(plain)]), "a text")


def test_a_named_tokenizer_that_is_none_is_not_replaced(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(InputError, match=f"--tokenizer {tmp_path}: {tmp_path} has no tokenizer"):
        find_tokenizer([TokenizerSource(plain)], named=str(tmp_path))


# What a run keeps


def test_a_run_goes_on_without_text_and_tokenizer(tmp_path: Path, plain: Path) -> None:
    file, run = tmp_path / "text.txt", tmp_path / "run"
    file.write_text("The cat sat on the mat. " * 20)
    first = load(file, plain, run=run)
    assert (np.load(run / "token_ids.npy") == first.token_ids).all()
    file.unlink()
    again = load_calibration(str(file), samples=2, sequence_length=8, run=run)
    assert (again.token_ids == first.token_ids).all()
    assert again.sha256 == first.sha256
    assert {kept.name for kept in run.iterdir()} == {"token_ids.npy", "token_ids.json"}
    with pytest.raises(InputError, match="there is no file"):
        load_calibration(str(file), samples=3, sequence_length=8, run=run)


def test_other_calibrations_have_files_of_their_own(tmp_path: Path, plain: Path, with_bos: Path) -> None:
    file, run = tmp_path / "text.txt", tmp_path / "run"
    file.write_text("The cat sat on the mat. " * 20)
    first = load("pydoc", plain, run=run)
    second = load(file, plain, run=run)
    more = load("pydoc", plain, n=3, run=run)
    named = load("pydoc", plain, tokenizer=str(with_bos), run=run)
    file.write_text("A dog barked at the moon. " * 20)
    changed = load(file, plain, run=run)
    others = (second, more, named, changed)
    expected = {"token_ids.npy", *(f"token_ids-{other.sha256[:12]}.npy" for other in others)}
    assert len(expected) == 5
    assert {kept.name for kept in run.glob("*.npy")} == expected
    assert (np.load(run / "token_ids.npy") == first.token_ids).all()
    assert load("pydoc", plain, run=run).sha256 == first.sha256
    assert load(file, plain, run=run).sha256 == changed.sha256


def test_what_is_damaged_in_a_run_is_made_anew(tmp_path: Path, plain: Path) -> None:
    first = load("pydoc", plain, run=tmp_path)
    (tmp_path / "token_ids.json").write_text("{")
    assert load("pydoc", plain, run=tmp_path).sha256 == first.sha256
    assert json.loads((tmp_path / "token_ids.json").read_text())["sha256"] == first.sha256
    (tmp_path / "token_ids.npy").write_bytes(b"cut")
    again = load("pydoc", plain, run=tmp_path)
    assert (again.token_ids == first.token_ids).all()
    assert (np.load(tmp_path / f"token_ids-{first.sha256[:12]}.npy") == first.token_ids).all()
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_cannot_be_written_is_told(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="token ids cannot be kept"):
        load("pydoc", plain, run=tmp_path / "file" / "run")


# Datasets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/a", DatasetName("org/a", None, None, "text")),
        ("hf:org/a:en", DatasetName("org/a", "en", None, "text")),
        ("hf:org/a::test", DatasetName("org/a", None, "test", "text")),
        ("hf:org/a:en:test:content", DatasetName("org/a", "en", "test", "content")),
    ],
)
def test_dataset_names(text: str, expected: DatasetName) -> None:
    assert DatasetName.parse(text) == expected


@pytest.mark.parametrize("text", ["hf:", "hf::en", "hf:a:b:c:d:e"])
def test_dataset_names_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read; it looks like hf:NAME\[:config\]"):
        DatasetName.parse(text)


@pytest.mark.parametrize(
    ("path", "config", "split"),
    [
        ("data/train-00000-of-00001.parquet", "default", "train"),
        ("wikitext-2-raw-v1/test-00000-of-00001.parquet", "wikitext-2-raw-v1", "test"),
        ("en/c4-validation.00003-of-00008.json.gz", "en", "validation"),
        ("default/partial-train/0000.parquet", "default", "train"),
        ("mini/valid/0000.parquet", "mini", "validation"),
        ("sample/10BT/000_00000.parquet", "sample/10BT", "train"),
        ("my_dev.jsonl", "default", "validation"),
        ("contest.jsonl", "default", "train"),
    ],
)
def test_files_are_sorted_by_their_names(path: str, config: str, split: str) -> None:
    assert layout_of([path]) == {config: {split: [path]}}


def test_a_card_says_which_files_are_what() -> None:
    paths = ["sample/10BT/0.parquet", "data/2013/a.parquet", "data/2014/b.parquet", "x/held.parquet", "y/test.parquet"]
    card = [
        {"config_name": "all", "default": True, "data_files": [{"split": "train", "path": "data/**/*.parquet"}]},
        {"config_name": "2013", "data_files": "data/2013/*"},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": ["sample/10BT/*"]}]},
        {"config_name": "held", "data_dir": "x", "data_files": {"validation": "held.parquet"}},
        {"config_name": "y", "data_dir": "y"},
        {"config_name": "none", "data_files": "*.parquet"},
        "no mapping",
    ]
    assert layout_declared(card, paths) == {
        "all": {"train": paths[1:3]},
        "default": {"train": paths[1:3]},
        "2013": {"train": paths[1:2]},
        "sample-10BT": {"train": paths[:1]},
        "held": {"validation": paths[3:4]},
        "y": {"test": paths[4:]},
    }
    assert layout_declared("nothing", paths) == layout_declared(None, paths) == {}


def test_the_split_that_is_meant_when_none_is_named() -> None:
    layout = {"default": {split: [split] for split in ("train", "test", "validation")}, "odd": {"train_sft": ["x"]}}
    assert chosen_files(layout, DatasetName.parse("hf:a")) == ["validation"]
    del layout["default"]["validation"]
    assert chosen_files(layout, DatasetName.parse("hf:a")) == ["test"]
    assert chosen_files(layout, DatasetName.parse("hf:a::train")) == ["train"]
    assert chosen_files(layout, DatasetName.parse("hf:a:odd")) == ["x"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:a", r"a has 2 configurations: fr, french. Name one: --calibration hf:a:fr"),
        ("hf:a:fre", r"no configuration 'fre'; there is fr, french"),
        ("hf:a:de", r"no configuration 'de'; there is fr, french"),
        ("hf:a:test", r"no configuration 'test'; .* For a split of the default configuration: hf:a::test"),
        ("hf:a:fr:test", r"no split 'test' in fr; there is train"),
    ],
)
def test_configurations_and_splits_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen_files({"fr": {"train": ["x"]}, "french": {"train": ["y"]}}, DatasetName.parse(name))


def _parquet(folder: Path, **columns: list[object]) -> bytes:
    pl.DataFrame(columns).write_parquet(folder / "made.parquet", row_group_size=2)
    return (folder / "made.parquet").read_bytes()


def _lines(rows: list[object]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


FORMATS: dict[str, Callable[[Path], bytes]] = {
    "test.parquet": lambda folder: _parquet(folder, id=[1, 2, 3, 4], text=[*LINES[:2], None, LINES[2]]),
    "test.jsonl": lambda _: _lines([{"text": line} for line in LINES]) + b"\n\n",
    "test.jsonl.gz": lambda _: gzip.compress(_lines([{"text": line, "id": 1} for line in LINES])),
    "test.json": lambda _: b" \n" + json.dumps([{"text": line} for line in LINES]).encode(),
    "test.json.gz": lambda _: gzip.compress(_lines([{"text": line} for line in [*LINES[:2], "", LINES[2]]])),
}


@pytest.mark.parametrize("file", FORMATS)
def test_datasets_are_read_in_every_format(file: str, tmp_path: Path, plain: Path, loopback_hub: LoopbackHub) -> None:
    content = {f"data/{file}": FORMATS[file](tmp_path), "LICENSE.txt": b"text", "dataset_infos.json": b"{}"}
    loopback_hub.add_repo("org/data", {"main": content}, kind="dataset")
    ids = load("hf:org/data", plain, n=1, t=16, hub=Hub(loopback_hub.url)).token_ids
    tokenizer = load_tokenizer(TokenizerSource(plain), Hub())
    whole_text = tokenizer("</s>".join(LINES), verbose=False)["input_ids"]
    assert ids[0].tolist() == whole_text[:16]


def test_a_text_dataset_is_one_document_a_file(plain: Path, loopback_hub: LoopbackHub) -> None:
    files = {"one.txt": LINES[0].encode(), "two.txt.gz": gzip.compress(LINES[1].encode())}
    loopback_hub.add_repo("org/data", {"main": files}, kind="dataset")
    ids = load("hf:org/data", plain, n=1, t=14, hub=Hub(loopback_hub.url)).token_ids[0].tolist()
    tokenizer = load_tokenizer(TokenizerSource(plain), Hub())
    assert ids == tokenizer("</s>".join(LINES[:2]), verbose=False)["input_ids"][:14]


def test_c4_takes_only_the_files_it_needs(plain: Path, loopback_hub: LoopbackHub) -> None:
    rows = gzip.compress(_lines([{"text": f"{line} {number}", "url": "u"} for number in range(20) for line in LINES]))
    names = [f"en/c4-{kind}.{n:05}-of-00003.json.gz" for kind in ("train", "validation") for n in range(3)]
    loopback_hub.add_repo("allenai/c4", {"main": dict.fromkeys(names, rows)}, kind="dataset")
    hub = Hub(loopback_hub.url)
    assert load("c4", plain, n=4, t=32, hub=hub).token_ids.shape == (4, 32)
    bodies = [request.path.rpartition("/")[2] for request in loopback_hub.matching("GET", "*/resolve/*")]
    assert bodies == ["c4-validation.00000-of-00003.json.gz"]
    with pytest.raises(InputError, match=r"The calibration c4 gives [\d,]+ tokens.*--samples \d+ would fit"):
        load("c4", plain, n=10_000, t=32, hub=hub)


def test_c4_in_the_users_cache_needs_no_network(plain: Path, loopback_hub: LoopbackHub) -> None:
    rows = gzip.compress(_lines([{"text": line} for line in LINES]))
    content = {"en/c4-validation.00000-of-00001.json.gz": rows}
    loopback_hub.add_repo("allenai/c4", {"main": content}, kind="dataset")
    snapshot_download("allenai/c4", repo_type="dataset", endpoint=loopback_hub.url)
    loopback_hub.forget_requests()
    assert load("c4", plain, hub=Hub(loopback_hub.url, offline=True)).token_ids.shape == (2, 8)
    assert not loopback_hub.requests


def test_a_card_of_the_hub_is_followed(tmp_path: Path, plain: Path, loopback_hub: LoopbackHub) -> None:
    entry = "- config_name: small\n  data_files:\n  - {split: held, path: parts/a-*.parquet}"
    card = f"---\nconfigs:\n{entry}\n---\n# Data\n".encode()
    parquet = _parquet(tmp_path, body=LINES * 9, n=[1] * 27)
    for name, readme in (("org/card", card), ("org/broken", b"---\n: [\n---\n")):
        loopback_hub.add_repo(
            name, {"main": {"README.md": readme, "parts/a-0.parquet": parquet, "parts/b.parquet": b""}}, kind="dataset"
        )
    hub = Hub(loopback_hub.url)
    assert load("hf:org/card:small:held:body", plain, hub=hub).token_ids.shape == (2, 8)
    assert load("hf:org/broken:parts:train:body", plain, hub=hub).token_ids.shape == (2, 8)
    with pytest.raises(InputError, match=r"a-0.parquet of org/card has no column of text 'text'; with text: body"):
        load("hf:org/card", plain, hub=hub)


def test_the_hubs_own_parquet_copy_stands_in(tmp_path: Path, plain: Path, loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo(
        "org/script",
        {"main": {"script.py": b"", "README.md": b"# Data"}},
        converts={"parquet": {"default/test/0000.parquet": _parquet(tmp_path, text=LINES)}},
        kind="dataset",
    )
    assert load("hf:org/script", plain, hub=Hub(loopback_hub.url)).token_ids.shape == (2, 8)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"script.py": b""}, r"org/data has no .parquet, .*; it holds: script.py.*FILE.txt"),
        ({"a.jsonl": b'{"body": "x"}'}, "a.jsonl of org/data has no column of text 'text'; with text: body"),
        ({"a.jsonl": b'{"text": 3}'}, "no column of text 'text'; and none with text"),
        ({"a.jsonl": b"{"}, "a.jsonl of org/data is not JSON"),
        ({"a.jsonl": b"3"}, "Row 1 of a.jsonl of org/data is no JSON object"),
        ({"a.jsonl": b'{"text": "caf\xe9"}'}, "not UTF-8"),
        ({"a.jsonl.gz": gzip.compress(b'{"text": "The cat"}' * 99)[:40]}, "a.jsonl.gz of org/data cannot be read"),
        ({"a.parquet": b"PAR1"}, "a.parquet of org/data cannot be read as parquet"),
    ],
)
def test_datasets_that_cannot_be_used(
    files: dict[str, bytes], message: str, plain: Path, loopback_hub: LoopbackHub
) -> None:
    loopback_hub.add_repo("org/data", {"main": files}, kind="dataset")
    with pytest.raises(InputError, match=message):
        load("hf:org/data", plain, hub=Hub(loopback_hub.url))


def test_an_unknown_dataset_is_told(plain: Path, loopback_hub: LoopbackHub) -> None:
    with pytest.raises(InputError, match="org/none was not found"):
        load("hf:org/none", plain, hub=Hub(loopback_hub.url))


def test_token_ids_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((2, 8), dtype=int))
    code = (
        "import sys; from pathlib import Path; from redundancy_trace.calibration import load_calibration;"
        f"load_calibration('tokens:{tmp_path}/ids.npy', samples=2, sequence_length=8, run=Path({str(tmp_path)!r}));"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pieces_have_two_parts() -> None:
    assert list(whole(["", " \n", "x"])) == [Piece("x", ends_document=True)]
