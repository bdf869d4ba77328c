"""Ratios measured side by side in one run, each with the bound that it is held against.

Without a name: all of the table, each benchmark in a process of its own; under ten minutes on two cores, no network.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.ratios import Options, Ratio, machine, processor_times, stolen_since, table, write_results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Of the table, in its order: modules with `measure(options) -> list[Ratio]`.
TABLE = ("scoring", "memory", "pipeline", "growth", "cluster")
# Too long for it: modules with `add_options(parser)` and `run(options) -> int`.
APART = ("deep", "faults", "large", "engines", "decoding", "vllm_check")

# Share of the processors' time that a hypervisor gave to others, from which it is told.
_STOLEN = 0.005


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that is named, or all of the table; 1 if a bound is missed or a benchmark fails."""
    options = _parser().parse_args(arguments)
    before = processor_times()
    if options.name in APART:
        return int(importlib.import_module(f"benchmarks.{options.name}").run(options))
    _set_environment()
    if options.name is None:
        return _run_all(options, before)
    started = time.monotonic()
    rows = importlib.import_module(f"benchmarks.{options.name}").measure(Options(toy=options.toy))
    if options.toy:
        rows = [replace(row, bound=None) for row in rows]
    return _tell(rows, {options.name: time.monotonic() - started}, [], options, before)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, help="JSON file to write [default: benchmarks/results/NAME.json]")
    shared.add_argument("--toy", action="store_true", help="at the size of a test, held against no bound")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        parents=[shared],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    named = parser.add_subparsers(dest="name", metavar="NAME")
    for name in TABLE:
        named.add_parser(name, help=_first_line(name), parents=[shared])
    for name in APART:
        importlib.import_module(f"benchmarks.{name}").add_options(
            named.add_parser(name, help=f"{_first_line(name)} (apart)")
        )
    return parser


def _first_line(name: str) -> str:
    return (importlib.import_module(f"benchmarks.{name}").__doc__ or "").splitlines()[0]


def _set_environment() -> None:
    """No network, none of the user's caches, threads that wait quietly: before the libraries are imported."""
    for variable in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE"):
        os.environ.pop(variable, None)
    os.environ.update(
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        DISABLE_SAFETENSORS_CONVERSION="1",
        MPLBACKEND="Agg",
        OMP_WAIT_POLICY="PASSIVE",
        PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    )


def _run_all(options: argparse.Namespace, before: tuple[float, float]) -> int:
    """Each benchmark in a process of its own, so that none is measured in what another left behind."""
    rows: list[Ratio] = []
    failed: list[str] = []
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        for name in TABLE:
            started = time.monotonic()
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "benchmarks", name, "--out", str(file), *(["--toy"] * options.toy)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
            seconds[name] = time.monotonic() - started
            if not file.is_file():
                failed.append(f"{name} (exit {done.returncode})")
                continue
            rows += _read_rows(file)
            print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    return _tell(rows, seconds, failed, options, before)


def _read_rows(file: Path) -> list[Ratio]:
    rows = json.loads(file.read_text(encoding="utf-8"))["ratios"]
    return [Ratio(**{name: value for name, value in row.items() if name != "met"}) for row in rows]


def _tell(
    rows: list[Ratio],
    seconds: dict[str, float],
    failed: list[str],
    options: argparse.Namespace,
    before: tuple[float, float],
) -> int:
    """Print the table and where it was measured, write the JSON; returns the exit code."""
    on = machine() | {"stolen": stolen_since(before)}
    versions = ", ".join(f"{name} {number}" for name, number in on["versions"].items())
    print(table(rows))
    print(f"\n{on['cpu']}, {on['cores']} cores, {on['memory_gib']} GiB; {on['system']}, Python {on['python']}")
    print(f"{versions}; {on['date']}; {sum(seconds.values()):.0f} s")
    if on["stolen"] > _STOLEN:
        print(f"Other machines took {on['stolen']:.1%} of the processors' time meanwhile: times are less certain.")
    out = options.out or RESULTS / f"{options.name or 'all'}.json"
    write_results(out, rows, seconds, on)
    print(f"Written: {out}")
    missed = [row.name for row in rows if row.met is False]
    for name in missed:
        print(f"Bound missed: {name}", file=sys.stderr)
    for name in failed:
        print(f"Failed: {name}", file=sys.stderr)
    return int(bool(missed or failed))


if __name__ == "__main__":
    raise SystemExit(main())
