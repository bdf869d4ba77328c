"""Every option of a sweep and of an evaluation, once: the command line and the Python call read these tables.

The table of a sweep also tells the identity of a row which settings change a number.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

from redundancy_trace.errors import InputError

ENGINES = ("stream", "whole")
FETCHES = ("auto", "file", "stream")
DTYPES = ("auto", "float32", "bfloat16")


def _option(default: Any, text: str, *, identity: bool) -> Any:
    """One field: its default, its help text, and whether its value changes a stored number."""
    return field(default=default, metadata={"help": text, "identity": identity})


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """The settings of one sweep; each field is a flag of `trace` and an argument of `redundancy_trace.trace`."""

    model: str | None = _option(None, "Hub repository (org/name) or local folder of checkpoints.", identity=False)
    revisions: str = _option(
        "log:20",
        "Which checkpoints: all, every:N, log:N, linear:N, 1000..5000, 1000..5000/5, tokens:0..100B, stage:1, "
        "a comma list of names, globs or SHAs, or @file.",
        identity=False,
    )
    out: Path | None = _option(None, "Run folder [default: runs/<last part of the model's name>].", identity=False)
    demo: bool = _option(
        False, "Train a small Pythia-style model on built-in text and sweep it; no network.", identity=False
    )
    calibration: tuple[str, ...] = _option(
        (),
        "Text to score on: c4, pydoc, FILE.txt, tokens:FILE.npy, hf:NAME[:config][:split][:column]; given again: on "
        "each [default: c4 for Hub models, pydoc for local folders, --demo and --offline].",
        identity=False,  # the hash of the token ids stands for it
    )
    tokenizer: str | None = _option(
        None, "Repository or folder of the tokenizer, where the model has none.", identity=False
    )
    samples: tuple[int, ...] = _option(
        (64,), "Number of calibration sequences; given again: with each number.", identity=False
    )
    sequence_length: int | None = _option(
        None, "Tokens in each sequence [default: 512; 128 for --demo; of tokens:FILE.npy its own].", identity=False
    )
    batch_size: int | None = _option(
        None, "Sequences per forward pass [default: from the sequence length].", identity=False
    )
    device: str = _option("auto", "auto, cpu, cuda, cuda:1 or mps.", identity=False)
    devices: str | None = _option(
        None,
        "Several devices of this machine, a process each: cuda:0,cuda:1 or auto (every CUDA device).",
        identity=False,
    )
    shard: str | None = _option(
        None,
        "i/n: only the i-th of n shares of the checkpoints; other processes or machines take the others.",
        identity=False,
    )
    cluster: str | None = _option(
        None,
        "ray or ray:ADDRESS: score on the nodes of a Ray cluster, which have to see the run folder.",
        identity=False,
    )
    dtype: str = _option(
        "auto",
        "auto, float32 or bfloat16; auto is float32 on CPU and MPS, bfloat16 on CUDA that has it.",
        identity=True,
    )
    engine: str = _option(
        "stream", "stream (layer by layer, constant memory) or whole (the model at once).", identity=False
    )
    fetch: str = _option(
        "auto",
        "file (whole files, deleted once scored), stream (layers go from the server into the engine, no disk) or auto "
        "(files, streamed where they do not fit the disk).",
        identity=False,
    )
    disk_budget: str | None = _option(
        None,
        "Most that downloads may take of the disk at a time, such as 100GB [default: what is free].",
        identity=False,
    )
    keep: bool = _option(False, "Keep downloaded weights in the run folder.", identity=False)
    tokens_per_step: int | None = _option(
        None, "Tokens in one optimizer step, for a tokens axis where names carry none.", identity=False
    )
    trust_remote_code: bool = _option(False, "Run model code from the repository, pinned to the commit.", identity=True)
    endpoint: str | None = _option(None, "Hub endpoint [default: HF_ENDPOINT].", identity=False)
    offline: bool = _option(False, "No network: local folders and the Hub cache only.", identity=False)
    dry_run: bool = _option(
        False,
        "Only tell what would be fetched and scored, how many bytes and how long; nothing is written.",
        identity=False,
    )
    yes: bool = _option(False, "Go on although very many bytes are to be moved.", identity=False)
    json: bool = _option(False, "Print the result as JSON.", identity=False)
    quiet: bool = _option(False, "No progress, only the result.", identity=False)

    def __post_init__(self) -> None:
        for name in ("calibration", "samples"):
            object.__setattr__(self, name, _several(getattr(self, name)) or TraceSettings.__dict__[name])
        for name, least in (
            ("samples", 1),
            ("sequence_length", 2),
            ("batch_size", 1),
            ("tokens_per_step", 1),
        ):
            for value in _several(getattr(self, name)):
                if value < least:
                    raise InputError(f"{flag_of(name)} is {value}; it must be at least {least}.")
        for name, known in (("engine", ENGINES), ("dtype", DTYPES), ("fetch", FETCHES)):
            if getattr(self, name) not in known:
                raise InputError(f"{flag_of(name)} is {getattr(self, name)!r}; known: {', '.join(known)}.")
        if self.fetch == "stream" and self.engine == "whole":
            raise InputError("--engine whole needs the files; leave out --fetch stream, or use --engine stream.")
        if self.fetch == "stream" and self.keep:
            raise InputError("--fetch stream stores no weights, so there is nothing to --keep; leave out one of them.")
        if self.disk_budget is not None:
            parse_bytes(self.disk_budget)
        if self.shard is not None:
            parse_shard(self.shard)
        self._check_places()
        if self.model is None and not self.demo:
            raise InputError(
                "No model is named. Try trace --model EleutherAI/pythia-70m, or trace --demo without a network."
            )
        if self.model is not None and self.demo:
            raise InputError("--demo trains its own model; leave out --model or --demo.")

    def _check_places(self) -> None:
        """Refuse places that contradict each other."""
        if self.devices is not None:
            device_names(self.devices)
            if self.device != "auto":
                raise InputError("--devices names the devices; leave out --device.")
        if self.cluster is None:
            return
        kind, colon, address = self.cluster.partition(":")
        if kind != "ray" or (colon and not address):
            raise InputError(f"--cluster {self.cluster!r} is none; known: ray, ray:ADDRESS, such as ray:10.0.0.1:6379.")
        if self.devices is not None:
            raise InputError("--cluster takes the GPUs that Ray knows of; leave out --devices.")


def parse_shard(text: str) -> tuple[int, int]:
    """Which share of the work, counted from 1, and how many there are.

    Raises:
        InputError: It is none.

    Example:
        >>> parse_shard("2/8")
        (2, 8)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(
            f"--shard {text!r} is no share; shares count from 1: write --shard 1/4, 2/4, 3/4 or 4/4 for the quarters."
        )
    return int(match[1]), int(match[2])


def device_names(text: str) -> tuple[str, ...]:
    """The devices of `--devices`; whether they are there is another question.

    Raises:
        InputError: It is no list of names.

    Example:
        >>> device_names("cuda:0, cuda:1")
        ('cuda:0', 'cuda:1')
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or any(name.isdigit() for name in names) or ("auto" in names and len(names) > 1):
        raise InputError(
            f"--devices {text!r} is no list of devices; write their names, such as cuda:0,cuda:1 or cpu,cpu, or auto "
            "for every CUDA device."
        )
    return names


def _several(given: Any) -> tuple[Any, ...]:
    """What was given, once each, in the order given: one value, several, or none."""
    values = given if isinstance(given, list | tuple) else () if given is None else (given,)
    return tuple(dict.fromkeys(values))


DEFAULT_DROPS = "attn=25%,attn=50%,mlp=25%,block=25%,joint=25%"
DEFAULT_ORDERS = "importance,deepest,random:0,random:1,random:2,random:3,random:4"
MEASURES = ("loss", "speed", "tasks")
CURVES = ("attn", "mlp", "block", "joint")


def _measured(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


# What says nothing of the losses along a run, and what says nothing alone.
_NOT_ALONG = (
    "model", "revision", "plan", "curve", "scores", "measure", "tasks", "task_folder", "limit", "shots", "speed_batch",
    "prompt_tokens", "new_tokens", "rounds", "dtype", "out",
)  # fmt: skip
_OF_USE_WITH = {
    ("drops",): ("along",),
    ("orders",): ("along", "curve"),
    ("scores",): ("curve",),
    ("task_folder", "limit", "shots"): ("tasks",),
}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The settings of one evaluation; each field is a flag of `trace eval` and an argument of `evaluate`.

    Lists are written with commas.
    """

    model: str | None = _measured(None, "Hub repository (org/name), or local folder of one checkpoint or of several.")
    revision: str | None = _measured(None, "Which checkpoint; may be left out where there is only one.")
    along: Path | None = _measured(
        None, "Run folder: what dropping costs at each of its checkpoints, and the plan of each applied to the last."
    )
    plan: Path | None = _measured(None, "Drop plan; measured before and after, in turns.")
    curve: str | None = _measured(
        None, "Loss for every number dropped of attn, mlp, block, joint, or several with commas."
    )
    drops: str = _measured(DEFAULT_DROPS, "What --along drops at each checkpoint.")
    orders: str = _measured(DEFAULT_ORDERS, "In which orders --along and --curve drop.")
    scores: Path | None = _measured(
        None, "Run folder with the checkpoint's scores, for --curve [default: scored now, on the same text]."
    )
    measure: str = _measured(
        "loss,speed", "loss (with bits per byte), speed (with memory and KV cache), tasks (those alone), or several."
    )
    tasks: str | None = _measured(None, "Tasks of lm-eval too, such as arc_easy,piqa; needs the extra `eval`.")
    task_folder: Path | None = _measured(None, "Folder with YAML files of further tasks.")
    limit: int | None = _measured(None, "Only so many questions of each task.")
    shots: int | None = _measured(None, "Examples in front of each question [default: as the task says].")
    text: str | None = _measured(
        None,
        "Text to measure on, named as for --calibration of a sweep: c4, pydoc, FILE.txt, tokens:FILE.npy, "
        "hf:NAME[:config][:split][:column] [default: c4 for Hub models, pydoc for local folders and --offline; for "
        "--along what the run was scored on, behind its calibration].",
    )
    tokenizer: str | None = _measured(None, "Repository or folder of the tokenizer, where the model has none.")
    samples: int | None = _measured(
        None, "Number of windows of text; 0 = the whole text [default: 64; for --along as many as the run's]."
    )
    sequence_length: int | None = _measured(
        None, "Tokens in each window [default: 512, or the model's most; for --along as the run's]."
    )
    stride: int | None = _measured(
        None, "Tokens from one window to the next; what a window repeats is context only [default: no overlap]."
    )
    batch_size: int | None = _measured(None, "Windows or questions at a time [default: from the length].")
    speed_batch: int = _measured(1, "Sequences at a time while speed and memory are measured.")
    prompt_tokens: int | None = _measured(None, "Tokens of the prompt there [default: 512, or what the model takes].")
    new_tokens: int = _measured(32, "Tokens decoded behind it.")
    rounds: int = _measured(5, "How often speed is measured; medians are told.")
    device: str = _measured("auto", "auto, cpu, cuda, cuda:1 or mps.")
    dtype: str = _measured("auto", "auto, float32 or bfloat16; auto is float32 on CPU and MPS.")
    trust_remote_code: bool = _measured(False, "Run model code from the repository, pinned to the commit.")
    endpoint: str | None = _measured(None, "Hub endpoint [default: HF_ENDPOINT].")
    offline: bool = _measured(False, "No network: local folders and the Hub cache only.")
    out: Path | None = _measured(
        None,
        "Where the numbers go: a .parquet file or a run folder [default: evaluation.parquet in the folder of one "
        "checkpoint, else runs/<last part of the model's name>].",
    )
    json: bool = _measured(False, "Print the numbers as JSON.")
    quiet: bool = _measured(False, "No progress, only the result.")

    def __post_init__(self) -> None:
        for name, least in (
            ("samples", 0), ("sequence_length", 2), ("stride", 1), ("batch_size", 1), ("limit", 1), ("shots", 0),
            ("speed_batch", 1), ("prompt_tokens", 1), ("new_tokens", 1), ("rounds", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{flag_of(name)} is {value}; it must be at least {least}.")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype is {self.dtype!r}; known: {', '.join(DTYPES)}.")
        for name, known in (("measure", MEASURES), ("curve", CURVES)):
            for item in listed(getattr(self, name)):
                if item not in known:
                    raise InputError(f"{flag_of(name)} {item!r} is none of {', '.join(known)}.")
        for order in listed(self.orders):
            if not re.fullmatch(r"importance|deepest|random:\d+", order):
                raise InputError(f"--orders {order!r} is none of importance, deepest, random:SEED (such as random:0).")
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if self.along is not None:
            for name in sorted(given.intersection(_NOT_ALONG)):
                raise InputError(f"--along measures the loss of the run as it was scored; leave out {flag_of(name)}.")
        elif self.model is None:
            raise InputError(
                "Nothing to evaluate is named. Try trace eval FOLDER, trace eval --model EleutherAI/pythia-70m "
                "--revision step143000, or trace eval --along RUN."
            )
        if not listed(self.measure):
            raise InputError(f"--measure names nothing; known: {', '.join(MEASURES)}.")
        if "tasks" in listed(self.measure) and not listed(self.tasks):
            raise InputError("--measure tasks: name some with --tasks, such as --tasks arc_easy,piqa.")
        if self.curve is not None:
            for name in sorted(given.intersection(("plan", "tasks", "measure"))):
                raise InputError(f"--curve measures the loss under plans of its own; leave out {flag_of(name)}.")
        for names, needed in _OF_USE_WITH.items():
            for name in sorted(given.intersection(names)):
                if given.isdisjoint(needed):
                    with_these = " or ".join(map(flag_of, needed))
                    raise InputError(f"{flag_of(name)} is of use with {with_these} only; add that, or leave it out.")


def listed(text: str | None) -> tuple[str, ...]:
    """The items of a list that is written with commas.

    Example:
        >>> listed("attn, mlp"), listed(None)
        (('attn', 'mlp'), ())
    """
    return tuple(item.strip() for item in (text or "").split(",") if item.strip())


def parse_bytes(text: str) -> int:
    """Bytes as people write them.

    Raises:
        InputError: It is no number of bytes, or none at all.

    Example:
        >>> parse_bytes("1.5TB"), parse_bytes("100 GiB")
        (1500000000000, 107374182400)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise InputError(f"{text!r} is no number of bytes; write it like 100GB, 1.5TB or 500MB.")
    base = 1024 if match[3] else 1000
    power = " KMGT".index(match[2].upper() or " ")
    return round(float(match[1]) * float(base**power))


def is_several(hint: Any) -> bool:
    """Whether a field of this type takes several values, and its flag may be given again."""
    return get_origin(hint) is tuple


def flag_of(name: str) -> str:
    """The command-line flag of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def identity_fields() -> tuple[str, ...]:
    """Fields whose value changes a stored number, beside the commit and the calibration tokens."""
    return tuple(f.name for f in fields(TraceSettings) if f.metadata["identity"])
