"""SmolLM2 whole and without 8 attentions in transformers (`hf`) and llama.cpp (`gguf`): speed and cache, in turns.

In the 16 bits that are stored, one sequence, a prompt of 512 tokens and 64 decoded behind it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.ratios import Ratio, machine, median_ratio, tell_apart

ROOT = Path(__file__).parents[1]
STANDALONE = Path(__file__).parent / "standalone"
ROUNDS = 7
DECODED = 64
# 22 of 30 attentions stay; in transformers there are two numbers a token for each of the others.
CACHE_BOUND = 0.74


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json")


def run(options: argparse.Namespace) -> int:
    """Export, measure, print the table, write the JSON; 1 if a bound is missed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark-engines-") as work:
        rows = measure(Path(work))
    return tell_apart(rows, {"engines": time.monotonic() - started}, machine(), options.out)


def measure(work: Path) -> list[Ratio]:
    """Three rows an engine: prefill, decoding, cache."""
    import redundancy_trace as rt
    from benchmarks.smollm2 import smollm2, whole_gguf

    model = smollm2(work)
    request = work / "request.npz"
    np.savez(request, prompt=model.token_ids[:1], decoded=DECODED, rounds=ROUNDS)
    hf, gguf = (
        rt.prune(model.folder, out=work / form, format=form, plan=model.plan, device="cpu").folder
        for form in ("hf", "gguf")
    )
    return [
        *engine_rows("hf in transformers", asked("transformers_timed", model.folder, hf, request)),
        *engine_rows(
            "gguf in llama.cpp", asked("llama_cpp_timed", whole_gguf(model, work), gguf / "model.gguf", request)
        ),
    ]


def asked(script: str, whole: Path, pruned: Path, request: Path) -> dict[str, np.ndarray]:
    """What a script of its own process found of two models: timings in turns, and bytes of the caches."""
    answer = request.with_name("answer.npz")
    done = subprocess.run(
        [sys.executable, str(STANDALONE / f"{script}.py"), str(whole), str(pruned), str(request), str(answer)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed: {done.stderr[-1000:]}")
    with np.load(answer) as held:
        found = dict(held)
    return {"cache_bytes": cache_bytes(done.stderr + done.stdout), **found}


def cache_bytes(log: str) -> np.ndarray:
    """Bytes of a token in each cache that llama.cpp made, as its log tells."""
    sizes = re.findall(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells", log)
    return np.array([float(size) * 2**20 / int(cells) for size, cells in sizes])


def engine_rows(name: str, found: dict[str, np.ndarray]) -> list[Ratio]:
    """Prefill, decoding and cache of an engine, from what its script found."""
    rows = []
    for what, unit in (("prefill", "s"), ("decode", "s a token")):
        before, after = np.median(found[what], axis=0)
        told = f"{before:.4g} {unit} before, {after:.4g} after (medians of {len(found[what])})"
        ratio = median_ratio([(float(first), float(second)) for first, second in found[what]])
        rows.append(Ratio(f"{name}: {what} speed-up", ratio, 1.0, "higher", {"told": told, **_listed(found)}))
    before, after = found["cache_bytes"]
    told = f"{before:,.0f} bytes a token before, {after:,.0f} after"
    rows.append(Ratio(f"{name}: cache after / before", float(after / before), CACHE_BOUND, "lower", {"told": told}))
    return rows


def _listed(found: dict[str, np.ndarray]) -> dict[str, list[list[float]]]:
    return {f"{name}_seconds": found[name].tolist() for name in ("prefill", "decode")}
