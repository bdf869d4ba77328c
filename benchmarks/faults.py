"""Sweeps that are killed while their Hub fails: whether the table comes out the same, and what it costs in bytes.

The rounds are those of `tests/fault_rounds.py`; a seed tells all that goes wrong in one of them.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
if TYPE_CHECKING:
    from fault_rounds import Round


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first round")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")


def run(options: argparse.Namespace) -> int:
    """Play the rounds, print the table, write the JSON; 1 if anything was wrong in any."""
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory(prefix="benchmark-faults-") as name:
        folder = Path(name)
        # Read once, when huggingface_hub is imported: no server and no cache of the user's.
        for variable in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            os.environ.pop(variable, None)
        os.environ |= {
            "HF_HOME": str(folder / "hf-home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        from fault_rounds import Rounds
        from tiny_runs import RECIPE

        from redundancy_trace.demo import train_demo

        rounds = Rounds(train_demo(folder / "tiny-run", recipe=RECIPE), folder)
        played: list[Round] = []
        try:
            for seed in range(options.first, options.first + options.rounds):
                played.append(rounds.play(seed))
                _tell(played[-1])
                _write(options.out, played)
        finally:
            rounds.close()
    table = summary(played)
    for what, number in table.items():
        print(f"{what:45} {number}")
    print(f"Written: {options.out}")
    return int(any(this.told for this in played))


def summary(played: "list[Round]") -> dict[str, Any]:
    """The rounds in a table; bytes of those that fetched files alone, as a killed stream is read anew."""
    files = [this for this in played if this.fetch == "file"]
    worst = max(files, key=lambda this: this.ratio, default=None)
    ended = sum((this.ended for this in played), Counter[str]())
    met = sum((this.met for this in played), Counter[str]())
    return {
        "rounds": len(played),
        "rounds --fetch stream": len(played) - len(files),
        "sweeps started": sum(this.starts for this in played),
        "sweeps ended by a signal": sum(this.kills for this in played),
        "sweeps by how they ended": dict(ended.most_common()),
        "faults met": met.total(),
        "faults met by kind": dict(met.most_common()),
        "rounds with a branch that moved": sum(this.moved for this in played),
        "rounds with a wrong table": sum(this.wrong for this in played),
        "rounds with something double": sum(this.double for this in played),
        "rounds with something left over": sum(this.left_over for this in played),
        "rounds with an odd end of a process": sum(this.odd for this in played),
        "bytes sent by bytes needed": _ratio(files, "served_plain", "needed_plain"),
        "the same of the worst round": None if worst is None else [round(worst.ratio, 3), f"seed {worst.seed}"],
        "the same with what is sent again by design": _ratio(files, "served", "needed"),
        "seconds": round(sum(this.seconds for this in played)),
    }


def _ratio(played: "list[Round]", sent: str, needed: str) -> float | None:
    total = sum(getattr(this, needed) for this in played)
    return round(sum(getattr(this, sent) for this in played) / total, 4) if total else None


def _tell(this: "Round") -> None:
    told = "; ".join(this.told) or "right"
    print(
        f"{this.seed:4} {this.fetch:6} {this.kills} killed, {this.met.total():3} faults, "
        f"bytes {this.ratio:.3f}, {this.seconds:.1f} s: {told}",
        flush=True,
    )


def _write(path: Path, played: "list[Round]") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"summary": summary(played), "rounds": [vars(this) for this in played]}, indent=1))
