"""Load a folder with vLLM, and write down what it computes, how fast, and what its cache takes. Stands alone.

    python vllm_asked.py FOLDER REQUEST.npz ANSWER.npz DTYPE

REQUEST holds `ids` (N, T) and `prompt` (1, P) to compare on, with `new_tokens`; and `long` (1, Q), whose prefill and
`decoded` tokens behind it are timed `rounds` times. ANSWER holds `logprobs` (N, T - 1, V), those of each next token
behind each prefix; `tokens`, decoded greedily; `cache_bytes` of a token over all layers; `cache_tokens`, as many as fit
a cache of 1 GiB; and seconds of the `prefill` and of one token of `decode`, each (rounds,).
"""

import os
import sys
import time
from typing import Any

import numpy as np

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(folder: str, request: str, answer: str, dtype: str) -> None:
    """Answer one request."""
    from vllm import LLM, SamplingParams

    asked = np.load(request)
    ids, prompt, long = asked["ids"], asked["prompt"][0], asked["long"][0]
    llm: Any = LLM(
        folder,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        max_logprobs=-1,
        max_model_len=2048,
        enable_prefix_caching=False,
    )

    def run(rows: Any, new_tokens: int, **more: Any) -> list[Any]:
        how = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **more)
        given = [{"prompt_token_ids": [int(token) for token in row]} for row in rows]
        found: list[Any] = llm.generate(given, how, use_tqdm=False)
        return found

    told: dict[str, Any] = {}
    if ids.size:
        outputs = run(ids, 1, prompt_logprobs=-1)
        told["logprobs"] = np.stack([_table(output.prompt_logprobs[1:]) for output in outputs])
        told["tokens"] = np.array(run([prompt], int(asked["new_tokens"]))[0].outputs[0].token_ids)
    decoded = int(asked["decoded"])
    seconds = []
    for _ in range(int(asked["rounds"]) + 1):  # the first warms up
        started = time.perf_counter()
        run([long], 1)
        first = time.perf_counter() - started
        run([long], 1 + decoded)
        seconds.append((first, (time.perf_counter() - started - 2 * first) / decoded))
    told["prefill"], told["decode"] = np.array(seconds[1:]).reshape(-1, 2).T
    (specs,) = llm.collective_rpc("get_kv_cache_spec")
    told["cache_bytes"] = sum(spec.page_size_bytes / spec.block_size for spec in specs.values())
    cache = llm.llm_engine.vllm_config.cache_config
    told["cache_tokens"] = cache.num_gpu_blocks * cache.block_size
    np.savez(answer, **told)
    sys.stdout.flush()
    os._exit(0)  # the engine's threads need no farewell


def _table(places: Any) -> np.ndarray:
    """Log-probabilities of all tokens at each place, shape (T - 1, V)."""
    found = np.full((len(places), 1 + max(max(place) for place in places)), np.nan)
    for row, place in zip(found, places, strict=True):
        row[list(place)] = [value.logprob for value in place.values()]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
