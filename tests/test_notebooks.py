"""The notebooks run from beginning to end as they are, one after the other, in the order of their numbers."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
# What must be seen when all cells have run.
PICTURES = {"1_quick_start": 1, "2_exploring_a_run": 2, "3_from_trace_to_pruned_model": 2, "4_a_figure_of_your_own": 2}
MOST_BYTES = 600_000


def outputs(book):
    return [output for cell in book.cells for output in cell.get("outputs", ())]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_text_and_code_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert outputs(book) == []
    assert {cell.get("execution_count") for cell in book.cells} == {None}
    assert book.cells[0].source.startswith("# ")
    assert path.stat().st_size < 10_000


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the demo is trained first where the cache has none
def test_they_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")  # as in a notebook of a user, where figures are shown
    assert [path.stem for path in BOOKS] == list(PICTURES)
    ran = {}
    for path in BOOKS:  # in one folder: they share the run, and the cache shares the demo's training
        book = nbformat.read(path, as_version=4)
        NotebookClient(
            book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
        ran[path.stem] = outputs(book)
        seen = sum("image/png" in output.get("data", {}) for output in ran[path.stem])
        assert seen == PICTURES[path.stem], path.stem
        assert len(nbformat.writes(book)) < MOST_BYTES, path.stem
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    assert (tmp_path / "share.pdf").is_file()
    decoded = [
        output["data"]["text/plain"]
        for output in ran["3_from_trace_to_pruned_model"]
        if "The assert" in output.get("data", {}).get("text/plain", "")
    ]
    assert len(decoded) == 2
    assert decoded[0] == decoded[1], "the export decodes what the drop in place did"
