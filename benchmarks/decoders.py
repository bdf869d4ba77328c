"""Decoders of a given shape with seeded random weights, saved as checkpoint folders, and token ids to feed them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

LENGTH = 512
# Rotary positions: as many as the longest sequence that is fed.
_POSITIONS = 2048


@dataclass(frozen=True)
class Shape:
    """A Llama: pre-norm, sequential, rotary positions, gated MLP.

    Attributes:
        width: Of the residual stream.
        layers: Decoder blocks.
        vocabulary: Rows of the embedding and of the head, which are not tied.
        inner: Width of the MLP; None = 8/3 of `width`, as Llama has it.
        heads: Attention heads, 64 wide each; None = as many as make up `width`.
    """

    width: int
    layers: int
    vocabulary: int
    inner: int | None = None
    heads: int | None = None


def save_decoder(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder in float32, as most training runs publish them; the same weights from the same seed.

    Matrices are drawn with the 0.02 of a model before training, and the two that write to the residual stream twice as
    large, so that layers turn it visibly.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    heads = shape.heads or max(1, shape.width // 64)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner or round(shape.width * 8 / 3 / 64) * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=min(64, shape.width),
        vocab_size=shape.vocabulary,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(2)
            layer.mlp.down_proj.weight.mul_(2)
    model.save_pretrained(folder)
    return folder


def random_ids(vocabulary: int, sequences: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Token ids, shape (sequences, length), int64."""
    return np.random.default_rng(seed).integers(0, vocabulary, size=(sequences, length))
