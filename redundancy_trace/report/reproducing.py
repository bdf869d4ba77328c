"""The command that makes a run again, from what the run keeps of how it was made."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redundancy_trace.report.gathering import Sources
from redundancy_trace.settings import TraceSettings, flag_of
from redundancy_trace.store import CalibrationRecord

# Where the files go, how they come and what is printed changes no number.
_NEEDLESS = ("out", "fetch", "disk_budget", "keep", "offline", "dry_run", "yes", "json", "quiet")


def commands(sources: Sources) -> list[str]:
    """One `trace` command for each calibration of the run, whose scores are those of the run.

    The checkpoints are selected as in the last sweep where that covers all that are stored, else by name.
    """
    settings = dict(sources.made_with["settings"])
    settings |= {"dtype": sources.run.dtype, "revisions": _revisions(sources, settings["revisions"])}
    found = [_command(settings | _source(sources.run.folder, one)) for one in sources.run.calibrations]
    return found or [_command(settings)]


def _revisions(sources: Sources, selector: str) -> str:
    scored = sources.scores["revision"].unique(maintain_order=True).to_list()
    failed = [one["revision"] for one in sources.failures]
    chosen = {one.name for one in sources.listing.chosen} if sources.listing else set(scored)
    return selector if chosen >= set(scored) else ",".join(dict.fromkeys([*scored, *failed]))


def _source(folder: Path, record: CalibrationRecord) -> dict[str, Any]:
    """What the calibration was made from; nothing where the run does not tell."""
    try:
        made = json.loads((folder / record.file).with_suffix(".json").read_text(encoding="utf-8"))
        return {name: made[name] for name in ("calibration", "samples", "sequence_length", "tokenizer")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _command(settings: Mapping[str, Any]) -> str:
    words = ["trace"]
    for field in fields(TraceSettings):
        default = _each(field.default)
        given = _each(settings.get(field.name, field.default))
        if field.name in _NEEDLESS or given == default:
            continue
        for value in given:
            words.append(flag_of(field.name))
            if value is not True:
                words.append(_without_login(str(value)) if field.name == "endpoint" else str(value))
    return shlex.join(words)


def _each(value: Any) -> list[Any]:
    """The values of a flag, which some take several times; none of one that is not given."""
    several = value if isinstance(value, list | tuple) else [value]
    return [one for one in several if one is not None and one is not False]


def _without_login(url: str) -> str:
    """The address without the name and password that may stand in it: a report is sent around."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
