"""Time two files in llama.cpp, in turns; its log, on stderr, tells the size of each cache. Stands alone.

    python llama_cpp_timed.py WHOLE.gguf PRUNED.gguf REQUEST.npz ANSWER.npz

REQUEST holds `prompt` (1, P), `decoded` and `rounds`. ANSWER holds, for both, seconds of the `prefill` and of one token
of `decode`, each (rounds, 2), as llama.cpp tells them.
"""

import os
import sys
from typing import Any

import numpy as np

_TELLS_SIZES = 4  # verbosity


def main(whole: str, pruned: str, request: str, answer: str) -> None:
    """Answer one request."""
    asked = np.load(request)
    prompt, decoded = [int(token) for token in asked["prompt"][0]], int(asked["decoded"])
    servers = [_server(file, len(prompt) + decoded + 8) for file in (whole, pruned)]
    found = [[_timed(server, prompt, decoded) for server in servers] for _ in range(int(asked["rounds"]) + 1)]
    prefill, decode = np.array(found[1:]).transpose(2, 0, 1)  # the first warmed up
    np.savez(answer, prefill=prefill, decode=decode)
    sys.stdout.flush()
    os._exit(0)  # the servers' threads need no farewell


def _server(file: str, room: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = room
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = _TELLS_SIZES
    return xllamacpp.Server(params)


def _timed(server: Any, prompt: list[int], decoded: int) -> tuple[float, float]:
    asked = {
        "prompt": prompt, "n_predict": decoded + 1, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
    }  # fmt: skip
    told = server.handle_completions(asked)
    if "timings" not in told:
        sys.exit(f"llama.cpp answers {str(told)[:300]}")
    return told["timings"]["prompt_ms"] / 1e3, told["timings"]["predicted_per_token_ms"] / 1e3


if __name__ == "__main__":
    main(*sys.argv[1:])
