"""What a layer did to the residual stream, in tensors; and the form in which that was proven."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Largest |x + a + m − y| of a token, as a share of the largest number that token has in x, a, m or y.
# States of float64 are compared in float32, too.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float64: 1e-5}


@dataclass(frozen=True)
class Update:
    """Where one sublayer's update is read.

    Attributes:
        child: Name of the layer's direct child whose output it is, `post_attention_layernorm` or `mlp`, say.
        minus: None, or the position (int) or keyword (str) of the residual that the child is handed and adds itself.
        copy: Whether the layer overwrites the child's output, so that it must be copied when it appears.
    """

    child: str
    minus: int | str | None = None
    copy: bool = False


@dataclass(frozen=True)
class Decomposition:
    """The proven form of one kind of layer: output = input + scale · attn + scale · mlp.

    Attributes:
        attn: Where the attention's update is read.
        mlp: Where the MLP's update is read.
        scale: Factor on both updates (Granite's residual multiplier, else 1).
        parallel: Whether the MLP branches off at the layer's input rather than behind the attention.
        copy_input: Whether the layer overwrites its input.
        error: Largest relative |x + a + m − y| that the proof saw.
    """

    attn: Update
    mlp: Update
    scale: float
    parallel: bool
    copy_input: bool
    error: float


@dataclass(frozen=True)
class LayerStates:
    """What one layer did to one batch; tensors of shape (B, T, D) in the compute dtype unless said otherwise.

    Attributes:
        resid_pre: Input of the layer, X of attention and block.
        resid_post: Output of the layer, Y of the block.
        attn_update: What attention adds, times the residual multiplier; float32 where it is a difference.
        mlp_update: What the MLP adds, likewise.
        parallel: Whether the MLP branches off at the layer's input.
    """

    resid_pre: Tensor
    resid_post: Tensor
    attn_update: Tensor
    mlp_update: Tensor
    parallel: bool

    @property
    def resid_mid(self) -> Tensor:
        """X of the MLP: the input again in a parallel block, else input + attention as the model rounds it."""
        x = self.resid_pre
        return x if self.parallel else (x.float() + self.attn_update.float()).to(x.dtype)

    def components(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For attn, block and mlp: name, X and update, float32; the block's update is its own output − X.

        Those that share one X follow each other and are handed the same tensor.
        """
        x = self.resid_pre.float()
        yield "attn", x, self.attn_update.float()
        yield "block", x, self.resid_post.float() - x
        yield "mlp", x if self.parallel else self.resid_mid.float(), self.mlp_update.float()

    def tiles(self, n_tokens: int) -> Iterator["LayerStates"]:
        """The same, in pieces of shape (at most n_tokens, D), in order."""
        tiles = (tensor.split(n_tokens) for tensor in self._flat())
        for x, y, attn, mlp in zip(*tiles, strict=True):
            yield LayerStates(x, y, attn, mlp, self.parallel)

    def tokens(self, chosen: Tensor) -> "LayerStates":
        """The same of some tokens, shape (n, D): those where `chosen`, shape (B·T,), bool, is true."""
        chosen = chosen.to(self.resid_pre.device)
        x, y, attn, mlp = (tensor[chosen] for tensor in self._flat())
        return LayerStates(x, y, attn, mlp, self.parallel)

    def _flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = (self.resid_pre, self.resid_post, self.attn_update, self.mlp_update)
        x, y, attn, mlp = (tensor.flatten(0, -2) for tensor in tensors)
        return x, y, attn, mlp

    def identity_error(self) -> float:
        """Largest |x + a + m − y| of a token, as a share of the largest number that the token has in x, a, m or y."""
        tensors = (self.resid_pre, self.attn_update, self.mlp_update, self.resid_post)
        return relative_error(*(tensor.float() for tensor in tensors))


def not_finite(what: str, dtype: torch.dtype) -> str:
    """The message for a state that is infinite or no number."""
    name = str(dtype).removeprefix("torch.")
    hint = " Try --dtype float32." if dtype != torch.float32 else " The weights themselves may be broken."
    return f"{what[0].upper()}{what[1:]} is not finite in {name}; it is no redundancy and gets no score.{hint}"


def relative_error(x: Tensor, a: Tensor, m: Tensor, y: Tensor) -> float:
    """Largest |x + a + m − y| of a token, as a share of the largest number that the token has in any of the four."""
    largest = torch.stack([t.abs().amax(dim=-1) for t in (x, a, m, y)]).amax(dim=0)
    error = (x + a + m - y).abs().amax(dim=-1)
    # A token of zeros throughout reproduces itself.
    return float(torch.where(largest == 0, error, error / largest.clamp_min(1e-30)).max())


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first member of a tuple (attentions return weights beside it)."""
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, Tensor) else None


def in_shape_of(value: Any, x: Tensor) -> Tensor | None:
    """`value` in the shape of the residual stream `x`, or None (OPT flattens batch and tokens for its MLP)."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == x.numel():
        return value.reshape(x.shape) if value.shape[-1] == x.shape[-1] else None
    return None
