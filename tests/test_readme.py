"""The README says what is true: the flags, functions, columns and pictures that it names are there."""

import ast
import re
from pathlib import Path

import pytest

import redundancy_trace as rt
from redundancy_trace.cli import run
from redundancy_trace.cli.app import app
from redundancy_trace.settings import TraceSettings, flag_of
from redundancy_trace.store import SCORE_SCHEMA

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Of pip, git, pytest, sbatch and python -m figures.
OTHERS = {"--dist", "--no-deps", "--index-url", "--array", "--wrap", "--mpl-generate-path", "--redraw"}
COMMANDS = [command.name for command in app.registered_commands]


def flags_of(command, capsys):
    run([*command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_every_flag_that_is_named_exists_and_every_flag_is_named(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - OTHERS
    known = flags_of([], capsys).union(*(flags_of([command], capsys) for command in COMMANDS))
    assert named <= known
    assert {flag_of(name) for name in TraceSettings.__dataclass_fields__} <= named


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line[:6] == "trace "]
)
def test_every_trace_command_is_one_that_the_parser_takes(line, capsys):
    words = line.split("#")[0].split()[1:]
    command = words[:1] if words[0] in COMMANDS else []
    flags = {word for word in words if word.startswith("--")}
    assert flags <= flags_of(command, capsys)


def test_python_examples_call_what_there_is():
    names = {
        node.attr
        for block in blocks("python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rt"
    }
    assert names
    assert names <= set(rt.__all__)


def test_columns_are_those_of_the_store():
    listed = re.search(r"Columns: `([^`]*)`", README)
    assert listed is not None
    assert [name.strip() for name in listed.group(1).split(",")] == list(SCORE_SCHEMA)


def test_pictures_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_two_commands_are_one_line_each_and_ci_reads_them():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for mark in ("demo-command", "test-command"):
        block = re.search(rf"<!-- {mark} -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
        assert block is not None
        assert len(block.group(1).strip().splitlines()) == 1
        assert mark in ci
