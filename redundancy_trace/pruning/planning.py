"""The plan of one checkpoint: read, or made from a run's scores, or from scores that are made for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redundancy_trace.calibration import load_calibration, token_hash
from redundancy_trace.errors import InputError
from redundancy_trace.loading import OpenCheckpoint
from redundancy_trace.pruning.plans import DropPlan, read_plan
from redundancy_trace.pruning.selecting import check_request, choose, parse_spec, plan_drop

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """What a checkpoint is scored on, and its loss measured; made when it is first asked for.

    Attributes:
        name: The calibration, as the user may type it, or as the run's rows call it.
        known: Whether the user named it, or the run has it.
        make: Makes the token ids.
    """

    name: str
    known: bool
    make: Callable[[], "np.ndarray"]

    @cached_property
    def token_ids(self) -> "np.ndarray":
        """The token ids, shape (N, T)."""
        return self.make()

    @property
    def label(self) -> str:
        """What rows and cards call it."""
        return self.name if " " in self.name else f"{self.name} {'x'.join(map(str, self.token_ids.shape))}"

    @property
    def is_used(self) -> bool:
        """Whether it has been asked for."""
        return "token_ids" in vars(self)


def text_of(
    checkpoint: OpenCheckpoint,
    *,
    scores: str | Path | None,
    calibration: str | None,
    samples: int,
    sequence_length: int | None,
    tokenizer: str | None,
) -> Text:
    """The calibration that is asked for, else the first of the run, else the default of a sweep.

    Raises:
        InputError: The run cannot be read.
    """
    import numpy as np

    from redundancy_trace.store import read_run

    if calibration is None and scores is not None:
        folder = Path(scores).expanduser()
        run = read_run(folder)
        if run is None or not run.calibrations:
            raise InputError(f"{scores} is no run with scores. A run is what `trace --model … --out` writes.")
        first = run.calibrations[0]
        return Text(first.label, known=True, make=lambda: np.load(folder / first.file, allow_pickle=False))
    default = "pydoc" if checkpoint.is_local or checkpoint.hub.is_offline else "c4"

    def make() -> "np.ndarray":
        return load_calibration(
            calibration or default,
            samples=samples,
            sequence_length=sequence_length,
            tokenizer=tokenizer,
            candidates=checkpoint.tokenizers,
            hub=checkpoint.hub,
            trust_remote_code=checkpoint.trust_remote_code,
        ).token_ids

    return Text(calibration or default, known=calibration is not None, make=make)


def plan_for(
    checkpoint: OpenCheckpoint,
    n_layers: int,
    *,
    drop: str | None,
    plan: DropPlan | str | Path | None,
    order: str,
    scores: str | Path | None,
    text: Text,
    device: str,
    dtype: str,
    say: OnLine,
) -> DropPlan:
    """The plan that is given, or what `drop` means of a checkpoint.

    Raises:
        InputError: The plan, or the run, is of another model; or it cannot be planned.
        CheckpointError: The checkpoint cannot be scored.
    """
    if plan is not None:
        if order != "importance":
            raise InputError(f"A plan has an order of its own; leave out --order {order}.")
        given = plan if isinstance(plan, DropPlan) else read_plan(plan)
        check_model(given.model, given.commit, checkpoint, "plan")
        return given
    assert drop is not None
    spec = parse_spec(drop)
    check_request(spec, order, n_layers)
    if order == "iterative":
        return _iterative(checkpoint, drop, text, device, dtype, say)
    if scores is not None:
        return _from_run(checkpoint, drop, order, scores)
    if spec.named or order.startswith(("random:", "deepest")):
        kept = "named" if spec.named else order
        return DropPlan(
            checkpoint.model, checkpoint.revision, checkpoint.commit, None, None, spec.text, kept, n_layers,
            choose(spec, order, n_layers, {}),
        )  # fmt: skip
    return _scored_now(checkpoint, drop, order, text, device, dtype, say)


def _from_run(checkpoint: OpenCheckpoint, drop: str, order: str, scores: str | Path) -> DropPlan:
    from redundancy_trace.store import read_distances

    same = scores_in_run(checkpoint, scores)
    distances = read_distances(scores) if order == "consecutive" else None
    return plan_drop(same, same["revision"][0], drop=drop, order=order, distances=distances)


def scores_in_run(checkpoint: OpenCheckpoint, scores: str | Path) -> "pl.DataFrame":
    """The rows that a run has of a checkpoint, known by its commit.

    Raises:
        InputError: It is no run, of another model, or has none of this checkpoint.
    """
    import polars as pl

    from redundancy_trace.store import read_scores

    rows = read_scores(scores)
    same = rows.filter(pl.col("commit") == checkpoint.commit)
    if same.is_empty():
        named = rows.filter(pl.col("revision") == checkpoint.revision)
        check_model(rows["model"][0], None, checkpoint, "run")
        moved = f" It has scores of {checkpoint.revision} at another commit." if not named.is_empty() else ""
        raise InputError(
            f"{scores} has no scores of {checkpoint.revision} at commit {checkpoint.commit[:12]}.{moved} Score it: "
            f"trace --model {checkpoint.model} --revisions {checkpoint.revision} --out {scores}; or leave out "
            "--scores, and it is scored now."
        )
    return same


def _scored_now(
    checkpoint: OpenCheckpoint, drop: str, order: str, text: Text, device: str, dtype: str, say: OnLine
) -> DropPlan:
    from redundancy_trace.engine import choose_device, choose_dtype, score_checkpoint
    from redundancy_trace.store import Labels, distances_frame, row_identity, scores_frame

    at = choose_device(device)
    compute = choose_dtype(dtype, at)
    ids = text.token_ids
    say(f"Scoring {checkpoint.revision} on {text.label} …")
    found = score_checkpoint(
        checkpoint.folder, ids, device=at, dtype=compute, trust_remote_code=checkpoint.trust_remote_code
    )
    settings = {
        "dtype": str(compute).removeprefix("torch."),
        "trust_remote_code": checkpoint.trust_remote_code,
    }
    labels = Labels(
        model=checkpoint.model,
        revision=checkpoint.revision,
        commit=checkpoint.commit,
        calibration=text.label,
        identity=row_identity(checkpoint.commit, token_hash(ids), settings, checkpoint.subfolder),
    )
    distances = distances_frame(labels, found.distances)
    return plan_drop(scores_frame(labels, found.values), drop=drop, order=order, distances=distances)


def _iterative(checkpoint: OpenCheckpoint, drop: str, text: Text, device: str, dtype: str, say: OnLine) -> DropPlan:
    from redundancy_trace.blocks import find_layers
    from redundancy_trace.engine import choose_device, choose_dtype
    from redundancy_trace.pruning.iterating import drop_one_by_one
    from redundancy_trace.weights import load_whole_model

    spec = parse_spec(drop)
    at = choose_device(device)
    model: Any = load_whole_model(
        checkpoint.folder, device=at, dtype=choose_dtype(dtype, at), trust_remote_code=checkpoint.trust_remote_code
    )
    say(f"Scoring after each drop on {text.label} …")
    components = drop_one_by_one(spec, model, text.token_ids)
    return DropPlan(
        checkpoint.model, checkpoint.revision, checkpoint.commit, None, text.label, spec.text, "iterative",
        len(find_layers(model)[1]), components,
    )  # fmt: skip


def check_model(model: str | None, commit: str | None, checkpoint: OpenCheckpoint, what: str) -> None:
    """Refuse a plan or a run of another model; another checkpoint of the same model is what along training needs.

    Raises:
        InputError: It is of another model.
    """
    if model is not None and model != checkpoint.model and commit != checkpoint.commit:
        how = "trace prune --drop SPEC" if what == "plan" else f"trace --model {checkpoint.model}"
        raise InputError(
            f"The {what} is of {model}, not of {checkpoint.model} at {checkpoint.commit[:12]}. Make one of this model: "
            f"{how}."
        )
