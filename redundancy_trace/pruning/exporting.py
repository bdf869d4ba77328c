"""One checkpoint pruned and exported: planned, written, proven in a fresh process, and only then there."""

import glob
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import TOKENIZER_FILES
from redundancy_trace.errors import CheckpointError, InputError, nearest
from redundancy_trace.loading import OpenCheckpoint, open_checkpoint
from redundancy_trace.pruning.cards import Effect, Sizes, model_card
from redundancy_trace.pruning.planning import Text, plan_for, text_of
from redundancy_trace.pruning.plans import DropPlan
from redundancy_trace.pruning.proving import Proof, Reference, probe, proof_dtype, reference_of
from redundancy_trace.pruning.selecting import parse_spec
from redundancy_trace.settings import DTYPES, parse_bytes
from redundancy_trace.writing import PART, STRAY_AFTER_SECONDS, part_of

if TYPE_CHECKING:
    from redundancy_trace.pruning.sources import Source

FORMATS = ("native", "zeroed", "hf", "nemotron-nas", "gguf")
# Proven by an engine that computes in float32 whatever the dtype of the files.
_NEED_FLOAT32 = ("gguf",)
OnLine = Callable[[str], None]


@dataclass(frozen=True)
class PruneResult:
    """What `prune` did.

    Attributes:
        folder: The export.
        format: Its format.
        plan: What was dropped.
        commit: Of the source.
        proof: How the export, loaded in a fresh process, compares with the drop in place.
        sizes: Parameters and cache, before and after.
        effect: Loss before and after; None where there was no text.
    """

    folder: Path
    format: str
    plan: DropPlan
    commit: str
    proof: Proof
    sizes: Sizes
    effect: Effect | None

    def told(self) -> str:
        """What is printed."""
        lines = [self.plan.told(), self.sizes.told(), self.effect.told() if self.effect else "", self.proof.told()]
        return "\n".join([*filter(None, lines), f"{self.format}: {self.folder}"])


def prune(
    model: str | Path,
    revision: str | None = None,
    *,
    out: str | Path,
    format: str,  # noqa: A002 - as the flag is called
    drop: str | None = None,
    plan: DropPlan | str | Path | None = None,
    order: str = "importance",
    scores: str | Path | None = None,
    calibration: str | None = None,
    samples: int = 64,
    sequence_length: int | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    shard_size: str = "5GB",
    trust_remote_code: bool = False,
    endpoint: str | None = None,
    offline: bool = False,
    on_line: OnLine | None = None,
) -> PruneResult:
    """Drop components of a checkpoint and write what is left, so that others can run it: what `trace prune` does.

    The export is loaded back in a fresh process and compared with the drop in place before it appears under its name.

    Args:
        model: Hub repository, or local folder: of a checkpoint, or of several.
        revision: Which checkpoint; may be left out where there is only one.
        out: Folder to write; it must not be there.
        format: `native` (whole blocks; a stock model with fewer layers), `zeroed` (anything; stock, not faster), `hf`
            (anything; faster, a file of code with it), `nemotron-nas` (Llama-shaped, for vLLM), `gguf` (Llama-shaped,
            for llama.cpp).
        drop: What to drop: `attn=8`, `mlp=25%`, `block<0.01`, `joint=6`, `attn:3,mlp:5,block:7`.
        plan: Instead of `drop`: a plan, or its file.
        order: As `plan_drop`.
        scores: Run folder whose scores decide; None = the checkpoint is scored now, if the order asks for scores.
        calibration: Text to score on, and to measure the effect on, as for a sweep [default: that of the run, else c4
            for Hub models and pydoc for local ones, if there is anything to score].
        samples: Number of calibration sequences.
        sequence_length: Tokens in each [default: 512].
        tokenizer: Repository or folder of the tokenizer, where the model has none.
        device: Where the checkpoint is scored and the effect measured.
        dtype: Compute dtype of both.
        shard_size: Most bytes in one file of weights, such as 5GB.
        trust_remote_code: Whether the checkpoint's own code may be run.
        endpoint: Hub endpoint.
        offline: No network.
        on_line: Told what is being done.

    Returns:
        The export, its plan, and the figures of its proof and effect.

    Raises:
        InputError: The input cannot be used: an impossible plan, a plan of another model, a format that cannot express
            it (what could is told), an `out` that is there.
        CheckpointError: The checkpoint cannot be used, or the proof failed; nothing is left behind.
    """
    from redundancy_trace.engine import choose_device
    from redundancy_trace.pruning.sources import open_source

    say = on_line or (lambda _: None)
    if format not in FORMATS:
        like = nearest(format, FORMATS, count=1)
        hint = f" Did you mean {like[0]}?" if like else ""
        raise InputError(f"--format {format!r} is none of {', '.join(FORMATS)}.{hint}")
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}; known: {', '.join(DTYPES)}.")
    choose_device(device)
    target = Path(out).expanduser()
    if target.exists() or target.is_symlink():
        raise InputError(f"--out {target} is there already; name a new folder.")
    if (drop is None) == (plan is None):
        raise InputError("Either --drop or --plan says what to drop, such as --drop attn=8.")
    most = parse_bytes(shard_size)
    written = import_module(f"redundancy_trace.pruning.formats.{format.replace('-', '_')}")
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "endpoint": endpoint, "offline": offline}
    with open_checkpoint(model, revision, **where) as checkpoint:
        text = text_of(
            checkpoint,
            scores=scores,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            tokenizer=tokenizer,
        )
        source = open_source(checkpoint.folder, trust_remote_code=trust_remote_code)
        written.check_request(source, None if drop is None else parse_spec(drop))
        chosen = plan_for(
            checkpoint,
            len(source.layers),
            drop=drop,
            plan=plan,
            order=order,
            scores=scores,
            text=text,
            device=device,
            dtype=dtype,
            say=say,
        )
        say(chosen.told())
        written.check(source, chosen)
        return _exported(checkpoint, source, chosen, format, written, target, text, tokenizer, device, dtype, most, say)


def _exported(
    checkpoint: OpenCheckpoint,
    source: "Source",
    plan: DropPlan,
    form: str,
    written: Any,
    target: Path,
    text: Text,
    tokenizer: str | None,
    device: str,
    dtype: str,
    shard_bytes: int,
    say: OnLine,
) -> PruneResult:
    part = part_of(target)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, part, ignore_errors=True)
        # Below a name of its own kind: loaders make module names of the folder's.
        inside = part / "export"
        try:
            _remove_strays(target)
            inside.mkdir(parents=True)
            # First of all: a tokenizer or room that is missing is told before anything is computed.
            say(f"Writing {form} …")
            _write_beside(checkpoint, inside, tokenizer, say)
            written.write(source, plan, inside, shard_bytes, None)
            effect = _effect(source, checkpoint, plan, text, device, dtype, say) if text.known or text.is_used else None
            say("Computing what the drop in place computes …")
            whole, reference = _references(source, checkpoint, plan, in_float32=form in _NEED_FLOAT32)
            say("Proving it in a fresh process …")
            proof = written.prove(inside, reference)
            if not proof.holds:
                raise CheckpointError(
                    f"The export does not compute what the drop in place does, and is deleted: {proof.told()}. Use "
                    "--format hf or zeroed, and please open an issue with the model's config.json."
                )
            sizes = Sizes(
                (whole.n_parameters, proof.n_parameters), (whole.cache_bytes, proof.cache_bytes), reference.dtype
            )
            brings_code = form == "hf" or source.has_own_code
            card = model_card(
                plan, checkpoint.model, checkpoint.commit, form, proof, sizes, effect, brings_code=brings_code
            )
            (inside / "README.md").write_text(card, encoding="utf-8")
            plan.write(inside / "drop_plan.json")
            inside.rename(target)
        except OSError as error:
            raise InputError(f"--out {target} cannot be written: {error.strerror or error}.") from error
    return PruneResult(target, form, plan, checkpoint.commit, proof, sizes, effect)


def _remove_strays(target: Path) -> None:
    """Delete what killed processes left of the same export; what was written to within the hour may be in use."""
    for stray in target.parent.glob(f".{glob.escape(target.name)}.*{PART}"):
        try:
            newest = max(path.stat().st_mtime for path in (stray, *stray.rglob("*")))
        except OSError:
            continue  # gone meanwhile
        if time.time() - newest > STRAY_AFTER_SECONDS:
            shutil.rmtree(stray, ignore_errors=True)


def _effect(
    source: "Source", checkpoint: OpenCheckpoint, plan: DropPlan, text: Text, device: str, dtype: str, say: OnLine
) -> Effect:
    from redundancy_trace.engine import choose_device, choose_dtype
    from redundancy_trace.pruning.inplace import dropped
    from redundancy_trace.pruning.losses import mean_loss
    from redundancy_trace.weights import load_whole_model

    say(f"Measuring the loss before and after, on {text.label} …")
    at = choose_device(device)
    in_memory = dtype == "auto" and at.type == "cpu"
    compute = proof_dtype(source.n_parameters, source.stored_dtype) if in_memory else choose_dtype(dtype, at)
    model = load_whole_model(
        checkpoint.folder, device=at, dtype=compute, trust_remote_code=checkpoint.trust_remote_code
    )
    ids = text.token_ids
    before, n_tokens = mean_loss(model, ids)
    with dropped(model, plan):
        after, _ = mean_loss(model, ids)
    return Effect(text.label, n_tokens, before, after, str(compute).removeprefix("torch."))


def _references(
    source: "Source", checkpoint: OpenCheckpoint, plan: DropPlan, *, in_float32: bool
) -> tuple[Reference, Reference]:
    """What the model computes on the CPU, whole and with the drop in place.

    Args:
        source: The checkpoint, as its headers tell.
        checkpoint: The same.
        plan: What is dropped.
        in_float32: Whether it must be computed in float32 also where a copy in float32 has no room.
    """
    import torch

    from redundancy_trace.pruning.inplace import drop_
    from redundancy_trace.pruning.widening import widen_
    from redundancy_trace.weights import load_whole_model

    dtype = proof_dtype(source.n_parameters, source.stored_dtype)
    model = load_whole_model(
        checkpoint.folder,
        device=torch.device("cpu"),
        dtype=dtype,
        trust_remote_code=checkpoint.trust_remote_code,
    )
    if in_float32 and dtype != torch.float32:
        model, dtype = widen_(model), torch.float32
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    asked = probe(model.get_input_embeddings().weight.shape[0], positions if isinstance(positions, int) else None)
    return reference_of(model, replace(asked, new_tokens=1), dtype), reference_of(drop_(model, plan), asked, dtype)


def _write_beside(checkpoint: OpenCheckpoint, folder: Path, tokenizer: str | None, say: OnLine) -> None:
    """Generation config and tokenizer, as they are where the checkpoint has them."""
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    own = [file for name in TOKENIZER_FILES if (file := checkpoint.folder / name).is_file()]
    if tokenizer is None and any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in own):
        for file in own:
            shutil.copyfile(file, folder / file.name)
        return
    try:
        checkpoint.tokenizer(tokenizer).save_pretrained(folder)
    except InputError as error:
        if tokenizer is not None:
            raise
        say(f"No tokenizer goes with it: {error}")
