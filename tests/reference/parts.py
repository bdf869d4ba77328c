"""The pieces that decoder models are made of, each as a formula on float64 tensors.

Shape letters: B sequences, T tokens, D width, H query heads, G key/value heads, K width of a head, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The tensors of a model, or of the part of it whose names begin with `prefix`, in float64."""

    tensors: Mapping[str, Tensor]
    prefix: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name].double()

    def get(self, name: str) -> Tensor | None:
        return self[name] if self.prefix + name in self.tensors else None

    def under(self, name: str) -> "Weights":
        return Weights(self.tensors, f"{self.prefix}{name}.")


# ---- linear maps and norms


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """W x + b; the bias where the file has one."""
    bias = w.get(f"{name}.bias")
    out = x @ w[f"{name}.weight"].T
    return out if bias is None else out + bias


def conv1d(x: Tensor, w: Weights, name: str) -> Tensor:
    """GPT-2 stores its matrices the other way round."""
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def named_layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return layer_norm(x, eps, w[f"{name}.weight"], w.get(f"{name}.bias"))


# ---- activations


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor, slope: float = math.sqrt(2 / math.pi)) -> Tensor:
    return x * (1 + torch.tanh(slope * (x + 0.044715 * x**3))) / 2


def gelu_bloom(x: Tensor) -> Tensor:
    return gelu_tanh(x, slope=0.79788456)  # the constant as BLOOM was trained with it


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "relu": relu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}


# ---- positions


def rope(x_BTHK: Tensor, theta: float, width: int | None = None, *, interleaved: bool = False) -> Tensor:
    """Turn pairs of the first `width` entries of every head by position · theta^(-2i/width).

    The i-th pair is (i, i + width/2), or (2i, 2i + 1) if interleaved.
    """
    n_positions, head_width = x_BTHK.shape[1], x_BTHK.shape[-1]
    width = width or head_width
    speed = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(n_positions, dtype=torch.float64)[:, None, None] * speed  # (T, 1, width/2)
    turned, rest = x_BTHK[..., :width], x_BTHK[..., width:]
    half = width // 2
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    new_first = first * angle.cos() - second * angle.sin()
    new_second = second * angle.cos() + first * angle.sin()
    if interleaved:
        turned = torch.stack((new_first, new_second), dim=-1).flatten(-2)
    else:
        turned = torch.cat((new_first, new_second), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def alibi_slopes(n_heads: int) -> Tensor:
    """2^(-8i/n) for i = 1 … n; what n heads of a count that is no power of two lack comes from twice as many.

    BLOOM, Falcon and MPT place the biases differently, but as slope · (key − query) up to a constant a row.
    Falcon rounds the slopes to bfloat16: no loss for the head counts tested.
    """
    power = 2 ** int(math.log2(n_heads))
    exponents = [-8 * i / power for i in range(1, power + 1)]
    exponents += [-8 * i / (2 * power) for i in range(1, 2 * power, 2)]
    return torch.tensor([2.0**exponent for exponent in exponents[:n_heads]], dtype=torch.float64)


# ---- attention


def heads(x_BTD: Tensor, n_heads: int) -> Tensor:
    """(B, T, H·K) to (B, T, H, K)."""
    return x_BTD.unflatten(-1, (n_heads, -1))


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def attend(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
) -> Tensor:
    """Causal attention; H/G neighbouring query heads share a key head; returns (B, T, H·K).

    Args:
        q_BTHK: Queries.
        k_BTGK: Keys.
        v_BTGK: Values.
        scale: Factor of the scores; 1/√K if None.
        window: A query sees itself and the window − 1 tokens before it.
        softcap: Bound c of the scores, c · tanh(score / c).
        alibi: Slope a head, (H,).
    """
    n_tokens, n_heads, head_width = q_BTHK.shape[1:]
    share = n_heads // k_BTGK.shape[2]
    k_BTHK, v_BTHK = (x.repeat_interleave(share, dim=2) for x in (k_BTGK, v_BTGK))
    scores = torch.einsum("bqhk,bshk->bhqs", q_BTHK, k_BTHK)
    scores = scores * (head_width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(n_tokens)[None, :] - torch.arange(n_tokens)[:, None]  # key's position − query's
    if alibi is not None:
        scores = scores + alibi[:, None, None] * ahead
    hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
    weights = softmax(scores.masked_fill(hidden, -torch.inf))
    return torch.einsum("bhqs,bshk->bqhk", weights, v_BTHK).flatten(-2)


# ---- MLPs


def plain_mlp(x: Tensor, w: Weights, act: Callable[[Tensor], Tensor], up: str, down: str) -> Tensor:
    return linear(act(linear(x, w, up)), w, down)


def gated_mlp(x: Tensor, w: Weights, act: Callable[[Tensor], Tensor]) -> Tensor:
    return linear(act(linear(x, w, "gate_proj")) * linear(x, w, "up_proj"), w, "down_proj")


def mixture(x_BTD: Tensor, w: Weights, share_BTE: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over all experts of share · expert(x); the share of an expert that was not chosen is 0."""
    gate_up, down = w["gate_up_proj"], w["down_proj"]  # (E, 2·inner, D), (E, D, inner)
    total = torch.zeros_like(x_BTD)
    for expert in range(gate_up.shape[0]):
        gate, up = (x_BTD @ gate_up[expert].T).chunk(2, dim=-1)
        total = total + share_BTE[..., expert, None] * ((act(gate) * up) @ down[expert].T)
    return total


def keep_largest(x: Tensor, k: int) -> Tensor:
    """True at the k largest entries of the last axis."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(k, dim=-1).indices, True)


def softmax_router(x_BTD: Tensor, router_ED: Tensor, k: int, *, renormalise: bool) -> Tensor:
    """Shares of the k likeliest experts, (B, T, E)."""
    probability = softmax(x_BTD @ router_ED.T)
    share = torch.where(keep_largest(probability, k), probability, 0.0)
    return share / share.sum(-1, keepdim=True) if renormalise else share


def grouped_sigmoid_router(
    x_BTD: Tensor, router_ED: Tensor, bias_E: Tensor, *, k: int, n_groups: int, k_groups: int, factor: float
) -> Tensor:
    """Shares as in DeepSeek-V3 and GLM-4.5, (B, T, E).

    The bias has a say in the choice only: of the groups with the largest sum of their two best experts, the k
    best experts. Shares are the sigmoids, brought to a sum of `factor`.
    """
    score = 1 / (1 + torch.exp(-(x_BTD @ router_ED.T)))
    wanted = (score + bias_E).unflatten(-1, (n_groups, -1))
    group = wanted.topk(2, dim=-1).values.sum(-1)
    wanted = torch.where(keep_largest(group, k_groups)[..., None], wanted, -torch.inf).flatten(-2)
    share = torch.where(keep_largest(wanted, k), score, 0.0)
    return factor * share / share.sum(-1, keepdim=True)
