"""What a checkpoint is, and what a listing of them is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from redundancy_trace.hub import RepoFile

if TYPE_CHECKING:
    import polars as pl

CheckpointKind = Literal["branch", "tag", "subfolder", "repo", "local", "other"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved state of one training run; what is unknown is None.

    Attributes:
        name: The revision (branch or tag), the folder, or the last part of its own repository's name.
        kind: How it is published.
        commit: 40 hex digits. Of a local folder: a hash of its config and weights, None until it is computed.
        stage: Stage of the training, from 1.
        ingredient: One of several parallel anneals.
        seed: Name of the random seed.
        step: Optimizer steps, as the name says.
        tokens: Tokens seen: as the name says, else steps times the tokens per step that the user gave.
        index: A running number that is neither steps nor tokens.
        path: The folder of a local checkpoint.
        repo: Its own repository, where every checkpoint has one, or the present name of a renamed one; None: that
            of the listing.
        subfolder: Its folder in the repository, with `/`; None: the root.
        files: Every file of the commit, relative to its folder; None where it was not asked for.
        bytes: Size of the weight files of the one format that is used.
        format: `safetensors` or `bin`; None where not asked for, and where there are no weights.
        duplicate_of: Name of the checkpoint whose weights it repeats.
        partial_duplicate_of: Name of the checkpoint some of whose weight files it repeats.
        chosen: Whether `--revisions` selects it.
    """

    name: str
    kind: CheckpointKind
    commit: str | None = None
    stage: int | None = None
    ingredient: int | None = None
    seed: str | None = None
    step: int | None = None
    tokens: int | None = None
    index: int | None = None
    path: Path | None = None
    repo: str | None = None
    subfolder: str | None = None
    files: tuple[RepoFile, ...] | None = None
    bytes: int | None = None
    format: str | None = None
    duplicate_of: str | None = None
    partial_duplicate_of: str | None = None
    chosen: bool = False

    @property
    def repeats(self) -> bool:
        """Whether its weights are, whole or in part, those of another checkpoint."""
        return self.duplicate_of is not None or self.partial_duplicate_of is not None

    @property
    def is_parsed(self) -> bool:
        """Whether its name places it in the training."""
        return self.step is not None or self.index is not None or self.tokens is not None


# The columns of `trace list --json`, in order.
ROW_FIELDS = (
    "name",
    "kind",
    "commit",
    "stage",
    "ingredient",
    "seed",
    "step",
    "tokens",
    "bytes",
    "format",
    "duplicate_of",
    "partial_duplicate_of",
    "chosen",
)


@dataclass(frozen=True, repr=False)
class Listing:
    """Every ref of a model in training order, refs without a place in it last.

    Attributes:
        model: As the user named it.
        source: On a Hub, in the user's cache of one (whose lists of files may not be whole), or in a local folder.
        checkpoints: All that were seen, chosen or not.
        notes: What is to be known of them, or went wrong while they were listed; one line each.
    """

    model: str
    source: Literal["hub", "cache", "local"]
    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that `--revisions` selects, in training order."""
        return tuple(checkpoint for checkpoint in self.checkpoints if checkpoint.chosen)

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __repr__(self) -> str:
        names = [checkpoint.name for checkpoint in self.chosen]
        which = f", {names[0]} … {names[-1]}" if len(names) > 1 else f", {names[0]}" if names else ""
        return f"Listing({self.model!r}: {len(self)} refs, {len(names)} chosen{which})"

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        return str(self.to_frame()._repr_html_())

    def to_json_rows(self) -> list[dict[str, Any]]:
        """One object a ref, as `trace list --json` prints them; unknown is None."""
        return [{field: getattr(checkpoint, field) for field in ROW_FIELDS} for checkpoint in self.checkpoints]

    def to_frame(self) -> "pl.DataFrame":
        """The same as a polars frame."""
        import polars as pl

        integers = ("stage", "ingredient", "step", "tokens", "bytes")
        schema = {
            field: pl.Int64 if field in integers else pl.Boolean if field == "chosen" else pl.String
            for field in ROW_FIELDS
        }
        return pl.DataFrame(self.to_json_rows(), schema=schema)
