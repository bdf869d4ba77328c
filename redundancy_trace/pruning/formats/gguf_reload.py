"""Load a GGUF with llama.cpp alone, and write down what it computes. Stands alone: it is run in a fresh process.

    python gguf_reload.py FILE.gguf REQUEST.npz ANSWER.npz TEXT…

REQUEST is that of `reload.py`. ANSWER holds for prefixes of the first row of `ids`, whose `lengths` (L,) are told,
`top_ids` and `top_logprobs` (L, 10) of the next token; `tokens` decoded greedily from `prompt`, with `step_ids` and
`step_logprobs` (new_tokens, 10); and `text0` …, the token ids of each text.
"""

import json
import os
import sys
import urllib.request
from typing import Any

import numpy as np

TOP = 10
PREFIXES = 8


def main(file: str, request: str, answer: str, *texts: str) -> None:
    """Answer one request."""
    import xllamacpp

    asked = np.load(request)
    row, prompt, new_tokens = asked["ids"][0], asked["prompt"][0], int(asked["new_tokens"])
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = len(row) + new_tokens + 8
    params.n_parallel = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    lengths = np.unique(np.linspace(1, len(row), PREFIXES).round().astype(int))
    tops = [_steps(server, row[:length], 1)[0] for length in lengths]
    steps = _steps(server, prompt, new_tokens)
    found: dict[str, Any] = {
        "lengths": lengths,
        "top_ids": np.array([ids for _, ids, _ in tops]),
        "top_logprobs": np.array([logprobs for *_, logprobs in tops]),
        "tokens": np.array([token for token, _, _ in steps]),
        "step_ids": np.array([ids for _, ids, _ in steps]),
        "step_logprobs": np.array([logprobs for *_, logprobs in steps]),
    }
    for index, text in enumerate(texts):
        found[f"text{index}"] = np.array(_cut(server.listening_address, text))
    np.savez(answer, **found)
    sys.stdout.flush()
    os._exit(0)  # the server's threads need no farewell


def _steps(server: Any, prompt: np.ndarray, count: int) -> list[tuple[int, list[int], list[float]]]:
    """Greedy decoding: each token, and ids and log-probabilities of the likeliest ones."""
    asked = {
        "prompt": [int(token) for token in prompt],
        "n_predict": count,
        "temperature": 0.0,
        "n_probs": TOP,
        "ignore_eos": True,
        "cache_prompt": False,
        "top_k": 1,
    }
    told = server.handle_completions(asked)
    if "choices" not in told:
        sys.exit(f"llama.cpp answers {json.dumps(told)[:300]}")
    return [
        (step["id"], [top["id"] for top in step["top_logprobs"]], [top["logprob"] for top in step["top_logprobs"]])
        for step in told["choices"][0]["logprobs"]["content"]
    ]


def _cut(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False}).encode()
    asked = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        tokens: list[int] = json.load(answer)["tokens"]
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
