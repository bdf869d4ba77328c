"""Next-token loss over windows of text: the quality of a model in one number, with its standard error."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from redundancy_trace.blocks import not_finite
from redundancy_trace.engine import choose_batch_size
from redundancy_trace.engine.checks import check_calibration
from redundancy_trace.errors import CheckpointError, InputError
from redundancy_trace.evaluation.windows import Windows
from redundancy_trace.metrics import ADDED_LOSS
from redundancy_trace.similarity import to_float64
from redundancy_trace.store import Evaluated


@dataclass(frozen=True)
class TextLoss:
    """The loss on one text.

    Attributes:
        windows: The text.
        sums: Shape (W,), float64: summed loss of each window's counted tokens, in nats.
    """

    windows: Windows
    sums: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Counted tokens of each window, shape (W,)."""
        counts: np.ndarray = self.windows.ids.shape[1] - self.windows.first
        return counts

    def loss(self) -> Evaluated:
        """Mean loss in nats per token."""
        windows = self.windows
        value, stderr = _ratio_and_error(self.sums, self.counts)
        return Evaluated(
            metric="loss",
            value=value,
            stderr=stderr,
            n_samples=len(windows.ids),
            n_tokens=windows.n_tokens,
            n_bytes=None if windows.n_bytes is None else int(windows.n_bytes.sum()),
            dataset=windows.name,
            token_sha256=windows.sha256,
            sequence_length=windows.ids.shape[1],
            stride=windows.stride,
            bos=windows.bos,
        )

    def added_to(self, whole: "TextLoss") -> Evaluated:
        """By how much the loss is above that of the whole model on the same windows, with the error of the difference.

        Both find the same windows hard, so that the difference is known far better than either loss.
        """
        value, stderr = _ratio_and_error(self.sums - whole.sums, self.counts)
        return replace(self.loss(), metric=ADDED_LOSS.name, value=value, stderr=stderr)

    def numbers(self) -> list[Evaluated]:
        """Loss, perplexity and, where the text's bytes are known, bits per byte, which compares tokenizers."""
        loss = self.loss()
        assert loss.value is not None
        perplexity = math.exp(loss.value) if loss.value < 700 else math.inf
        error = None if loss.stderr is None else loss.stderr * perplexity
        numbers = [loss, replace(loss, metric="perplexity", value=perplexity, stderr=error)]
        if loss.n_bytes:
            assert self.windows.n_bytes is not None
            bits, error = _ratio_and_error(self.sums / math.log(2), self.windows.n_bytes)
            numbers.append(replace(loss, metric="bits_per_byte", value=bits, stderr=error))
        return numbers


@contextmanager
def text_errors() -> Iterator[None]:
    """What is wrong with a text, told in the words of an evaluation."""
    try:
        yield
    except InputError as error:
        told = str(error).replace("--calibration", "--text")
        told = told.replace("The calibration", "The text").replace("A calibration", "A text")
        raise InputError(told) from error


def _ratio_and_error(sums_W: np.ndarray, sizes_W: np.ndarray) -> tuple[float, float | None]:
    """Σ sums / Σ sizes, and its standard error over windows of unequal size; None of one window.

    The error is that of the ratio estimator (Cochran, Sampling Techniques, chapter 6), for windows of one size that of
    the mean.
    """
    value = math.fsum(sums_W) / float(sizes_W.sum())
    n = len(sums_W)
    if n < 2:
        return value, None
    squares = math.fsum((sums_W - value * sizes_W) ** 2)
    return value, math.sqrt(squares * n / (n - 1)) / float(sizes_W.sum())


def text_loss(model: Any, windows: Windows, *, batch_size: int | None = None) -> TextLoss:
    """Loss of a causal language model on windows of text: float32 per token, float64 in the sums.

    Args:
        model: A causal language model of transformers, in eval mode, on any device.
        windows: The text.
        batch_size: Windows at a time; None = about 4096 tokens, on the CPU 1024; halved where they do not fit the
            device's memory.

    Raises:
        InputError: The model has no embedding row for an id, or fewer positions than a window has tokens.
        CheckpointError: The loss is not finite, or not even one window fits the device.
    """
    with text_errors():
        check_calibration(windows.ids, model)
    device = model.get_input_embeddings().weight.device
    size = choose_batch_size(batch_size, windows.ids.shape[1], len(windows.ids), device)
    while True:
        try:
            return TextLoss(windows, _sums(model, windows, size))
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise CheckpointError(
                    f"One window of {windows.ids.shape[1]:,} tokens does not fit the device; try a shorter "
                    "--sequence-length, or --device cpu."
                ) from error
            size = (size + 1) // 2


@torch.no_grad()
def _sums(model: Any, windows: Windows, batch_size: int) -> np.ndarray:
    ids = torch.as_tensor(windows.ids, device=model.get_input_embeddings().weight.device)
    sums = []
    firsts = iter(windows.first.tolist())
    for batch in ids.split(batch_size):
        logits_BTV = model(input_ids=batch, use_cache=False).logits
        for logits_TV, ids_T in zip(logits_BTV, batch, strict=True):
            first = next(firsts)
            counted = logits_TV[first - 1 : -1].float()
            losses = torch.nn.functional.cross_entropy(counted, ids_T[first:], reduction="none")
            total = float(to_float64(losses).sum())
            if not math.isfinite(total):
                raise CheckpointError(not_finite("the loss", logits_TV.dtype))
            sums.append(total)
    return np.array(sums)
