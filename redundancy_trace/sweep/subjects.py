"""What `trace eval` measures: a checkpoint on disk, or a model in memory, with its text, scores and load."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redundancy_trace.checkpoints import is_local
from redundancy_trace.errors import InputError
from redundancy_trace.progress import Reporter
from redundancy_trace.settings import EvaluationSettings
from redundancy_trace.store import Labels

if TYPE_CHECKING:
    import polars as pl
    import torch

    from redundancy_trace.evaluation import Load, Windows
    from redundancy_trace.loading import OpenCheckpoint

DEFAULT_SAMPLES = 64
DEFAULT_LENGTH = 512


class Subject:
    """What is measured; text and speed settings follow from the model and the user's settings."""

    def __init__(self, settings: EvaluationSettings, labels: Labels) -> None:
        self.settings = settings
        self.labels = labels

    @property
    def model(self) -> Any:
        """The model in memory."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        raise NotImplementedError

    @property
    def windows(self) -> "Windows":
        """The text."""
        raise NotImplementedError

    def scores(self, folder: Path) -> "pl.DataFrame":
        """What a run folder has of its scores."""
        raise NotImplementedError

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model takes; None where it has no limit."""
        from redundancy_trace.evaluation import positions_in

        return positions_in(self.model.config)

    @property
    def load(self) -> "Load":
        """What is generated while time and memory are measured."""
        from redundancy_trace.evaluation import Load

        room = (self.positions or 2 * DEFAULT_LENGTH) - self.settings.new_tokens
        prompt = self.settings.prompt_tokens or max(1, min(DEFAULT_LENGTH, room))
        return Load(self.settings.speed_batch, prompt, self.settings.new_tokens, self.settings.rounds)


class OnDisk(Subject):
    """A checkpoint; model, tokenizer and text are loaded when they are asked for."""

    def __init__(self, settings: EvaluationSettings, checkpoint: "OpenCheckpoint", reporter: Reporter) -> None:
        super().__init__(settings, _labels(checkpoint))
        self._checkpoint = checkpoint
        self._reporter = reporter

    @cached_property
    def dtype(self) -> "torch.dtype":
        """What it is computed in."""
        from redundancy_trace.engine import choose_device, choose_dtype

        return choose_dtype(self.settings.dtype, choose_device(self.settings.device))

    @cached_property
    def model(self) -> Any:
        """Loaded when it is first asked for."""
        from redundancy_trace.engine import choose_device
        from redundancy_trace.weights import load_whole_model

        self._reporter.line(f"Loading {self._checkpoint.revision} …")
        return load_whole_model(
            self._checkpoint.folder,
            device=choose_device(self.settings.device),
            dtype=self.dtype,
            trust_remote_code=self.settings.trust_remote_code,
        )

    @cached_property
    def positions(self) -> int | None:
        """As its config tells: a text that does not fit is refused before the model is loaded."""
        from redundancy_trace.evaluation import positions_in
        from redundancy_trace.weights import read_config

        return positions_in(read_config(self._checkpoint.folder, trust_remote_code=self.settings.trust_remote_code))

    @cached_property
    def tokenizer(self) -> Any:
        """Its own, or the one that the user named."""
        return self._checkpoint.tokenizer(self.settings.tokenizer)

    @cached_property
    def windows(self) -> "Windows":
        """Of the text that the user named; c4 for models of a Hub, else pydoc."""
        from redundancy_trace.calibration import load_stream
        from redundancy_trace.evaluation import cut_windows, text_errors, tokens_needed

        settings, checkpoint = self.settings, self._checkpoint
        local = is_local(settings.model or "") or settings.offline
        name = settings.text or ("pydoc" if local else "c4")
        samples = DEFAULT_SAMPLES if settings.samples is None else settings.samples
        length = settings.sequence_length
        stored = name.startswith("tokens:")
        if length is None and not stored:
            length = min(DEFAULT_LENGTH, self.positions or DEFAULT_LENGTH)
        if length is not None and self.positions is not None and length > self.positions:
            raise InputError(
                f"--sequence-length {length} is more than the model's {self.positions:,} positions; give at most that."
            )
        most = (
            None if length is None else tokens_needed(samples=samples, sequence_length=length, stride=settings.stride)
        )
        with text_errors():
            stream = load_stream(
                name,
                at_most=most,
                tokenizer=settings.tokenizer,
                candidates=checkpoint.tokenizers,
                hub=checkpoint.hub,
                trust_remote_code=settings.trust_remote_code,
            )
        if stored and settings.samples is None:
            samples = 0  # all that the user gives
        return cut_windows(stream, samples=samples, sequence_length=length, stride=settings.stride)

    def scores(self, folder: Path) -> "pl.DataFrame":
        """The rows at its commit."""
        from redundancy_trace.pruning.planning import scores_in_run

        return scores_in_run(self._checkpoint, folder)


class InMemory(Subject):
    """A model that the caller has in memory."""

    def __init__(self, settings: EvaluationSettings, model: Any, token_ids: Any, tokenizer: Any) -> None:
        name = type(model).__name__
        super().__init__(settings, Labels(model=name, revision=name))
        self._model, self._token_ids, self._tokenizer = model, token_ids, tokenizer

    @property
    def model(self) -> Any:
        """As it was given."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """As it was given."""
        if self._tokenizer is None:
            raise InputError("Tasks of a model in memory need its tokenizer: evaluate(model, tokenizer=…, tasks=…).")
        return self._tokenizer

    @property
    def windows(self) -> "Windows":
        """The token ids that were given."""
        import numpy as np

        from redundancy_trace.evaluation import counted_sequences

        if self._token_ids is None:
            raise InputError(
                "The loss of a model in memory needs text: evaluate(model, token_ids=…), integers of shape (W, T)."
            )
        ids = self._token_ids
        return counted_sequences(np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids))

    def scores(self, folder: Path) -> "pl.DataFrame":
        """None: it has no commit."""
        raise InputError(
            f"Which of the checkpoints of {folder} a model in memory is, is not known; leave out scores, and it is "
            "scored now."
        )


def _labels(checkpoint: "OpenCheckpoint") -> Labels:
    placed = ("kind", "stage", "ingredient", "seed", "step", "tokens")
    return Labels(
        model=checkpoint.model,
        revision=checkpoint.revision,
        commit=checkpoint.commit,
        **{name: getattr(checkpoint.listed, name) for name in placed},
    )
