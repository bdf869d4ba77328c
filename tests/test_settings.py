"""The table of options: sorted by hand into what changes a number and what does not, refused early."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path

import pytest

from redundancy_trace import cli
from redundancy_trace.cli.sweeping import sweep_command
from redundancy_trace.errors import InputError
from redundancy_trace.settings import TraceSettings, flag_of
from redundancy_trace.sweep import settings_from

FIELDS = dataclasses.fields(TraceSettings)
# Settings that take neither any word nor nothing.
GIVEN = {
    "devices": "cpu,cpu",
    "shard": "1/2",
    "cluster": "ray",
    "engine": "whole",
    "fetch": "file",
    "disk_budget": "100GB",
    "dtype": "bfloat16",
    "samples": (7,),
    "calibration": ("word",),
    "sequence_length": 7,
    "batch_size": 7,
    "tokens_per_step": 7,
}


def test_every_setting_says_whether_it_changes_a_number():
    for field in FIELDS:
        assert isinstance(field.metadata["identity"], bool), field.name
        assert field.metadata["help"].endswith("."), field.name


def test_every_setting_is_a_flag_of_the_sweep_and_no_other():
    parameters = [p for p in inspect.signature(sweep_command).parameters.values() if p.name not in ("ctx", "version")]
    assert {p.name: p.default for p in parameters} == {field.name: field.default for field in FIELDS}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_flag_reaches_its_field(field, monkeypatch):
    seen = []
    monkeypatch.setattr("redundancy_trace.sweep.run_sweep", lambda settings, _: seen.append(settings) or 1 / 0)
    given = True if isinstance(field.default, bool) else GIVEN.get(field.name, "word")
    arguments = [flag_of(field.name)]
    if given is not True:
        arguments += [str(given[0] if isinstance(given, tuple) else given)]
    model = [] if field.name in ("model", "demo") else ["--model", "me/model"]
    assert cli.run([*model, *arguments]) == 1
    value = getattr(seen[0], field.name)
    assert (str(value) if field.name == "out" else value) == given
    changed = {f.name for f in FIELDS if getattr(seen[0], f.name) != f.default}
    assert changed == {field.name, *(["model"] if model else [])}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "--samples is 0; it must be at least 1"),
        ({"samples": [4, 0]}, "--samples is 0; it must be at least 1"),
        ({"sequence_length": 1}, "--sequence-length is 1; it must be at least 2"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"tokens_per_step": -5}, "--tokens-per-step is -5; it must be at least 1"),
        ({"engine": "quick"}, "--engine is 'quick'; known: stream, whole"),
        ({"dtype": "float16"}, "--dtype is 'float16'; known: auto, float32, bfloat16"),
        ({"model": None}, "No model is named. Try trace --model EleutherAI/pythia-70m"),
        ({"demo": True}, "leave out --model or --demo"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError) as raised:
        TraceSettings(**{"model": "me/model", **fields})
    assert message in str(raised.value)


def test_keywords_of_the_python_call(tmp_path):
    paths = {"model": tmp_path, "tokenizer": tmp_path / "x", "calibration": tmp_path / "text.txt"}
    expected = TraceSettings(**{name: str(path) for name, path in paths.items()}, out=tmp_path / "run", samples=3)
    assert settings_from({**paths, "out": tmp_path / "run", "samples": 3}) == expected
    assert (
        settings_from({name: str(path) for name, path in paths.items()} | {"out": str(tmp_path / "run"), "samples": 3})
        == expected
    )
    several = settings_from({"model": "m", "calibration": [tmp_path / "a.txt", "pydoc", "pydoc"], "samples": [4, 2, 4]})
    assert (several.calibration, several.samples) == ((str(tmp_path / "a.txt"), "pydoc"), (4, 2)), "each once"
    with pytest.raises(InputError, match=r"no setting 'sampels'\. Did you mean samples\?"):
        settings_from({"model": "me/model", "sampels": 3})
    with pytest.raises(InputError, match=r"no setting 'xyz'\. Known: model, revisions"):
        settings_from({"model": "me/model", "xyz": 3})


def test_the_python_call_shows_its_settings_to_help_and_completion():
    import redundancy_trace as rt

    parameters = inspect.signature(rt.trace).parameters
    assert {name: p.default for name, p in parameters.items()} == {field.name: field.default for field in FIELDS}
    assert [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == ["model"]
    assert parameters["out"].annotation == Path | None | str
    assert parameters["samples"].annotation == int | Sequence[int]
    assert parameters["calibration"].annotation == str | Path | Sequence[str | Path]
    for field in FIELDS:
        assert f"\n    {field.name}: {field.metadata['help'].split()[0]}" in rt.trace.__doc__
    with pytest.raises(InputError, match=r"no setting 'sampels'\. Did you mean samples\?"):
        rt.trace("me/model", sampels=3)


def test_help_shows_every_flag(capsys):
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for field in FIELDS:
        assert flag_of(field.name) in shown
    for word in ("list", "plot", "[default: 64]", "[default: log:20]"):
        assert word in shown
