"""Put a nemotron-nas folder together with transformers, and write down what it computes. Stands alone.

    python nemotron_nas_reload.py FOLDER REQUEST.npz ANSWER.npz DTYPE

REQUEST and ANSWER are those of `reload.py`. What vLLM reads is checked on the way: the class of the configuration, the
width of each MLP as vLLM computes it, and that exactly the tensors of what is on are there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Off(nn.Module):
    """A part that is off: attention and MLP add zeros, a norm hands on."""

    def __init__(self, *, norm: bool, attention: bool) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """Zeros, or what is given."""
        result = hidden_states if self.norm else torch.zeros_like(hidden_states)
        return (result, None) if self.attention else result


def mlp_width(ffn: Any, width: int) -> int:
    """The width of an MLP as vLLM computes it."""
    if not hasattr(ffn, "ffn_mult"):
        return int(ffn.intermediate_size)
    inner = int(2 * ffn.ffn_mult * width / 3)
    return inner + -inner % 256


def assembled(folder: str, dtype: torch.dtype) -> Any:
    """The model of a folder, every tensor in its place; raises where one is missing or left over."""
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    fields = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if config.architectures != ["DeciLMForCausalLM"] or len(config.block_configs) != config.num_hidden_layers:
        sys.exit("its config.json is none of DeciLMForCausalLM with a block_config for each layer")
    if config.to_dict()["block_configs"] != fields["block_configs"]:
        sys.exit("its block_configs do not survive their class")
    blocks = config.block_configs
    widths = {mlp_width(block.ffn, config.hidden_size) for block in blocks if not block.ffn.no_op}
    groups = {block.attention.n_heads_in_group for block in blocks if not block.attention.no_op}
    if blocks[0].attention.no_op or not widths <= {config.intermediate_size}:
        sys.exit("its first attention is off, or vLLM would compute another width of the MLP")
    if groups != {config.num_attention_heads // config.num_key_value_heads}:
        sys.exit("its n_heads_in_group does not give the heads of keys and values")
    foreign = ("architectures", "auto_map", "block_configs", "model_type", "qkv_bias")
    kind = Qwen2Config if fields.get("qkv_bias") else LlamaConfig
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(kind(**{k: v for k, v in fields.items() if k not in foreign}))
    for layer, block in zip(model.model.layers, blocks, strict=True):
        if block.attention.no_op:
            layer.input_layernorm = Off(norm=True, attention=False)
            layer.self_attn = Off(norm=False, attention=True)
        if block.ffn.no_op:
            layer.post_attention_layernorm = Off(norm=True, attention=False)
            layer.mlp = Off(norm=False, attention=False)
    state = {name: t.to(dtype) for f in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(f).items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wanted = {name for name, _ in model.named_parameters()} - tied
    if wanted != set(state):
        sys.exit(f"tensors are missing or left over: {sorted(wanted ^ set(state))[:3]}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def main(folder: str, request: str, answer: str, dtype: str) -> None:
    """Answer one request; the first layer has an attention, of which a cache knows its length."""
    model = assembled(folder, getattr(torch, dtype))
    asked = np.load(request)
    given, cache, tokens = torch.from_numpy(asked["prompt"]), None, []
    with torch.no_grad():
        whole = model(input_ids=torch.from_numpy(asked["ids"]), use_cache=True)
        for _ in range(int(asked["new_tokens"])):
            output = model(input_ids=given, cache=cache, use_cache=True)
            given, cache = output.logits[:, -1:].argmax(dim=-1), output.cache
            tokens.append(int(given))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in whole.cache.layers if layer.keys is not None)
    np.savez(
        answer,
        logits=whole.logits.float().numpy(),
        tokens=np.array(tokens),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        cache_bytes=held / asked["ids"].size,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
