"""The page itself: sources into the template, and the file that is written whole or not at all."""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from redundancy_trace.analysis import Check
from redundancy_trace.errors import InputError
from redundancy_trace.figures.style import model_name
from redundancy_trace.metrics import COMPONENT_LABELS, COMPONENTS
from redundancy_trace.report import words
from redundancy_trace.report.gathering import Sources, gather
from redundancy_trace.report.pictures import pictures
from redundancy_trace.report.reproducing import commands
from redundancy_trace.versions import library_versions
from redundancy_trace.writing import write_whole

FILE = "report.html"


def write_report(run: str | Path, file: str | Path | None = None, *, calibration: str | None = None) -> Path:
    """Write one self-contained HTML page of a run: words, pictures to point at, tables, how to make it again.

    The page loads nothing and asks nobody; it can be sent as it is. The same run gives the same bytes.

    Args:
        run: A run folder.
        file: Where to write; None = `report.html` in the run. A file that is there is replaced whole.
        calibration: The calibration to show, as the rows name it; None = the run's first.

    Returns:
        The file.

    Raises:
        InputError: If the folder is no run or holds no scores, importances are missing or no numbers, there is no such
            calibration, or the file cannot be written.
    """
    folder = Path(run).expanduser()
    path = folder / FILE if file is None else Path(file).expanduser()
    text = render(gather(folder, calibration))
    if path.is_dir():
        raise InputError(f"The report cannot be written to {path}: it is a folder. Name a file, such as {path / FILE}.")
    try:
        return write_whole(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))
    except OSError as error:
        raise InputError(
            f"The report cannot be written to {path}: {error.strerror or error}. Name another file with --out."
        ) from error


def render(sources: Sources) -> str:
    """The page, as text."""
    script, style = (_part(name) for name in ("page.js", "page.css"))
    template = _environment().get_template("page.html.j2")
    stats = sources.stats
    return template.render(
        model=model_name(sources.scores).replace(r"\$", "$") or "A model",
        lead=words.lead(sources),
        left_out=words.left_out(stats),
        findings=words.findings(stats),
        answers=words.answers(stats),
        checks=[_check(check) for check in stats.checks],
        pictures=json.dumps(pictures(sources), ensure_ascii=False, separators=(",", ":"), allow_nan=False),
        trends=_trends(sources),
        calibrations=_calibrations(stats.calibrations),
        rows=sources.table,
        has_tokens=any(row["tokens"] is not None for row in sources.table),
        n_listed=None if sources.listing is None else len(sources.listing),
        components=[(name, COMPONENT_LABELS[name]) for name in COMPONENTS if name in stats.series.grids],
        several=stats.series.checkpoints.height > 1,
        run=sources.run,
        shown=sources.calibration,
        settings=_settings(sources),
        versions=sources.made_with.get("versions", {}),
        written_by=library_versions()["redundancy-trace"],
        commands=commands(sources),
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
    )


@cache
def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    """Names of models and checkpoints are anybody's: whatever is put in is escaped unless the template says `safe`."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: "" if value is None else f"{value:,}"
    environment.filters["decimal"] = lambda value: "" if value is None else f"{value:.4f}"
    environment.filters["size"] = _size
    environment.filters["data"] = _inert
    return environment


def _inert(text: str) -> str:
    """JSON that ends no script element, whatever its strings hold."""
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    """As a content security policy names what it lets run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _check(check: Check) -> dict[str, str]:
    return {name: getattr(check, name) for name in ("question", "answer", "figure", "rule")}


def _trends(sources: Sources) -> list[dict[str, Any]]:
    """One row a component and set of layers, as the table shows them."""
    found = []
    for row in sources.stats.trends.drop_nulls("first").to_dicts():
        layers = "all layers" if row["layers"] == "all" else "without the first and last"
        per = {"tokens": "tokens", "step": "steps"}.get(row["per"], "")
        found.append(
            {
                "name": f"{COMPONENT_LABELS[row['component']]}, {layers}",
                "first": f"{row['first']:.3g}",
                "last": f"{row['last']:.3g}",
                "slope": _banded(row, "slope", "+#.2g"),
                "per": per,
                "spearman": _banded(row, "spearman", ".2f"),
            }
        )
    return found


def _banded(row: dict[str, Any], name: str, form: str) -> str:
    if row[name] is None:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def _calibrations(between: pl.DataFrame) -> list[dict[str, Any]]:
    """Mean agreement of every two calibrations over the checkpoints; no rows of one calibration."""
    keys = ["calibration", "other_calibration", "component"]
    means = between.group_by(keys, maintain_order=True).agg(
        pl.col("spearman", "shared", "overlap", "chance").mean(), pl.col("k").first(), pl.len().alias("checkpoints")
    )
    return [{**row, "component": COMPONENT_LABELS[row["component"]]} for row in means.to_dicts()]


def _settings(sources: Sources) -> list[tuple[str, str]]:
    """The settings of the last sweep that were given, and what the run holds to."""
    given = sources.made_with["settings"]
    kept = {"dtype": sources.run.dtype, "trust_remote_code": sources.run.trust_remote_code}
    hidden = ("out", "endpoint", "json", "quiet", "yes", "dry_run")
    rows = {name: value for name, value in {**given, **kept}.items() if name not in hidden}
    told = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in rows.items()}
    return [(name, str(value)) for name, value in told.items() if value not in (None, False, "")]


def _size(value: int | None) -> str:
    if value is None:
        return ""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value} B"
