"""What a benchmark measured, the bound that it is held against, and how both are told: a table and a JSON file."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from redundancy_trace.versions import library_versions


@dataclass(frozen=True)
class Options:
    """How a benchmark is measured.

    Attributes:
        toy: At the size of a test: seconds, to see that it runs; its ratios say nothing and are held against no bound.
    """

    toy: bool = False


@dataclass(frozen=True)
class Ratio:
    """One row of the table.

    Attributes:
        name: What was measured, with what it is divided by.
        value: The figure, in `unit`.
        bound: What it is held against; None for a row that stands beside another for comparison.
        better: Which way is better: at most (`lower`) or at least (`higher`) the bound is met.
        detail: All that the figure was made from, raw timings too; ready for JSON.
        unit: `×` for a ratio, `s`, `MB`.
    """

    name: str
    value: float
    bound: float | None
    better: Literal["lower", "higher"] = "lower"
    detail: dict[str, Any] = field(default_factory=dict)
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        """Whether the bound is met; None without one."""
        if self.bound is None:
            return None
        return self.value <= self.bound if self.better == "lower" else self.value >= self.bound


def median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Median over runs taken in pairs of the first time over the second: what slows a pair down slows down both."""
    return statistics.median(first / second for first, second in pairs)


def table(ratios: Sequence[Ratio]) -> str:
    """The rows in plain columns: name, figure, bound, met or missed."""
    verdicts = {True: "met", False: "MISSED", None: ""}
    rows = [("", "measured", "bound", "")]
    for ratio in ratios:
        sign = "≤" if ratio.better == "lower" else "≥"
        bound = "" if ratio.bound is None else f"{sign} {ratio.bound:g} {ratio.unit}"
        rows.append((ratio.name, f"{_figure(ratio.value)} {ratio.unit}", bound, verdicts[ratio.met]))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(
            (name.ljust(widths[0]), value.rjust(widths[1]), bound.rjust(widths[2]), verdict.ljust(widths[3]))
        ).rstrip()
        for name, value, bound, verdict in rows
    )


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def machine() -> dict[str, Any]:
    """Where and with what it was measured: processor, cores, memory in GiB, system, versions, date."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        pages = 0
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": library_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor_times() -> tuple[float, float]:
    """Seconds of the processors so far, and those that a hypervisor gave to other machines; 0 where not told."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    except OSError:
        return 0.0, 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    return sum(map(int, fields)) / ticks, int(fields[7]) / ticks


def stolen_since(before: tuple[float, float]) -> float:
    """Share of the processors' time that a hypervisor gave to other machines since `processor_times` gave `before`."""
    in_all, stolen = (now - then for now, then in zip(processor_times(), before, strict=True))
    return stolen / in_all if in_all else 0.0


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_results(path: Path, ratios: Sequence[Ratio], seconds: dict[str, float], on: dict[str, Any]) -> None:
    """Write the rows with all their raw timings, how long each benchmark took, and the machine."""
    rows = [{**asdict(ratio), "met": ratio.met} for ratio in ratios]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": on, "seconds": seconds, "ratios": rows}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def tell_apart(
    rows: Sequence[Ratio], seconds: dict[str, float], on: dict[str, Any], path: Path, where: str | None = None
) -> int:
    """Print the rows of a benchmark that stands apart and where it ran, write the JSON; 1 if a bound is missed."""
    print(table(rows))
    for row in rows:
        if "told" in row.detail:
            print(f"{row.name}: {row.detail['told']}")
    print(f"\n{where or on['cpu']}, {on['cores']} cores, {on['memory_gib']} GiB; {on['date']}")
    write_results(path, rows, seconds, on)
    print(f"Written: {path}")
    return int(any(row.met is False for row in rows))
