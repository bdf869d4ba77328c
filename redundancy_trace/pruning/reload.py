"""Load a folder with transformers alone, and write down what it computes. Stands alone: it is run in a fresh process.

    python reload.py FOLDER REQUEST.npz ANSWER.npz DTYPE

REQUEST holds `ids`, shape (N, T), `prompt`, shape (1, P), and `new_tokens`; ANSWER what `computed` returns.
"""

import sys
from typing import Any

import numpy as np
import torch


def computed(model: Any, ids: np.ndarray, prompt: np.ndarray, new_tokens: int) -> dict[str, np.ndarray]:
    """What two models must agree in.

    Args:
        model: A causal language model, in eval mode.
        ids: Token ids, shape (N, T).
        prompt: Where greedy decoding with a cache starts, shape (1, P).
        new_tokens: How many tokens are decoded.

    Returns:
        `logits`, shape (N, T, V), float32; `tokens`, shape (new_tokens,); `n_parameters`; `cache_bytes` of keys and
        values that one token takes.
    """
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(ids), use_cache=True)
        decoded = greedy(model, torch.from_numpy(prompt), new_tokens)
    return {
        "logits": output.logits.float().numpy(),
        "tokens": decoded.numpy(),
        "n_parameters": np.array(sum(parameter.numel() for parameter in model.parameters())),
        "cache_bytes": np.array(_cache_bytes(output.cache) / ids.size),
    }


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The likeliest tokens, one after the other, each computed from the last one and the cache; shape (new_tokens,)."""
    found, given, cache = [], prompt, None
    for _ in range(new_tokens):
        output = model(input_ids=given, cache=cache, use_cache=True)
        given, cache = output.logits[:, -1:].argmax(dim=-1), output.cache
        found.append(given)
    return torch.cat(found, dim=1)[0]


def _cache_bytes(cache: Any) -> int:
    held: list[Any] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            held += list(value.values()) if isinstance(value, dict) else [value]
    return sum(value.numel() * value.itemsize for value in held if isinstance(value, torch.Tensor))


def main(folder: str, request: str, answer: str, dtype: str) -> None:
    """Answer one request; exits with a message if the folder does not load whole."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        trust_remote_code=True,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    odd = {what: sorted(map(str, names))[:3] for what, names in info.items() if names}
    if odd:
        sys.exit(f"it does not load whole: {odd}")
    asked = np.load(request)
    found: Any = computed(model.eval(), asked["ids"], asked["prompt"], int(asked["new_tokens"]))
    np.savez(answer, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
