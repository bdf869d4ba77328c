"""SmolLM2 without half of its attentions as `hf` in transformers: decoding speed-up, and what the drop allows.

The bound is the larger of two ratios, before over after: multiply-adds of a decoding step, and bytes of weights and
cache that it reads. In the 16 bits that are stored, one sequence, a prompt of 512 tokens and 64 decoded behind it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.engines import DECODED, ROUNDS, asked, engine_rows
from benchmarks.ratios import Ratio, machine, tell_apart

ROOT = Path(__file__).parents[1]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decoding.json")


def run(options: argparse.Namespace) -> int:
    """Export, measure, print the table, write the JSON; 1 if a bound is missed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark-decoding-") as work:
        rows = measure(Path(work))
    return tell_apart(rows, {"decoding": time.monotonic() - started}, machine(), options.out)


def measure(work: Path) -> list[Ratio]:
    """Prefill and decoding as measured in turns, the cache, and the bound on decoding by counting."""
    import redundancy_trace as rt
    from benchmarks.smollm2 import smollm2

    model = smollm2(work)
    ids, request = work / "ids.npy", work / "request.npz"
    np.save(ids, model.token_ids)
    np.savez(request, prompt=model.token_ids[:1], decoded=DECODED, rounds=ROUNDS)
    export = rt.prune(
        model.folder,
        out=work / "hf",
        format="hf",
        drop="attn=50%",
        calibration=f"tokens:{ids}",
        samples=len(model.token_ids),
        device="cpu",
    )
    rows = engine_rows("hf, attn=50%", asked("transformers_timed", model.folder, export.folder, request))
    counted = rt.evaluate(
        model.folder, plan=export.plan, measure="speed", dtype="bfloat16", device="cpu", new_tokens=DECODED, rounds=1,
        out=work / "counted.parquet", quiet=True,
    )  # fmt: skip
    allowed = {row["metric"]: row["value"] for row in counted.iter_rows(named=True) if row["metric"].endswith("_bound")}
    told = "by multiply-adds, or bytes of weights and cache, of a step"
    return [
        *rows,
        Ratio("hf, attn=50%: decode speed-up allowed", allowed["decode_speedup_bound"], None, detail={"told": told}),
    ]
