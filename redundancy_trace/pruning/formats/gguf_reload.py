"""Load a GGUF with llama.cpp alone, and write down what it computes. Stands alone: it is run in a fresh process.

    python gguf_reload.py FILE.gguf REQUEST.npz ANSWER.npz TEXT…

REQUEST is that of `reload.py`. ANSWER holds for prefixes of the first row of `ids`, whose `lengths` (L,) are told,
`top_ids` and `top_logprobs` (L, 10) of the next token; `tokens` decoded greedily from `prompt`, with `step_ids` and
`step_logprobs` (new_tokens, 10); and `text0` …, the token ids of each text.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

import numpy as np

TOP = 10
PREFIXES = 8
_SURE = 1e4  # added to a logit: that token is drawn


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
    # One less than all: the token that is drawn needs a position too, and the model may have no more.
    lengths = np.unique(np.linspace(1, len(row) - 1, PREFIXES).round().astype(int))
    address = server.listening_address
    letter = _cut(address, "a")[-1]
    tops = [_likeliest(address, row[:length], letter) for length in lengths]
    tokens = _decoded(address, prompt, new_tokens)
    steps = [_likeliest(address, np.append(prompt, tokens[:done]), letter) for done in range(new_tokens)]
    found: dict[str, Any] = {
        "lengths": lengths,
        "top_ids": np.array([ids for ids, _ in tops]),
        "top_logprobs": np.array([logprobs for _, logprobs in tops]),
        "tokens": np.array(tokens),
        "step_ids": np.array([ids for ids, _ in steps]),
        "step_logprobs": np.array([logprobs for _, logprobs in steps]),
    }
    for index, text in enumerate(texts):
        found[f"text{index}"] = np.array(_cut(address, text))
    np.savez(answer, **found)
    sys.stdout.flush()
    os._exit(0)  # the server's threads need no farewell


def _decoded(address: str, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy decoding with a cache, in one go."""
    told = _completed(address, prompt, n_predict=count, ignore_eos=True, return_tokens=True)
    tokens: list[int] = told["tokens"]
    if len(tokens) != count:
        sys.exit(f"llama.cpp decodes {len(tokens)} tokens where {count} were asked for")
    return tokens


def _likeliest(address: str, prompt: np.ndarray, letter: int) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of the likeliest next tokens.

    They are told of tokens that end a character, so one that does is drawn; they are those before that.
    """
    told = _completed(address, prompt, n_predict=1, n_probs=TOP, logit_bias=[[letter, _SURE]])
    (step,) = told["completion_probabilities"]
    return [top["id"] for top in step["top_logprobs"]], [top["logprob"] for top in step["top_logprobs"]]


def _cut(address: str, text: str) -> list[int]:
    tokens: list[int] = _answer(address, "tokenize", {"content": text, "add_special": False})["tokens"]
    return tokens


def _completed(address: str, prompt: np.ndarray, **how: Any) -> dict[str, Any]:
    given = {"prompt": [int(token) for token in prompt], "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    return _answer(address, "completion", given | how)


def _answer(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    asked = urllib.request.Request(f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked) as answer:
            told: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"llama.cpp answers {error.read().decode(errors='replace')[:300]}")
    return told


if __name__ == "__main__":
    main(*sys.argv[1:])
