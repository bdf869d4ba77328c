"""Time two folders in transformers, in turns, and measure their caches. Stands alone.

    python transformers_timed.py WHOLE PRUNED REQUEST.npz ANSWER.npz

REQUEST holds `prompt` (1, P), `decoded` and `rounds`. ANSWER holds, for both, seconds of the `prefill` and of one token
of `decode`, each (rounds, 2), and `cache_bytes` of a token (2,).
"""

import sys
import time
from typing import Any

import numpy as np
import torch


def main(whole: str, pruned: str, request: str, answer: str) -> None:
    """Answer one request."""
    from transformers import AutoModelForCausalLM

    asked = np.load(request)
    prompt, decoded = torch.from_numpy(asked["prompt"]), int(asked["decoded"])
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True, local_files_only=True).eval()
        for folder in (whole, pruned)
    ]
    found = [[_timed(model, prompt, decoded) for model in models] for _ in range(int(asked["rounds"]) + 1)]
    prefill, decode, cache_bytes = np.array(found[1:]).transpose(2, 0, 1)  # the first warmed up
    np.savez(answer, prefill=prefill, decode=decode, cache_bytes=cache_bytes[0])


def _timed(model: Any, prompt: torch.Tensor, decoded: int) -> tuple[float, float, float]:
    """Seconds of the prefill and of one decoded token, and bytes of the cache for a token."""
    with torch.inference_mode():
        started = time.perf_counter()
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        filled = time.perf_counter()
        for _ in range(decoded):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = model(input_ids=token, cache=output.cache, use_cache=True)
        done = time.perf_counter()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.cache.layers)
    return filled - started, (done - filled) / decoded, held / (prompt.shape[1] + decoded)


if __name__ == "__main__":
    main(*sys.argv[1:])
