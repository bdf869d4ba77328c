"""Configuration of `DeciLMForCausalLM` for vLLM: Llama's, with attention and MLP of each layer on or off."""

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """Llama's configuration and `block_configs`, whose entries are read as attributes and written as JSON."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**settings) for part, settings in block.items()})
            for block in block_configs
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        blocks = [{part: vars(settings) for part, settings in vars(block).items()} for block in self.block_configs]
        return {**super().to_dict(), "block_configs": blocks}
