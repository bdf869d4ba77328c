"""`trace prune`: components of a checkpoint are dropped, and what is left is written so that others can run it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redundancy_trace.cli.printing import say
from redundancy_trace.errors import InputError

if TYPE_CHECKING:
    from redundancy_trace.pruning.exporting import PruneResult


def prune_command(
    model: Annotated[str, typer.Option("--model", help="Hub repository (org/name) or local folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not be there.")],
    export_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Required: native (whole blocks, a stock model), zeroed (anything, stock, not faster), hf (anything, "
            "faster, with a file of code), nemotron-nas (Llama-shaped, for vLLM), gguf (Llama-shaped, for llama.cpp).",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Which checkpoint; may be left out where there is only one.")
    ] = None,
    drop: Annotated[
        str | None, typer.Option("--drop", help="attn=8, mlp=25%, block<0.01, joint=6, or attn:3,mlp:5,block:7.")
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Instead of --drop: the file of a plan.")] = None,
    order: Annotated[
        str, typer.Option("--order", help="importance, random:SEED, deepest, consecutive or iterative.")
    ] = "importance",
    scores: Annotated[
        Path | None,
        typer.Option("--scores", help="Run folder whose scores decide [default: the checkpoint is scored now]."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            help="Text to score on, and to measure the effect on, as for a sweep [default: the run's, else a sweep's].",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Number of calibration sequences.", min=1)] = 64,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", help="Tokens in each sequence [default: 512].", min=2)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Repository or folder of the tokenizer, where the model has none.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="Compute dtype: auto, float32 or bfloat16.")] = "auto",
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Most bytes in one file of weights, such as 5GB.")
    ] = "5GB",
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="Hub endpoint [default: HF_ENDPOINT].")] = None,
    *,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code from the repository, pinned to the commit.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Local folders and the Hub cache only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the result.")] = False,
) -> int:
    """Drop components of a checkpoint and write what is left, proven to compute the pruned model."""
    from redundancy_trace.pruning.exporting import FORMATS, prune

    if export_format is None:
        raise InputError(f"--format says how it is written: one of {', '.join(FORMATS)}, such as --format hf.")
    result = prune(
        model,
        revision,
        out=out,
        format=export_format,
        drop=drop,
        plan=plan,
        order=order,
        scores=scores,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        shard_size=shard_size,
        trust_remote_code=trust_remote_code,
        endpoint=endpoint,
        offline=offline,
        on_line=None if quiet else say,
    )
    typer.echo(json.dumps(_as_json(result), indent=1) if as_json else result.told())
    return 0


def _as_json(result: "PruneResult") -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "format": result.format,
        "commit": result.commit,
        "plan": asdict(result.plan),
        "proof": {**asdict(result.proof), "holds": result.proof.holds},
        "sizes": asdict(result.sizes),
        "effect": None if result.effect is None else asdict(result.effect),
    }
