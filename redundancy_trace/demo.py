"""The embedded default: a small Pythia-style model, trained for real on text that every CPython carries.

It learns from `pydoc_data.topics` but for the first topics, which hold the tokens that the calibration `pydoc` takes
at its default size (64 x 512): there the demo's loss is on text that it was not trained on. Its tokenizer saw all.
"""

import hashlib
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from redundancy_trace.calibration.texts import pydoc_topics
from redundancy_trace.calibration.tokenizers import encode
from redundancy_trace.errors import TraceError
from redundancy_trace.fetching import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
ONE_DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the demo's weights, beside the text and the libraries.

    Attributes:
        layers: Decoder blocks.
        width: Of the residual stream.
        heads: Attention heads.
        vocabulary: Entries of the tokenizer, at most.
        positions: The longest sequence of the model.
        sequence_length: Tokens of a training sequence.
        batch_size: Sequences in a step.
        steps: Optimizer steps.
        saved: The steps after which a checkpoint is saved; 0 is the untrained model.
        learning_rate: At its highest, after `warmup` steps; it ends at a tenth.
        warmup: Steps with a rising learning rate.
        embedding_std: Of the embeddings at the start. With the 0.02 of the other matrices, the first block alone would
            rise far above them and make every later one look redundant.
        held_out_tokens: So many from the beginning of the text are not trained on.
        seed: Of weights and order.
    """

    layers: int = 8
    width: int = 128
    heads: int = 4
    vocabulary: int = 1024
    positions: int = 512
    sequence_length: int = 128
    batch_size: int = 8
    steps: int = 192
    saved: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192)
    learning_rate: float = 4e-3
    warmup: int = 16
    embedding_std: float = 0.2
    held_out_tokens: int = 64 * 512
    seed: int = 0


def demo_checkpoints(
    cache: Path | None = None, on_step: Callable[[int, int], None] | None = None, recipe: Recipe | None = None
) -> Path:
    """The demo's checkpoints: those that an earlier call left in the cache, else trained now.

    The folder is named by a hash of recipe, text and library versions. It gets its name only once training is
    over, so a run that was killed in between leaves nothing that would be trusted.

    Args:
        cache: Folder of caches; None = `$XDG_CACHE_HOME/redundancy-trace`, else `~/.cache/redundancy-trace`.
        on_step: Told step and number of steps after each step.
        recipe: What is trained.

    Returns:
        A folder of `checkpoint-N`, as `transformers.Trainer` writes them.

    Raises:
        TraceError: The cache cannot be written.
    """
    recipe = recipe or Recipe()
    cache = cache or cache_folder()
    folder = cache / f"demo-{_key(recipe)}"
    if _is_whole(folder, recipe):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _clear(cache)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as training:
            trained = train_demo(Path(training) / folder.name, on_step=on_step, recipe=recipe)
            if not _is_whole(folder, recipe):  # else another process was faster, with the same weights
                shutil.rmtree(folder, ignore_errors=True)
                trained.rename(folder)
    except OSError as error:
        if not _is_whole(folder, recipe):
            raise TraceError(
                f"The demo cannot be kept in {cache}: {error.strerror or error}. Set XDG_CACHE_HOME to a folder that "
                "can be written and has space."
            ) from error
    return folder


def train_demo(
    folder: Path, *, on_step: Callable[[int, int], None] | None = None, recipe: Recipe | None = None
) -> Path:
    """Train a small GPT-NeoX model on the CPU and save it along the way; the same weights from the same recipe.

    Args:
        folder: Where `checkpoint-N` go, each with config, weights, tokenizer and the state of the training.
        on_step: Told step and number of steps after each step.
        recipe: What is trained.

    Returns:
        `folder`.
    """
    with _quiet_and_restored():
        _train(folder, recipe or Recipe(), on_step)
    return folder


def _train(folder: Path, recipe: Recipe, on_step: Callable[[int, int], None] | None) -> None:
    import torch
    from transformers import (
        GPTNeoXForCausalLM,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
    )

    class SaveAndTell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_save = state.global_step in recipe.saved
            if on_step is not None:
                on_step(state.global_step, recipe.steps)

    tokenizer = _tokenizer(recipe)
    torch.manual_seed(recipe.seed)
    model = GPTNeoXForCausalLM(_config(recipe))
    _initialise(model, recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    # The Trainer's own schedules start at 0, which would make checkpoint-1 a copy of checkpoint-0.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmed_cosine(step, recipe))
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        seed=recipe.seed,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        save_only_model=True,
        logging_steps=max(1, recipe.steps // 32),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_sequences(tokenizer, recipe),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[SaveAndTell()],
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    if 0 in recipe.saved:  # the Trainer itself saves only behind a step
        untrained = folder / "checkpoint-0"
        trainer.save_model(str(untrained))
        trainer.state.save_to_json(str(untrained / "trainer_state.json"))
    trainer.train()


def _warmed_cosine(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: up in a straight line, then down to a tenth along a cosine."""
    falling = 0.1 + 0.45 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup) * falling


def _config(recipe: Recipe) -> Any:
    """The shape of Pythia: parallel residual, rotary embeddings on a quarter of each head, embeddings not tied."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
        max_position_embeddings=recipe.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def _initialise(model: Any, recipe: Recipe) -> None:
    """Pythia's own start (small init, Wang init for what writes to the residual stream) but for the embeddings."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = (2 / (5 * recipe.width)) ** 0.5
        if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
            std = 2 / recipe.layers / recipe.width**0.5
        elif "embed_in" in name:
            std = recipe.embedding_std
        torch.nn.init.normal_(parameter, std=std)


def _tokenizer(recipe: Recipe) -> "PreTrainedTokenizerFast":
    """Byte-level BPE of the whole text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(pydoc_topics(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=recipe.positions,
    )


def _sequences(tokenizer: "PreTrainedTokenizerFast", recipe: Recipe) -> list[dict[str, list[int]]]:
    """The training text in sequences of one length."""
    ids: list[int] = []
    for topic in pydoc_topics():
        ids += [*encode(tokenizer, topic), tokenizer.eos_token_id]
    length = recipe.sequence_length
    starts = range(recipe.held_out_tokens, len(ids) - length + 1, length)
    return [{"input_ids": ids[start : start + length], "labels": ids[start : start + length]} for start in starts]


def _is_whole(folder: Path, recipe: Recipe) -> bool:
    """Whether every checkpoint is there: what clears old files out of caches takes single ones."""
    return all((folder / f"checkpoint-{step}" / "model.safetensors").is_file() for step in recipe.saved)


def _clear(cache: Path) -> None:
    """Delete what killed trainings left behind, once it is a day old and no training can still be at it."""
    for left in cache.glob(".demo-*"):
        if time.time() - left.stat().st_mtime > ONE_DAY_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _key(recipe: Recipe) -> str:
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    text = hashlib.sha256("\0".join(pydoc_topics()).encode()).hexdigest()
    described = json.dumps([asdict(recipe), libraries, text], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


@contextmanager
def _quiet_and_restored() -> Iterator[None]:
    """No bars of transformers, and the caller's random states as they were: a Trainer seeds all of them."""
    import torch
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what the Trainer seeds
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        if bars:
            logging.enable_progress_bar()
