"""All scores of a model from a hand-written float64 forward pass: what the engines are held to.

Nothing here calls a model: the architectures are written out in `reference.forward`, the metrics below.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from reference.forward import Pass, Updates, forward
from torch import Tensor
from transformers import PreTrainedModel

COMPONENTS = ("attn", "mlp", "block")
METRICS = ("cosine_similarity", "angular_distance", "relative_norm", "update_cosine")


@dataclass(frozen=True)
class ReferenceScores:
    """Scores of one model on fixed tokens, all in float64.

    Attributes:
        value: (component, metric) to the mean over all tokens, one a layer, (L,).
        stderr: The same keys to the standard error over sequences, (L,); NaN with fewer than two sequences.
        n_tokens: The same keys to the tokens that the mean counts, (L,).
        loss: Mean next-token cross entropy over all predicted tokens, in nats.
        loss_stderr: Its standard error over sequences.
        hidden: h_0 … h_L, each (B, T, D): what enters the first block, then every block's output.
        updates: What attention and MLP of each layer add to the stream, and whether they are parallel.
        logits: (B, T, vocabulary).
    """

    value: dict[tuple[str, str], np.ndarray]
    stderr: dict[tuple[str, str], np.ndarray]
    n_tokens: dict[tuple[str, str], np.ndarray]
    loss: float
    loss_stderr: float
    hidden: tuple[np.ndarray, ...]
    updates: tuple[Updates, ...]
    logits: np.ndarray

    @property
    def parallel(self) -> tuple[bool, ...]:
        """Whether each layer's MLP reads the block's input instead of the stream behind the attention."""
        return tuple(update.parallel for update in self.updates)

    def importance(self, component: str) -> np.ndarray:
        """1 − mean cos(X, Y), one a layer."""
        return 1 - self.value[component, "cosine_similarity"]

    def distances(self, metric: str, n_sequences: int | None = None) -> np.ndarray:
        """Mean `metric` of h_i and h_j over the tokens of the first sequences (None: all), (L + 1, L + 1)."""
        states = [torch.from_numpy(h[:n_sequences]) for h in self.hidden]
        measure = {"cosine_similarity": cosine, "angular_distance": angle}[metric]
        return np.array([[np.nanmean(measure(x, y).numpy()) for y in states] for x in states])


def reference_scores(model: PreTrainedModel, token_ids: np.ndarray | Tensor) -> ReferenceScores:
    """Score a model by hand.

    Args:
        model: Only its configuration and its state dict are read.
        token_ids: Integers of shape (sequences, length).
    """
    ids = torch.as_tensor(token_ids)
    with torch.no_grad(), one_thread():
        run = forward(model.config, model.state_dict(), ids)
        tokens = _tokens(run)
        loss_BT = cross_entropy(run.logits[:, :-1], ids[:, 1:])
    summaries = {key: [summary(layer) for layer in layers] for key, layers in tokens.items()}
    loss, loss_stderr, _ = summary(loss_BT)
    return ReferenceScores(
        value={key: np.array([value for value, _, _ in rows]) for key, rows in summaries.items()},
        stderr={key: np.array([stderr for _, stderr, _ in rows]) for key, rows in summaries.items()},
        n_tokens={key: np.array([n for _, _, n in rows]) for key, rows in summaries.items()},
        loss=loss,
        loss_stderr=loss_stderr,
        hidden=tuple(h.numpy() for h in run.hidden),
        updates=run.updates,
        logits=run.logits.numpy(),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small are many times slower when several threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tokens(run: Pass) -> dict[tuple[str, str], list[Tensor]]:
    """Every metric of every component, one (B, T) a layer."""
    tokens: dict[tuple[str, str], list[Tensor]] = {
        (component, metric): [] for component in COMPONENTS for metric in METRICS
    }
    for x, step in zip(run.hidden, run.updates, strict=False):
        branch = {  # where the component leaves the stream, and what it adds
            "attn": (x, step.attn),
            "mlp": (x if step.parallel else x + step.attn, step.mlp),
            "block": (x, step.attn + step.mlp),
        }
        for component, (start, update) in branch.items():
            for metric, values_BT in zip(METRICS, measure(start, update), strict=True):
                tokens[component, metric].append(values_BT)
    return tokens


def measure(x: Tensor, update: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four metrics token by token, (B, T); NaN = left out of the mean, as a vector it needs is zero."""
    y = x + update
    similarity = cosine(x, y)
    relative = torch.where(similarity.isnan(), torch.nan, update.norm(dim=-1) / x.norm(dim=-1))
    return similarity, angle(x, y), relative, cosine(update, x)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Angle as a share of half a turn."""
    x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1)) / torch.pi


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[..., None])[..., 0]


def summary(values_BT: Tensor) -> tuple[float, float, int]:
    """Mean over all tokens, standard error over the sequences' means, tokens counted; NaN is no value."""
    counted = ~values_BT.isnan()
    mean = values_BT.nanmean().item()
    of_sequences = values_BT[counted.any(-1)].nanmean(-1)
    n = len(of_sequences)
    stderr = of_sequences.std(correction=1).item() / n**0.5 if n > 1 else float("nan")
    return mean, stderr, int(counted.sum())
