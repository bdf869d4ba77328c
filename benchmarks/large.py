"""A checkpoint of OLMo-7B's shape: written with random weights, scored in the memory of a few layers, and deleted.

Needs 28 GB on the disk, about 4 GB of memory, and on two cores about ten minutes.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.decoders import random_ids
from benchmarks.peaks import score_apart
from benchmarks.ratios import Ratio, machine, tell_apart

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
SEQUENCES, LENGTH = 8, 256
_BOUND_GB = 3.5
# Of OLMo-7B: norms without weights, embedding and head not tied.
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
VOCABULARY = 50304


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written [default: the temporary folder]")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "large.json")


def run(options: argparse.Namespace) -> int:
    """Write, score, delete; print the rows and write the JSON; 1 if the bound is missed."""
    with tempfile.TemporaryDirectory(prefix="benchmark-large-", dir=options.folder) as name:
        folder = Path(name)
        needed, free = _bytes_of(SHAPE, VOCABULARY), shutil.disk_usage(folder).free
        if needed > 0.95 * free:
            print(f"The checkpoint takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.", file=sys.stderr)
            return 1
        started = time.monotonic()
        written = write_checkpoint(folder, SHAPE, VOCABULARY)
        wrote = time.monotonic() - started
        print(f"{written / 1e9:.1f} GB written in {wrote:.0f} s", file=sys.stderr, flush=True)
        rows = measure(folder, written, VOCABULARY)
    return tell_apart(rows, {"writing": wrote}, machine(), options.out)


def measure(folder: Path, written: int, vocabulary: int) -> list[Ratio]:
    """Score the checkpoint in a process of its own; what that took."""
    peaks = score_apart([folder], random_ids(vocabulary, SEQUENCES, LENGTH))
    detail: dict[str, Any] = {**vars(peaks), "sequences": SEQUENCES, "length": LENGTH, "checkpoint_bytes": written}
    return [
        Ratio("peak anonymous memory of the process", peaks.anonymous / 1e9, _BOUND_GB, detail=detail, unit="GB"),
        Ratio("peak resident memory, pages of the mapped files with it", peaks.resident / 1e9, None, unit="GB"),
        Ratio("the checkpoint", written / 1e9, None, unit="GB"),
        Ratio(f"scoring {SEQUENCES} × {LENGTH} tokens", peaks.seconds, None, unit="s"),
    ]


def write_checkpoint(folder: Path, shape: dict[str, int], vocabulary: int) -> int:
    """Random float32 weights in shards, one a layer, written one by one; returns the bytes of the weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import OlmoConfig

    config = OlmoConfig(**shape, vocab_size=vocabulary, tie_word_embeddings=False, architectures=["OlmoForCausalLM"])
    config.save_pretrained(folder)
    shards = list(_shards(shape, vocabulary))
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    written = 0
    for number, matrices in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(size, generator) for name, size in matrices.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        written += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": written}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return written


def _random(size: tuple[int, int], generator: "torch.Generator") -> "torch.Tensor":
    import torch

    return torch.empty(size).normal_(0, 0.02, generator=generator)


def _shards(shape: dict[str, int], vocabulary: int) -> Iterator[dict[str, tuple[int, int]]]:
    """Name to rows and columns of each shard's matrices."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    yield {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(shape["num_hidden_layers"]):
        attention = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
        mlp = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        yield {f"model.layers.{layer}.{name}.weight": size for name, size in (attention | mlp).items()}
    yield {"lm_head.weight": (vocabulary, width)}


def _bytes_of(shape: dict[str, int], vocabulary: int) -> int:
    return sum(4 * rows * columns for shard in _shards(shape, vocabulary) for rows, columns in shard.values())
